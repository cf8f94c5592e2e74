"""Should batch norms be trained, frozen or made affine in fine-tuning?

Command: python -m experiments run fine_tuning --preset small

Time: planned for 9 minutes on 2 CPU cores (small); measured: {time}

Published: No numbers. Common advice: freeze batch norm if the data set to fine-tune on is small and differs from the
one used for pre-training, or if batches are too small for good statistics; with a large data set and long training, or
with a similar data set, there is no need to. A map with learned scale and bias and fixed statistics is an option in
between.

Finding: With frozen instead of trained batch norms, the final test accuracy is {small_batch} at batch size 4, averaged
over the four targets (with affine maps that learn, {affine_small_batch}), and {small_far} on the small far target at
batch size 64 (with affine maps, {affine_small_far}). On the large targets at batch size 64, it is {large} with trained
batch norms than with frozen ones. {verdict}.

Agreement: Agrees in part ((3) holds, (1) and (2) are not shown): on large data sets there is no need to freeze, as
advised. But where freezing is advised, on the small far data set and at small batches, trained batch norms also end
clearly higher. Networks with frozen ones are trained at a tenth of the learning rate, chosen on the large near target,
and fit the small data sets less well.

Refuted if: (1) at batch size 4, frozen batch norms do not end above trained ones; (2) on the small far target at batch
size 64, they do not either; (3) on the large targets at batch size 64, trained batch norms end more than 1 point below
frozen ones.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.evidence import plots
from experiments.evidence.verdicts import Spread, compared, exceeds, final_accuracy, gains, judge, spread

TUNINGS = ("trained", "frozen", "affine")
TARGETS = {"near": {"classes": (5, 6, 7, 8, 9)}, "far": {"data": "digits", "classes": None}}
SIZES = {  # the large one is the size of the digits data set
    "small": {"train_images": 100, "epochs": 20, "lr_decay_epochs": 16},
    "large": {"train_images": 1_400, "epochs": 5, "lr_decay_epochs": 4},
}
BATCHES = (4, 64)
MARGIN = 1.0  # points that training may lose where freezing is commonly held to be unnecessary
AVERAGED = 640  # images over which running statistics average, at either batch size
RATES = {"trained": 0.03, "frozen": 0.003, "affine": 0.003}  # at the largest batch, and proportional to the batch
SMALL_BATCH, LARGE_BATCH = BATCHES
GROUPS = tuple(itertools.product(TARGETS, SIZES))
COLORS = {"frozen": plots.PALETTE["sky"], "affine": plots.PALETTE["vermilion"]}


def runs(preset: str) -> dict[str, Config]:
    """Returns every target, size, batch and tuning; `SETUP` says how `small` differs."""
    start = PRESETS[preset].replace(classes=(0, 1, 2, 3, 4))
    return {
        _label(target, size, batch, tuning): start.replace(
            augment=False,
            batch_size=batch,
            learning_rate=RATES[tuning] * batch / LARGE_BATCH,
            tuning=tuning,
            momentum=1 - batch / AVERAGED if tuning == "trained" else None,
            start=start,
            **TARGETS[target] | SIZES[size],
        )
        for target, size in GROUPS
        for batch in BATCHES
        for tuning in TUNINGS
    }


def _label(target: str, size: str, batch: int, tuning: str) -> str:
    return f"{size}-{target}-{batch}-{tuning}"


START = runs("small")["small-near-64-trained"].start
TUNED = (
    "The learning rates for batch size 64, 0.03 with trained batch norms and 0.003 with frozen and affine ones, were "
    "chosen on the large near target in trial runs of `small` with another seed, from 0.001 to 0.3 for the former, and "
    "from 0.03 and a tenth of it for the latter; the rates for batch size 4 are proportional to the batch. "
    "Before these trial runs, claims (1) and (2) were about affine maps."
)
FINE_TUNED = (
    "Then all weights, with a new last layer, are trained without augmentation on the other five classes (near) or on "
    "handwritten digits (far): on 100 images for 20 epochs (small) or on 1,400 for 5 (large), at a tenth of the rate "
    f"in the last epochs. Running statistics average about {AVERAGED} images at either batch size."
)
SETUP = {
    "small": "The network is pre-trained on five classes of CIFAR-10, by the protocol of the full preset except for "
    f"{START.differences(PRESETS['full'])}. {FINE_TUNED} {TUNED}",
    "full": "The Inception network is pre-trained on five classes of CIFAR-10 by the protocol of 30 epochs. "
    f"{FINE_TUNED} {TUNED}",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding: differences between runs of the same seed, averaged over the targets."""
    small_far, large = [("far", "small")], [(target, "large") for target in TARGETS]
    frozen_at_small_batch = gain(results, "frozen", "trained", GROUPS, SMALL_BATCH)
    frozen_on_small_far = gain(results, "frozen", "trained", small_far, LARGE_BATCH)
    trained_on_large = gain(results, "trained", "frozen", large, LARGE_BATCH)
    differences = {
        "small_batch": frozen_at_small_batch,
        "affine_small_batch": gain(results, "affine", "trained", GROUPS, SMALL_BATCH),
        "small_far": frozen_on_small_far,
        "affine_small_far": gain(results, "affine", "trained", small_far, LARGE_BATCH),
        "large": trained_on_large,
    }
    claims = exceeds(frozen_at_small_batch), exceeds(frozen_on_small_far), exceeds(trained_on_large, -MARGIN)
    return {
        **{name: compared(difference, "higher", "lower") for name, difference in differences.items()},
        **judge(*claims, seeds=trained_on_large.n),
    }


def gain(
    results: dict[str, list[dict]], tuning: str, baseline: str, targets: Sequence[tuple[str, str]], batch: int
) -> Spread:
    """Returns the points by which one tuning ends above another, averaged over targets before the seeds are compared.

    Args:
      results: label -> runs.
      tuning: one of `TUNINGS`.
      baseline: the one that it is compared with.
      targets: pairs of target and size.
      batch: images per step.
    """
    by_target = [
        gains(results, _label(target, size, batch, tuning), _label(target, size, batch, baseline))
        for target, size in targets
    ]
    return spread(np.mean(by_target, axis=0))


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per target, size and batch: the final accuracy with every tuning."""
    del preset
    lines = []
    for (target, size), batch in itertools.product(GROUPS, BATCHES):
        groups = {tuning: results[_label(target, size, batch, tuning)] for tuning in TUNINGS}
        line = {"target": target, "images": f"{SIZES[size]['train_images']:,}", "batch size": str(batch)}
        line |= {f"{tuning}, %": spread(map(final_accuracy, group)).text() for tuning, group in groups.items()}
        lines.append(line | {"seeds": str(len(groups["trained"]))})
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws, for each batch size, what frozen and affine batch norms gain over trained ones on every target."""
    panels = []
    for batch in BATCHES:
        bars = []
        for (target, size), tuning in itertools.product(GROUPS, COLORS):
            gained = gains(results, _label(target, size, batch, tuning), _label(target, size, batch, "trained"))
            bars.append(plots.Bar(f"{size} {target}, {tuning}", gained, COLORS[tuning]))
        panels.append(plots.Bars("accuracy - accuracy if trained (points)", bars, title=f"batch size {batch}"))
    return plots.draw(panels)
