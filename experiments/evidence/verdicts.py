"""Numbers of runs, their spread over seeds, and verdicts on the claims of a study.

Conventions: a run is the dict {"header": ..., "rows": [...], "measured": [...]} that `files.read` returns. Accuracies
are in %, the time of a step in milliseconds, and the time of a run in seconds.
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
    """A number over seeds.

    Attributes:
      mean: over the seeds.
      std: sample standard deviation, with n - 1; NaN for a single seed.
      n: number of seeds.
    """

    mean: float
    std: float
    n: int

    def text(self, decimals: int = 1) -> str:
        """Formats it as "mean ± std", or as "mean (1 seed)" if there is no spread."""
        mean = f"{self.mean:.{decimals}f}"
        return f"{mean} (1 seed)" if self.n == 1 else f"{mean} ± {self.std:.{decimals}f}"


# Verdicts: a difference is real if it exceeds two standard deviations over seeds.


def spread(values: Iterable[float]) -> Spread:
    """Computes the mean and the standard deviation over seeds."""
    values = np.asarray(list(values), float)
    n = len(values)
    return Spread(float(values.mean()), float(values.std(ddof=1)) if n > 1 else math.nan, n)


def exceeds(difference: Spread, least: float = 0.0) -> bool:
    """Says whether a difference is above `least` by more than two standard deviations over seeds.

    A single seed never is: its standard deviation is NaN, and comparisons with NaN are false.
    """
    return difference.mean - least > 2 * difference.std


def below(difference: Spread, most: float) -> bool:
    """Says whether a difference is below `most` by more than two standard deviations over seeds."""
    return exceeds(Spread(-difference.mean, difference.std, difference.n), -most)


def within(difference: Spread, margin: float) -> bool:
    """Says whether two arms are equal up to a margin: two standard deviations around the mean stay inside of it.

    A claim that there is no difference needs this. Merely failing to show a difference is not enough, since a large
    spread would then support the claim.
    """
    return below(difference, margin) and exceeds(difference, -margin)


def judge(*claims: bool, seeds: int) -> dict[str, str]:
    """Judges a study by its claims.

    Args:
      *claims: whether each of them holds, in the order of their numbers.
      seeds: number of seeds. A single one gets no verdict.

    Returns:
      Fields of a summary: `verdict`, a key of `VERDICTS`, and `claims`, which lists those that hold and those that do
      not, if there are both.
    """
    if seeds < 2:
        return {"verdict": "unknown", "claims": ""}
    if all(claims):
        return {"verdict": "holds", "claims": ""}
    if not any(claims):
        return {"verdict": "fails", "claims": ""}
    kept = [number for number, holds in enumerate(claims, start=1) if holds]
    lost = [number for number, holds in enumerate(claims, start=1) if not holds]
    kept_text = f"{enumerate_in_words(kept)} {'holds' if len(kept) == 1 else 'hold'}"
    lost_text = f"{enumerate_in_words(lost)} {'is' if len(lost) == 1 else 'are'} not shown"
    return {"verdict": "partly", "claims": f"{kept_text}, {lost_text}"}


def enumerate_in_words(numbers: list[int]) -> str:
    """Lists the numbers of claims as a sentence does: "(1), (2) and (4)"."""
    *first, last = (f"({number})" for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last


def compared(difference: Spread, more: str, less: str, *, unit: str = "points", decimals: int = 1) -> str:
    """Says a difference in words that fit its sign, such as "2.1 ± 0.3 points more"."""
    if not math.isfinite(difference.mean):
        return "(not measured)"
    size = difference._replace(mean=abs(difference.mean))
    return f"{size.text(decimals)} {unit} {more if difference.mean >= 0 else less}"


def quoted(value: Spread, decimals: int = 1) -> str:
    """Formats a number for a sentence, even if some run does not have it."""
    return value.text(decimals) if math.isfinite(value.mean) else "(not measured)"


# Differences between arms. Runs of the same seed share randomness such as the order of the images, so that a difference
# between them varies less than one between any two runs.


def paired_runs(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """Pairs the runs of two arms by their seeds.

    Raises:
      ValueError: the arms do not have the same seeds.
    """
    first_by_seed, second_by_seed = ({run["header"]["config"]["seed"]: run for run in runs} for runs in (first, second))
    seeds, second_seeds = sorted(first_by_seed), sorted(second_by_seed)
    if seeds != second_seeds:
        raise ValueError(f"both arms must have the same seeds, got {seeds} and {second_seeds}; train the missing runs.")
    return [(first_by_seed[seed], second_by_seed[seed]) for seed in seeds]


def paired_differences(number: Callable[[dict], float], first: list[dict], second: list[dict]) -> np.ndarray:
    """Subtracts a number of the second arm's runs from that of the first arm's, seed by seed; shape [seeds].

    Args:
      number: of one run, such as `final_accuracy`.
      first: runs of one arm.
      second: runs of another arm.

    Raises:
      ValueError: the arms do not have the same seeds.
    """
    return np.array([number(run) - number(baseline) for run, baseline in paired_runs(first, second)])


def gains(results: dict[str, list[dict]], label: str, baseline: str) -> np.ndarray:
    """Returns the points of final test accuracy that one arm gains over another, seed by seed; shape [seeds].

    Raises:
      ValueError: the arms do not have the same seeds.
    """
    return paired_differences(final_accuracy, results[label], results[baseline])


# Numbers of the rows of a run.


def column(runs: list[dict], name: str) -> np.ndarray:
    """Collects one field of the rows of several runs, shape [runs, rows].

    A run that diverged has fewer rows than the others. Its last row is repeated: it would not have recovered.
    """
    longest = max(len(run["rows"]) for run in runs)
    padded = [run["rows"] + run["rows"][-1:] * (longest - len(run["rows"])) for run in runs]
    return np.array([[row[name] for row in rows] for rows in padded])


def elapsed(runs: list[dict]) -> np.ndarray:
    """Returns the seconds of training up to each row, shape [runs, rows]; after divergence, time stands still."""
    seconds = column(runs, "seconds")
    lengths = np.array([[len(run["rows"])] for run in runs])
    is_padding = np.arange(seconds.shape[1]) >= lengths
    return np.where(is_padding, 0, seconds).cumsum(axis=1)


def final_accuracy(run: dict) -> float:
    """Returns the test accuracy of the last row, in %."""
    return 100 * run["rows"][-1]["test_accuracy"]


def best_accuracy(run: dict) -> float:
    """Returns the highest test accuracy of all rows, in %."""
    return 100 * max(row["test_accuracy"] for row in run["rows"])


def training_seconds(run: dict, last: int | None = None) -> float:
    """Returns the seconds of training, without compilation and evaluation, up to and including the row `last`."""
    rows = run["rows"] if last is None else run["rows"][: last + 1]
    return sum(row["seconds"] for row in rows)


def step_milliseconds(run: dict) -> float:
    """Returns the time of a training step, in ms: the median over the rows, which ignores a short disturbance."""
    steps = np.diff([0, *(row["step"] for row in run["rows"])])
    return float(np.median([1000 * row["seconds"] / n for row, n in zip(run["rows"], steps, strict=True)]))


def first_above(run: dict, accuracy: float) -> int | None:
    """Returns the index of the first row with a test accuracy of at least `accuracy` (in %), or None."""
    return next((i for i, row in enumerate(run["rows"]) if 100 * row["test_accuracy"] >= accuracy), None)


def diverged(run: dict) -> bool:
    """Says whether the run ended because a loss was not finite."""
    return bool(run["rows"][-1]["diverged"])


# Numbers of the further measurements of a run.


def entries(run: dict, **fields: object) -> list[dict]:
    """Returns the entries in `measured` whose fields have these values."""
    return [entry for entry in run["measured"] if all(entry.get(key) == value for key, value in fields.items())]


def measured(run: dict, name: str, **fields: object) -> float:
    """Returns a number from the only entry in `measured` whose fields have these values.

    Raises:
      ValueError: there is no such entry, or more than one.
    """
    matching = entries(run, **fields)
    wanted = ", ".join(f"{key}={value!r}" for key, value in fields.items()) or "any fields"
    if not matching:
        raise ValueError(
            f"run must have a measurement of {name!r} with {wanted}, but the run with seed "
            f"{run['header']['config']['seed']} has none; delete its result and run the study again."
        )
    if len(matching) > 1:
        raise ValueError(
            f"run must have one measurement with {wanted}, got {len(matching)}; add the fields that tell them apart."
        )
    return matching[0][name]


def measured_accuracy(run: dict, **fields: object) -> float:
    """Returns a measured accuracy in %; NaN if the run diverged and the study did not measure it.

    Raises:
      ValueError: as for `measured`.
    """
    if diverged(run) and not entries(run, **fields):
        return math.nan
    return 100 * measured(run, "accuracy", **fields)


def has_too_few_images(run: dict, images: int, **fields: object) -> bool:
    """Says whether a run has entries with these values, but all of them come from fewer than `images` images.

    Studies try several numbers of images, and leave out those that are larger than the data set.
    """
    numbers = [entry["images"] for entry in entries(run, **fields)]
    return bool(numbers) and max(numbers) < images


def generalization_gap(run: dict) -> float:
    """Returns the accuracy on all training images minus that on all test images, in points."""
    return measured_accuracy(run, images="training") - measured_accuracy(run, images="test")
