"""What if the test data is shifted?

Command: python -m experiments run domain_shift --preset small

Time: sized for 4 minutes on 2 CPU cores (small); measured: {time}

Published: Li et al. (2016) replace the statistics of a trained net by those of the target domain (AdaBN) and gain on
domain adaptation benchmarks; no number published for CIFAR-10. On ImageNet-C, statistics of the corrupted images lower
the mean corruption error of ResNet-50 from 76.7 % to 62.2 % (Schneider et al. 2020). Corruptions and strengths are
those of Hendrycks and Dietterich (2019): Gaussian noise, contrast and brightness are among the 15 of that mean, while
Gaussian blur is one of the extra ones beside them.

Finding: On clean images, test accuracy is {clean} % with running statistics and {reference} % with those of 1,000
unlabelled images, from which the loss is counted. At the largest strength, in the mean over four corruptions, running
statistics have {shifted} %, {lost} than that; group norm, which keeps no statistics, goes from {group_clean} % to
{group_shifted} %, {group_lost}. Statistics of 1,000 unlabelled images of the shifted kind have {adapted} %, {won} than
running ones; that is {back} of the loss, and what statistics of 100 images win back is {enough} of what those of 1,000
do. {verdict}.

Agreement: Agrees in part ((1) and (3) hold, (2) is not shown): running statistics lose accuracy on shifted images, and
statistics of unlabelled ones win some of it back, a hundred images nearly as much as a thousand; at the largest
strength that is about half and not clearly more, since at low contrast most of the loss stays with all statistics that
were tried.

Refuted if: (1) running statistics lose no more than 5 points of what statistics of 1,000 clean images have on clean
ones; (2) statistics of 1,000 shifted images win back no more than half of that loss; (3) those of 100 images win back
no more than 80 % of what those of 1,000 do. All at the largest strength, in the mean over the corruptions.
"""

import math
from collections.abc import Iterator, Sequence

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.corruptions import CORRUPTIONS, STRENGTHS
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import Spread, compared, exceeds, judge, measured_accuracy, quoted, spread
from experiments.nets import linen as linen_nets
from experiments.training import evaluation, loop
from experiments.training.evaluation import predict, score, split
from jaxbn import calibrate

ARMS = ("batch", "group")
TESTED = 2_500  # images, at most: of the first half of the test set; those of the other half serve for statistics
IMAGES = (10, 100, 1000)  # without labels
ENOUGH, MOST = IMAGES[1:]
COUNTED = (0, 3, 5)  # the strengths at which all these numbers of images are tried
BATCH = 100  # of test images that share their statistics, and to measure statistics
SETTINGS = {"tested": TESTED, "images": IMAGES, "counted": COUNTED, "batch": BATCH}
CLEAN = ("none", 0)
CELLS = (CLEAN, *((name, strength) for name in CORRUPTIONS for strength in STRENGTHS))


def runs(preset: str) -> dict[str, Config]:
    """Returns the two arms; what `small` makes smaller is said in `SETUP`."""
    return {norm: PRESETS[preset].replace(norm=norm) for norm in ARMS}


SHARED = (
    f"Tested on up to {TESTED:,} images of the first half of the test set, the same for all arms and seeds. Unlabelled "
    "images come from the other half, drawn anew for each seed, and their statistics are measured layer by layer. "
    "Running statistics come from augmented images and these from plain ones, which alone can raise accuracy; loss and "
    "what is won back are therefore counted from the accuracy with statistics of clean unlabelled images. Noise and "
    "blur have the published sizes, for values and pixels of the images as they are trained on"
)
SETUP = {
    "small": (
        f"Not the published net and protocol, but {runs('small')['batch'].differences(runs('full')['batch'])}. "
        f"{SHARED}: on 16x16 pixels both are about twice as strong as on 32x32 ones that are halved afterwards. "
        "Nothing was tuned."
    ),
    "full": f"The published net and protocol. {SHARED}.",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run and tests the net on corrupted images, with statistics of several origins."""
    trained = loop.fit(config, dataset, **options)
    if trained.rows[-1]["diverged"]:
        return trained
    return trained.measure(lambda variables: measure(config, dataset, variables))


def measure(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Returns loss and accuracy of a net by corruption, strength, statistics, and the images that these come from."""
    net = linen_nets.build(config, len(dataset.class_names))
    half = len(dataset.test_images) // 2
    tested, labels = dataset.test_images[:half][:TESTED], dataset.test_labels[:half][:TESTED]
    # RandomState, because NumPy promises never to change its stream.
    unlabelled = dataset.test_images[half:][np.random.RandomState(config.seed).permutation(half)[:MOST]]
    found = []
    for corruption, strength in CELLS:
        images, others = (corrupt(each, corruption, strength, seed) for seed, each in enumerate((tested, unlabelled)))
        counts = IMAGES if strength in COUNTED else (MOST,)
        for statistics, n, logits in answers(net, variables, images, others, counts):
            which = {"corruption": corruption, "strength": strength, "statistics": statistics, "images": n}
            found.append(which | score(logits, labels)._asdict())
    return found


def answers(
    net: nn.Module, variables: dict, images: np.ndarray, others: np.ndarray, counts: Sequence[int]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields the name of statistics, the number of images that they come from, and the logits of images with them.

    Args:
      net: with batch norm, or a norm that has one answer.
      variables: its `params` and `batch_stats`.
      images: what to look at.
      others: images of the same kind, the first of which give new statistics.
      counts: how many of them; what is more than there are is left out.
    """
    yield "running", 0, predict(net, variables, images)
    if not variables["batch_stats"]:
        return
    yield "batch", BATCH, predict(net, variables, images, statistics="batch", batch_size=BATCH)
    for n in counts:
        if n <= len(others):
            batches = split(others[:n], BATCH)
            adapted = calibrate.layer_by_layer(net, variables, batches, call=evaluation.call)
            yield "recalibrated", n, predict(net, adapted, images)


def corrupt(images: np.ndarray, corruption: str, strength: int, seed: int) -> np.ndarray:
    """Returns the corrupted images; at strength 0, as they are."""
    return CORRUPTIONS[corruption](images, strength, seed=seed) if strength else images


def accuracy(
    run: dict, strength: int, statistics: str = "running", images: int = 0, corruption: str | None = None
) -> float:
    """Returns the test accuracy in %, with one corruption or in the mean over all; NaN where it was not measured."""
    names = [name for name, s in CELLS if s == strength and corruption in (None, name)]
    which = {"strength": strength, "statistics": statistics, "images": images}
    return float(np.mean([measured_accuracy(run, corruption=name, **which) for name in names]))


def adapted(run: dict, images: int = MOST, strength: int = STRENGTHS[-1]) -> float:
    """Returns the test accuracy, in %, with statistics of so many unlabelled images of the same strength."""
    return accuracy(run, strength, "recalibrated", images)


def lost(run: dict) -> float:
    """Returns what running statistics lose at the largest strength, in points.

    They lose it from the accuracy with statistics of clean images. Running ones have seen augmented images: what the
    new ones gain by that is no recovery from a shift.
    """
    return adapted(run, strength=0) - accuracy(run, STRENGTHS[-1])


def won(run: dict, images: int = MOST) -> float:
    """Returns what statistics of so many unlabelled images win back of it, in points."""
    return adapted(run, images) - accuracy(run, STRENGTHS[-1])


def share(parts: list[float], wholes: list[float]) -> Spread:
    """Returns parts in % of their wholes; not finite where a whole is not above 0."""
    return spread(100 * part / whole if whole > 0 else math.nan for part, whole in zip(parts, wholes, strict=True))


def share_text(found: Spread, wholes: list[float], nothing: str) -> str:
    """Returns a share as text; where some wholes are not above 0, why there is none."""
    without = sum(whole <= 0 for whole in wholes)
    if without:
        return f"a part that is not defined ({nothing} in {without} of {found.n} runs)"
    return f"{quoted(found, 0)} %" if math.isfinite(found.mean) else quoted(found)


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and shares are taken within a run."""
    group, last = results["batch"], STRENGTHS[-1]
    losses, most, fewer = list(map(lost, group)), [won(run) for run in group], [won(run, ENOUGH) for run in group]
    back, enough = share(most, losses), share(fewer, most)
    claims = exceeds(spread(losses), least=5), exceeds(back, least=50), exceeds(enough, least=80)
    plain = [accuracy(run, last) - accuracy(run, 0) for run in results["group"]]
    return {
        "clean": quoted(spread(accuracy(run, 0) for run in group)),
        "reference": quoted(spread(adapted(run, strength=0) for run in group)),
        "shifted": quoted(spread(accuracy(run, last) for run in group)),
        "adapted": quoted(spread(map(adapted, group))),
        "lost": compared(spread(-loss for loss in losses), "more", "less"),
        "won": compared(spread(most), "more", "less"),
        "group_clean": quoted(spread(accuracy(run, 0) for run in results["group"])),
        "group_shifted": quoted(spread(accuracy(run, last) for run in results["group"])),
        "group_lost": compared(spread(plain), "more", "less"),
        "back": share_text(back, losses, "nothing is lost"),
        "enough": share_text(enough, most, "nothing is won back"),
        **judge(*claims, seeds=len(group)),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns the test accuracies by corruption, at the strengths at which all numbers of images were tried."""
    del preset
    shown = {
        "running statistics": ("batch", "running", 0),
        f"test batch of {BATCH}": ("batch", "batch", BATCH),
        **{f"{n:,} unlabelled images": ("batch", "recalibrated", n) for n in IMAGES},
        "group norm": ("group", "running", 0),
    }
    cells = [(None, 0), *((name, s) for name in (*CORRUPTIONS, None) for s in COUNTED if s)]
    return [
        {"corruption, strength": f"{corruption or 'mean'}, {strength}" if strength else "none"}
        | {
            f"{name}, %": quoted(spread(accuracy(run, strength, *which, corruption) for run in results[norm]))
            for name, (norm, *which) in shown.items()
        }
        | {"seeds": str(len(results["batch"]))}
        for corruption, strength in cells
    ]


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns accuracy against strength for each corruption, and against the number of unlabelled images."""
    shown = {
        "running": ("batch", "running", 0, plots.COLORS["batch"]),
        "test batch": ("batch", "batch", BATCH, plots.PALETTE["orange"]),
        f"{MOST:,} images": ("batch", "recalibrated", MOST, plots.PALETTE["purple"]),
        "group norm": ("group", "running", 0, plots.COLORS["group"]),
    }
    x = (0, *STRENGTHS)
    panels = []
    for corruption in CORRUPTIONS:
        lines = []
        for name, (norm, *which, color) in shown.items():
            y = [[accuracy(run, s, *which, corruption if s else None) for s in x] for run in results[norm]]
            lines.append(plots.Line(name, np.array(x), np.array(y), color, marker="o"))
        panels.append(plots.Lines("strength", "test accuracy (%)", lines, bottom=None, title=corruption))
    lines = []
    for strength, dashes in zip(COUNTED, ("-", "--", ":"), strict=True):
        name = f"strength {strength}" if strength else "clean"
        y = np.array([[accuracy(run, strength, "recalibrated", n) for n in IMAGES] for run in results["batch"]])
        lines.append(plots.Line(name, np.array(IMAGES), y, plots.PALETTE["purple"], dashes, "o"))
    title = "mean over the corruptions"
    panels.append(plots.Lines("unlabelled images", "test accuracy (%)", lines, "log", bottom=None, title=title))
    return plots.draw(panels)
