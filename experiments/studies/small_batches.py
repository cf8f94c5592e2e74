"""How does the error grow as the batch shrinks, and what helps?

Command: python -m experiments run small_batches --preset small

Time: sized for ten minutes on 2 CPU cores (small); measured: {time}

Published: Of ResNet-50 on ImageNet, trained on 8 GPUs: validation error of batch norm 23.6 % at 32 images per GPU and
34.7 % at 2, of group norm 24.1 % at both (Wu and He 2018). A common rule asks for 32 images per worker. No number
published for CIFAR-10 with this net.

Finding: With batch norm the net ends at {batch_32} % test accuracy at 32 images per device and at {batch_2} % at 2, a
loss of {lost} points. At 2 images, synchronising eight devices gains {sync} points over the same eight unsynchronised;
group norm gains {group} and batch renorm {renorm} points over batch norm on one device. {verdict}.

Refuted if: any of these differences is no larger than twice its standard deviation over seeds: accuracy with batch norm
at 32 less that at 2 images per device; and at 2 images synchronised less unsynchronised statistics, group norm less
batch norm, batch renorm less batch norm.
"""

from matplotlib.figure import Figure

from experiments import plots
from experiments.config import PRESETS, Config
from experiments.measures import Spread, exceeds, final_accuracy, pairs, spread, verdict

SIZES = (2, 4, 8, 16, 32, 64)  # images per device
DEVICES = 8  # of the arms that have several; whole batches of all sizes make up the training sets below
TRAIN_IMAGES = {"small": 5_120, "full": 49_664}
RATE = 0.1 / 128  # for each image of a step: the linear scaling rule

ARMS = {
    "batch": ("batch norm", plots.COLORS["batch"]),
    "renorm": ("batch renorm", plots.COLORS["renorm"]),
    "group": ("group norm", plots.COLORS["group"]),
    "ghost": ("8 devices, each alone", plots.COLORS["ghost"]),
    "sync": ("8 devices, synchronised", plots.PALETTE["black"]),
}


def runs(preset: str) -> dict[str, Config]:
    """Returns every arm at every number of images per device, as in "ghost-2"."""
    config = PRESETS[preset].replace(train_images=TRAIN_IMAGES[preset])
    if preset == "small":
        config = config.replace(epochs=3, lr_decay_epochs=3)
    return {f"{arm}-{size}": _run(config, arm, size) for arm in ARMS for size in SIZES}


def _run(config, arm, size):
    """The run of one arm. The gradient of a step is the mean over the images of all devices."""
    images = size * DEVICES if arm in ("ghost", "sync") else size
    config = config.replace(norm="batch" if arm == "sync" else arm, batch_size=images, learning_rate=RATE * images)
    if arm == "group":
        return config
    # The running statistics look back over half an epoch whatever a step holds: tests differ in nothing but the norm.
    momentum = 1 - images / (config.train_images / 2)
    return config.replace(momentum=momentum, debias=True, group_size=size if arm == "ghost" else None)


_SHARED = (
    f"In all arms the learning rate is {RATE * 128:g} for 128 images in a step, and in proportion to them. Eight devices "
    "are one batch of eight times the images, normalised as a whole where they are synchronised, and in eight groups "
    "where each is alone. Running statistics look back over half an epoch, and are corrected for their start."
)
SETUP = {
    "small": (
        f"{_SHARED} At 32 images, {runs('small')['batch-32'].differences(runs('full')['batch-32'])}. One trial run with "
        "another seed set the number of images and epochs, and showed that running statistics over 100 steps, whatever "
        "a step holds, fall behind at large batches."
    ),
    "full": f"The net, the epochs and the images of the published comparison on CIFAR-10. {_SHARED}",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    claims = {
        "lost": gain(results, "batch-32", "batch-2"),
        "sync": gain(results, "sync-2", "ghost-2"),
        "group": gain(results, "group-2", "batch-2"),
        "renorm": gain(results, "renorm-2", "batch-2"),
    }
    return {
        "batch_2": spread(map(final_accuracy, results["batch-2"])).text(),
        "batch_32": spread(map(final_accuracy, results["batch-32"])).text(),
        **{name: difference.text() for name, difference in claims.items()},
        "verdict": verdict(*map(exceeds, claims.values()), seeds=claims["lost"].n),
    }


def gain(results: dict[str, list[dict]], label: str, other: str) -> Spread:
    """Returns the points of final test accuracy by which one run is above another of the same seed."""
    return spread(final_accuracy(a) - final_accuracy(b) for a, b in pairs(results[label], results[other]))


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm: final test accuracy by images per device."""
    lines = []
    for arm, (name, _) in ARMS.items():
        accuracy = {f"{size} images, %": spread(map(final_accuracy, results[f"{arm}-{size}"])).text() for size in SIZES}
        lost = gain(results, f"{arm}-32", f"{arm}-2").text()
        seeds = str(len(results[f"{arm}-2"]))
        lines.append({"test accuracy per device of": name, **accuracy, "32 less 2, points": lost, "seeds": seeds})
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns accuracy against images per device, and how far it is below that at 64."""
    by_arm = {
        arm: np.array([[final_accuracy(run) for run in results[f"{arm}-{size}"]] for size in SIZES]).T for arm in ARMS
    }
    accuracy = [plots.Line(*ARMS[arm][:1], SIZES, y, ARMS[arm][1], marker="o") for arm, y in by_arm.items()]
    lost = [line._replace(y=line.y[:, -1:] - line.y) for line in accuracy]
    return plots.draw(
        [
            plots.Lines("images per device", "test accuracy (%)", accuracy, xscale="log", bottom=None),
            plots.Lines("images per device", "accuracy at 64 less accuracy (points)", lost, xscale="log", bottom=None),
        ]
    )
