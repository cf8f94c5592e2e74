"""What does folding batch norm into the convolution save, and at what cost?

Command: python -m experiments run folding --preset small

Time: planned for 3 minutes on 2 CPU cores (small); measured: {time}

Published: No numbers. At inference, batch norm is a fixed affine map, which the preceding convolution can absorb; this
is commonly said to save time and to leave the outputs unchanged.

Finding: Number of batch norms that folding removes: {counts}. The outputs on the test images then differ by at most
{difference} of the largest output, and the test accuracy by at most {accuracy} points. Inference time after folding,
relative to before: {ratios}. {verdict}.

Agreement: Agrees in part ((1) and (2) hold, (3) is not shown): outputs change by no more than rounding, and a single
image takes clearly less time with every network. With a batch of 100 images, the 7-layer CNN saves little, and the
other two save nothing for certain.

Refuted if: (1) an output differs by more than 0.00001 of the largest one; (2) a test accuracy changes by more than 0.05
points; (3) one of the networks is not faster afterward, with a batch of 1 or with one of 100.
"""

import itertools
import math
import statistics
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import Spread, below, diverged, judge, measured, quoted, spread
from experiments.nets import linen as linen_nets
from experiments.probes import folding
from experiments.training import evaluation, loop

NETS = {"cnn7": 1.0, "resnet20": 0.5, "inception": 0.125}  # name -> width in the small preset
NAMES = {"cnn7": "7-layer CNN", "resnet20": "ResNet-20", "inception": "Inception"}
BATCHES = (1, 100)  # numbers of images whose inference is timed
ROUNDS = 30  # timings before and after
SETTINGS = {"batches": BATCHES, "rounds": ROUNDS}
COLORS = {1: plots.PALETTE["sky"], 100: plots.PALETTE["blue"]}
LARGEST_DIFFERENCE = 1e-5  # of an output, relative to the largest one
LARGEST_CHANGE = 0.05  # points of accuracy


def runs(preset: str) -> dict[str, Config]:
    """Returns the three networks with short training; `SETUP` says how `small` differs."""
    config = PRESETS[preset].replace(epochs=2)
    if preset == "small":
        config = config.replace(train_images=3_000, epochs=1, momentum=0.9)
    return {net: config.replace(net=net, width=NETS[net] if preset == "small" else 1.0) for net in NETS}


TIMED = (
    f"Times are medians of {ROUNDS} evaluations before and as many after folding, in turns; the weights are arguments "
    "of the compiled function, as they mostly are, and folding leaves fewer arrays to pass."
)
SETUP = {
    "small": "Each network is trained only long enough to have realistic statistics. The Inception network has the "
    f"published protocol, except for {runs('small')['inception'].differences(Config())}; the others have the widths 1 "
    f"(7-layer CNN) and 0.5 (ResNet-20). Sizes were set by the time of one trial run with another seed. {TIMED}",
    "full": f"The networks at full width, trained by the published protocol, but for two epochs only. {TIMED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run, then folds its network and compares the two."""
    trained = loop.fit(config, dataset, **options)
    if trained.rows[-1]["diverged"]:
        return trained
    net = linen_nets.build(config, len(dataset.class_names))
    return trained.measure(lambda variables: compare_folded(net, variables, dataset))


def compare_folded(net: nn.Module, variables: dict, dataset: Dataset) -> list[dict]:
    """Measures what folding changes: the outputs on the test images, and the time of an evaluation.

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      dataset: provides the test images; for the timings, they are repeated if there are too few.
    """
    images = dataset.test_images.astype(np.float32) / 255
    comparison = folding.fold_net(net, variables, images[:1])
    batches = evaluation.split(images, max(BATCHES))
    with jax.default_matmul_precision("highest"):  # a GPU's default precision rounds more than folding changes
        before = np.concatenate([comparison.before(batch) for batch in batches])
        after = np.concatenate([comparison.after(batch) for batch in batches])
    outputs = {
        "what": "outputs",
        "norms": comparison.norms,
        "folded": comparison.folded,
        "difference": folding.difference(before, after),
        "accuracy_before": evaluation.score(before, dataset.test_labels).accuracy,
        "accuracy_after": evaluation.score(after, dataset.test_labels).accuracy,
    }
    times = []
    for batch in BATCHES:
        timed = jnp.asarray(np.resize(images, (batch, *images.shape[1:])))
        seconds_before, seconds_after = folding.timings(comparison, timed, ROUNDS)
        times.append(
            {
                "what": "time",
                "batch": batch,
                "seconds_before": statistics.median(seconds_before),
                "seconds_after": statistics.median(seconds_after),
            }
        )
    return [outputs, *times]


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Runs that diverged were not folded and are left out."""
    ratios = {(net, batch): ratio(results[net], batch) for net in NETS for batch in BATCHES}
    runs_of_all = [run for net in NETS for run in results[net]]
    difference = largest(number(run, "difference") for run in runs_of_all)
    # Rounded, because the difference of two accuracies in float64 may exceed the limit by 1e-16.
    change = largest(round(abs(accuracy(run, "after") - accuracy(run, "before")), 6) for run in runs_of_all)
    faster = all(below(ratio_of_times, 1) for ratio_of_times in ratios.values())
    return {
        "counts": ", ".join(f"{folded(results[net])} ({NAMES[net]})" for net in NETS),
        "difference": "(not measured)" if math.isnan(difference) else f"{difference:.1e}",
        "accuracy": "(not measured)" if math.isnan(change) else f"{change:.2f}",
        "ratios": "; ".join(
            f"{NAMES[net]} {' and '.join(f'{quoted(ratios[net, batch], 2)} (batch {batch})' for batch in BATCHES)}"
            for net in NETS
        ),
        **judge(difference <= LARGEST_DIFFERENCE, change <= LARGEST_CHANGE, faster, seeds=len(results["cnn7"])),
    }


def number(run: dict, name: str, **which: object) -> float:
    """Returns a measured number; NaN if the run diverged."""
    return math.nan if diverged(run) else measured(run, name, **({"what": "outputs"} | which))


def accuracy(run: dict, when: str) -> float:
    """Returns the test accuracy "before" or "after", in %."""
    return 100 * number(run, f"accuracy_{when}")


def milliseconds(run: dict, when: str, batch: int) -> float:
    """Returns the time of an evaluation of `batch` images "before" or "after", in ms."""
    return 1000 * number(run, f"seconds_{when}", what="time", batch=batch)


def ratio(group: list[dict], batch: int) -> Spread:
    """Returns the time of an evaluation after folding, relative to before."""
    return spread(milliseconds(run, "after", batch) / milliseconds(run, "before", batch) for run in group)


def largest(numbers: Iterable[float]) -> float:
    """Returns the largest of the numbers that were measured; NaN if none was."""
    return max((value for value in numbers if not math.isnan(value)), default=math.nan)


def folded(group: list[dict]) -> str:
    """Says how many of a network's batch norms are folded: "all 6", or "5 of 6"."""
    n, norms = (largest(number(run, name) for run in group) for name in ("folded", "norms"))
    if math.isnan(n):
        return "none"
    return f"all {norms:.0f}" if n == norms else f"{n:.0f} of {norms:.0f}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per network and batch size."""
    del preset
    lines = []
    for net, batch in itertools.product(NETS, BATCHES):
        group = results[net]
        differences = spread(1e6 * number(run, "difference") for run in group)
        line = {
            "network": NAMES[net],
            "batch norms folded": folded(group),
            "change / largest output, 1e-6": quoted(differences),
        }
        for when in ("before", "after"):
            line[f"accuracy {when}, %"] = quoted(spread(accuracy(run, when) for run in group), 2)
        line["batch size"] = str(batch)
        for when in ("before", "after"):
            line[f"time {when}, ms"] = quoted(spread(milliseconds(run, when, batch) for run in group), 2)
        line["time after / before"] = quoted(ratio(group, batch), 2)
        lines.append(line | {"seeds": str(len(group))})
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws the ratio of times by network and batch size, and the largest change of an output by network."""
    ratios = [
        plots.Bar(
            f"{NAMES[net]}, batch {batch}",
            [milliseconds(run, "after", batch) / milliseconds(run, "before", batch) for run in results[net]],
            COLORS[batch],
        )
        for net, batch in itertools.product(NETS, BATCHES)
    ]
    differences = [
        plots.Bar(NAMES[net], [1e6 * number(run, "difference") for run in results[net]], plots.PALETTE["green"])
        for net in NETS
    ]
    return plots.draw(
        [
            plots.Bars("inference time, folded / unfolded", ratios),
            plots.Bars("change / largest output (1e-6)", differences),
        ]
    )
