"""Is the regularising noise in the statistics?

Command: python -m experiments run batch_noise --preset small

Time: sized for six minutes on 2 CPU cores (small); measured: {time}

Published: Statistics of small groups within a large batch close part of the gap in generalization between large and
small batches (Hoffer et al. 2017); batch norm amounts to normalizing by population statistics plus a regularizer that
stems from the noise of the batch's statistics (Luo et al. 2019). No number published for this comparison on CIFAR-10.

Finding: {law}. Trained with the statistics of whole batches of 256 images, the net classifies {batch_training} % of the
training images and {batch_test} % of the test images correctly, a gap of {batch_gap} points. With statistics of groups
of 16 these are {ghost_training} % and {ghost_test} %, a gap that is {ghost}; with those of the whole batch plus noise
matched to groups of 16, {noise_training} % and {noise_test} %, a gap that is {noise}. {verdict}.

Agreement: Not shown: with statistics of groups of 16, or noise matched to them, the gap is smaller on average, but not
by clearly more than the seeds differ; with groups of 4 it is clearly smaller, and so is the accuracy on the training
images. Mean test accuracy is higher in none of the arms.

Refuted if: (1) with statistics of groups of 16, the gap between training and test accuracy is no smaller than with
those of whole batches, or test accuracy is a point or more lower; (2) the same is found with noise matched to groups of
16.
"""

import math

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
SIZES = (4, 16, 64)  # images that share statistics, or the noise that is matched to them
RATE = 0.1
TRAIN_IMAGES = {"small": 2_560, "full": 10_240}  # whole batches, since groups must fill the last one as well
ROW_IMAGES = 1_000  # for testing during training, which shows no more than that it goes on
SPREAD_IMAGES = 2_560
SETTINGS = {"row_images": ROW_IMAGES, "spread_images": SPREAD_IMAGES}
# Points of test accuracy that noise may cost. A net that learns less of the training images has a smaller gap too; that
# is no regularization.
MARGIN = 1

ARMS = {"batch": "whole batch"}
ARMS |= {f"ghost-{size}": f"statistics of {size}" for size in SIZES}
ARMS |= {f"noise-{size}": f"whole batch, noise as of {size}" for size in SIZES}
KINDS = {
    "ghost": ("groups' statistics", plots.COLORS["ghost"]),
    "noise": ("matched noise", plots.PALETTE["green"]),
}


def runs(preset: str) -> dict[str, Config]:
    """Returns whole batches, groups within them, and whole batches with noise as of groups."""
    config = PRESETS[preset].replace(train_images=TRAIN_IMAGES[preset], batch_size=BATCH, learning_rate=RATE)
    config = config.replace(epochs=30, lr_decay_epochs=31, augment=False)
    configs = {"batch": config}
    configs |= {f"ghost-{size}": config.replace(norm="ghost", group_size=size) for size in SIZES}
    return configs | {f"noise-{size}": config.replace(noise="matched", group_size=size) for size in SIZES}


_ALL = (
    f"Batches of {BATCH} images at a constant rate of {RATE:g} for 30 epochs, without augmentation; at the end the "
    "net is tested on all images, those for training as well."
)
_DIFFERENT = runs("small")["batch"].differences(runs("full")["batch"])
SETUP = {
    "small": (
        f"{_ALL} Not the protocol of full, but {_DIFFERENT}. One trial run with another seed showed that so many "
        "epochs suffice to learn the training images by heart."
    ),
    "full": f"{_ALL} The net is that of the published comparison on CIFAR-10.",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains, then tests the net on all training and test images, and measures the spread of its statistics.

    Rows hold the accuracy on the first `ROW_IMAGES` test images.
    """
    first = first_tests(dataset, ROW_IMAGES)
    return loop.fit(config, first, **options).measure(lambda variables: measure(config, dataset, variables))


def measure(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Returns the scores of a net on all training and test images, and the spread of its statistics at each size."""
    net = linen_nets.build(config, len(dataset.class_names))
    found = evaluation.score_all(net, variables, dataset)
    if config.norm == "batch" and config.noise == "none":
        images = dataset.train_images[:SPREAD_IMAGES]
        layers = image_moments(net, variables, images)
        sizes = [size for size in sizes_for(len(images)) if size <= BATCH]
        found += [{"group_size": size, **group_spread(layers, size)._asdict()} for size in sizes]
    return found


def spreads(run: dict) -> dict[int, dict]:
    """Returns the spread of the statistics by group size."""
    return {entry["group_size"]: entry for entry in run["measured"] if "group_size" in entry}


def slope(run: dict, name: str) -> float:
    """Returns the power of the group size by which the spread of "mean" or "std" falls."""
    return log_slope(spreads(run), (entry[name] for entry in spreads(run).values()))


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    fields = {"law": _law(results["batch"]), "batch_gap": spread(map(generalization_gap, results["batch"])).text()}
    claims = []
    for kind in KINDS:
        batch, other = results["batch"], results[f"{kind}-16"]
        gone = spread(paired_differences(generalization_gap, batch, other))
        gained = spread(paired_differences(lambda run: measured_accuracy(run, images="test"), other, batch))
        claims.append(exceeds(gone) and exceeds(gained, -MARGIN))
        fields[kind] = compared(gone, "smaller", "larger")
    for name, label in {"batch": "batch", "ghost": "ghost-16", "noise": "noise-16"}.items():
        fields |= {f"{name}_{images}": _accuracy(results[label], images) for images in ("training", "test")}
    return fields | judge(*claims, seeds=len(results["batch"]))


def _law(runs):
    """How the spread depends on the group size, in words. No claim: shuffled images are independent draws."""
    power, stds = (spread(slope(run, name) for run in runs) for name in ("mean", "std"))
    if not math.isfinite(power.mean + stds.mean):
        return "The spread of the batch statistics could not be measured with every seed"
    first, last = min(spreads(runs[0])), max(spreads(runs[0]))
    means = {size: spread(measured(run, "mean", group_size=size) for run in runs).text(3) for size in (first, last)}
    return (
        f"From {first} to {last} images the spread of their mean falls from {means[first]} to {means[last]} of a "
        f"feature's standard deviation, as the group size to the power {power.text(2)}, where independent draws give "
        f"-0.5; that of their standard deviation to the power {stds.text(2)}"
    )


def _accuracy(runs, images):
    return spread(measured_accuracy(run, images=images) for run in runs).text()


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm."""
    return [
        {
            "statistics": name,
            "training accuracy, %": _accuracy(results[label], "training"),
            "test accuracy, %": _accuracy(results[label], "test"),
            "gap, points": spread(map(generalization_gap, results[label])).text(),
            "gap less than with whole batches, points": spread(
                paired_differences(generalization_gap, results["batch"], results[label])
            ).text(),
            "test loss, nats": quoted(spread(measured(run, "loss", images="test") for run in results[label]), 2),
            "seeds": str(len(results[label])),
        }
        for label, name in ARMS.items()
    ]


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns the spread of the statistics, the gap and the test accuracy, against the group size."""
    return plots.draw(
        [
            _spread_panel(results["batch"]),
            _panel(results, "training less test accuracy (points)", generalization_gap),
            _panel(results, "test accuracy (%)", lambda run: measured_accuracy(run, images="test")),
        ]
    )


def _panel(results, ylabel, number):
    """A measure against group size. A group of the whole batch is what both kinds end in."""
    lines = []
    for kind, (name, color) in KINDS.items():
        groups = [*(results[f"{kind}-{size}"] for size in SIZES), results["batch"]]
        y = np.array([[number(run) for run in group] for group in groups]).T
        lines.append(plots.Line(name, np.array([*SIZES, BATCH]), y, color, marker="o"))
    return plots.Lines("images in a group", ylabel, lines, xscale="log", bottom=None)


def _spread_panel(runs):
    """The spread of means and standard deviations, and what independent images would give."""
    sizes = np.array(list(spreads(runs[0])))
    mean, std = (np.array([[spreads(run)[size][name] for size in sizes] for run in runs]) for name in ("mean", "std"))
    law = mean[:, :1] * np.sqrt(sizes[:1] / sizes)
    lines = [
        plots.Line("mean", sizes, mean, plots.COLORS["batch"], marker="o"),
        plots.Line("standard deviation", sizes, std, plots.PALETTE["orange"], marker="o"),
        plots.Line("1 / sqrt(images)", sizes, law, plots.PALETTE["black"], dashes=":"),
    ]
    label = "spread over groups (feature's std)"
    return plots.Lines("images in a group", label, lines, xscale="log", yscale="log")
