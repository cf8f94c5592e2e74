"""What does fusing batch norm into the convolution buy, and what does it cost?

Command: python -m experiments run folding --preset small

Time: sized for 3 minutes on 2 CPU cores (small); measured: {time}

Published: No number. At inference batch norm is a fixed affine map, which the convolution before it can take in; that
is commonly said to save time and to leave the outputs as they are.

Finding: Of the batch norms, folding takes away {counts}. The outputs on the test images then differ by at most
{difference} of the largest output, and the test accuracy by at most {accuracy} points. The time of inference
afterwards, over that before, is: {ratios}. {verdict}.

Agreement: Agrees in part ((1) and (2) hold, (3) is not shown): outputs stay as they are but for rounding, and a single
image takes clearly less time with every net; with a batch of 100 images little is saved with the 7-layer CNN, and
nothing for certain with the other two.

Refuted if: (1) an output differs by more than 0.00001 of the largest one; (2) a test accuracy changes by more than 0.05
points; (3) one of the nets is not faster afterwards, with a batch of 1 or with one of 100.
"""

import functools
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
from experiments.evidence.verdicts import Spread, below, entries, judge, measured, quoted, spread
from experiments.nets import linen as linen_nets
from experiments.probes import folding
from experiments.training import evaluation, loop

NETS = {"cnn7": 1.0, "resnet20": 0.5, "inception": 0.125}  # with their widths on `small`
NAMES = {"cnn7": "7-layer CNN", "resnet20": "ResNet-20", "inception": "Inception"}
BATCHES = (1, 100)  # images whose evaluation is timed
ROUNDS = 30  # timings of each
SETTINGS = {"batches": BATCHES, "rounds": ROUNDS}
COLORS = {1: plots.PALETTE["sky"], 100: plots.PALETTE["blue"]}
LARGEST_DIFFERENCE = 1e-5
LARGEST_CHANGE = 0.05  # points of accuracy


def runs(preset: str) -> dict[str, Config]:
    """Returns the three nets, trained shortly; what `small` makes smaller is said in `SETUP`."""
    config = PRESETS[preset].replace(epochs=2)
    if preset == "small":
        config = config.replace(train_images=3_000, epochs=1, momentum=0.9)
    return {net: config.replace(net=net, width=NETS[net] if preset == "small" else 1.0) for net in NETS}


TIMED = (
    f"Times are medians of {ROUNDS} evaluations before and as many after, in turns; the weights are arguments of the "
    "compiled function, as they mostly are, and folding leaves fewer arrays to hand over."
)
SETUP = {
    "small": "Each net learns only long enough for its statistics to be real ones. Not the published protocol, but for "
    f"the Inception net {runs('small')['inception'].differences(Config())}; the others have the widths 1 (7-layer CNN) "
    f"and 0.5 (ResNet-20). Sizes were set by the time of one trial run with another seed. {TIMED}",
    "full": f"The nets at full width, trained by the published protocol, but for two epochs only. {TIMED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a net as `loop.fit` does, and folds it."""
    trained = loop.fit(config, dataset, **options)
    if trained.rows[-1]["diverged"]:
        return trained
    net = linen_nets.build(config, len(dataset.class_names))
    return trained.measure(lambda variables: measure(net, variables, dataset))


def measure(net: nn.Module, variables: dict, dataset: Dataset) -> list[dict]:
    """Returns what folding does to a net: to its outputs on the test images, and to the time of an evaluation.

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      dataset: its test images; for the timings, they are repeated where they are too few.
    """
    images, largest = dataset.test_images.astype(np.float32) / 255, max(BATCHES)
    pair = folding.fold_net(net, variables, images[:1])
    batches = [images[first : first + largest] for first in range(0, len(images), largest)]
    with jax.default_matmul_precision("highest"):  # the default of a GPU rounds more than folding changes
        before, after = (np.concatenate([forward(x) for x in batches]) for forward in (pair.before, pair.after))
    outputs = {
        "what": "outputs",
        "norms": pair.norms,
        "folded": pair.folded,
        "difference": folding.difference(before, after),
        "accuracy_before": evaluation.score(before, dataset.test_labels).accuracy,
        "accuracy_after": evaluation.score(after, dataset.test_labels).accuracy,
    }
    times = []
    for batch in BATCHES:
        timings = folding.timings(pair, jnp.asarray(np.resize(images, (batch, *images.shape[1:]))), ROUNDS)
        seconds = [statistics.median(each) for each in timings]
        times.append({"what": "time", "batch": batch, "seconds_before": seconds[0], "seconds_after": seconds[1]})
    return [outputs, *times]


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding; runs that diverged were not folded, and are left out."""
    ratios = {(net, batch): ratio(results[net], batch) for net in NETS for batch in BATCHES}
    every = [run for net in NETS for run in results[net]]
    difference = largest(number(run, "difference") for run in every)
    change = largest(round(abs(accuracy(run, "after") - accuracy(run, "before")), 6) for run in every)
    faster = all(below(each, 1) for each in ratios.values())
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
    """Returns a number that was measured; NaN where the run diverged."""
    which = {"what": "outputs"} | which
    return measured(run, name, **which) if entries(run, **which) else math.nan


def accuracy(run: dict, when: str) -> float:
    """Returns the test accuracy "before" or "after", in %."""
    return 100 * number(run, f"accuracy_{when}")


def milliseconds(run: dict, when: str, batch: int) -> float:
    """Returns the time of an evaluation of so many images "before" or "after"."""
    return 1000 * number(run, f"seconds_{when}", what="time", batch=batch)


def ratio(group: list[dict], batch: int) -> Spread:
    """Returns the time of an evaluation after folding, over that before."""
    return spread(milliseconds(run, "after", batch) / milliseconds(run, "before", batch) for run in group)


def largest(numbers: Iterable[float]) -> float:
    """Returns the largest of those that were measured; NaN without any."""
    return max((each for each in numbers if math.isfinite(each)), default=math.nan)


def folded(group: list[dict]) -> str:
    """Says how many of a net's batch norms are folded: "all 6", or "5 of 6"."""
    n, norms = (largest(number(run, name) for run in group) for name in ("folded", "norms"))
    if math.isnan(n):
        return "none"
    return f"all {norms:.0f}" if n == norms else f"{n:.0f} of {norms:.0f}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line for each net and batch."""
    del preset
    lines = []
    for net, batch in itertools.product(NETS, BATCHES):
        group = results[net]
        differences = spread(1e6 * number(run, "difference") for run in group)
        accuracies, times = (
            {when: quoted(spread(of(run, when) for run in group), 2) for when in ("before", "after")}
            for of in (accuracy, functools.partial(milliseconds, batch=batch))
        )
        lines.append(
            {
                "net": NAMES[net],
                "batch norms folded": folded(group),
                "difference / largest output, 1e-6": quoted(differences),
                **{f"accuracy {when}, %": text for when, text in accuracies.items()},
                "batch": str(batch),
                **{f"time {when}, ms": text for when, text in times.items()},
                "after / before": quoted(ratio(group, batch), 2),
                "seeds": str(len(group)),
            }
        )
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns the ratio of times for each net and batch, and the largest difference for each net."""
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
            plots.Bars("time of inference, folded / before", ratios),
            plots.Bars("difference / largest output (1e-6)", differences),
        ]
    )
