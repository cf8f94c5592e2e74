"""Which batch sizes work, and at what cost in time?

Command: python -m experiments run batch_sizes --preset small

Time: sized for 8 minutes on 2 CPU cores (small); measured: {time}

Published: On CIFAR-10 with the Inception net at the rate 0.01, with 5, 10, 50, 100 and 250 images in a batch: best
validation accuracy in 30 epochs ~92, ~92, ~91, ~90 and ~87 % with batch norm, ~85, ~87, ~84, ~79 and ~66 % without, in
~223, ~173, ~54, ~47 and ~43 minutes with, and ~124, ~78, ~43, ~38 and ~34 without, read off bar charts; summed up as a
longer step, and good work at medium sizes of 50 to 100 (Kiefer 2020).

Finding: Batch norm raises the best test accuracy at {better} of the {sizes} sizes, by {least} to {most} points. With
batch norm it is highest at {best_size} images, {best} %. A step takes longer with batch norm at {slower} of the {sizes}
sizes, {shortest} to {longest} times as long. {verdict}.

Refuted if: at one of the sizes the accuracy is not raised, or the step not made longer, by more than twice the standard
deviation of the difference over seeds, or the best size with batch norm is neither 50 nor 100; if one of the three is
not so, the claim holds in part.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments import plots
from experiments.config import PRESETS, Config
from experiments.measures import (
    Spread,
    best_accuracy,
    exceeds,
    pairs,
    spread,
    step_milliseconds,
    training_seconds,
    verdict,
)

ARMS = ("batch", "none")
SIZES = (5, 10, 50, 100, 250)
MEDIUM = (50, 100)
PUBLISHED_ACCURACY = {"batch": (92, 92, 91, 90, 87), "none": (85, 87, 84, 79, 66)}  # best, in %, read off a bar chart
PUBLISHED_MINUTES = {"batch": (223, 173, 54, 47, 43), "none": (124, 78, 43, 38, 34)}  # of training, as well
PUBLISHED_COLUMN = {"small": "published (full protocol)", "full": "published"}


def runs(preset: str) -> dict[str, Config]:
    """Returns every batch size with batch norm and without, all at the same rate, as published."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(epochs=5)
    return {_label(norm, size): config.replace(norm=norm, batch_size=size) for size in SIZES for norm in ARMS}


def _label(norm, size):
    return f"{norm}-{size}"


SETUP = {
    "small": "Not the published net and protocol, but "
    f"{runs('small')['batch-250'].differences(runs('full')['batch-250'])}. Trial runs with another seed set the number "
    "of epochs, by the time they took.",
    "full": "The published net and protocol.",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    gains = [gain(results, size) for size in SIZES]
    costs = [cost(results, size) for size in SIZES]
    best = {size: spread(map(best_accuracy, results[_label("batch", size)])) for size in SIZES}
    best_size = max(SIZES, key=lambda size: best[size].mean)
    better, slower = _count(gains, 0), _count(costs, 1)
    by_mean = {"key": lambda difference: difference.mean}
    return {
        "sizes": str(len(SIZES)),
        "better": str(better),
        "least": min(gains, **by_mean).text(),
        "most": max(gains, **by_mean).text(),
        "best_size": str(best_size),
        "best": best[best_size].text(),
        "slower": str(slower),
        "shortest": min(costs, **by_mean).text(2),
        "longest": max(costs, **by_mean).text(2),
        "verdict": verdict(
            better == len(SIZES), best_size in MEDIUM, slower == len(SIZES), seeds=len(results[_label("batch", 5)])
        ),
    }


def _count(differences, least):
    """How many are above `least`: clearly so, or at all where there is a single seed, which gets no verdict."""
    return sum(exceeds(each, least) if each.n > 1 else each.mean > least for each in differences)


def gain(results: dict[str, list[dict]], size: int) -> Spread:
    """Returns the points by which batch norm raises the best test accuracy at a batch size."""
    return spread(best_accuracy(batch) - best_accuracy(none) for batch, none in _pairs(results, size))


def cost(results: dict[str, list[dict]], size: int) -> Spread:
    """Returns how many times as long a step takes with batch norm."""
    return spread(step_milliseconds(batch) / step_milliseconds(none) for batch, none in _pairs(results, size))


def _pairs(results, size):
    return pairs(*(results[_label(norm, size)] for norm in ARMS))


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per batch size: accuracies and times of both arms, the published ones beside them."""
    lines = []
    for i, size in enumerate(SIZES):
        groups = {plots.NAMES[norm]: results[_label(norm, size)] for norm in ARMS}
        line = {"batch size": str(size)}
        line |= {f"best, {name}, %": spread(map(best_accuracy, group)).text() for name, group in groups.items()}
        line["difference, points"] = gain(results, size).text()
        line[f"{PUBLISHED_COLUMN[preset]}, with / without, %"] = _both(PUBLISHED_ACCURACY, i)
        line |= {f"step, {name}, ms": spread(map(step_milliseconds, group)).text() for name, group in groups.items()}
        line["times as long"] = cost(results, size).text(2)
        line |= {f"training, {name}, s": spread(map(training_seconds, group)).text() for name, group in groups.items()}
        line[f"{PUBLISHED_COLUMN[preset]}, with / without, min"] = _both(PUBLISHED_MINUTES, i)
        line["seeds"] = str(len(results[_label("batch", size)]))
        lines.append(line)
    return lines


def _both(published, i):
    return " / ".join(f"~{published[norm][i]}" for norm in ARMS)


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns the best accuracy and the time of an epoch against the batch size."""
    accuracies, times = [], []
    for norm in ARMS:
        name, color = plots.NAMES[norm], plots.COLORS[norm]
        groups = [results[_label(norm, size)] for size in SIZES]
        best = np.array([[best_accuracy(run) for run in group] for group in groups]).T
        published = np.array([PUBLISHED_ACCURACY[norm]])
        accuracies.append(plots.Line(name, SIZES, best, color, marker="o"))
        accuracies.append(plots.Line(f"{name}, published", SIZES, published, color, dashes=":"))
        seconds = np.array([[training_seconds(run) / run["rows"][-1]["epoch"] for run in group] for group in groups]).T
        times.append(plots.Line(name, SIZES, seconds, color, marker="o"))
    return plots.draw(
        [
            plots.Lines("batch size (images)", "best test accuracy (%)", accuracies, xscale="log"),
            plots.Lines("batch size (images)", "training time per epoch (s)", times, xscale="log", yscale="log"),
        ]
    )
