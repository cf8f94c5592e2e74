"""Which learning rates work?

Command: python -m experiments run learning_rates --preset small

Time: planned for 8 minutes on 2 CPU cores (small); measured: {time}

Published: On CIFAR-10 with the Inception network, best validation accuracy in 30 epochs at the learning rates 0.00001,
0.0001, 0.001, 0.01, 0.1, 1 and 10: with batch norm ~31, ~49, ~71, ~87, ~92, ~70 and ~10 %; without, ~66 % at 0.01 and
~10 % at all others (Kiefer 2020, read off a bar chart). On ImageNet, batch norm allowed a rate 30 times larger (Ioffe
and Szegedy 2015).

Finding: A rate works if the best test accuracy is at least 20 %, twice chance, with every seed. With batch norm,
{batch_range}; without, {none_range}. {extremes}. The best accuracy is {batch_best} with batch norm and {none_best}
without. {verdict}.

Agreement: Agrees: with batch norm both larger and smaller rates work than without, and both networks are best at the
published rates. But with batch norm the two smallest rates do not work here, and without it the rate 0.1 works with
some seeds, while it did not in the published runs.

Refuted if: (1) the largest rate that works with batch norm is no larger than the largest that works without; (2) the
smallest is no smaller. A rate that works for only one of the networks counts as larger, and as smaller, than none at
all.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.evidence import plots
from experiments.evidence.verdicts import best_accuracy, column, diverged, judge, paired_differences, spread

ARMS = ("batch", "none")
PUBLISHED = {  # rate: best validation accuracy in %, with batch norm and without, read off a bar chart
    1e-5: (31, 10),
    1e-4: (49, 10),
    1e-3: (71, 10),
    0.01: (87, 66),
    0.1: (92, 10),
    1.0: (70, 10),
    10.0: (10, 10),
}
RATES = tuple(PUBLISHED)
WORKS = 20.0  # %; twice chance
COURSES = (1e-3, 0.1)  # rates whose learning curves are drawn
PUBLISHED_COLUMN = {"small": "published (full protocol)", "full": "published"}


def runs(preset: str) -> dict[str, Config]:
    """Returns every rate with batch norm and without; `SETUP` says how `small` differs."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(epochs=5)
    return {_label(norm, rate): config.replace(norm=norm, learning_rate=rate) for rate in RATES for norm in ARMS}


def _label(norm: str, rate: float) -> str:
    return f"{norm}-{rate:g}"


SETUP = {
    "small": "The published network and protocol, except for "
    f"{runs('small')['batch-0.01'].differences(runs('full')['batch-0.01'])}. The number of epochs was set by the time "
    "that trial runs with another seed took.",
    "full": "The published network and protocol.",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding."""
    working = {norm: [rate for rate in RATES if works(results[_label(norm, rate)])] for norm in ARMS}
    batch, none = working["batch"], working["none"]
    higher = bool(batch) and (not none or max(batch) > max(none))
    lower = bool(batch) and (not none or min(batch) < min(none))
    return {
        "batch_range": _range(batch),
        "none_range": _range(none),
        "extremes": _extremes(batch, none),
        "batch_best": _best(results, "batch"),
        "none_best": _best(results, "none"),
        **judge(higher, lower, seeds=len(results[_label("batch", RATES[0])])),
    }


def works(group: list[dict]) -> bool:
    """Says whether the network has learned something in every run of a rate."""
    return all(best_accuracy(run) >= WORKS for run in group)


def _range(rates: list[float]) -> str:
    """Says which rates work."""
    if not rates:
        return "none of them works"
    verb = "works" if len(rates) == 1 else "work"
    return f"{len(rates)} of {len(RATES)} {verb} ({', '.join(f'{rate:g}' for rate in rates)})"


def _extremes(batch: list[float], none: list[float]) -> str:
    """Compares the largest rates that work, and the smallest."""
    if not (batch and none):
        return "There are thus no largest and no smallest rates to compare"
    largest, smallest = (_times(extreme(batch) / extreme(none)) for extreme in (max, min))
    return f"With batch norm, the largest rate that works is {largest}, and the smallest {smallest}"


def _times(ratio: float) -> str:
    if ratio == 1:
        return "the same"
    return f"{max(ratio, 1 / ratio):g} times {'larger' if ratio > 1 else 'smaller'}"


def _best(results: dict[str, list[dict]], norm: str) -> str:
    """Returns the best accuracy over all rates, and where it is."""
    best = {rate: spread(map(best_accuracy, results[_label(norm, rate)])) for rate in RATES}
    rate = max(RATES, key=lambda rate: best[rate].mean)
    return f"{best[rate].text()} % at {rate:g}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per rate: our and the published accuracies of both arms, and how many runs diverged."""
    lines = []
    for rate in RATES:
        groups = [results[_label(norm, rate)] for norm in ARMS]
        gain = spread(paired_differences(best_accuracy, *groups))
        line = {"learning rate": f"{rate:g}"}
        line |= {
            f"best accuracy, {plots.NAMES[norm]}, %": _text(group) for norm, group in zip(ARMS, groups, strict=True)
        }
        line["difference, points"] = gain.text()
        line |= {
            f"{PUBLISHED_COLUMN[preset]}, {plots.NAMES[norm]}, %": f"~{accuracy}"
            for norm, accuracy in zip(ARMS, PUBLISHED[rate], strict=True)
        }
        line["diverged runs, batch norm + no norm"] = " + ".join(str(sum(map(diverged, group))) for group in groups)
        line["seeds"] = str(len(groups[0]))
        lines.append(line)
    return lines


def _text(group: list[dict]) -> str:
    return spread(map(best_accuracy, group)).text()


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws the best accuracy against the rate, and the learning curves of `COURSES`."""
    by_rate, courses = [], []
    for norm, published in zip(ARMS, zip(*PUBLISHED.values(), strict=True), strict=True):
        name, color = plots.NAMES[norm], plots.COLORS[norm]
        best = [[best_accuracy(run) for run in results[_label(norm, rate)]] for rate in RATES]
        by_rate.append(plots.Line(name, RATES, np.transpose(best), color, marker="o"))
        by_rate.append(plots.Line(f"{name}, published", RATES, np.array([published]), color, dashes=":"))
        for rate, dashes in zip(COURSES, ("--", "-"), strict=True):
            accuracy = 100 * column(group := results[_label(norm, rate)], "test_accuracy")
            epochs = column(group, "epoch").max(axis=0)
            courses.append(plots.Line(f"{name}, {rate:g}", epochs, accuracy, color, dashes=dashes))
    return plots.draw(
        [
            plots.Lines("learning rate", "best test accuracy (%)", by_rate, xscale="log"),
            plots.Lines("epoch", "test accuracy (%)", courses),
        ]
    )
