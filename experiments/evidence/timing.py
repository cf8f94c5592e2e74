"""Timing of several arms in one run, in turns, so that whatever else the machine does hits all of them alike.

Conventions: a sample is a function that returns the seconds of one call. In a round every arm gives one sample, in
shuffled order. What is quoted is a ratio of two arms, and the median of those within the rounds: a machine that slows
down between two rounds leaves it as it is. This module does not import JAX, so that a process without it can use it.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def in_rounds(samples: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every arm, one for each round."""
    seconds = {name: [] for name in samples}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(samples), len(samples)):
            seconds[name].append(samples[name]())
    return seconds


def sampler(
    call: Callable[[], Any],
    *,
    wait: Callable[[Any], Any],
    at_least: float = 0.0,
    together: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Callable[[], float]:
    """Returns a sample of a call: it runs once just before it is timed, then as often as it takes.

    Args:
      call: what is timed.
      wait: for the result of a call; it comes back at once where calls are synchronous.
      at_least: seconds that the timed calls last together. A clock is read for each, which is nothing beside them.
      together: calls between two waits. On a CPU 1, since several would run side by side; on an accelerator as many as
        keep it busy.
      clock: gives the time in seconds.
    """

    def sample():
        wait(call())
        calls, start = 0, clock()
        while True:
            for _ in range(together):
                result = call()
            wait(result)
            calls, elapsed = calls + together, clock() - start
            if elapsed >= at_least:
                return elapsed / calls

    return sample


def time_calls(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds per call of JAX for every arm, `rounds` of them, taken in shuffled order."""
    import jax

    return in_rounds({name: sampler(call, wait=jax.block_until_ready) for name, call in calls.items()}, rounds)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Returns the median and the quartiles."""
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "lower": float(lower), "upper": float(upper)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Returns the median, and the quartiles, of the ratios within the rounds."""
    return quartiles(np.asarray(ours) / np.asarray(theirs))


def geometric_mean(ratios: Sequence[float]) -> float:
    """Returns the geometric mean, which treats a ratio and its inverse alike."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def estimate(figure: Callable[..., ArrayLike], *ratios: ArrayLike, resamples: int = 2000) -> dict[str, float]:
    """Returns a figure of some arms, and how sure it is.

    Args:
      figure: takes the ratio of each arm, scalars or arrays of one shape: the median over processes and rounds.
      ratios: of each arm to another one within the rounds, shape [processes, rounds].
      resamples: of the processes, and of the rounds in each, drawn with replacement for the interval.

    Returns:
      The value, and the lower and upper end of an interval of 95 %, which are NaN where more than 2.5 % of the
      resamples have no figure.
    """
    samples = np.array(ratios)
    processes, rounds = samples.shape[1:]
    rng = np.random.default_rng(0)
    process = rng.integers(0, processes, (resamples, processes, 1))
    drawn = samples[:, process, rng.integers(0, rounds, (resamples, processes, rounds))]
    value = figure(*np.median(samples, axis=(-2, -1)))
    figures = np.asarray(figure(*np.median(drawn, axis=(-2, -1))))
    known = figures[~np.isnan(figures)]
    lower, upper = np.quantile(known, (0.025, 0.975)) if len(known) >= 0.975 * resamples else (np.nan, np.nan)
    return {"value": float(value), "lower": float(lower), "upper": float(upper)}
