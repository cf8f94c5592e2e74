"""The conclusions of the study internal_shift, on made-up runs; and its rows, on a run that is interrupted."""

import math

import numpy as np
import pytest

from experiments.config import Config
from experiments.probes import shifts
from experiments.studies import internal_shift
from experiments.studies.internal_shift import MEASURES, SETUP, over_rows, plot, runs, summary, table
from experiments.training import loop, programs

SMALL, LARGE = 0.1, 0.5


@pytest.fixture
def made_up(make_run):
    """Returns a function of the arms' measures that gives results."""

    def make(seeds=2, diverged=(), **changed):
        measures = {arm: dict.fromkeys(MEASURES, LARGE) for arm in ("batch", "none", "noisy")}
        measures["batch"] = dict.fromkeys(MEASURES, SMALL) | {"gradient_cosine": 0.9}
        for arm, values in changed.items():
            measures[arm] = measures[arm] | values
        return {
            arm: [run_of(arm, values, seed, arm in diverged) for seed in range(seeds)]
            for arm, values in measures.items()
        }

    def run_of(arm, values, seed, diverged):
        run = make_run(runs("small")[arm].replace(seed=seed), (0.1, 0.4), diverged)
        for row in run["rows"]:
            row |= (
                dict.fromkeys(values, math.nan) if row["diverged"] else {n: v + 0.01 * seed for n, v in values.items()}
            )
        return run

    return make


def test_smaller_shifts_of_both_kinds_show_the_claim(made_up):
    assert summary(made_up())["verdict"] == "holds"


@pytest.mark.parametrize(
    ("name", "lost"), [("mean_shift", 1), ("var_shift", 1), ("gradient_shift", 2), ("gradient_cosine", 2)]
)
def test_shift_that_is_no_smaller_leaves_the_claim_in_part(made_up, name, lost):
    fields = summary(made_up(batch={name: LARGE}))
    assert fields["verdict"] == "partly" and fields["claims"] == f"({3 - lost}) holds, ({lost}) is not shown"


def test_no_smaller_shift_of_either_kind_does_not_show_the_claim(made_up):
    assert summary(made_up(batch={"var_shift": LARGE, "gradient_shift": LARGE}))["verdict"] == "fails"


def test_smoothness_and_noise_do_not_enter_the_verdict(made_up):
    smooth = {"loss_range": LARGE, "beta": LARGE, "gradient_change": LARGE}
    assert summary(made_up(batch=smooth, noisy=dict.fromkeys(MEASURES, 9.0)))["verdict"] == "holds"


def test_shifts_are_quoted_with_their_spread(made_up):
    fields = summary(made_up())
    assert (fields["batch_mean"], fields["none_var"]) == ("0.105 ± 0.007", "0.505 ± 0.007")
    assert (fields["batch_cosine"], fields["noisy_cosine"]) == ("0.905 ± 0.007", "0.505 ± 0.007")


def test_smoothness_is_quoted_as_a_ratio_of_runs_of_the_same_seed(made_up):
    assert summary(made_up(none={"beta": SMALL}))["beta_ratio"] == "1.000 ± 0.000"


def test_single_seed_gives_no_verdict_and_no_spread(made_up):
    fields = summary(made_up(seeds=1))
    assert fields["verdict"] == "unknown"
    assert not any("±" in text or "nan" in text for text in fields.values())


def test_measures_are_averaged_over_the_rows_before_divergence(made_up):
    (run, _) = made_up(diverged=["none"])["none"]
    assert math.isnan(run["rows"][-1]["mean_shift"]) and over_rows(run, "mean_shift") == LARGE


def test_rows_of_a_lower_rate_do_not_count(made_up):
    (run, _) = made_up()["batch"]
    run["rows"][-1] |= {"learning_rate": 0.1 * run["rows"][0]["learning_rate"], "mean_shift": 9.0}
    assert over_rows(run, "mean_shift") == SMALL
    run["rows"] = run["rows"][-1:]
    assert math.isnan(over_rows(run, "mean_shift"))


def test_initial_rate_is_that_of_several_rows():
    for preset, rows in (("small", 6), ("full", 9)):
        config = runs(preset)["batch"]
        rates = [loop.learning_rate(config, epoch) for epoch in range(config.epochs)]
        assert config.evaluations * rates.count(config.learning_rate) == rows


def test_step_of_the_layers_below_is_what_momentum_adds_up_to(tiny, blobs, monkeypatch):
    steps = []

    def fit(config, dataset, probe):
        probe(programs.State(np.int32(1), {}, {}, None, 0.0, 0), 0.02)
        return loop.Trained([], {}, 0.0)

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(loop, "initial_variables", lambda *_: {})
    monkeypatch.setattr(shifts, "input_moments", lambda *_: [])
    monkeypatch.setattr(shifts, "along_gradient", lambda *_: shifts.Smoothness(0.0, 0.0, 0.0))
    monkeypatch.setattr(shifts, "gradient_shift", lambda *a: steps.append(a[-1]) or shifts.GradientShift(0.0, 1.0))
    internal_shift.fit(tiny, blobs)
    assert steps == [pytest.approx(0.2)]


def test_arm_that_diverged_at_once_is_reported_too(made_up):
    results = made_up(diverged=["none"])
    for run in results["none"]:
        run["rows"] = run["rows"][-1:]
    fields = summary(results)
    assert fields["none_mean"] == fields["none_cosine"] == "(not measured)" and fields["verdict"] == "fails"
    assert "nan" not in str(fields) + str(table(results, "small"))
    assert len(plot(results).axes) == 6


def test_setup_of_small_names_all_that_differs_from_full():
    small, full = (vars(runs(preset)["none"]) for preset in ("small", "full"))
    for name in vars(Config()):
        assert (f"`{name}` {small[name]} instead of" in SETUP["small"]) == (small[name] != full[name])


@pytest.mark.slow
def test_interrupted_run_measures_the_same(tiny, blobs, tmp_path):
    config = tiny.replace(noise="shifting")
    whole = internal_shift.fit(config, blobs)

    def stop_at_the_last_row(progress):
        if progress.row and progress.step == progress.steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        internal_shift.fit(config, blobs, checkpoint_dir=tmp_path, on_progress=stop_at_the_last_row)
    continued = internal_shift.fit(config, blobs, checkpoint_dir=tmp_path)
    assert [[row[name] for name in MEASURES] for row in continued.rows] == [
        [row[name] for name in MEASURES] for row in whole.rows
    ]
    assert all("moments" not in row for row in continued.rows)
