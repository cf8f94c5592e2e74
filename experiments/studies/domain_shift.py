"""What if the test data are shifted?

Command: python -m experiments run domain_shift --preset small

Time: planned for 4 minutes on 2 CPU cores (small); measured: {time}

Published: Li et al. (2016) replace the statistics of a trained network with those of the target domain (AdaBN), and
gain accuracy on domain adaptation benchmarks; no numbers are published for CIFAR-10. On ImageNet-C, statistics of the
corrupted images lower the mean corruption error of ResNet-50 from 76.7 % to 62.2 % (Schneider et al. 2020). Corruptions
and strengths are those of Hendrycks and Dietterich (2019): Gaussian noise, contrast and brightness are among the 15 in
that mean; Gaussian blur is one of their additional ones.

Finding: On clean images, test accuracy is {clean} % with running statistics and {reference} % with the statistics of
1,000 unlabeled images; losses are counted from the latter. At the largest strength, averaged over four corruptions,
running statistics reach {shifted} %, {lost} than that; group norm, which keeps no statistics, goes from {group_clean} %
to {group_shifted} %, {group_lost}. Statistics of 1,000 unlabeled images of the shifted kind reach {adapted} %, {won}
than running statistics. They win back {back} of the loss, and statistics of 100 images win back {enough} of what those
of 1,000 do. {verdict}.

Agreement: Agrees in part ((1) and (3) hold, (2) is not shown): running statistics lose accuracy on shifted images, and
statistics of unlabeled images win some of it back, with a hundred images nearly as much as with a thousand. At the
largest strength that is about half and not clearly more: at low contrast, most of the loss remains with all statistics
that were tried.

Refuted if: (1) running statistics lose no more than 5 points of the accuracy that statistics of 1,000 clean images have
on clean images; (2) statistics of 1,000 shifted images win back no more than half of that loss; (3) statistics of 100
images win back no more than 80 % of what those of 1,000 do. All at the largest strength, averaged over the corruptions.
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
from experiments.evidence.verdicts import (
    Spread,
    compared,
    exceeds,
    has_too_few_images,
    judge,
    measured_accuracy,
    quoted,
    spread,
)
from experiments.nets import linen as linen_nets
from experiments.training import evaluation, loop
from experiments.training.evaluation import predict, score, split
from jaxbn import calibrate

ARMS = ("batch", "group")
TESTED = 2_500  # images at most, from the first half of the test set; the other half provides statistics
IMAGES = (10, 100, 1000)  # numbers of unlabeled images to take statistics from
ENOUGH, MOST = IMAGES[1:]
COUNTED = (0, 3, 5)  # strengths at which all of `IMAGES` are tried; at the others, only the last
BATCH = 100  # test images that share their statistics; also the batches from which statistics are measured
SETTINGS = {"tested": TESTED, "images": IMAGES, "counted": COUNTED, "batch": BATCH}
CLEAN = ("none", 0)
CELLS = (CLEAN, *((name, strength) for name in CORRUPTIONS for strength in STRENGTHS))


def runs(preset: str) -> dict[str, Config]:
    """Returns the two arms; `SETUP` says how `small` differs."""
    return {norm: PRESETS[preset].replace(norm=norm) for norm in ARMS}


SHARED = (
    f"Tested on up to {TESTED:,} images of the first half of the test set, the same for all arms and seeds. Unlabeled "
    "images come from the other half, drawn separately for each seed, and their statistics are measured layer by "
    "layer. Running statistics come from augmented images and these from plain ones, which alone can raise accuracy; "
    "what is lost and won back is therefore counted from the accuracy with statistics of clean unlabeled images. Noise "
    "and blur have the published sizes, in pixel values and pixels of the images that the network is trained on"
)
SETUP = {
    "small": (
        "The published network and protocol, except for "
        f"{runs('small')['batch'].differences(runs('full')['batch'])}. {SHARED}: on 16x16 pixels both are about twice "
        "as strong as on 32x32 ones whose size is halved afterward. Nothing was tuned."
    ),
    "full": f"The published network and protocol. {SHARED}.",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run and tests the network on corrupted images, with statistics from several sources."""
    trained = loop.fit(config, dataset, **options)
    if trained.rows[-1]["diverged"]:
        return trained
    return trained.measure(lambda variables: scores_on_corruptions(config, dataset, variables))


def scores_on_corruptions(config: Config, dataset: Dataset, variables: dict) -> list[dict]:
    """Measures loss and accuracy by corruption, strength, kind of statistics, and their number of images."""
    net = linen_nets.build(config, len(dataset.class_names))
    half = len(dataset.test_images) // 2
    tested, labels = dataset.test_images[:half][:TESTED], dataset.test_labels[:half][:TESTED]
    # RandomState, because NumPy promises never to change its stream.
    drawn = np.random.RandomState(config.seed).permutation(half)[:MOST]
    unlabeled = dataset.test_images[half:][drawn]
    entries = []
    for corruption, strength in CELLS:
        # With different seeds, so that the statistics do not come from images with the very same noise.
        images = corrupt(tested, corruption, strength, seed=0)
        source = corrupt(unlabeled, corruption, strength, seed=1)
        counts = IMAGES if strength in COUNTED else (MOST,)
        for statistics, n, logits in answers(net, variables, images, source, counts):
            cell = {"corruption": corruption, "strength": strength, "statistics": statistics, "images": n}
            entries.append(cell | score(logits, labels)._asdict())
    return entries


def answers(
    net: nn.Module, variables: dict, images: np.ndarray, source: np.ndarray, counts: Sequence[int]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yields, for several kinds of statistics: their name, the number of images they come from, and the logits.

    Args:
      net: with batch norm, or with a norm that has no statistics, for which there is a single answer.
      variables: its `params` and `batch_stats`.
      images: the images to classify.
      source: images of the same kind, the first of which give new statistics.
      counts: numbers of these images; larger ones than there are images are left out.
    """
    yield "running", 0, predict(net, variables, images)
    if not variables["batch_stats"]:
        return
    yield "batch", BATCH, predict(net, variables, images, statistics="batch", batch_size=BATCH)
    for n in counts:
        if n <= len(source):
            batches = split(source[:n], BATCH)
            recalibrated = calibrate.layer_by_layer(net, variables, batches, call=evaluation.call)
            yield "recalibrated", n, predict(net, recalibrated, images)


def corrupt(images: np.ndarray, corruption: str, strength: int, seed: int) -> np.ndarray:
    """Corrupts images; strength 0 leaves them as they are."""
    return CORRUPTIONS[corruption](images, strength, seed=seed) if strength else images


def accuracy(
    run: dict, strength: int, statistics: str = "running", images: int = 0, corruption: str | None = None
) -> float:
    """Returns the test accuracy in %, with one corruption or averaged over all.

    It is NaN if the run diverged, or had fewer unlabeled images than `images`.
    """
    if has_too_few_images(run, images, statistics=statistics):
        return math.nan
    names = [name for name, s in CELLS if s == strength and corruption in (None, name)]
    which = {"strength": strength, "statistics": statistics, "images": images}
    return float(np.mean([measured_accuracy(run, corruption=name, **which) for name in names]))


def adapted(run: dict, images: int = MOST, strength: int = STRENGTHS[-1]) -> float:
    """Returns the test accuracy, in %, with statistics of `images` unlabeled images of the same strength."""
    return accuracy(run, strength, "recalibrated", images)


def lost(run: dict) -> float:
    """Returns what running statistics lose at the largest strength, in points.

    The reference is the accuracy with statistics of clean images, not with running statistics. Those come from
    augmented images, so statistics of plain images gain accuracy that is not a recovery from a shift.
    """
    return adapted(run, strength=0) - accuracy(run, STRENGTHS[-1])


def won(run: dict, images: int = MOST) -> float:
    """Returns the points that statistics of `images` unlabeled images win back at the largest strength."""
    return adapted(run, images) - accuracy(run, STRENGTHS[-1])


def share(parts: list[float], wholes: list[float]) -> Spread:
    """Returns parts in % of their wholes; not finite if a whole is not positive."""
    return spread(100 * part / whole if whole > 0 else math.nan for part, whole in zip(parts, wholes, strict=True))


def share_text(percent: Spread, wholes: list[float], nothing: str) -> str:
    """Returns a share as text, or the reason why it is not defined: `nothing`, if a whole is not positive."""
    without = sum(whole <= 0 for whole in wholes)
    if without:
        return f"an undefined part ({nothing} in {without} of {percent.n} runs)"
    return f"{quoted(percent, 0)} %" if math.isfinite(percent.mean) else quoted(percent)


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
    """Returns the test accuracies by corruption, at the strengths at which all of `IMAGES` were tried."""
    del preset
    shown = {
        "running statistics": ("batch", "running", 0),
        f"test batch of {BATCH}": ("batch", "batch", BATCH),
        **{f"{n:,} unlabeled images": ("batch", "recalibrated", n) for n in IMAGES},
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
    """Draws accuracy against strength for each corruption, and against the number of unlabeled images."""
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
        panels.append(plots.Lines("corruption strength", "test accuracy (%)", lines, bottom=None, title=corruption))
    lines = []
    for strength, dashes in zip(COUNTED, ("-", "--", ":"), strict=True):
        name = f"strength {strength}" if strength else "clean"
        y = np.array([[accuracy(run, strength, "recalibrated", n) for n in IMAGES] for run in results["batch"]])
        lines.append(plots.Line(name, np.array(IMAGES), y, plots.PALETTE["purple"], dashes, "o"))
    title = "mean over corruptions"
    panels.append(plots.Lines("unlabeled images", "test accuracy (%)", lines, "log", bottom=None, title=title))
    return plots.draw(panels)
