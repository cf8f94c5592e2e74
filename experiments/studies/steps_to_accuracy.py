"""How many fewer steps does batch norm need to reach the best accuracy of the net without it?

Command: python -m experiments run steps_to_accuracy --preset small

Time: sized for eight minutes on 2 CPU cores (small); measured: {time}

Published: On ImageNet, Inception reaches its best accuracy of 72.2 % after 31.0 million steps; with batch norm it does
so after 13.3 million, at 5 times the learning rate after 2.1 million (14 times fewer), and at 30 times after 2.7
million, where it goes on to 74.8 %. The nets at 5 and 30 times the rate differ in more than the rate: they do without
dropout and local response normalization, have a weaker weight decay and a rate that decays faster, and see images that
are shuffled better and distorted less. With sigmoids in place of ReLUs the net at 5 times the rate reaches 69.8 %, and
does no better than chance without batch norm (Ioffe and Szegedy 2015). No number published for deep supervision beside
these.

Finding: An accuracy counts as reached where two evaluations running have it. The net without batch norm is at its best
in these {epochs} epochs after {none_steps} steps, at {none} %. With batch norm this accuracy {x1}; at 5 times the
learning rate it {x5}; at 30 times it {x30}, and the best there is {x30_best} %, {gain} than without. With deep
supervision in place of batch norm it {deep}. With sigmoids the best is {sigmoid_bn} % with batch norm, {sigmoid_gain}
than the {sigmoid_none} % without. {verdict}.

Agreement: Agrees in part ((1), (3) and (4) hold, (2) is not shown): at the same rate batch norm needs fewer steps, by a
larger factor than published; its best at high rates is higher, and it makes sigmoids learn. Unlike there, higher rates
do not clearly save further steps, so that at these rates the factor is smaller than published on average.

Refuted if: (1) batch norm does not reach the best accuracy of the net without in fewer steps, or not with every seed;
(2) at 5 times the learning rate it does not reach it in fewer steps than at the same rate, or not with every seed;
(3) at 30 times the rate the best accuracy is no higher than without batch norm; (4) with sigmoids, the best accuracy is
no higher with batch norm than without.
"""

import itertools
import math

from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset, first_tests
from experiments.evidence import plots
from experiments.evidence.verdicts import below, column, compared, exceeds, judge, paired_differences, pairs, spread
from experiments.training import loop

WATCHED = 2_000  # test images of every evaluation: with all 10,000, evaluating would take longer than training
SETTINGS = {"watched": WATCHED}
# What each arm is named, its colour, what it changes in the net without batch norm, and by how much its learning rate.
ARMS = {
    "none": ("no norm", plots.COLORS["none"], {}, 1),
    "bn-x1": ("batch norm", plots.PALETTE["sky"], {"norm": "batch"}, 1),
    "bn-x5": ("batch norm, rate x 5", plots.COLORS["batch"], {"norm": "batch"}, 5),
    "bn-x30": ("batch norm, rate x 30", plots.PALETTE["black"], {"norm": "batch"}, 30),
    "sigmoid-none": ("sigmoid, no norm", plots.PALETTE["orange"], {"activation": "sigmoid"}, 5),
    "sigmoid-bn": ("sigmoid, batch norm", plots.PALETTE["purple"], {"activation": "sigmoid", "norm": "batch"}, 5),
    "deep-supervision": ("deep supervision", plots.PALETTE["green"], {"deep_supervision": True}, 1),
}
EVALUATIONS = 10  # in an epoch
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
    """Returns the arms. Only the 7-layer net has deep supervision, so that all have this net."""
    config = PRESETS[preset].replace(net="cnn7", norm="none", evaluations=EVALUATIONS)
    if preset == "small":
        config = config.replace(epochs=8, lr_decay_epochs=7)  # long enough that the best without norm takes a while
    return {
        label: config.replace(learning_rate=config.learning_rate * factor, **changes)
        for label, (_, _, changes, factor) in ARMS.items()
    }


_RATES = "Nets with sigmoids learn at 5 times the rate, as in the published one with batch norm."
_WATCHED = f"All accuracies are those of {WATCHED:,} test images."
_DIFFERENT = runs("small")["none"].differences(runs("full")["none"])
SETUP = {
    "small": f"The protocol of full, but {_DIFFERENT}. {_RATES} {_WATCHED} The net without batch norm is stopped "
    "before it has converged, so that its best is that of a short training. Trial runs with another seed set the "
    "numbers of epochs and evaluations, by the time they took.",
    "full": "The protocol of the published comparisons on CIFAR-10, with a net of seven layers and "
    f"{EVALUATIONS} evaluations in an epoch. {_RATES} {_WATCHED}",
}


def fit(config: Config, dataset: Dataset, **options) -> loop.Trained:
    """Trains a run, evaluated on a part of the test images."""
    watched = first_tests(dataset, WATCHED)
    return loop.fit(config, watched, **options)


def held(run: dict) -> list[float]:
    """Returns the accuracies in % that a run has at a row and at the next one: chance seldom strikes twice.

    A run of a single row has that of this row.
    """
    accuracies = [100 * row["test_accuracy"] for row in run["rows"]]
    return [min(pair) for pair in itertools.pairwise(accuracies)] or accuracies


def best(run: dict) -> float:
    """Returns the highest accuracy in % of two rows running."""
    return max(held(run))


def steps_until(run: dict, accuracy: float) -> float:
    """Returns the steps to the first of two rows running that have an accuracy (in %); infinite without them."""
    both = zip(run["rows"], held(run), strict=False)
    return next((row["step"] for row, reached in both if reached >= accuracy), math.inf)


def steps(results: dict[str, list[dict]], label: str) -> list[float]:
    """Returns the steps of each run to the best accuracy of the net without norm and of the same seed, or infinity."""
    return [steps_until(run, best(none)) for run, none in pairs(results[label], results["none"])]


def ratios(results: dict[str, list[dict]], label: str, other: str) -> list[float]:
    """Returns the steps of one arm over those of another, seed by seed; infinite where the first is."""
    both = zip(steps(results, label), steps(results, other), strict=True)
    return [math.inf if math.isinf(first) else first / second for first, second in both]


def fewer(results: dict[str, list[dict]], label: str, other: str) -> bool:
    """Says whether an arm needs fewer steps than another, by more than twice the spread; never where it fails to."""
    found = ratios(results, label, other)
    return all(map(math.isfinite, found)) and below(spread(found), 1)


def part(results: dict[str, list[dict]], label: str) -> str:
    """Returns the steps of an arm in % of those of the net without norm, or how many seeds get there."""
    found = [100 * ratio for ratio in ratios(results, label, "none")]
    reached = sum(map(math.isfinite, found))
    return f"{spread(found).text()} %" if reached == len(found) else f"{reached} of {len(found)} seeds get there"


def takes(results: dict[str, list[dict]], label: str) -> str:
    """Returns what becomes of the accuracy in an arm: the end of a sentence about it."""
    needed = steps(results, label)
    if all(map(math.isfinite, needed)):
        return f"takes {part(results, label)} of these steps"
    reached = sum(map(math.isfinite, needed))
    return f"is not reached with every seed ({reached} of {len(needed)})" if reached else "is not reached"


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    bests = {label: spread(map(best, results[label])).text() for label in ARMS}
    gain, sigmoid = (
        spread(paired_differences(best, results[label], results[other]))
        for label, other in (("bn-x30", "none"), ("sigmoid-bn", "sigmoid-none"))
    )
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
        "sigmoid_gain": compared(sigmoid, "more", "less"),
        "deep": takes(results, "deep-supervision"),
        **judge(
            fewer(results, "bn-x1", "none"),
            fewer(results, "bn-x5", "bn-x1"),
            exceeds(gain),
            exceeds(sigmoid),
            seeds=gain.n,
        ),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm, the published figures for ImageNet beside ours."""
    lines = []
    for label, (name, *_) in ARMS.items():
        needed = steps(results, label)
        lines.append(
            {
                "net": name,
                "steps to the best without norm": spread(needed).text(0) if all(map(math.isfinite, needed)) else "-",
                "of the steps without norm": part(results, label),
                "published, million steps": PUBLISHED[label][0],
                "best test accuracy, %": spread(map(best, results[label])).text(),
                "published, %": PUBLISHED[label][1],
                "seeds": str(len(results[label])),
            }
        )
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns accuracy against step, of the learning rates and of what else is said to help."""
    panels = []
    for labels in PANELS:
        lines = []
        for label in labels:
            accuracy = 100 * column(results[label], "test_accuracy")
            lines.append(plots.Line(ARMS[label][0], column(results[label], "step").max(0), accuracy, ARMS[label][1]))
        panels.append(plots.Lines("step", "test accuracy (%)", lines))
    return plots.draw(panels)
