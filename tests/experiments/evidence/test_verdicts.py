"""Measures of runs, against hand-made rows."""

import math

import numpy as np
import pytest

from experiments.config import Config
from experiments.evidence import verdicts


@pytest.fixture
def run(make_run):
    return make_run(Config(), accuracies=(0.2, 0.6, 0.5))


def test_spread_is_mean_and_sample_standard_deviation():
    assert verdicts.spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)


def test_single_seed_has_no_spread():
    single = verdicts.spread([2.0])
    assert math.isnan(single.std) and single.text() == "2.0 (1 seed)"


def test_spread_is_quoted_as_mean_and_deviation():
    assert verdicts.spread([1.0, 2.0, 3.0]).text(2) == "2.00 ± 1.00"


def test_diverged_run_stays_where_it_was(make_run):
    short = make_run(Config(), accuracies=(0.1,), diverged=True)
    column = verdicts.column([short, make_run(Config(), accuracies=(0.3, 0.4, 0.5))], "test_accuracy")
    np.testing.assert_array_equal(column, [[0.1, 0.1, 0.1], [0.3, 0.4, 0.5]])


def test_time_stands_still_after_divergence(make_run):
    short = make_run(Config(), accuracies=(0.1,), diverged=True)
    seconds = verdicts.elapsed([short, make_run(Config(), accuracies=(0.3, 0.4, 0.5))])
    np.testing.assert_array_equal(seconds, [[2, 2, 2], [2, 4, 6]])


def test_pairs_have_the_same_seed(make_run):
    first, second = ([make_run(Config(seed=seed)) for seed in seeds] for seeds in ((0, 1), (1, 0)))
    assert verdicts.paired_runs(first, second) == [(first[0], second[1]), (first[1], second[0])]


def test_final_and_best_accuracy_are_percentages(run):
    assert (verdicts.final_accuracy(run), verdicts.best_accuracy(run)) == (50.0, 60.0)


def test_time_of_a_step_withstands_one_slow_row(run):
    run["rows"][1]["seconds"] = 1000.0
    assert verdicts.step_milliseconds(run) == 200.0


def test_training_seconds_add_up(run):
    assert verdicts.training_seconds(run) == 6.0 and verdicts.training_seconds(run, 1) == 4.0


def test_first_row_above_an_accuracy(run):
    assert [verdicts.first_above(run, accuracy) for accuracy in (10, 20, 55, 61)] == [0, 0, 1, None]


@pytest.mark.parametrize(
    ("values", "least", "exceeds"),
    [
        ((2.0, 3.0, 4.0), 0.0, True),
        ((1.0, 3.0, 5.0), 0.0, False),
        ((12.0, 13.0, 14.0), 11.0, False),
        ((9.0,), 0, False),
    ],
)
def test_difference_counts_from_two_standard_deviations(values, least, exceeds):
    assert verdicts.exceeds(verdicts.spread(values), least) == exceeds


@pytest.mark.parametrize(
    ("claims", "seeds", "judged"),
    [
        ((True, True), 3, {"verdict": "holds", "claims": ""}),
        ((True, False, True), 3, {"verdict": "partly", "claims": "(1) and (3) hold, (2) is not shown"}),
        ((False, True, False, False), 3, {"verdict": "partly", "claims": "(2) holds, (1), (3) and (4) are not shown"}),
        ((False,), 2, {"verdict": "fails", "claims": ""}),
        ((True, True), 1, {"verdict": "unknown", "claims": ""}),
    ],
)
def test_claims_are_judged_by_their_numbers(claims, seeds, judged):
    assert verdicts.judge(*claims, seeds=seeds) == judged


@pytest.mark.parametrize(
    ("values", "within"),
    [((0.1, 0.0, -0.1), True), ((2.0, 2.1, 2.2), False), ((-1.0, 0.0, 1.0), False), ((0.0,), False)],
)
def test_no_difference_is_one_whose_whole_range_is_within_the_margin(values, within):
    assert verdicts.within(verdicts.spread(values), 1.0) == within


def test_difference_is_told_in_words_that_fit_its_sign():
    assert verdicts.compared(verdicts.spread([1.0, 2.0, 3.0]), "more", "less") == "2.0 ± 1.0 points more"
    assert verdicts.compared(verdicts.spread([-3.0]), "more", "less", unit="%") == "3.0 (1 seed) % less"
    assert verdicts.compared(verdicts.spread([1.0, math.nan]), "more", "less") == "(not measured)"


def test_measured_accuracy_is_that_of_the_one_entry_that_fits(run):
    found = run | {"measured": [{"images": 10, "accuracy": 0.25}, {"images": 100, "accuracy": 0.5}]}
    assert verdicts.measured_accuracy(found, images=100) == 50.0


def test_missing_measurement_is_refused_and_named(run):
    expected = r"run must have a measurement of 'accuracy' with images=100, .* seed 0 has none; delete its result"
    with pytest.raises(ValueError, match=expected):
        verdicts.measured_accuracy(run, images=100)


def test_accuracy_of_a_diverged_run_is_no_number_unless_it_was_measured(make_run):
    run = make_run(Config(), diverged=True) | {"measured": [{"images": 10, "accuracy": 0.25}]}
    assert math.isnan(verdicts.measured_accuracy(run, images=100))
    assert verdicts.measured_accuracy(run, images=10) == 25.0


def test_too_few_images_are_told_from_missing_measurements(run):
    measured = run | {"measured": [{"images": n, "statistics": "batch"} for n in (10, 100)]}
    assert verdicts.has_too_few_images(measured, 1000, statistics="batch")
    assert not verdicts.has_too_few_images(measured, 50, statistics="batch")
    assert not verdicts.has_too_few_images(measured, 1000, statistics="precise")


def test_ambiguous_measurements_are_refused(run):
    found = run | {"measured": [{"images": 10, "accuracy": 0.25}, {"images": 100, "accuracy": 0.5}]}
    with pytest.raises(ValueError, match="run must have one measurement with any fields, got 2"):
        verdicts.measured_accuracy(found)


def test_measure_that_a_run_lacks_is_quoted_in_words():
    assert verdicts.quoted(verdicts.spread([1.0, math.nan])) == "(not measured)"
    assert verdicts.quoted(verdicts.spread([1.0, 3.0])) == "2.0 ± 1.4"


def test_differences_are_taken_between_runs_of_the_same_seed(make_run):
    first = [make_run(Config(seed=seed), accuracies=[0.5 + seed / 10]) for seed in (1, 0)]
    other = [make_run(Config(seed=seed), accuracies=[0.4]) for seed in (0, 1)]
    np.testing.assert_allclose(verdicts.paired_differences(verdicts.final_accuracy, first, other), [10, 20])
    np.testing.assert_allclose(verdicts.gains({"first": first, "other": other}, "first", "other"), [10, 20])
    with pytest.raises(ValueError, match="both arms must have the same seeds"):
        verdicts.paired_differences(verdicts.final_accuracy, first, other[:1])
