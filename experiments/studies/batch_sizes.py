"""Which batch sizes work, and at what cost in time?

Command: python -m experiments run batch_sizes --preset small

Time: planned for 8 minutes on 2 CPU cores (small); measured: {time}

Published: On CIFAR-10 with the Inception network, learning rate 0.01, and 5, 10, 50, 100 and 250 images per batch: best
validation accuracy in 30 epochs ~92, ~92, ~91, ~90 and ~87 % with batch norm and ~85, ~87, ~84, ~79 and ~66 % without;
training time ~223, ~173, ~54, ~47 and ~43 minutes with and ~124, ~78, ~43, ~38 and ~34 minutes without (read off bar
charts). The author concludes that batch norm makes a step longer and works well at medium batch sizes of 50 to 100
(Kiefer 2020).

Finding: The best test accuracy is higher with batch norm than without at {better} of the {sizes} batch sizes, by
{least} to {most} points. With batch norm it is highest at {best_size} images, {best} %; at 50 and 100 images it is
{lost_50} and {lost_100} points below that, and an epoch takes {epoch_50} and {epoch_100} % of the time that it takes at
5 images. A step takes longer with batch norm at {slower} of the {sizes} sizes; over all sizes, it takes {shortest} to
{longest} times as long. {verdict}.

Agreement: Agrees in part ((1) holds, (2) and (3) are not shown): batch norm is better at every size, and most so at the
largest, as published. But medium batches fall further behind small ones than published and save less time, and a step
with batch norm takes only a little longer, clearly so at two sizes.

Refuted if: (1) at one of the sizes, the best accuracy with batch norm is not higher than without; (2) at one of them, a
step with batch norm does not take longer; (3) at 50 or at 100 images, the best accuracy with batch norm is 2 or more
points below that at its best size, or an epoch takes at least half the time that it takes at 5 images.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    Spread,
    below,
    best_accuracy,
    exceeds,
    judge,
    paired_differences,
    paired_runs,
    spread,
    step_milliseconds,
    training_seconds,
)

ARMS = ("batch", "none")
SIZES = (5, 10, 50, 100, 250)
MEDIUM = (50, 100)
LITTLE = 2.0  # points that medium sizes may lose compared with the best size
# The running statistics of `small` average about this many images at every batch size. With the same momentum, those of
# small batches would be noisier, which would not be an effect of training with small batches.
AVERAGED = 1_000
PUBLISHED_ACCURACY = {"batch": (92, 92, 91, 90, 87), "none": (85, 87, 84, 79, 66)}  # best, in %, read off a bar chart
PUBLISHED_MINUTES = {"batch": (223, 173, 54, 47, 43), "none": (124, 78, 43, 38, 34)}  # of training, read off as well
PUBLISHED_COLUMN = {"small": "published (full protocol)", "full": "published"}


def runs(preset: str) -> dict[str, Config]:
    """Returns every batch size with batch norm and without, all at the same learning rate, as published."""
    return {_label(norm, size): _run(preset, norm, size) for size in SIZES for norm in ARMS}


def _run(preset: str, norm: str, size: int) -> Config:
    config = PRESETS[preset].replace(norm=norm, batch_size=size)
    if preset == "small":
        config = config.replace(epochs=5, momentum=1 - size / AVERAGED if norm == "batch" else None)
    return config


def _label(norm: str, size: int) -> str:
    return f"{norm}-{size}"


SETUP = {
    "small": "The published network and protocol, except for "
    f"{runs('small')['none-250'].differences(runs('full')['none-250'])}. The running statistics of batch norm average "
    f"about {AVERAGED:,} images at every size: with n images per batch, the momentum is 1 - n / {AVERAGED:,}, from "
    f"{1 - SIZES[0] / AVERAGED:g} at {SIZES[0]} to {1 - SIZES[-1] / AVERAGED:g} at {SIZES[-1]} images, instead of 0.99 "
    "at all sizes. The number of epochs was set by the time that trial runs with another seed took.",
    "full": "The published network and protocol.",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    gains = [gain(results, size) for size in SIZES]
    costs = [cost(results, size) for size in SIZES]
    best = {size: spread(map(best_accuracy, results[_label("batch", size)])) for size in SIZES}
    best_size = max(SIZES, key=lambda size: best[size].mean)
    better, slower = _count(gains, 0), _count(costs, 1)
    lost = {size: loss(results, size, best_size) for size in MEDIUM}
    epoch = {size: epoch_time(results, size) for size in MEDIUM}
    by_mean = {"key": lambda difference: difference.mean}
    return {
        "sizes": str(len(SIZES)),
        "better": str(better),
        "least": min(gains, **by_mean).text(),
        "most": max(gains, **by_mean).text(),
        "best_size": str(best_size),
        "best": best[best_size].text(),
        **{f"lost_{size}": points.text() for size, points in lost.items()},
        **{f"epoch_{size}": percent.text() for size, percent in epoch.items()},
        "slower": str(slower),
        "shortest": min(costs, **by_mean).text(2),
        "longest": max(costs, **by_mean).text(2),
        **judge(
            better == len(SIZES),
            slower == len(SIZES),
            all(below(lost[size], LITTLE) and below(epoch[size], 50) for size in MEDIUM),
            seeds=len(results[_label("batch", 5)]),
        ),
    }


def _count(spreads: list[Spread], least: float) -> int:
    """Counts those that clearly exceed `least`. A single seed has no spread and no verdict: the mean decides."""
    return sum(exceeds(value, least) if value.n > 1 else value.mean > least for value in spreads)


def gain(results: dict[str, list[dict]], size: int) -> Spread:
    """Returns the points by which batch norm raises the best test accuracy at a batch size."""
    return spread(paired_differences(best_accuracy, *_arms(results, size)))


def cost(results: dict[str, list[dict]], size: int) -> Spread:
    """Returns how many times as long a step takes with batch norm."""
    both = paired_runs(*_arms(results, size))
    return spread(step_milliseconds(batch) / step_milliseconds(none) for batch, none in both)


def loss(results: dict[str, list[dict]], size: int, best_size: int) -> Spread:
    """Returns the points by which the best accuracy with batch norm is below that at the best size."""
    best, runs_of_size = results[_label("batch", best_size)], results[_label("batch", size)]
    return spread(paired_differences(best_accuracy, best, runs_of_size))


def epoch_time(results: dict[str, list[dict]], size: int) -> Spread:
    """Returns the time of an epoch with batch norm, in % of that at the smallest size."""
    both = paired_runs(results[_label("batch", size)], results[_label("batch", SIZES[0])])
    return spread(100 * epoch_seconds(run) / epoch_seconds(smallest) for run, smallest in both)


def epoch_seconds(run: dict) -> float:
    """Returns the seconds of training per epoch."""
    return training_seconds(run) / run["rows"][-1]["epoch"]


def _arms(results: dict[str, list[dict]], size: int) -> list[list[dict]]:
    return [results[_label(norm, size)] for norm in ARMS]


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per batch size: accuracies and times of both arms, ours and the published ones."""
    lines = []
    for i, size in enumerate(SIZES):
        groups = {plots.NAMES[norm]: results[_label(norm, size)] for norm in ARMS}
        line = {"batch size": str(size)}
        line |= {
            f"best accuracy, {name}, %": spread(map(best_accuracy, group)).text() for name, group in groups.items()
        }
        line["difference, points"] = gain(results, size).text()
        line[f"{PUBLISHED_COLUMN[preset]}, with / without batch norm, %"] = _both(PUBLISHED_ACCURACY, i)
        line |= {
            f"time per step, {name}, ms": spread(map(step_milliseconds, group)).text() for name, group in groups.items()
        }
        line["ratio of step times"] = cost(results, size).text(2)
        line |= {
            f"training time, {name}, s": spread(map(training_seconds, group)).text() for name, group in groups.items()
        }
        line[f"{PUBLISHED_COLUMN[preset]}, with / without batch norm, min"] = _both(PUBLISHED_MINUTES, i)
        line["seeds"] = str(len(results[_label("batch", size)]))
        lines.append(line)
    return lines


def _both(published: dict[str, tuple[int, ...]], i: int) -> str:
    return " / ".join(f"~{published[norm][i]}" for norm in ARMS)


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws the best accuracy and the time of an epoch against the batch size."""
    accuracies, times = [], []
    for norm in ARMS:
        name, color = plots.NAMES[norm], plots.COLORS[norm]
        groups = [results[_label(norm, size)] for size in SIZES]
        best = np.array([[best_accuracy(run) for run in group] for group in groups]).T
        published = np.array([PUBLISHED_ACCURACY[norm]])
        accuracies.append(plots.Line(name, SIZES, best, color, marker="o"))
        accuracies.append(plots.Line(f"{name}, published", SIZES, published, color, dashes=":"))
        seconds = np.array([[epoch_seconds(run) for run in group] for group in groups]).T
        times.append(plots.Line(name, SIZES, seconds, color, marker="o"))
    return plots.draw(
        [
            plots.Lines("batch size (images)", "best test accuracy (%)", accuracies, xscale="log"),
            plots.Lines("batch size (images)", "training time per epoch (s)", times, xscale="log"),
        ]
    )
