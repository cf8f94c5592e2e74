"""Does batch norm forgive a bad start?

Command: python -m experiments run initialization --preset small

Time: sized for 4 minutes on 2 CPU cores (small); measured: {time}

Published: A 7-layer CNN on CIFAR-10 whose weights start from U(-0.001, 0.001) does not train at all without batch norm:
its pre-activations fall to about 1e-11 in the last layer. Batch norm on the last layer alone, before the softmax, was
enough for it to train (notes on batch normalization, 2016; no accuracy published). Batch norm gives the same output and
the same gradient with respect to the layer's input when the weights are multiplied by a, and 1/a times the gradient
with respect to the weights (Ioffe and Szegedy 2015, section 3.3).

Finding: From U(-0.001, 0.001), the net ends at {none} % test accuracy without batch norm; at {batch} % with it after
every convolution, {gain}; and at {logits} % with it before the softmax alone, with the net's own epsilon,
{logits_gain}. From the usual weights, without it, it ends at {usual} %. From U(-0.001, 0.001) and without it, the size
of the pre-activations is {first} in the first layer and {last} in the last. The norm before the softmax turns such
values into logits of size {normalized}; with an epsilon of {tiny}, of size {restored}, and at this rate {tiny_epsilon}.
With an epsilon of {negligible}, multiplying one layer's weights by 0.01 to 100 from the usual start changes the output
of its batch norm by {output} of the largest value, the gradient with respect to the layer's input by {input_gradient},
and that with respect to its weights, times the factor, by {weight_gradient} (the largest changes over factors and
layers). With the net's own epsilon, multiplying by 100 changes the output by {own_large} and by 0.01 by {own_small};
from the tiny start, multiplying by 100 changes it by {tiny_large}. {verdict}.

Agreement: Agrees in part ((1) and (3) hold, (2) is not shown): without batch norm the bad start stays at chance, and
batch norm after every convolution rescues it; where epsilon is negligible, the scale of the weights drops out, as
derived. Batch norm before the softmax alone does not rescue it: at the start its epsilon keeps the logits tiny, and
with a far smaller one training diverges.

Refuted if: (1) without batch norm the net ends at a mean of 15 % test accuracy or more, or batch norm after every
convolution does not exceed it by more than 10 points; (2) batch norm before the softmax alone, with the net's own
epsilon (1e-5 in the small preset, 1e-3 in the full one), does not exceed it by more than 10 points; (3) with a
negligible epsilon (1e-12), multiplying the weights of a layer by 0.01, 0.1, 10 or 100 from the usual start changes the
output of its batch norm by more than 0.0001 of its largest value, with any seed.
"""

import functools
import math
from collections.abc import Iterable

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import (
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
    "logits": "batch norm last",
    "tiny_epsilon": "last, tiny epsilon",
    "usual": "usual, no norm",
}
COLORS = {
    **plots.COLORS,
    "logits": plots.PALETTE["sky"],
    "tiny_epsilon": plots.PALETTE["green"],
    "usual": plots.PALETTE["black"],
}
TINY_EPSILON = 1e-37  # below the variance of what the last layer puts out, and still a normal float32
NEGLIGIBLE = 1e-12  # beside the variances of the usual start, even where its weights are multiplied by 0.01
SCALED = {  # name: start and epsilon with which the weights of a layer are multiplied
    "usual start": ("usual", "own"),
    "tiny weights": ("tiny", "own"),
    f"usual, epsilon {NEGLIGIBLE:g}": ("usual", "negligible"),
}
SCALED_COLORS = (plots.PALETTE["black"], plots.COLORS["batch"], plots.PALETTE["purple"])
FACTORS = (0.01, 0.1, 10.0, 100.0)  # of the weights of a layer
SCALED_IMAGES = 100  # on which their effect is measured
SETTINGS = {"negligible": NEGLIGIBLE, "factors": FACTORS, "scaled_images": SCALED_IMAGES, "images": activations.IMAGES}
CHANCE = 15.0  # %; below this, nothing was learned
LEAST_GAIN = 10.0  # points
UNCHANGED = 1e-4  # relative


def runs(preset: str) -> dict[str, Config]:
    """Returns the net with tiny weights in four variants, and with the usual weights for comparison."""
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
    f"All arms have the same rate. What multiplied weights change is compared on {SCALED_IMAGES} training images, with "
    "products in full float32."
)
SETUP = {
    "small": "Seven layers with weights; not the net and the protocol of the full preset, but "
    f"{runs('small')['none'].differences(runs('full')['none'])}. One trial run of each arm with another seed, for the "
    f"time. {SHARED}",
    "full": f"Not the published net, but the Inception net and its protocol: 55 layers with weights. {SHARED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run; measures the layers' sizes at both ends, and with batch norm everywhere what scaling changes."""
    return loop.fit(config, dataset, **options).measure(lambda variables: measure(config, dataset, variables))


def measure(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Returns the layers' sizes at the start of a run and at its end, and what scaling the weights changes."""
    net = linen_nets.build(config, len(dataset.class_names))
    (images, _), key = activations.first_images(dataset), jax.random.key(config.seed)
    start = jax.device_get(loop.initial_variables(config, dataset))
    found = [
        {"when": when, **activations.sizes(net, of_then, images, key)._asdict()}
        for when, of_then in (("start", start), ("end", variables))
    ]
    if config.norm == "batch" and config.norm_layers == "hidden":
        images = images[:SCALED_IMAGES]
        usual = linen_nets.build(config.replace(init_scale=None), len(dataset.class_names))
        starts = {"usual": _initialize(usual, key, images[:1]), "tiny": start}
        nets = {
            "own": net,
            "negligible": linen_nets.build(config.replace(epsilon=NEGLIGIBLE), len(dataset.class_names)),
        }
        for name, epsilon in SCALED.values():
            changes = activations.rescaling(nets[epsilon], starts[name], images, key, FACTORS)
            which = {"start": name, "epsilon": epsilon}
            found += [which | {"factor": factor, **change._asdict()} for factor, change in changes.items()]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _initialize(net, key, images):
    return net.init(key, images, train=False)


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding; gains are taken between runs of the same seed."""

    def gain(arm):
        return spread(gains(results, arm, "none"))

    def largest(name):
        return [float(np.max(changes(run, name, "usual", "negligible"))) for run in results["batch"]]

    def own(factor, start="usual"):
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
    """Returns the relative changes of the output or a gradient, one for each of `FACTORS`."""
    return [measured(run, name, start=start, epsilon=epsilon, factor=factor) for factor in FACTORS]


def _end(runs):
    """How runs end that may diverge."""
    lost = sum(map(diverged, runs))
    accuracy = spread(map(final_accuracy, runs)).text()
    return f"{lost} of {len(runs)} runs diverge" if lost else f"the net ends at {accuracy} %"


def scientific(values: Iterable[float]) -> str:
    """Returns numbers of any size as mean and deviation over seeds; in words where one is not finite."""
    found = spread(values)
    if not math.isfinite(found.mean):
        return "(not finite)"
    if found.mean >= 0.01:
        return found.text(3)
    return f"{found.mean:.1e} (1 seed)" if found.n == 1 else f"{found.mean:.1e} ± {found.std:.0e}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm: accuracy, and the pre-activations of the first and the last layer at both ends."""
    lines = []
    for arm, name in ARMS.items():
        group = results[arm]
        line = {
            "net (from U(-0.001, 0.001), but for the last)": name,
            "final test accuracy, %": spread(map(final_accuracy, group)).text(),
        }
        for when in ("start", "end"):
            for layer, place in (("first", 0), ("last", -1)):
                sizes = [measured(run, "layers", when=when)[place] for run in group]
                line[f"pre-activations (rms), {layer} layer, {when}"] = scientific(sizes)
        lines.append(line | {"seeds": str(len(group))})
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns pre-activations by layer, accuracy against epoch, and what the size of the weights changes."""
    by_layer, by_epoch = [], []
    for arm, name in ARMS.items():
        group, dashes = results[arm], "--" if arm == "logits" else "-"
        sizes = np.array([measured(run, "layers", when="start") for run in group], float)
        sizes = np.where(sizes > 0, sizes, np.nan)  # what float32 cannot hold has no place on a log scale
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
            plots.Lines("layer", "pre-activations at the start (rms)", by_layer, yscale="log"),
            plots.Lines("epoch", "test accuracy (%)", by_epoch),
            plots.Lines(
                "weights of a layer multiplied by",
                "relative change of the output",
                by_factor,
                "log",
                yscale="log",
            ),
        ]
    )


def _changes(group, start, epsilon):
    """The relative changes of the output, shape [seeds, factors]; 0 has no place on a log scale."""
    found = np.array([changes(run, "output", start, epsilon) for run in group])
    return np.where(found > 0, found, np.nan)
