"""Does an ensemble of batch-norm nets help?

Command: python -m experiments run ensemble --preset small

Time: sized for six minutes on 2 CPU cores (small); measured: {time}

Published: On ImageNet, one Inception net with batch norm has a top-5 validation error of 5.82 %, and six of them, their
probabilities averaged, 4.9 %; their error on the test set is 4.82 % (Ioffe and Szegedy 2015). No number published for
CIFAR-10, or for the same net without batch norm.

Finding: With batch norm, six nets together have {batch} % test accuracy and one alone {batch_single} %, a gain of
{batch_gain} points. Without, it is {none} % and {none_single} %, a gain of {none_gain} points, so that batch norm gains
{more} points more. {verdict}.

Refuted if: six nets with batch norm are no more accurate than one of them is on average, by more than twice the
standard deviation over seeds; or they gain less than nets without batch norm do, by as much.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.scipy.special import logsumexp
from matplotlib.figure import Figure

from experiments import evaluation, models, plots, train
from experiments.config import PRESETS, Config
from experiments.data import Dataset
from experiments.measures import exceeds, measured, pairs, spread, verdict

ARMS = ("batch", "none")
NETS = 6
SEEDS_APART = 1_000  # between the first nets of two runs, so that no net belongs to both


def runs(preset: str) -> dict[str, Config]:
    """Returns the two arms; each run trains `NETS` nets."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(train_images=8_000, epochs=5)
    return {norm: config.replace(norm=norm) for norm in ARMS}


_DIFFERENT = runs("small")["batch"].differences(runs("full")["batch"])
_ALL = f"A run trains {NETS} nets, which differ in their first weights, the order of the images and their augmentation."
SETUP = {
    "small": f"Not the protocol of full, but {_DIFFERENT}. {_ALL} Nothing was tuned but the time it takes.",
    "full": f"The net and protocol of the published comparison on CIFAR-10. {_ALL}",
}


def fit(
    config: Config,
    dataset: Dataset,
    *,
    checkpoint_dir: Path | None = None,
    on_progress: Callable[[train.Progress], None] | None = None,
    **options,
) -> train.Trained:
    """Trains the nets one after the other, and tests the first k of them together, for every k.

    Returns:
      The rows and variables of the first net, the seconds of all, and the tests.
    """
    module = models.build(config, len(dataset.class_names))
    logits, trained = [], []
    for k in range(NETS):
        trained.append(
            train.fit(
                config.with_seed(SEEDS_APART * (config.seed + 1) + k),
                dataset,
                checkpoint_dir=checkpoint_dir and checkpoint_dir / f"net{k}",
                on_progress=on_progress and _as_one_run(on_progress, k, config.epochs),
                **options,
            )
        )
        logits.append(evaluation.predict(module, trained[-1].variables, dataset.test_images))
    scores = score_together(np.array(logits), dataset.test_labels)
    return trained[0]._replace(seconds=sum(each.seconds for each in trained), measured=scores)


def _as_one_run(on_progress, k, epochs):
    """Tells of net k as of a part of the whole run, which ends with the last net, whether it diverges or not."""

    def tell(progress):
        row = progress.row
        if row is not None:
            row = row | {"epoch": k * epochs + row["epoch"], "diverged": row["diverged"] and k == NETS - 1}
        on_progress(progress._replace(step=k * progress.steps + progress.step, steps=NETS * progress.steps, row=row))

    return tell


def score_together(logits: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Returns the scores of every net alone, and of the first k together: of the mean of their probabilities.

    Args:
      logits: of the nets, [nets, n, classes].
      labels: [n].
    """
    found = [{"net": k, **evaluation.score(each, labels)._asdict()} for k, each in enumerate(logits)]
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))
    for k in range(1, len(logits) + 1):
        # The logarithm of the sum, which softmax does not tell from that of the mean.
        together = np.asarray(logsumexp(log_probabilities[:k], axis=0))
        found.append({"nets": k, **evaluation.score(together, labels)._asdict()})
    return found


def accuracies(run: dict) -> list[float]:
    """Returns the test accuracy of the first 1, 2, ... nets together, in %."""
    return [100 * measured(run, "accuracy", nets=k) for k in range(1, NETS + 1)]


def single(run: dict) -> float:
    """Returns the mean test accuracy of the nets alone, in %."""
    return float(np.mean([100 * measured(run, "accuracy", net=k) for k in range(NETS)]))


def gain(run: dict) -> float:
    """Returns the points by which all nets together are more accurate than one is on average."""
    return accuracies(run)[-1] - single(run)


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences are taken between runs of the same seed."""
    paired = pairs(*(results[norm] for norm in ARMS))
    helps = exceeds(spread(map(gain, results["batch"])))
    helps_less = exceeds(spread(gain(none) - gain(batch) for batch, none in paired))
    fields = {
        "more": spread(gain(batch) - gain(none) for batch, none in paired).text(),
        "verdict": verdict(helps, not helps_less, seeds=len(paired)),
    }
    for norm in ARMS:
        fields[norm] = spread(accuracies(run)[-1] for run in results[norm]).text()
        fields[f"{norm}_single"] = spread(map(single, results[norm])).text()
        fields[f"{norm}_gain"] = spread(map(gain, results[norm])).text()
    return fields


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm."""
    lines = []
    for norm in ARMS:
        group = results[norm]
        line = {"norm": plots.NAMES[norm], "one net on average, %": spread(map(single, group)).text()}
        for k in (2, 4, NETS):
            line[f"{k} nets, %"] = spread(accuracies(run)[k - 1] for run in group).text()
        losses = [np.mean([measured(run, "loss", net=k) for k in range(NETS)]) for run in group]
        together = [measured(run, "loss", nets=NETS) for run in group]
        line |= {
            "gain, points": spread(map(gain, group)).text(),
            "loss of one, nats": spread(losses).text(2),
            f"loss of {NETS}, nats": spread(together).text(2),
            "seeds": str(len(group)),
        }
        lines.append(line)
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns the accuracy, and its gain over that of one net on average, against the number of nets."""
    nets, accuracy, gained = np.arange(1, NETS + 1), [], []
    for norm in ARMS:
        name, color = plots.NAMES[norm], plots.COLORS[norm]
        together = np.array([accuracies(run) for run in results[norm]])
        alone = np.array([[single(run)] for run in results[norm]])
        accuracy.append(plots.Line(name, nets, together, color, marker="o"))
        gained.append(plots.Line(name, nets, together - alone, color, marker="o"))
    return plots.draw(
        [
            plots.Lines("nets together", "test accuracy (%)", accuracy),
            plots.Lines("nets together", "gain over one net (points)", gained, bottom=None),
        ]
    )
