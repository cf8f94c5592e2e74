"""What is measured in the rows of runs, and its spread over seeds.

Conventions: a run is the dict {"header": ..., "rows": [...], "measured": [...]} that `files.read` returns; accuracies
come out in %, times in milliseconds for a step and in seconds for a run.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

VERDICTS = {
    "holds": "The claim holds here",
    "partly": "The claim holds here in part",
    "fails": "This does not show the claim",
    "unknown": "A single seed has no spread, so this neither shows nor refutes the claim",
}


class Spread(NamedTuple):
    """A measure over seeds: the mean, the standard deviation (with n - 1; NaN for a single seed), and their number."""

    mean: float
    std: float
    n: int

    def text(self, decimals: int = 1) -> str:
        """Returns "mean ± std", or "mean (1 seed)" where there is no spread."""
        mean = f"{self.mean:.{decimals}f}"
        return f"{mean} (1 seed)" if self.n == 1 else f"{mean} ± {self.std:.{decimals}f}"


def spread(values: Iterable[float]) -> Spread:
    """Returns the mean and the standard deviation of a measure over seeds."""
    values = np.asarray(list(values), float)
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan, len(values))


def exceeds(difference: Spread, least: float = 0.0) -> bool:
    """Says whether a difference is above `least` by more than twice its standard deviation over seeds.

    It is never so for a single seed, whose deviation is NaN.
    """
    return difference.mean - least > 2 * difference.std


def below(difference: Spread, most: float) -> bool:
    """Says whether a difference is below `most` by more than twice its standard deviation over seeds."""
    return exceeds(Spread(-difference.mean, difference.std, difference.n), -most)


def within(difference: Spread, margin: float) -> bool:
    """Says whether a difference is between -margin and margin, by more than twice its standard deviation over seeds.

    That is how a claim that something makes no difference is judged: a large spread does not speak for it.
    """
    return below(difference, margin) and exceeds(difference, -margin)


def judge(*claims: bool, seeds: int) -> dict[str, str]:
    """Returns what became of the claims of a study, over so many seeds: fields of its summary.

    Returns:
      `verdict`, one of `VERDICTS`, and `claims`, which says in words which of them hold, by their numbers.
    """
    if seeds < 2:
        return {"verdict": "unknown", "claims": ""}
    word = "holds" if all(claims) else "partly" if any(claims) else "fails"
    kept, lost = ([i for i, claim in enumerate(claims, start=1) if claim == held] for held in (True, False))
    if word != "partly":
        return {"verdict": word, "claims": ""}
    held = f"{enumerate_in_words(kept)} hold{'s' * (len(kept) == 1)}"
    return {
        "verdict": word,
        "claims": f"{held}, {enumerate_in_words(lost)} {'is' if len(lost) == 1 else 'are'} not shown",
    }


def enumerate_in_words(numbers: list[int]) -> str:
    """Returns numbers as a reader lists them: "(1), (2) and (4)"."""
    *first, last = (f"({number})" for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last


def compared(difference: Spread, more: str, less: str, *, unit: str = "points", decimals: int = 1) -> str:
    """Returns a difference in words that fit its sign: "2.1 ± 0.3 points more", or "... less"."""
    if not math.isfinite(difference.mean):
        return "(not measured)"
    size = Spread(abs(difference.mean), difference.std, difference.n)
    return f"{size.text(decimals)} {unit} {more if difference.mean >= 0 else less}"


def pairs(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """Returns the runs of two arms in pairs of the same seed.

    Raises:
      ValueError: the arms do not have the same seeds.
    """
    by_seed = [{run["header"]["config"]["seed"]: run for run in runs} for runs in (first, second)]
    seeds = [sorted(runs) for runs in by_seed]
    if seeds[0] != seeds[1]:
        raise ValueError(f"seeds={seeds[0]} beside {seeds[1]}; pairs need the same seeds; train the missing runs.")
    return [tuple(runs[seed] for runs in by_seed) for seed in seeds[0]]


def paired_differences(measure: Callable[[dict], float], first: list[dict], second: list[dict]) -> np.ndarray:
    """Returns a measure of the first arm's runs less that of the second's, seed by seed, shape [seeds].

    Args:
      measure: of one run, such as `final_accuracy`.
      first: the runs of one arm.
      second: those of another.

    Raises:
      ValueError: the arms do not have the same seeds.
    """
    return np.array([measure(run) - measure(other) for run, other in pairs(first, second)])


def gains(results: dict[str, list[dict]], label: str, other: str) -> np.ndarray:
    """Returns the points of final test accuracy by which one arm is above another, seed by seed, shape [seeds].

    Raises:
      ValueError: the arms do not have the same seeds.
    """
    return paired_differences(final_accuracy, results[label], results[other])


def column(runs: list[dict], name: str) -> np.ndarray:
    """Returns one field of the rows of several runs, shape [runs, rows].

    A run that diverged ended early. It stays where it was, since its weights are not finite any more.
    """
    longest = max(len(run["rows"]) for run in runs)
    padded = [run["rows"] + run["rows"][-1:] * (longest - len(run["rows"])) for run in runs]
    return np.array([[row[name] for row in rows] for rows in padded])


def elapsed(runs: list[dict]) -> np.ndarray:
    """Returns the seconds of training since the start at each row, shape [runs, rows]; after divergence none pass."""
    seconds = column(runs, "seconds")
    ended = np.arange(seconds.shape[1]) >= np.array([[len(run["rows"])] for run in runs])
    return np.where(ended, 0, seconds).cumsum(axis=1)


def final_accuracy(run: dict) -> float:
    """Returns the test accuracy at the end, in %."""
    return 100 * run["rows"][-1]["test_accuracy"]


def best_accuracy(run: dict) -> float:
    """Returns the highest test accuracy of all rows, in %."""
    return 100 * max(row["test_accuracy"] for row in run["rows"])


def training_seconds(run: dict, last: int | None = None) -> float:
    """Returns the seconds of training, without compiling and evaluating, up to the row of index `last` or the end."""
    return sum(row["seconds"] for row in run["rows"][: None if last is None else last + 1])


def step_milliseconds(run: dict) -> float:
    """Returns the time of a training step, in ms: the median over the rows, which a short disturbance leaves alone."""
    steps = np.diff([0, *(row["step"] for row in run["rows"])])
    return float(np.median([1000 * row["seconds"] / n for row, n in zip(run["rows"], steps, strict=True)]))


def first_above(run: dict, accuracy: float) -> int | None:
    """Returns the index of the first row whose test accuracy is at least `accuracy` (in %), or None."""
    return next((i for i, row in enumerate(run["rows"]) if 100 * row["test_accuracy"] >= accuracy), None)


def diverged(run: dict) -> bool:
    """Says whether a loss was not finite in the end."""
    return bool(run["rows"][-1]["diverged"])


def measured(run: dict, name: str, **which: object) -> float:
    """Returns a number of the one entry in `measured` that has all the values of `which`.

    Raises:
      ValueError: none or several have.
    """
    found = entries(run, **which)
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries have {which}; one is expected; name the values that tell them apart.")
    return found[0][name]


def entries(run: dict, **which: object) -> list[dict]:
    """Returns the entries in `measured` that have all the values of `which`."""
    return [entry for entry in run["measured"] if all(entry.get(key) == value for key, value in which.items())]


def measured_accuracy(run: dict, **which: object) -> float:
    """Returns a measured accuracy in %; NaN where there is none, since the run diverged or its images were too few."""
    return 100 * measured(run, "accuracy", **which) if entries(run, **which) else math.nan


def generalization_gap(run: dict) -> float:
    """Returns the points by which the accuracy on all training images exceeds that on all test images."""
    return measured_accuracy(run, images="training") - measured_accuracy(run, images="test")


def quoted(found: Spread, decimals: int = 1) -> str:
    """Returns a measure as text that may stand in a sentence, even where a run does not have it."""
    return found.text(decimals) if math.isfinite(found.mean) else "(not measured)"
