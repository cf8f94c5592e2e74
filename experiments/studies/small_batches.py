"""How does the error grow as the batch shrinks, and what helps?

Command: python -m experiments run small_batches --preset small

Time: planned for ten minutes on 2 CPU cores (small); measured: {time}

Published: For ResNet-50 on ImageNet, trained on 8 GPUs, the validation error of batch norm is 23.6 % at 32 images per
GPU and 34.7 % at 2, and that of group norm 24.1 % at both; according to the authors, batch norm needs large batches,
such as 32 images per worker (Wu and He 2018). No numbers are published for CIFAR-10.

Finding: With batch norm, the network ends at {batch_32} % test accuracy at 32 images per device and at {batch_2} % at
2, {batch_change}; with group norm, at {group_32} % and at {group_2} %, {group_change}. Small batches thus cost batch
norm {beyond} than group norm. At 2 images, eight devices with synchronized statistics end {sync} than the same eight
without; batch renorm ends {renorm} than batch norm on one device. {verdict}.

Agreement: Agrees: from 32 to two images, batch norm loses accuracy and group norm does not, as published; at two
images, synchronized statistics and batch renormalization do better. At all larger sizes, batch renormalization is
behind batch norm, as it is run here, with its limits open from the start; its running average over 100 steps is the
longer one only at 32 and 64 images.

Refuted if: (1) from 32 to 2 images per device, batch norm loses no more accuracy than group norm; (2) at 2 images,
eight devices with synchronized statistics are no more accurate than eight without; (3) at 2 images, batch renorm is no
more accurate than batch norm.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.evidence import plots
from experiments.evidence.verdicts import compared, exceeds, final_accuracy, gains, judge, spread

SIZES = (2, 4, 8, 16, 32, 64)  # images per device
DEVICES = 8  # in the arms with several devices
# Divisible by all batch sizes: groups must divide the last batch, too.
TRAIN_IMAGES = {"small": 4_096, "full": 49_664}
RATE = 0.1 / 128  # per image in a step: the linear scaling rule
RENORM_MOMENTUM = 0.99  # as published; batch renorm trains with its running statistics, so they must keep up

ARMS = {
    "batch": ("batch norm", plots.COLORS["batch"]),
    "renorm": ("batch renorm", plots.COLORS["renorm"]),
    "group": ("group norm", plots.COLORS["group"]),
    "ghost": ("8 devices, separate", plots.COLORS["ghost"]),
    "sync": ("8 devices, synchronized", plots.PALETTE["sky"]),
}


def runs(preset: str) -> dict[str, Config]:
    """Returns every arm at every number of images per device, as in "ghost-2"."""
    config = PRESETS[preset].replace(train_images=TRAIN_IMAGES[preset])
    if preset == "small":
        config = config.replace(epochs=3, lr_decay_epochs=3)
    return {f"{arm}-{size}": _run(config, arm, size) for arm in ARMS for size in SIZES}


def _run(config: Config, arm: str, size: int) -> Config:
    """Returns the run of one arm. The gradient of a step is the mean over the images of all devices."""
    images = size * DEVICES if arm in ("ghost", "sync") else size
    changes = {"norm": "batch" if arm == "sync" else arm, "batch_size": images, "learning_rate": RATE * images}
    if arm == "ghost":
        changes["group_size"] = size
    if arm != "group":
        # The average covers half an epoch at every size, so that no size is tested with staler statistics than another.
        momentum = RENORM_MOMENTUM if arm == "renorm" else 1 - images / (config.train_images / 2)
        changes |= {"momentum": momentum, "debias": True}
    return config.replace(**changes)


_ALL = (
    f"In all arms the learning rate is {RATE * 128:g} for 128 images per step, and proportional to them. Eight devices "
    "are one batch of eight times the images: normalized as a whole if they are synchronized, in eight groups if not. "
    "Running statistics are debiased and average over half an epoch. Only those of batch renorm, which also trains "
    f"with them, have the published momentum of {RENORM_MOMENTUM}, so that they average over 100 steps: over 200 "
    "images at 2 per step. Its limits are 3 and 5 from the first step; the published recipe begins with 1 and 0, which "
    "is batch norm, and widens them over thousands of steps."
)
_DIFFERENT = runs("small")["batch-32"].differences(runs("full")["batch-32"])
SETUP = {
    "small": (
        f"{_ALL} Compared with the full preset, at 32 images with batch norm: {_DIFFERENT}. Trial runs with another "
        "seed set the numbers of images and epochs, and showed that statistics averaged over 100 steps, like those of "
        "batch renorm, are too old at large batches."
    ),
    "full": f"{_ALL} Network and epochs are those of the published comparison on CIFAR-10.",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    fields = {}
    for arm in ("batch", "group"):
        fields |= {f"{arm}_{size}": spread(map(final_accuracy, results[f"{arm}-{size}"])).text() for size in (2, 32)}
        fields[f"{arm}_change"] = compared(spread(gains(results, f"{arm}-2", f"{arm}-32")), "higher", "lower")
    beyond, sync, renorm = (spread(values) for values in claims(results).values())
    return {
        **fields,
        "beyond": compared(beyond, "more", "less"),
        "sync": compared(sync, "higher", "lower"),
        "renorm": compared(renorm, "higher", "lower"),
        **judge(*map(exceeds, (beyond, sync, renorm)), seeds=beyond.n),
    }


def claims(results: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """Returns the differences that are claimed to be positive, in points, seed by seed: name of a bar -> values."""
    lost = {arm: gains(results, f"{arm}-32", f"{arm}-2") for arm in ("batch", "group")}
    return {
        "32 to 2:\nextra loss\nvs group": lost["batch"] - lost["group"],
        "at 2: sync.\n- separate": gains(results, "sync-2", "ghost-2"),
        "at 2: renorm\n- batch": gains(results, "renorm-2", "batch-2"),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm: final test accuracy by images per device, and the loss from 32 to 2."""
    lines = []
    for arm, (name, _) in ARMS.items():
        by_size = {f"{size} per device, %": spread(map(final_accuracy, results[f"{arm}-{size}"])) for size in SIZES}
        lines.append(
            {
                "norm": name,
                **{size: accuracy.text() for size, accuracy in by_size.items()},
                "loss from 32 to 2, points": spread(gains(results, f"{arm}-32", f"{arm}-2")).text(),
                "seeds": str(len(results[f"{arm}-2"])),
            }
        )
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws accuracy against images per device, and the differences that the claims are about."""
    lines = []
    for arm, (name, color) in ARMS.items():
        accuracy = np.array([[final_accuracy(run) for run in results[f"{arm}-{size}"]] for size in SIZES]).T
        lines.append(plots.Line(name, np.array(SIZES), accuracy, color, marker="o"))
    bars = [
        plots.Bar(name, values, ARMS[arm][1])
        for arm, (name, values) in zip(("batch", "sync", "renorm"), claims(results).items(), strict=True)
    ]
    return plots.draw(
        [
            plots.Lines("images per device", "test accuracy (%)", lines, xscale="log", bottom=None),
            plots.Bars("difference in accuracy (points)", bars),
        ]
    )
