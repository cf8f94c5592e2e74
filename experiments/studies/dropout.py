"""Does batch norm regularize like dropout, and do both help together?

Command: python -m experiments run dropout --preset small

Time: planned for 4 minutes on 2 CPU cores (small); measured: {time}

Published: On a part of CIFAR-10, with a simple network trained for 50 epochs until it overfits, final validation
accuracy is ~34 % with neither, ~32 % with half of the features dropped, and ~30 % with batch norm, which has the
noisiest validation loss. The author concludes that batch norm regularizes, similarly to dropout (Kiefer 2020, read off
a chart). On ImageNet, networks with batch norm do without dropout and overfit no more (Ioffe and Szegedy 2015).

Finding: Training and test accuracy end at {training_none} and {none} % with neither, {training_dropout} and {dropout} %
with dropout, {training_batch} and {batch} % with batch norm, and {training_both} and {both} % with both. The gap
between the two is {narrower} with batch norm than with neither. In test accuracy, batch norm is {vs_neither} than
neither and {vs_dropout} than dropout; both together are {added} than batch norm alone. From epoch to epoch, the test
loss changes by {noise_none}, {noise_dropout}, {noise_batch} and {noise_both} nats (standard deviation over the second
half, in the same order). {verdict}.

Agreement: Agrees in part ((1) and (3) hold, (2) is not shown): with batch norm there is no need for dropout, and adding
it lowers test accuracy a little. But batch norm fits the training images better, so the gap grows; the order of the
test accuracies is the reverse of the published one; and the test loss is not the noisiest with batch norm on average.

Refuted if: (1) test accuracy with batch norm may be one or more points below that with dropout; (2) the gap between
training and test accuracy is not smaller with batch norm than with neither, or test accuracy may be one or more points
lower; (3) adding dropout to batch norm may raise test accuracy by one or more points.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset, first_tests
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    Spread,
    below,
    column,
    compared,
    exceeds,
    generalization_gap,
    judge,
    measured_accuracy,
    paired_differences,
    quoted,
    spread,
)
from experiments.nets import linen as linen_nets
from experiments.training import loop
from experiments.training.evaluation import score_all

EPOCHS = 50  # as published
WATCHED = 2_000  # test images in every epoch; testing on all 10,000 would take longer than training
SETTINGS = {"watched": WATCHED}
LITTLE = 1.0  # points of test accuracy that are taken for no difference


class Arm(NamedTuple):
    """What is trained in an arm, and how it is shown."""

    norm: str
    dropout: float
    name: str
    color: str
    dashes: str


ARMS = {
    "none": Arm("none", 0.0, "neither", plots.PALETTE["vermilion"], "-"),
    "dropout": Arm("none", 0.5, "dropout", plots.PALETTE["orange"], "--"),
    "batch": Arm("batch", 0.0, "batch norm", plots.PALETTE["blue"], "-"),
    "both": Arm("batch", 0.5, "both", plots.PALETTE["sky"], "--"),
}
PUBLISHED = {"none": "~34", "dropout": "~32", "batch": "~30", "both": "not published"}  # final validation accuracy in %


def runs(preset: str) -> dict[str, Config]:
    """Returns the four arms: a constant rate, and few images without augmentation, so that the networks overfit."""
    config = PRESETS[preset].replace(augment=False, batch_size=50, epochs=EPOCHS, lr_decay_epochs=EPOCHS + 1)
    if preset == "small":
        config = config.replace(image_size=8, train_images=2_000, learning_rate=0.05)
    else:
        config = config.replace(train_images=5_000)
    return {label: config.replace(norm=arm.norm, dropout=arm.dropout) for label, arm in ARMS.items()}


_SHARED = (
    "Dropout drops half of the features before the last layer. Final accuracies are measured in evaluation mode on all "
    f"training and all test images, and the test loss of every epoch on {WATCHED:,} test images."
)
SETUP = {
    "small": (
        "The network and protocol of the other comparisons, except for "
        f"{runs('small')['batch'].differences(PRESETS['full'])}. {_SHARED} Learning rate, batch size and image size "
        "were set in trial runs with another seed, so that the network without batch norm overfits in time, too."
    ),
    "full": (
        "The network and protocol of the other comparisons, except for "
        f"{runs('full')['batch'].differences(PRESETS['full'])}: of the published comparison, neither the network nor "
        f"the number of images is known. {_SHARED}"
    ),
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run, tested on a part of the test images meanwhile and on all images at the end."""
    watched = first_tests(dataset, WATCHED)
    net = linen_nets.build(config, len(dataset.class_names))
    return loop.fit(config, watched, **options).measure(lambda variables: score_all(net, variables, dataset))


def training_accuracy(run: dict) -> float:
    """Returns the final accuracy on all training images in evaluation mode, in %."""
    return measured_accuracy(run, images="training")


def final_test_accuracy(run: dict) -> float:
    """Returns the final accuracy on all test images, in %."""
    return measured_accuracy(run, images="test")


def noise(run: dict) -> float:
    """Returns the standard deviation of the changes of the test loss from row to row, over the second half."""
    losses = [row["test_loss"] for row in run["rows"]]
    changes = np.diff(losses[len(losses) // 2 :])
    return float(changes.std(ddof=1)) if len(changes) > 1 else math.nan


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""

    def difference(number: Callable[[dict], float], label: str, baseline: str) -> Spread:
        return spread(paired_differences(number, results[label], results[baseline]))

    narrower = difference(generalization_gap, "none", "batch")
    vs_neither = difference(final_test_accuracy, "batch", "none")
    vs_dropout = difference(final_test_accuracy, "batch", "dropout")
    added = difference(final_test_accuracy, "both", "batch")
    fields = {
        "narrower": _difference_text(narrower, "smaller", "larger"),
        "vs_neither": _difference_text(vs_neither, "better", "worse"),
        "vs_dropout": _difference_text(vs_dropout, "better", "worse"),
        "added": _difference_text(added, "better", "worse"),
        **judge(
            exceeds(vs_dropout, -LITTLE),
            exceeds(narrower) and exceeds(vs_neither, -LITTLE),
            below(added, LITTLE),
            seeds=narrower.n,
        ),
    }
    for label, group in results.items():
        fields[label] = quoted(spread(map(final_test_accuracy, group)))
        fields[f"training_{label}"] = quoted(spread(map(training_accuracy, group)))
        fields[f"noise_{label}"] = quoted(spread(map(noise, group)), 2)
    return fields


def _difference_text(difference: Spread, more: str, less: str) -> str:
    """Says a difference in words that fit the sentence, even if it was not measured in some run."""
    return compared(difference, more, less) if math.isfinite(difference.mean) else f"(not measured) {more} or {less}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm: accuracies, gap and noise of the test loss, and the published accuracy."""
    return [
        {
            "arm": arm.name,
            "training accuracy, %": quoted(spread(map(training_accuracy, results[label]))),
            "test accuracy, %": quoted(spread(map(final_test_accuracy, results[label]))),
            "gap, points": quoted(spread(map(generalization_gap, results[label]))),
            "std of changes of the test loss, nats": quoted(spread(map(noise, results[label])), 2),
            "published test accuracy (simpler network), %": PUBLISHED[label],
            "seeds": str(len(results[label])),
        }
        for label, arm in ARMS.items()
    ]


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws test accuracy and test loss against the epoch, and the final gap."""
    accuracies, losses, bars = [], [], []
    for label, arm in ARMS.items():
        group = results[label]
        epochs = column(group, "epoch").max(axis=0)
        accuracies.append(plots.Line(arm.name, epochs, 100 * column(group, "test_accuracy"), arm.color, arm.dashes))
        losses.append(plots.Line(arm.name, epochs, column(group, "test_loss"), arm.color, arm.dashes))
        bars.append(plots.Bar(arm.name, [generalization_gap(run) for run in group], arm.color))
    return plots.draw(
        [
            plots.Lines("epoch", "test accuracy (%)", accuracies),
            plots.Lines("epoch", "test loss (nats)", losses),
            plots.Bars("training - test accuracy (points)", bars),
        ]
    )
