"""Timing: arms take turns, a sample lasts long enough, and ratios within rounds do not see the machine's drift."""

import itertools
import math

import numpy as np
import pytest

from experiments.evidence import timing


class Clock:
    """A clock that stands still but for what calls take."""

    def __init__(self):
        self.now = 0.0

    def call(self, seconds):
        def call():
            self.now += seconds

        return call

    def __call__(self):
        return self.now


def test_every_arm_gives_one_sample_in_a_round():
    taken = []
    samples = {name: lambda name=name: taken.append(name) or 1.0 for name in "abc"}
    seconds = timing.in_rounds(samples, 4)
    assert seconds == {name: [1.0] * 4 for name in "abc"}
    rounds = [tuple(taken[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(each) == list("abc") for each in rounds) and len(set(rounds)) > 1


def test_order_is_the_same_in_every_run():
    def order():
        taken = []
        timing.in_rounds({name: lambda name=name: taken.append(name) or 1.0 for name in "abc"}, 5)
        return taken

    assert order() == order()


def test_call_runs_once_before_it_is_timed():
    clock, cost = Clock(), iter([100.0, 1.0])
    calls = []

    def call():
        calls.append(None)
        clock.now += next(cost)

    assert timing.sampler(call, wait=lambda _: None, clock=clock)() == 1.0 and len(calls) == 2


@pytest.mark.parametrize(("seconds", "at_least", "calls"), [(0.25, 2.0, 8), (0.75, 2.0, 3), (5.0, 2.0, 1)])
def test_sample_repeats_the_call_for_at_least_so_long(seconds, at_least, calls):
    clock = Clock()
    sample = timing.sampler(clock.call(seconds), wait=lambda _: None, at_least=at_least, clock=clock)
    assert sample() == seconds
    assert clock.now == seconds * (1 + calls)


def test_sample_waits_for_the_last_of_the_calls_that_run_together():
    clock, numbers, waited = Clock(), itertools.count(), []

    def call():
        clock.now += 1
        return next(numbers)

    assert timing.sampler(call, wait=waited.append, at_least=6, together=3, clock=clock)() == 1.0
    assert waited == [0, 3, 6]


def test_drift_of_the_machine_cancels_in_the_ratio():
    drift = [1.0, 3.0, 0.5, 10.0]
    found = timing.ratio([2 * d for d in drift], [4 * d for d in drift])
    assert found == {"median": 0.5, "lower": 0.5, "upper": 0.5}


def test_quartiles_come_with_the_median():
    assert timing.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "lower": 2.0, "upper": 4.0}


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one():
    assert timing.geometric_mean([4.0, 0.25]) == pytest.approx(1)


def test_estimate_is_a_figure_of_the_medians_over_processes_and_rounds():
    ours, theirs = [[1, 2, 3], [4, 5, 60]], [[2, 2, 2], [2, 2, 200]]
    assert timing.estimate(np.divide, ours, theirs)["value"] == 3.5 / 2
    assert timing.estimate(np.divide, [[3.0] * 3] * 2, [[2.0] * 3] * 2) == {"value": 1.5, "lower": 1.5, "upper": 1.5}


@pytest.mark.parametrize(
    ("ratios", "lower", "upper"),
    [
        ([[1, 1, 1], [3, 3, 3]], 1, 3),  # processes differ
        ([[1, 2, 3], [1, 2, 3]], 1, 3),  # rounds do
        ([[2, 2, 2], [2, 2, 2]], 2, 2),
    ],
)
def test_interval_of_an_estimate_is_as_wide_as_processes_and_rounds_differ(ratios, lower, upper):
    found = timing.estimate(lambda ratio: ratio, ratios)
    assert found == {"value": 2, "lower": pytest.approx(lower, abs=0.51), "upper": pytest.approx(upper, abs=0.51)}
    assert (found["upper"] - found["lower"] > 0.9) == (lower < upper)


def test_arms_are_resampled_together():
    slow_and_fast = np.array([[1.0, 9.0, 2.0], [5.0, 4.0, 7.0]])
    found = timing.estimate(np.divide, 2 * slow_and_fast, slow_and_fast)
    assert found == {"value": 2, "lower": 2, "upper": 2}


def above_one(ratio):
    return np.where(ratio > 1, ratio, np.nan)


def test_interval_is_open_where_many_resamples_have_no_figure():
    found = timing.estimate(above_one, [[0.5], [2.5], [2.0]])
    assert found["value"] == 2 and math.isnan(found["lower"]) and math.isnan(found["upper"])


def test_few_resamples_without_a_figure_leave_the_interval():
    found = timing.estimate(above_one, [[0.5] + 19 * [2.0]])
    assert found == {"value": 2, "lower": 2, "upper": 2}
    assert not math.isnan(timing.estimate(above_one, [[0.5] * 4 + [2.0, 3.0] * 8])["lower"])
