"""Timing: arms take turns, a sample lasts long enough, and ratios within rounds do not see the machine's drift."""

import itertools
import math

import pytest

from experiments import timing


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


def test_spread_is_the_median_and_the_quartiles():
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "lower": 2.0, "upper": 4.0}


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one():
    assert timing.geometric_mean([4.0, 0.25]) == pytest.approx(1)


def test_share_is_what_one_arm_adds_over_what_the_other_adds():
    found = timing.share([12.0] * 3, [14.0] * 3, [10.0] * 3)
    assert found == {"value": 0.5, "lower": 0.5, "upper": 0.5}


def test_interval_of_the_share_is_wider_where_rounds_differ():
    rounds = [0.0, 1.0, -1.0, 0.5, -0.5]
    found = timing.share([12 + r for r in rounds], [14 - r for r in rounds], [10.0] * 5)
    assert found["lower"] < found["value"] == 0.5 < found["upper"]


def test_share_of_nothing_is_not_a_number():
    assert all(math.isnan(value) for value in timing.share([12.0], [9.0], [10.0]).values())
