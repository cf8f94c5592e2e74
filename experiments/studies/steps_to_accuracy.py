"""How many fewer steps does batch norm need to reach the best accuracy of the network without it?

Command: python -m experiments run steps_to_accuracy --preset small

Time: planned for eight minutes on 2 CPU cores (small); measured: {time}

Published: On ImageNet, Inception reaches its best accuracy of 72.2 % after 31.0 million steps; with batch norm it does
so after 13.3 million, at 5 times the learning rate after 2.1 million (14 times fewer), and at 30 times the rate after
2.7 million, where it goes on to 74.8 %. The networks at 5 and 30 times the rate differ in more than the rate: they have
no dropout and no local response normalization, weaker weight decay and a faster decaying rate, and see images that are
better shuffled and less distorted. With sigmoids instead of ReLUs, the network at 5 times the rate reaches 69.8 %, and
is no better than chance without batch norm (Ioffe and Szegedy 2015). No numbers are published for deep supervision in
this comparison.

Finding: An accuracy counts as reached if two consecutive evaluations have it. The network without batch norm is at its
best in these {epochs} epochs after {none_steps} steps, at {none} %. With batch norm this accuracy {x1}; at 5 times the
learning rate it {x5}; at 30 times it {x30}, and the best accuracy there is {x30_best} %, {gain} than without. With deep
supervision instead of batch norm it {deep}. With sigmoids the best accuracy is {sigmoid_bn} % with batch norm,
{sigmoid_gain} than the {sigmoid_none} % without. {verdict}.

Agreement: Agrees in part ((1), (3) and (4) hold, (2) is not shown): at the same rate, batch norm needs fewer steps, by
a larger factor than published; its best accuracy at high rates is higher, and it makes networks with sigmoids learn.
Unlike in the published runs, higher rates do not clearly save further steps, so that at these rates the factor is
smaller than published on average.

Refuted if: (1) batch norm does not reach the best accuracy of the network without it in fewer steps, or not with every
seed; (2) at 5 times the learning rate, it does not reach it in fewer steps than at the same rate, or not with every
seed; (3) at 30 times the rate, the best accuracy is no higher than without batch norm; (4) with sigmoids, the best
accuracy is no higher with batch norm than without.
"""

import itertools
import math
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset, first_tests
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    below,
    column,
    compared,
    exceeds,
    judge,
    paired_differences,
    paired_runs,
    spread,
)
from experiments.training import loop

WATCHED = 2_000  # test images in every evaluation; testing on all 10,000 would take longer than training
SETTINGS = {"watched": WATCHED}


class Arm(NamedTuple):
    """How an arm is shown, and how it differs from the network without batch norm.

    Attributes:
      name: for readers.
      color: of its line.
      changes: to the config.
      rate_factor: multiplies the learning rate.
    """

    name: str
    color: str
    changes: dict[str, object]
    rate_factor: float


ARMS = {
    "none": Arm("no norm", plots.COLORS["none"], {}, 1),
    "bn-x1": Arm("batch norm", plots.PALETTE["sky"], {"norm": "batch"}, 1),
    "bn-x5": Arm("batch norm, rate x 5", plots.COLORS["batch"], {"norm": "batch"}, 5),
    "bn-x30": Arm("batch norm, rate x 30", plots.PALETTE["black"], {"norm": "batch"}, 30),
    "sigmoid-none": Arm("sigmoid, no norm", plots.PALETTE["orange"], {"activation": "sigmoid"}, 5),
    "sigmoid-bn": Arm("sigmoid, batch norm", plots.PALETTE["purple"], {"activation": "sigmoid", "norm": "batch"}, 5),
    "deep-supervision": Arm("deep supervision", plots.PALETTE["green"], {"deep_supervision": True}, 1),
}
EVALUATIONS = 10  # per epoch
PANELS = (("none", "bn-x1", "bn-x5", "bn-x30"), ("none", "sigmoid-none", "sigmoid-bn", "deep-supervision"))
PUBLISHED = {  # millions of steps to 72.2 %, and best accuracy in %, on ImageNet
    "none": ("31.0", "72.2"),
    "bn-x1": ("13.3", "72.7"),
    "bn-x5": ("2.1", "73.0"),
    "bn-x30": ("2.7", "74.8"),
    "sigmoid-none": ("never", "chance"),
    "sigmoid-bn": ("never", "69.8"),
    "deep-supervision": ("not published", "not published"),
}


def runs(preset: str) -> dict[str, Config]:
    """Returns the arms. All have the 7-layer network, since deep supervision is implemented only for it."""
    config = PRESETS[preset].replace(net="cnn7", norm="none", evaluations=EVALUATIONS)
    if preset == "small":
        config = config.replace(epochs=8, lr_decay_epochs=7)  # long enough that the best without norm takes a while
    return {
        label: config.replace(learning_rate=config.learning_rate * arm.rate_factor, **arm.changes)
        for label, arm in ARMS.items()
    }


_RATES = "Networks with sigmoids have 5 times the learning rate, like the published one with batch norm."
_WATCHED = f"All accuracies are on {WATCHED:,} test images."
_DIFFERENT = runs("small")["none"].differences(runs("full")["none"])
SETUP = {
    "small": f"The protocol of the full preset, except for {_DIFFERENT}. {_RATES} {_WATCHED} The network without batch "
    "norm is stopped before it has converged, so that its best accuracy is that of a short training. The numbers of "
    "epochs and evaluations were set by the time that trial runs with another seed took.",
    "full": "The protocol of the published comparisons on CIFAR-10, with a network of seven layers and "
    f"{EVALUATIONS} evaluations per epoch. {_RATES} {_WATCHED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run, tested on a part of the test images."""
    watched = first_tests(dataset, WATCHED)
    return loop.fit(config, watched, **options)


def held(run: dict) -> list[float]:
    """Returns the accuracy in % that a run has in a row and in the next one, so that one lucky row does not count.

    A run with a single row has the accuracy of that row.
    """
    accuracies = [100 * row["test_accuracy"] for row in run["rows"]]
    return [min(pair) for pair in itertools.pairwise(accuracies)] or accuracies


def best(run: dict) -> float:
    """Returns the highest accuracy in % that two consecutive rows have."""
    return max(held(run))


def steps_until(run: dict, accuracy: float) -> float:
    """Returns the steps to the first of two consecutive rows with an accuracy (in %); infinite if there are none."""
    rows = zip(run["rows"], held(run), strict=False)  # the last row has no next one, and is left out
    return next((row["step"] for row, reached in rows if reached >= accuracy), math.inf)


def steps(results: dict[str, list[dict]], label: str) -> list[float]:
    """Returns the steps of each run to the best accuracy without norm and with the same seed, or infinity."""
    return [steps_until(run, best(none)) for run, none in paired_runs(results[label], results["none"])]


def ratios(results: dict[str, list[dict]], label: str, baseline: str) -> list[float]:
    """Returns the steps of one arm over those of another, seed by seed; infinite if the first are."""
    both = zip(steps(results, label), steps(results, baseline), strict=True)
    return [math.inf if math.isinf(first) else first / second for first, second in both]


def fewer(results: dict[str, list[dict]], label: str, baseline: str) -> bool:
    """Says whether an arm reaches the accuracy with every seed, and clearly in fewer steps than another arm."""
    by_seed = ratios(results, label, baseline)
    return all(map(math.isfinite, by_seed)) and below(spread(by_seed), 1)


def part(results: dict[str, list[dict]], label: str) -> str:
    """Returns the steps of an arm in % of those of the network without norm, or how many seeds get there."""
    percent = [100 * ratio for ratio in ratios(results, label, "none")]
    reached = sum(map(math.isfinite, percent))
    return f"{spread(percent).text()} %" if reached == len(percent) else f"{reached} of {len(percent)} seeds get there"


def takes(results: dict[str, list[dict]], label: str) -> str:
    """Says how an arm reaches the accuracy: the end of a sentence that begins with "this accuracy"."""
    needed = steps(results, label)
    if all(map(math.isfinite, needed)):
        return f"takes {part(results, label)} of these steps"
    reached = sum(map(math.isfinite, needed))
    return f"is not reached with every seed ({reached} of {len(needed)})" if reached else "is not reached"


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    bests = {label: spread(map(best, results[label])).text() for label in ARMS}
    gain = spread(paired_differences(best, results["bn-x30"], results["none"]))
    sigmoid_gain = spread(paired_differences(best, results["sigmoid-bn"], results["sigmoid-none"]))
    return {
        "epochs": str(results["none"][0]["header"]["config"]["epochs"]),
        "none": bests["none"],
        "none_steps": spread(steps(results, "none")).text(0),
        "x1": takes(results, "bn-x1"),
        "x5": takes(results, "bn-x5"),
        "x30": takes(results, "bn-x30"),
        "x30_best": bests["bn-x30"],
        "gain": compared(gain, "more", "less"),
        "sigmoid_bn": bests["sigmoid-bn"],
        "sigmoid_none": bests["sigmoid-none"],
        "sigmoid_gain": compared(sigmoid_gain, "more", "less"),
        "deep": takes(results, "deep-supervision"),
        **judge(
            fewer(results, "bn-x1", "none"),
            fewer(results, "bn-x5", "bn-x1"),
            exceeds(gain),
            exceeds(sigmoid_gain),
            seeds=gain.n,
        ),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm, with the published numbers for ImageNet."""
    lines = []
    for label, arm in ARMS.items():
        needed = steps(results, label)
        reached = all(map(math.isfinite, needed))
        lines.append(
            {
                "network": arm.name,
                "steps to the best accuracy without norm": spread(needed).text(0) if reached else "-",
                "relative to no norm": part(results, label),
                "published, million steps": PUBLISHED[label][0],
                "best test accuracy, %": spread(map(best, results[label])).text(),
                "published best, %": PUBLISHED[label][1],
                "seeds": str(len(results[label])),
            }
        )
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws accuracy against step: for the learning rates, and for the other arms."""
    panels = []
    for labels in PANELS:
        lines = []
        for label in labels:
            steps_of_rows = column(results[label], "step").max(axis=0)
            accuracy = 100 * column(results[label], "test_accuracy")
            lines.append(plots.Line(ARMS[label].name, steps_of_rows, accuracy, ARMS[label].color))
        panels.append(plots.Lines("step", "test accuracy (%)", lines))
    return plots.draw(panels)
