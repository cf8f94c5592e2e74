"""How many errors does an ensemble of networks with batch norm remove?

Command: python -m experiments run ensemble --preset small

Time: planned for six minutes on 2 CPU cores (small); measured: {time}

Published: On ImageNet, one Inception network with batch norm has a top-5 validation error of 5.82 %; six of them, with
their probabilities averaged, have 4.9 %, so that 16 % of the error is removed. Both are means over 144 crops of an
image; with a single crop, one network has 7.82 %. The six differed in their initial weights, in dropout, and in the
kind of norm in the last layers. On the test set they have 4.82 % (Ioffe and Szegedy 2015). No numbers are published for
CIFAR-10, or for the same network without batch norm.

Finding: With batch norm, six networks together reach {batch} % test accuracy and a single one {batch_single} % on
average, so that together they make {batch_share} errors. Without it, these are {none} % and {none_single} %, and
together they make {none_share} errors. The share of the errors that six networks remove is {more} with batch norm than
without. {verdict}.

Agreement: Not shown: six networks are clearly better than one, with batch norm and without. But the share of the errors
that they remove is much smaller than the published one, of top-5 errors on ImageNet, and just below the bound of the
claim. The spread over seeds leaves open whether it is larger with batch norm.

Refuted if: (1) six networks with batch norm remove no more than 5 % of the errors that one of them makes on average;
(2) the share that they remove is one or more points smaller than the share without batch norm.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.scipy.special import logsumexp
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import plots
from experiments.evidence.verdicts import compared, exceeds, judge, measured, paired_differences, quoted, spread
from experiments.nets import linen as linen_nets
from experiments.training import evaluation, loop

ARMS = ("batch", "none")
NETS = 6
SEEDS_APART = 1_000  # between the first networks of two runs, so that no network is in both
SETTINGS = {"nets": NETS, "seeds_apart": SEEDS_APART}
LEAST_SHARE = 5  # % of the errors
MARGIN = 1  # points by which the share may be smaller than without batch norm


def runs(preset: str) -> dict[str, Config]:
    """Returns the two arms; each run trains `NETS` networks."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(train_images=8_000, epochs=5)
    return {norm: config.replace(norm=norm) for norm in ARMS}


_DIFFERENT = runs("small")["batch"].differences(runs("full")["batch"])
_ALL = (
    f"Each run trains {NETS} networks, which differ in their initial weights, the order of the images and their "
    "augmentation."
)
SETUP = {
    "small": f"The protocol of the full preset, except for {_DIFFERENT}. {_ALL} Nothing was tuned except the duration.",
    "full": f"The network and protocol of the published comparison on CIFAR-10. {_ALL}",
}


def fit(
    config: Config,
    dataset: Dataset,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[loop.Progress], None] | None = None,
    **options,
) -> loop.Trained:
    """Trains the networks one after the other, and tests the first k of them as an ensemble, for every k.

    Returns:
      The rows and variables of the first network, the seconds of all, and the scores.
    """
    nets = [
        loop.fit(
            config.with_seed(SEEDS_APART * (config.seed + 1) + k),
            dataset,
            checkpoint_dir=checkpoint_dir and checkpoint_dir / f"net{k}",
            on_progress=on_progress and _as_one_run(on_progress, k, config.epochs),
            **options,
        )
        for k in range(NETS)
    ]

    def score_networks(_: dict) -> list[dict]:
        module = linen_nets.build(config, len(dataset.class_names))
        logits = [evaluation.predict(module, net.variables, dataset.test_images) for net in nets]
        return score_together(np.array(logits), dataset.test_labels)

    return nets[0]._replace(seconds=sum(net.seconds for net in nets)).measure(score_networks)


def _as_one_run(on_progress: Callable[[loop.Progress], None], k: int, epochs: int) -> Callable[[loop.Progress], None]:
    """Reports the progress of network k as a part of the whole run, so that a single progress bar shows all.

    A row that says "diverged" ends the bar. Only the last network may do so: the run goes on with the others.
    """

    def report(progress: loop.Progress) -> None:
        row = progress.row
        if row is not None:
            row = row | {"epoch": k * epochs + row["epoch"], "diverged": row["diverged"] and k == NETS - 1}
        on_progress(progress._replace(step=k * progress.steps + progress.step, steps=NETS * progress.steps, row=row))

    return report


def score_together(logits: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Scores every network alone, and the mean of the probabilities of the first k networks, for every k.

    Args:
      logits: of all networks, shape [networks, n, classes].
      labels: shape [n].
    """
    entries = [{"net": k, **evaluation.score(of_net, labels)._asdict()} for k, of_net in enumerate(logits)]
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for k in range(1, len(logits) + 1):
        # The log of the sum is the log of the mean plus a constant, to which the softmax in `score` is invariant.
        together = np.asarray(logsumexp(log_probabilities[:k], axis=0))
        entries.append({"nets": k, **evaluation.score(together, labels)._asdict()})
    return entries


def accuracies(run: dict) -> list[float]:
    """Returns the test accuracy of the first 1, 2, ... networks together, in %."""
    return [100 * measured(run, "accuracy", nets=k) for k in range(1, NETS + 1)]


def single(run: dict) -> float:
    """Returns the mean test accuracy of the single networks, in %."""
    return float(np.mean([100 * measured(run, "accuracy", net=k) for k in range(NETS)]))


def gain(run: dict) -> float:
    """Returns the points by which all networks together are more accurate than one on average."""
    return accuracies(run)[-1] - single(run)


def share(run: dict) -> float:
    """Returns the share of the errors of one network that all networks together avoid, in %."""
    errors = 100 - single(run)
    return 100 * gain(run) / errors if errors > 0 else 0.0  # where there are none, none are removed


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    shares = {norm: spread(map(share, results[norm])) for norm in ARMS}
    more = spread(paired_differences(share, *(results[norm] for norm in ARMS)))
    fields = {"more": compared(more, "larger", "smaller")}
    for norm in ARMS:
        fields[norm] = spread(accuracies(run)[-1] for run in results[norm]).text()
        fields[f"{norm}_single"] = spread(map(single, results[norm])).text()
        fields[f"{norm}_share"] = compared(shares[norm], "fewer", "more", unit="%")
    return fields | judge(exceeds(shares["batch"], LEAST_SHARE), exceeds(more, -MARGIN), seeds=more.n)


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm."""
    lines = []
    for norm in ARMS:
        group = results[norm]
        line = {"norm": plots.NAMES[norm], "one network on average, %": spread(map(single, group)).text()}
        for k in (2, 4, NETS):
            line[f"{k} networks, %"] = spread(accuracies(run)[k - 1] for run in group).text()
        losses = [np.mean([measured(run, "loss", net=k) for k in range(NETS)]) for run in group]
        together = [measured(run, "loss", nets=NETS) for run in group]
        line |= {
            "gain, points": spread(map(gain, group)).text(),
            "errors removed, %": spread(map(share, group)).text(),
            "loss of one network, nats": quoted(spread(losses), 2),
            f"loss of {NETS} networks, nats": quoted(spread(together), 2),
            "seeds": str(len(group)),
        }
        lines.append(line)
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws the accuracy, and the share of errors removed, against the number of networks."""
    nets, accuracy, removed = np.arange(1, NETS + 1), [], []
    for norm in ARMS:
        name, color = plots.NAMES[norm], plots.COLORS[norm]
        together = np.array([accuracies(run) for run in results[norm]])
        alone = np.array([[single(run)] for run in results[norm]])
        together[:, :1] = alone  # the mean over networks, not the one that happens to come first
        accuracy.append(plots.Line(name, nets, together, color, marker="o"))
        shares = 100 * (together - alone) / np.maximum(100 - alone, 1e-9)
        removed.append(plots.Line(name, nets, shares, color, marker="o"))
    return plots.draw(
        [
            plots.Lines("networks in the ensemble", "test accuracy (%)", accuracy),
            plots.Lines("networks in the ensemble", "errors of one network removed (%)", removed, bottom=None),
        ]
    )
