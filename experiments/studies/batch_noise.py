"""Does the noise of batch statistics regularize?

Command: python -m experiments run batch_noise --preset small

Time: planned for six minutes on 2 CPU cores (small); measured: {time}

Published: Computing statistics over small groups within a large batch closes part of the generalization gap between
large and small batches (Hoffer et al. 2017). Batch norm amounts to normalization by population statistics plus a
regularizer that comes from the noise of the batch statistics (Luo et al. 2019). No numbers are published for this
comparison on CIFAR-10.

Finding: {law}. Trained with the statistics of whole batches of 256 images, the network reaches {batch_training} % on
the training images and {batch_test} % on the test images, a gap of {batch_gap} points. With statistics of groups of 16
it reaches {ghost_training} % and {ghost_test} %, a gap that is {ghost}; with the statistics of the whole batch plus
noise matched to groups of 16, {noise_training} % and {noise_test} %, a gap that is {noise}. {verdict}.

Agreement: Not shown: with statistics of groups of 16, or with noise matched to them, the gap is smaller on average, but
not by clearly more than the seeds differ. With groups of 4 it is clearly smaller, and so is the accuracy on the
training images. No arm has a higher mean test accuracy than whole batches.

Refuted if: (1) with statistics of groups of 16, the gap between training and test accuracy is not smaller than with
statistics of whole batches, or test accuracy is one or more points lower; (2) the same is found with noise matched to
groups of 16.
"""

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset, first_tests
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    compared,
    exceeds,
    generalization_gap,
    judge,
    measured,
    measured_accuracy,
    paired_differences,
    quoted,
    spread,
)
from experiments.nets import linen as linen_nets
from experiments.probes.spread import group_spread, image_moments, log_slope, sizes_for
from experiments.training import evaluation, loop

BATCH = 256  # images per step
SIZES = (4, 16, 64)  # images that share statistics, or to which the noise is matched
RATE = 0.1
TRAIN_IMAGES = {"small": 2_560, "full": 10_240}  # a multiple of BATCH: groups must divide the last batch, too
ROW_IMAGES = 1_000  # test images during training, where accuracy only shows that the run makes progress
SPREAD_IMAGES = 2_560
SETTINGS = {"row_images": ROW_IMAGES, "spread_images": SPREAD_IMAGES}
# Points of test accuracy that noise may cost. A network that merely fits the training images less well has a smaller
# gap, too, but that is not regularization.
MARGIN = 1

ARMS = {"batch": "whole batch"}
ARMS |= {f"ghost-{size}": f"groups of {size}" for size in SIZES}
ARMS |= {f"noise-{size}": f"whole batch + noise of groups of {size}" for size in SIZES}
KINDS = {
    "ghost": ("group statistics", plots.COLORS["ghost"]),
    "noise": ("matched noise", plots.PALETTE["green"]),
}


def runs(preset: str) -> dict[str, Config]:
    """Returns the arms: whole batches, groups within them, and whole batches with the noise of groups."""
    config = PRESETS[preset].replace(train_images=TRAIN_IMAGES[preset], batch_size=BATCH, learning_rate=RATE)
    config = config.replace(epochs=30, lr_decay_epochs=31, augment=False)
    configs = {"batch": config}
    configs |= {f"ghost-{size}": config.replace(norm="ghost", group_size=size) for size in SIZES}
    return configs | {f"noise-{size}": config.replace(noise="matched", group_size=size) for size in SIZES}


_ALL = (
    f"Batches of {BATCH} images at a constant learning rate of {RATE:g} for 30 epochs, without augmentation; at the "
    "end the network is tested on all test images and all training images."
)
_DIFFERENT = runs("small")["batch"].differences(runs("full")["batch"])
SETUP = {
    "small": (
        f"{_ALL} The protocol of the full preset, except for {_DIFFERENT}. One trial run with another seed showed that "
        "30 epochs are enough to memorize the training images."
    ),
    "full": f"{_ALL} The network is that of the published comparison on CIFAR-10.",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run, then measures its scores on all images and the spread of its statistics.

    The accuracies in the rows are on the first `ROW_IMAGES` test images.
    """
    watched = first_tests(dataset, ROW_IMAGES)
    trained = loop.fit(config, watched, **options)
    return trained.measure(lambda variables: scores_and_spreads(config, dataset, variables))


def scores_and_spreads(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Measures loss and accuracy on all training and test images, and the spread of the statistics by group size."""
    net = linen_nets.build(config, len(dataset.class_names))
    entries = evaluation.score_all(net, variables, dataset)
    # The spread is a property of plain batch norm: it is what the noise of the other arms is compared with.
    if config.norm == "batch" and config.noise == "none":
        images = dataset.train_images[:SPREAD_IMAGES]
        layers = image_moments(net, variables, images)
        sizes = [size for size in sizes_for(len(images)) if size <= BATCH]
        entries += [{"group_size": size, **group_spread(layers, size)._asdict()} for size in sizes]
    return entries


def spreads(run: dict) -> dict[int, dict]:
    """Returns the measured spreads of the statistics: group size -> entry."""
    return {entry["group_size"]: entry for entry in run["measured"] if "group_size" in entry}


def slope(run: dict, name: str) -> float:
    """Fits the spread of "mean" or "std" by a power of the group size; returns the exponent."""
    return log_slope(spreads(run), (entry[name] for entry in spreads(run).values()))


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    fields = {"law": _law(results["batch"]), "batch_gap": spread(map(generalization_gap, results["batch"])).text()}
    claims = []
    for kind in KINDS:
        batch, noisy = results["batch"], results[f"{kind}-16"]
        closed = spread(paired_differences(generalization_gap, batch, noisy))
        gained = spread(paired_differences(lambda run: measured_accuracy(run, images="test"), noisy, batch))
        claims.append(exceeds(closed) and exceeds(gained, -MARGIN))
        fields[kind] = compared(closed, "smaller", "larger")
    for name, label in {"batch": "batch", "ghost": "ghost-16", "noise": "noise-16"}.items():
        fields |= {f"{name}_{images}": _accuracy(results[label], images) for images in ("training", "test")}
    return fields | judge(*claims, seeds=len(results["batch"]))


def _law(runs: list[dict]) -> str:
    """Says how the spread depends on the group size. This is not a claim: shuffled images are independent draws."""
    power, stds = (spread(slope(run, name) for run in runs) for name in ("mean", "std"))
    if not math.isfinite(power.mean + stds.mean):
        return "The spread of the batch statistics could not be measured with every seed"
    first, last = min(spreads(runs[0])), max(spreads(runs[0]))
    means = {size: spread(measured(run, "mean", group_size=size) for run in runs).text(3) for size in (first, last)}
    return (
        f"From {first} to {last} images, the standard deviation of their mean falls from {means[first]} to "
        f"{means[last]} times that of the feature, as the group size to the power {power.text(2)} (independent draws "
        f"give -0.5); the standard deviation of their standard deviation falls with the power {stds.text(2)}"
    )


def _accuracy(runs: list[dict], images: str) -> str:
    return spread(measured_accuracy(run, images=images) for run in runs).text()


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm."""
    return [
        {
            "statistics": name,
            "training accuracy, %": _accuracy(results[label], "training"),
            "test accuracy, %": _accuracy(results[label], "test"),
            "gap, points": spread(map(generalization_gap, results[label])).text(),
            "gap closed vs whole batch, points": spread(
                paired_differences(generalization_gap, results["batch"], results[label])
            ).text(),
            "test loss, nats": quoted(spread(measured(run, "loss", images="test") for run in results[label]), 2),
            "seeds": str(len(results[label])),
        }
        for label, name in ARMS.items()
    ]


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws the spread of the statistics, the gap and the test accuracy against the group size."""
    return plots.draw(
        [
            _spread_panel(results["batch"]),
            _panel(results, "training - test accuracy (points)", generalization_gap),
            _panel(results, "test accuracy (%)", lambda run: measured_accuracy(run, images="test")),
        ]
    )


def _panel(results: dict[str, list[dict]], ylabel: str, number: Callable[[dict], float]) -> plots.Lines:
    """Draws a number against the group size. Both lines end at the whole batch, a group of `BATCH` images."""
    lines = []
    for kind, (name, color) in KINDS.items():
        groups = [*(results[f"{kind}-{size}"] for size in SIZES), results["batch"]]
        y = np.array([[number(run) for run in group] for group in groups]).T
        lines.append(plots.Line(name, np.array([*SIZES, BATCH]), y, color, marker="o"))
    return plots.Lines("group size (images)", ylabel, lines, xscale="log", bottom=None)


def _spread_panel(runs: list[dict]) -> plots.Lines:
    """Draws the spread of means and standard deviations, and the law for independent images."""
    sizes = np.array(list(spreads(runs[0])))
    mean, std = (np.array([[spreads(run)[size][name] for size in sizes] for run in runs]) for name in ("mean", "std"))
    law = mean[:, :1] * np.sqrt(sizes[:1] / sizes)
    lines = [
        plots.Line("mean", sizes, mean, plots.COLORS["batch"], marker="o"),
        plots.Line("standard deviation", sizes, std, plots.PALETTE["orange"], marker="o"),
        plots.Line("1 / sqrt(images)", sizes, law, plots.PALETTE["black"], dashes=":"),
    ]
    label = "std over groups / std of the feature"
    return plots.Lines("group size (images)", label, lines, xscale="log", yscale="log")
