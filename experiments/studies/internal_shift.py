"""Does batch norm reduce internal covariate shift?

Command: python -m experiments run internal_shift --preset small

Time: planned for 7 minutes on 2 CPU cores (small); measured: {time}

Published: Ioffe and Szegedy (2015) argue that batch norm reduces the change of the layers' input distributions, and
thereby speeds up training. It fixes their means and variances almost by construction, except for scale and bias.
Santurkar, Tsipras, Ilyas and Madry (2018, in figures only) find that the change of a layer's gradient caused by the
update of the layers below is no smaller with batch norm, as a distance (not divided by the gradient's length, as it is
here) and as a cosine; that a network with noise after each batch norm shifts more than one without a norm and still
trains better; and that the loss is smoother along the gradient. Lipton and Steinhardt (2018) question the explanation.
No numbers are published.

Finding: At the initial learning rate, from one evaluation to the next, the means of the layers' inputs shift by
{batch_mean} standard deviations with batch norm and the logarithms of their variances by {batch_var}; without batch
norm, by {none_mean} and {none_var}; with noise after batch norm, by {noisy_mean} and {noisy_var}. When the layers below
take a step, a layer's gradient changes by {batch_gradient} of its length with batch norm (cosine {batch_cosine}), by
{none_gradient} without ({none_cosine}), and by {noisy_gradient} with noise ({noisy_cosine}). The final test accuracies
are {batch_accuracy}, {none_accuracy} and {noisy_accuracy} %. Along the gradient, the loss varies {range_ratio} times as
much with batch norm as without, and the gradient changes {beta_ratio} times as much per distance. {verdict}.

Agreement: Agrees in part ((1) holds, (2) is not shown): averaged over the initial learning rate, inputs shift less with
batch norm, as Ioffe and Szegedy say, and the gradient turns less, unlike what Santurkar et al. find; its relative
change is smaller too, but not clearly. In the first hundred steps, the network without a norm is the smoother one, and
its gradient changes less. As they find, the loss is smoother on average with batch norm, and the network with noise
beats the one without a norm; but its inputs shift less at the initial rate, and more only after it.

Refuted if: (1) the shift of the inputs, of their means or of their variances, is not smaller with batch norm than
without; (2) the change of a layer's gradient caused by the step of the layers below is not smaller with batch norm than
without, or its cosine is not larger: the claim needs both, the smaller distance relative to the gradient's length and
the larger cosine. All are means over the layers and over the rows at the initial learning rate.
"""

import time
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    Spread,
    below,
    column,
    exceeds,
    final_accuracy,
    judge,
    paired_differences,
    paired_runs,
    quoted,
    spread,
)
from experiments.nets import linen as linen_nets
from experiments.probes import activations, shifts
from experiments.training import loop
from experiments.training.programs import MOMENTUM

ARMS = {"batch": "batch norm", "none": "no norm", "noisy": "batch norm, noise"}
COLORS = {**plots.COLORS, "noisy": plots.PALETTE["purple"]}
# Step sizes along the gradient: 0.5 to 4 times 0.1, the effective rate of the learning rate 0.01 with momentum 0.9.
STEPS = (0.05, 0.1, 0.2, 0.4)
SETTINGS = {"steps": STEPS, "images": activations.IMAGES}
MEASURES = {
    "mean_shift": "shift of means (std)",
    "var_shift": "shift of variances (log ratio)",
    "gradient_shift": "gradient shift (relative)",
    "gradient_cosine": "gradient cosine",
    "loss_range": "loss range along gradient (nats)",
    "gradient_change": "gradient change along gradient (relative)",
    "beta": "effective beta-smoothness",
}
QUOTED = {  # field of the finding (one per arm): measure
    "mean": "mean_shift",
    "var": "var_shift",
    "gradient": "gradient_shift",
    "cosine": "gradient_cosine",
}


def runs(preset: str) -> dict[str, Config]:
    """Returns the arms: batch norm, no norm, and batch norm followed by noise whose distribution changes every step."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(evaluations=2)
    batch = config.replace(norm="batch")
    return {"batch": batch, "none": config.replace(norm="none"), "noisy": batch.replace(noise="shifting")}


MEASURED_ON = (
    "Measured at every row on the first 500 training images, without augmentation, with the statistics of that batch. "
    "Shifts of the inputs are relative to the row before, each with separate noise; gradient shift and smoothness "
    "compare points under the same noise. The step of the layers below is rate / (1 - 0.9) times their gradient, which "
    "is what a constant gradient adds up to with the momentum of 0.9. The steps along the gradient are 0.05, 0.1, 0.2 "
    "and 0.4 times the gradient in all arms. Averages are over the rows at the initial rate; figures show all rows."
)
SETUP = {
    "small": "Seven layers with weights. The network and protocol of the full preset, except for "
    f"{runs('small')['batch'].differences(runs('full')['batch'])}. {MEASURED_ON} One trial run of each arm "
    "with another seed was used to set the duration, and to check that the network also learns without a norm.",
    "full": f"The Inception network and its published protocol on CIFAR-10. {MEASURED_ON}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run whose rows also hold the `MEASURES`."""
    net = linen_nets.build(config, len(dataset.class_names))
    batch, key = activations.first_images(dataset), jax.random.key(config.seed)

    def moments_of(variables: dict, step: int) -> list:
        return shifts.input_moments(net, variables, batch[0], jax.random.fold_in(key, step))

    def probe(state: Any, learning_rate: float) -> dict:
        variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        now = jax.random.fold_in(key, int(state.step))
        shift = shifts.gradient_shift(net, variables, batch, now, learning_rate / (1 - MOMENTUM))
        return {
            # In the row, so that they are in the checkpoint: a continued run needs those of its last row.
            "moments": moments_of(variables, int(state.step)),
            "gradient_shift": shift.distance,
            "gradient_cosine": shift.cosine,
            **shifts.along_gradient(net, variables, batch, now, STEPS)._asdict(),
        }

    trained = loop.fit(config, dataset, probe=probe, **options)
    clock = time.perf_counter()
    before, rows = moments_of(jax.device_get(loop.initial_variables(config, dataset)), 0), []
    for row in trained.rows:
        after = row["moments"]
        shift = shifts.distribution_shift(before, after)
        without_moments = {name: value for name, value in row.items() if name != "moments"}
        rows.append(without_moments | {"mean_shift": shift.mean, "var_shift": shift.var})
        before = after
    return trained._replace(rows=rows, seconds=trained.seconds + time.perf_counter() - clock)


def over_rows(run: dict, name: str) -> float:
    """Averages a measure over the rows at the initial learning rate in which it is finite; NaN if it never is.

    The rows after the rate has been lowered would only show that a lower rate moves any network less.
    """
    rate = run["header"]["config"]["learning_rate"]
    values = np.array([row[name] for row in run["rows"] if row["learning_rate"] == rate], float)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    arms = results["batch"], results["none"]

    def difference(name: str) -> Spread:
        return spread(paired_differences(lambda run: over_rows(run, name), *arms))

    def smaller(name: str) -> bool:
        return below(difference(name), 0)

    def ratio(name: str) -> str:
        both = paired_runs(*arms)
        return quoted(spread(over_rows(batch, name) / over_rows(none, name) for batch, none in both), 3)

    fields = {}
    for arm in ARMS:
        for field, name in QUOTED.items():
            fields[f"{arm}_{field}"] = quoted(_mean(results[arm], name), 3)
        fields[f"{arm}_accuracy"] = spread(map(final_accuracy, results[arm])).text()
    return fields | {
        "range_ratio": ratio("loss_range"),
        "beta_ratio": ratio("beta"),
        **judge(
            smaller("mean_shift") and smaller("var_shift"),
            smaller("gradient_shift") and exceeds(difference("gradient_cosine")),
            seeds=len(results["batch"]),
        ),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm: accuracy, and the measures averaged over the rows at the initial rate."""
    return [
        {
            "network": name,
            "final test accuracy, %": spread(map(final_accuracy, results[arm])).text(),
            **{label: quoted(_mean(results[arm], measure), 3) for measure, label in MEASURES.items()},
            "seeds": str(len(results[arm])),
        }
        for arm, name in ARMS.items()
    ]


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws the shifts of the inputs and of the gradient, the smoothness and the accuracy against the step."""

    def panel(name: str, label: str, factor: float = 1, **options) -> plots.Lines:
        lines = [
            plots.Line(
                title, column(results[arm], "step").max(axis=0), factor * column(results[arm], name), COLORS[arm]
            )
            for arm, title in ARMS.items()
        ]
        return plots.Lines("step", label, lines, **options)

    linear = ("mean_shift", "var_shift")
    logarithmic = ("gradient_shift", "loss_range", "beta")
    return plots.draw(
        [
            *(panel(name, MEASURES[name]) for name in linear),
            *(panel(name, MEASURES[name], yscale="log") for name in logarithmic),
            panel("test_accuracy", "test accuracy (%)", 100),
        ]
    )


def _mean(group: list[dict], name: str) -> Spread:
    return spread(over_rows(run, name) for run in group)
