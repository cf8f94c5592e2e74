"""Timing of several arms in turns, so that disturbances of the machine affect all of them alike.

Conventions: a sample is a function that returns the seconds of one call. In a round, every arm gives one sample, in
shuffled order. The result to report is a ratio of two arms: the median of the ratios within the rounds, which does not
change if the machine becomes slower from one round to the next. This module does not import JAX at the top, since
processes that compare with other libraries use it without JAX.
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
    """Takes one sample of every arm in each round; returns the seconds of every arm, by rounds."""
    seconds = {name: [] for name in samples}
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(samples), len(samples)):
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
    """Makes a sample of a call, which runs it once to warm up and then times it.

    Args:
      call: the call to time.
      wait: blocks until a result is there; returns at once if calls are synchronous.
      at_least: repeat the call until this many seconds have passed, so that the time to read the clock is negligible.
      together: number of calls between two waits. Use 1 on a CPU, where several calls would run side by side, and
        enough to keep an accelerator busy.
      clock: returns the time in seconds.
    """

    def sample() -> float:
        # Other arms have run since the last sample: the call before the clock starts fills the caches again.
        wait(call())
        calls, start = 0, clock()
        while True:
            for _ in range(together):
                result = call()
            wait(result)
            calls += together
            elapsed = clock() - start
            if elapsed >= at_least:
                return elapsed / calls

    return sample


def time_calls(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Times calls of JAX functions in rounds; returns the seconds per call of every arm."""
    import jax

    samples = {name: sampler(call, wait=jax.block_until_ready) for name, call in calls.items()}
    return in_rounds(samples, rounds)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Computes the median and the quartiles."""
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75))
    return {"median": float(median), "lower": float(lower), "upper": float(upper)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Computes the median and the quartiles of the ratios within the rounds."""
    return quartiles(np.asarray(ours) / np.asarray(theirs))


def geometric_mean(ratios: Sequence[float]) -> float:
    """Computes the geometric mean, which treats a ratio and its inverse alike."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def estimate(figure: Callable[..., ArrayLike], *ratios: ArrayLike, resamples: int = 2000) -> dict[str, float]:
    """Estimates a figure of several arms, with a 95 % confidence interval from a bootstrap.

    Args:
      figure: a function of one ratio per arm, scalars or arrays of one shape; NaN where it is not defined.
      ratios: for each arm, its ratios to a common baseline within the rounds, shape [processes, rounds].
      resamples: number of bootstrap samples.

    Returns:
      `value`, the figure of the medians over processes and rounds, and the ends of the interval, `lower` and `upper`.
      These are NaN if the figure is undefined in more than 2.5 % of the resamples.
    """
    samples = np.array(ratios)  # [arms, processes, rounds]
    processes, rounds = samples.shape[1:]
    rng = np.random.default_rng(0)
    # In two stages, since rounds of the same process are not independent: first processes are drawn with replacement,
    # then rounds within each of them. All arms are drawn together, so that what they have in common cancels.
    process = rng.integers(0, processes, (resamples, processes, 1))
    round_ = rng.integers(0, rounds, (resamples, processes, rounds))
    drawn = samples[:, process, round_]
    value = figure(*np.median(samples, axis=(-2, -1)))
    figures = np.asarray(figure(*np.median(drawn, axis=(-2, -1))))
    known = figures[~np.isnan(figures)]
    lower, upper = np.nan, np.nan
    if len(known) >= 0.975 * resamples:
        lower, upper = np.quantile(known, (0.025, 0.975))
    return {"value": float(value), "lower": float(lower), "upper": float(upper)}
