"""Does batch norm make up for a bad initialization?

Command: python -m experiments run initialization --preset small

Time: planned for 4 minutes on 2 CPU cores (small); measured: {time}

Published: On CIFAR-10, a 7-layer CNN whose weights are initialized from U(-0.001, 0.001) does not train at all without
batch norm: its pre-activations shrink to about 1e-11 in the last layer. Batch norm on the last layer alone, before the
softmax, was enough for it to train (notes on batch normalization, 2016; no accuracy published). If the weights are
multiplied by a, batch norm gives the same output and the same gradient with respect to the layer's input, and 1/a times
the gradient with respect to the weights (Ioffe and Szegedy 2015, section 3.3).

Finding: Initialized from U(-0.001, 0.001), the network ends at {none} % test accuracy without batch norm; at {batch} %
with batch norm after every convolution, {gain}; and at {logits} % with batch norm before the softmax alone, with the
network's own epsilon, {logits_gain}. With the usual initialization and no batch norm, it ends at {usual} %. Initialized
from U(-0.001, 0.001) and without batch norm, the size of the pre-activations is {first} in the first layer and {last}
in the last. Batch norm before the softmax turns such values into logits of size {normalized}; with an epsilon of
{tiny}, of size {restored}, and at this learning rate {tiny_epsilon}. With the usual initialization and an epsilon of
{negligible}, multiplying one layer's weights by 0.01 to 100 changes the output of its batch norm by {output} of the
largest value, the gradient with respect to the layer's input by {input_gradient}, and the gradient with respect to its
weights, times the factor, by {weight_gradient} (the largest changes over factors and layers). With the network's own
epsilon, multiplying by 100 changes the output by {own_large} and by 0.01 by {own_small}; with the tiny initialization,
multiplying by 100 changes it by {tiny_large}. {verdict}.

Agreement: Agrees in part ((1) and (3) hold, (2) is not shown): without batch norm, the network with the bad
initialization stays at chance, and batch norm after every convolution rescues it. Where epsilon is negligible, the
scale of the weights cancels, as derived. Batch norm before the softmax alone does not rescue it: at the start its
epsilon keeps the logits tiny, and with a far smaller epsilon training diverges.

Refuted if: (1) without batch norm, the network ends at a mean of 15 % test accuracy or more, or batch norm after every
convolution does not exceed it by more than 10 points; (2) batch norm before the softmax alone, with the network's own
epsilon (1e-5 in the small preset, 1e-3 in the full one), does not exceed it by more than 10 points; (3) with the usual
initialization and a negligible epsilon (1e-12), multiplying the weights of a layer by 0.01, 0.1, 10 or 100 changes the
output of its batch norm by more than 0.0001 of its largest value, with any seed.
"""

import functools
import math
from collections.abc import Iterable

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    Spread,
    column,
    compared,
    diverged,
    exceeds,
    final_accuracy,
    gains,
    judge,
    measured,
    spread,
)
from experiments.nets import linen as linen_nets
from experiments.probes import activations
from experiments.training import loop

ARMS = {
    "none": "no norm",
    "batch": "batch norm",
    "logits": "logits only",
    "tiny_epsilon": "logits, tiny epsilon",
    "usual": "usual init, no norm",
}
COLORS = {
    **plots.COLORS,
    "logits": plots.PALETTE["sky"],
    "tiny_epsilon": plots.PALETTE["green"],
    "usual": plots.PALETTE["black"],
}
TINY_EPSILON = 1e-37  # below the variance of the last layer's outputs, and still a normal float32
NEGLIGIBLE = 1e-12  # compared with the variances at the usual initialization, even with weights times 0.01
SCALED = {  # name: initialization and epsilon with which the weights of a layer are multiplied
    "usual init": ("usual", "own"),
    "tiny init": ("tiny", "own"),
    f"usual, epsilon {NEGLIGIBLE:g}": ("usual", "negligible"),
}
SCALED_COLORS = (plots.PALETTE["black"], plots.COLORS["batch"], plots.PALETTE["purple"])
FACTORS = (0.01, 0.1, 10.0, 100.0)  # of the weights of a layer
SCALED_IMAGES = 100  # on which the effect is measured
SETTINGS = {"negligible": NEGLIGIBLE, "factors": FACTORS, "scaled_images": SCALED_IMAGES, "images": activations.IMAGES}
CHANCE = 15.0  # %; below this, the network has learned nothing
LEAST_GAIN = 10.0  # points
UNCHANGED = 1e-4  # relative


def runs(preset: str) -> dict[str, Config]:
    """Returns the network with tiny weights in four variants, and with the usual weights for comparison."""
    usual = PRESETS[preset].replace(norm="none")
    tiny = usual.replace(init_scale=0.001)
    logits = tiny.replace(norm="batch", norm_layers="logits")
    return {
        "none": tiny,
        "batch": tiny.replace(norm="batch"),
        "logits": logits,
        "tiny_epsilon": logits.replace(epsilon=TINY_EPSILON),
        "usual": usual,
    }


SHARED = (
    "All arms have the same learning rate. The effect of multiplying weights is measured on "
    f"{SCALED_IMAGES} training images, with products in full float32."
)
SETUP = {
    "small": "Seven layers with weights. The network and protocol of the full preset, except for "
    f"{runs('small')['none'].differences(runs('full')['none'])}. One trial run of each arm with another seed was "
    f"used to set the duration. {SHARED}",
    "full": f"Not the published network, but the Inception network and its protocol: 55 layers with weights. {SHARED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run; measures the size of the activations at its start and end, and the effect of scaling weights."""
    trained = loop.fit(config, dataset, **options)
    return trained.measure(lambda variables: sizes_and_rescaling(config, dataset, variables))


def sizes_and_rescaling(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Measures the layers' sizes at the start and end of a run and, with batch norm everywhere, `SCALED`."""
    net = linen_nets.build(config, len(dataset.class_names))
    (images, _), key = activations.first_images(dataset), jax.random.key(config.seed)
    start = jax.device_get(loop.initial_variables(config, dataset))
    entries = []
    for when, variables_then in (("start", start), ("end", variables)):
        entries.append({"when": when, **activations.sizes(net, variables_then, images, key)._asdict()})
    if config.norm != "batch" or config.norm_layers != "hidden":
        return entries
    images = images[:SCALED_IMAGES]
    usual = linen_nets.build(config.replace(init_scale=None), len(dataset.class_names))
    negligible = linen_nets.build(config.replace(epsilon=NEGLIGIBLE), len(dataset.class_names))
    starts = {"usual": _initialize(usual, key, images[:1]), "tiny": start}
    nets = {"own": net, "negligible": negligible}
    for name, epsilon in SCALED.values():
        changes = activations.rescaling(nets[epsilon], starts[name], images, key, FACTORS)
        for factor, change in changes.items():
            entries.append({"start": name, "epsilon": epsilon, "factor": factor, **change._asdict()})
    return entries


@functools.partial(jax.jit, static_argnums=0)
def _initialize(net: nn.Module, key: jax.Array, images: jax.Array) -> dict:
    return net.init(key, images, train=False)


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Gains are taken between runs of the same seed."""

    def gain(arm: str) -> Spread:
        return spread(gains(results, arm, "none"))

    def largest(name: str) -> list[float]:
        return [float(np.max(changes(run, name, "usual", "negligible"))) for run in results["batch"]]

    def own(factor: float, start: str = "usual") -> str:
        which = {"start": start, "epsilon": "own", "factor": factor}
        return scientific(measured(run, "output", **which) for run in results["batch"])

    at_chance = np.mean([final_accuracy(run) for run in results["none"]]) < CHANCE
    claims = (
        bool(at_chance) and exceeds(gain("batch"), LEAST_GAIN),
        exceeds(gain("logits"), LEAST_GAIN),
        all(change <= UNCHANGED for change in largest("output")),
    )
    return {
        **{arm: spread(map(final_accuracy, results[arm])).text() for arm in ARMS},
        "tiny_epsilon": _end(results["tiny_epsilon"]),
        "gain": compared(gain("batch"), "more", "less"),
        "logits_gain": compared(gain("logits"), "more", "less"),
        "first": scientific(measured(run, "layers", when="start")[0] for run in results["none"]),
        "last": scientific(measured(run, "layers", when="start")[-1] for run in results["none"]),
        "normalized": scientific(measured(run, "logits", when="start") for run in results["logits"]),
        "restored": scientific(measured(run, "logits", when="start") for run in results["tiny_epsilon"]),
        "tiny": f"{TINY_EPSILON:g}",
        "negligible": f"{NEGLIGIBLE:g}",
        "output": scientific(largest("output")),
        "input_gradient": scientific(largest("input_gradient")),
        "weight_gradient": scientific(largest("weight_gradient")),
        "own_large": own(100.0),
        "own_small": own(0.01),
        "tiny_large": own(100.0, start="tiny"),
        **judge(*claims, seeds=len(results["none"])),
    }


def changes(run: dict, name: str, start: str, epsilon: str) -> list[float]:
    """Returns the relative changes of the output or of a gradient, one for each of `FACTORS`."""
    return [measured(run, name, start=start, epsilon=epsilon, factor=factor) for factor in FACTORS]


def _end(group: list[dict]) -> str:
    """Says how runs end, some of which may have diverged."""
    count = sum(map(diverged, group))
    accuracy = spread(map(final_accuracy, group)).text()
    return f"{count} of {len(group)} runs diverge" if count else f"the network ends at {accuracy} %"


def scientific(values: Iterable[float]) -> str:
    """Returns the mean and deviation over seeds of numbers of any magnitude, or "(not finite)"."""
    mean, std, n = over_seeds = spread(values)
    if not math.isfinite(mean):
        return "(not finite)"
    if mean >= 0.01:
        return over_seeds.text(3)
    return f"{mean:.1e} (1 seed)" if n == 1 else f"{mean:.1e} ± {std:.0e}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm: accuracy, and the size of pre-activations in the first and last layer."""
    lines = []
    for arm, name in ARMS.items():
        group = results[arm]
        line = {
            "network (initialized from U(-0.001, 0.001), except the last)": name,
            "final test accuracy, %": spread(map(final_accuracy, group)).text(),
        }
        for when in ("start", "end"):
            for layer, place in (("first", 0), ("last", -1)):
                sizes = [measured(run, "layers", when=when)[place] for run in group]
                line[f"rms of pre-activations, {layer} layer, {when}"] = scientific(sizes)
        lines.append(line | {"seeds": str(len(group))})
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws pre-activations by layer, accuracy against epoch, and the effect of multiplying weights."""
    by_layer, by_epoch = [], []
    for arm, name in ARMS.items():
        group, dashes = results[arm], "--" if arm == "logits" else "-"
        sizes = np.array([measured(run, "layers", when="start") for run in group], float)
        sizes = np.where(sizes > 0, sizes, np.nan)  # underflow to 0 has no place on a log scale
        epochs = column(group, "epoch").max(axis=0)
        accuracy = 100 * column(group, "test_accuracy")
        by_layer.append(plots.Line(name, np.arange(1, sizes.shape[1] + 1), sizes, COLORS[arm], dashes))
        by_epoch.append(plots.Line(name, epochs, accuracy, COLORS[arm], dashes))
    by_factor = [
        plots.Line(name, np.array(FACTORS), _changes(results["batch"], *which), color, marker="o")
        for (name, which), color in zip(SCALED.items(), SCALED_COLORS, strict=True)
    ]
    return plots.draw(
        [
            plots.Lines("layer", "initial pre-activations (rms)", by_layer, yscale="log"),
            plots.Lines("epoch", "test accuracy (%)", by_epoch),
            plots.Lines(
                "factor on the weights of a layer",
                "relative change of the output",
                by_factor,
                "log",
                yscale="log",
            ),
        ]
    )


def _changes(group: list[dict], start: str, epsilon: str) -> np.ndarray:
    """Returns the relative changes of the output, shape [seeds, factors]; NaN for 0, for a log scale."""
    relative = np.array([changes(run, "output", start, epsilon) for run in group])
    return np.where(relative > 0, relative, np.nan)
