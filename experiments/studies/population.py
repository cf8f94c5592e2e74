"""Which statistics should be used at test time?

Command: python -m experiments run population --preset small

Time: planned for 5 minutes on 2 CPU cores (small); measured: {time}

Published: Ioffe and Szegedy (2015) test with the statistics of the population, approximated by running averages over
the steps of training. Wu and Johnson (2021) recompute them on training images once the weights are final ("precise"
batch norm), and find that validation is more stable than with running averages, notably early in training and with
large batches. No numbers are published for CIFAR-10.

Finding: After {short_steps} steps, the network has {short_average} % test accuracy with the running average of momentum
0.99 and {short_precise} % with statistics of 1,000 training images, {short_gain}; with the average of momentum 0.999 it
has {slow} %, and with the same average debiased, {debiased} %, {debias_gain}. After {long_steps} steps, it has
{long_average} % with momentum 0.99 and {long_precise} % with 1,000 images, {long_gain}. An average of momentum 0.9
gives {short_fast} % and {long_fast} %. {verdict}.

Agreement: Agrees in part ((1) and (3) hold, (2) is not shown): early in training, recomputed statistics are far better
than slow running averages, as Wu and Johnson find, though not clearly better than a fast one; later they are within the
margin of momentum 0.99. Debiasing the slowest average helps early on average, but by very different amounts from seed
to seed.

Refuted if: (1) in short training, 1,000 images are no more accurate than the running average of momentum 0.99; (2) in
short training, the running average of momentum 0.999 is no more accurate if it is debiased; (3) in long training, 1,000
images are not within 1 point of the running average of momentum 0.99. The first two claims are of a gain and one-sided:
a loss refutes them just as no difference does. The third is two-sided.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data import augmentation
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    compared,
    exceeds,
    final_accuracy,
    gains,
    has_too_few_images,
    judge,
    measured_accuracy,
    quoted,
    spread,
    within,
)
from experiments.nets import linen as linen_nets
from experiments.training import loop
from experiments.training.evaluation import evaluate, predict, score, split
from jaxbn import calibrate

AVERAGES = {  # arm: momentum, and whether the average is debiased
    "0.9": (0.9, False),
    "0.99": (0.99, False),
    "0.999": (0.999, False),
    "0.99-debiased": (0.99, True),
    "0.999-debiased": (0.999, True),
}
LENGTHS = ("short", "long")
MEASURED = "0.99"  # the arm that is also tested with other statistics; all arms have the same weights
TEST_BATCHES = (100, 10)
IMAGES = (10, 100, 1000, 10_000)
ENOUGH = 1000  # images for precise statistics in the claims
BATCH = 100  # images that are normalized together to measure precise statistics
SETTINGS = {"test_batches": TEST_BATCHES, "images": IMAGES, "batch": BATCH}
STATISTICS = (  # kind, and the arm or the number of images
    *(("running", name) for name in AVERAGES),
    *(("batch", n) for n in TEST_BATCHES),
    *(("precise", n) for n in IMAGES),
)
MARGIN = 1.0  # points within which two accuracies count as equal
COLORS = {"running": plots.PALETTE["blue"], "batch": plots.PALETTE["orange"], "precise": plots.PALETTE["green"]}


def runs(preset: str) -> dict[str, Config]:
    """Returns short and long training with each running average; `SETUP` says how `small` differs."""
    long = PRESETS[preset]
    configs = {"short": long.replace(epochs=1), "long": long}
    return {
        f"{length}-{name}": configs[length].replace(momentum=momentum, debias=debias)
        for length in LENGTHS
        for name, (momentum, debias) in AVERAGES.items()
    }


SHARED = (
    "Short training is only the first epoch. Running statistics play no part in training, so that the networks of one "
    "seed and length differ only in these. Precise statistics are the moments of training images, augmented as in "
    f"training, in batches of {BATCH} that are normalized as in training; test images are not augmented."
)
SETUP = {
    "small": (
        "The published network and protocol, except for "
        f"{runs('small')['long-0.99'].differences(runs('full')['long-0.99'])}. {SHARED} Nothing was tuned. Claims (1) "
        "and (3) compared with momentum 0.9 until a first set of runs had been made, and with 0.99, the default of "
        "Flax, since then; the table has both."
    ),
    "full": f"The published network and protocol, with other running averages. {SHARED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run; in one arm of each length, also tests the network with other statistics."""
    trained = loop.fit(config, dataset, **options)
    if (config.momentum, config.debias) != AVERAGES[MEASURED] or trained.rows[-1]["diverged"]:
        return trained
    return trained.measure(lambda variables: scores_with_statistics(config, dataset, variables))


def scores_with_statistics(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Measures loss and accuracy with the statistics of test batches, and of more and more training images."""
    net = linen_nets.build(config, len(dataset.class_names))

    def scored(name: str, images: int, variables: dict, **how) -> dict:
        logits = predict(net, variables, dataset.test_images, **how)
        return {"statistics": name, "images": images, **score(logits, dataset.test_labels)._asdict()}

    entries = []
    for n in TEST_BATCHES:
        if n <= len(dataset.test_images):
            entries.append(scored("batch", n, variables, statistics="batch", batch_size=n))
    for n in IMAGES:
        if n <= len(dataset.train_images):
            batches = augmented(config, dataset, n)
            entries.append(scored("precise", n, calibrate.one_pass(net, variables, batches, call=evaluate)))
    return entries


def augmented(config: Config, dataset: Dataset, n: int) -> list[jax.Array]:
    """Draws n training images at random; returns batches of floats in [0, 1], augmented as in training."""
    # RandomState, because NumPy promises never to change its stream.
    drawn = np.random.RandomState(config.seed).permutation(len(dataset.train_images))[:n]
    key, flip = jax.random.key(config.seed), config.data == "cifar10"
    return [
        _augment(jax.random.fold_in(key, i), jnp.asarray(batch), flip)
        for i, batch in enumerate(split(dataset.train_images[drawn], BATCH))
    ]


@functools.partial(jax.jit, static_argnums=2)
def _augment(key: jax.Array, images: jax.Array, flip: bool) -> jax.Array:
    return augmentation.augment(key, images.astype(jnp.float32) / 255, flip=flip)


def precise(run: dict, images: int = ENOUGH) -> float:
    """Returns the test accuracy, in %, with statistics of `images` training images."""
    return accuracy(run, "precise", images)


def accuracy(run: dict, statistics: str, images: int) -> float:
    """Returns the test accuracy, in %, with one of `STATISTICS`; NaN if the run diverged or had too few images."""
    if has_too_few_images(run, images, statistics=statistics):
        return math.nan
    return measured_accuracy(run, statistics=statistics, images=images)


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    short, long = (results[f"{length}-{MEASURED}"] for length in LENGTHS)
    short_gain, long_gain = (spread(precise(run) - final_accuracy(run) for run in group) for group in (short, long))
    debias_gain = spread(gains(results, "short-0.999-debiased", "short-0.999"))
    claims = exceeds(short_gain), exceeds(debias_gain), within(long_gain, MARGIN)
    running = {
        "short_average": short,
        "long_average": long,
        "slow": results["short-0.999"],
        "debiased": results["short-0.999-debiased"],
        "short_fast": results["short-0.9"],
        "long_fast": results["long-0.9"],
    }
    return {
        **{field: spread(map(final_accuracy, group)).text() for field, group in running.items()},
        "short_steps": str(short[0]["rows"][-1]["step"]),
        "short_precise": quoted(spread(map(precise, short))),
        "short_gain": compared(short_gain, "more", "less"),
        "debias_gain": compared(debias_gain, "more", "less"),
        "long_steps": str(long[0]["rows"][-1]["step"]),
        "long_precise": quoted(spread(map(precise, long))),
        "long_gain": compared(long_gain, "more", "less"),
        **judge(*claims, seeds=short_gain.n),
    }


def accuracies(results: dict[str, list[dict]], length: str, kind: str, which: str | int) -> list[float]:
    """Returns the test accuracies over seeds, in %, with one of `STATISTICS`; NaN if not measured."""
    if kind == "running":
        return [final_accuracy(run) for run in results[f"{length}-{which}"]]
    return [accuracy(run, kind, which) for run in results[f"{length}-{MEASURED}"]]


def named(kind: str, which: str | int) -> str:
    """Names one of `STATISTICS` for readers."""
    if kind == "running":
        return f"running average {which.replace('-', ', ')}"
    return f"test batch of {which}" if kind == "batch" else f"{which:,} training images"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per kind of statistics."""
    del preset
    return [
        {"statistics at test time": named(*statistics)}
        | {f"{length} training, %": quoted(spread(accuracies(results, length, *statistics))) for length in LENGTHS}
        | {"seeds": str(len(results[f"short-{MEASURED}"]))}
        for statistics in STATISTICS
    ]


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws accuracy by statistics after short and long training, and against the number of images."""
    panels, lines = [], []
    for length, dashes in zip(LENGTHS, (":", "-"), strict=True):
        measured = {(kind, which): np.array(accuracies(results, length, kind, which)) for kind, which in STATISTICS}
        measured = {statistics: values for statistics, values in measured.items() if np.isfinite(values).all()}
        bars = [
            plots.Bar(named(kind, which), values, COLORS[kind])
            for (kind, which), values in measured.items()
            if kind != "precise" or which == ENOUGH
        ]
        steps = results[f"{length}-{MEASURED}"][0]["rows"][-1]["step"]
        panels.append(plots.Bars("test accuracy (%)", bars, title=f"{length} training, {steps:,} steps"))
        if images := [which for kind, which in measured if kind == "precise"]:
            accuracy = np.array([measured["precise", n] for n in images]).T
            lines.append(plots.Line(length, np.array(images), accuracy, COLORS["precise"], dashes, marker="o"))
    if lines:
        panels.append(plots.Lines("training images", "test accuracy (%)", lines, xscale="log"))
    return plots.draw(panels)
