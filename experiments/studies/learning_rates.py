"""Which learning rates work?

Command: python -m experiments run learning_rates --preset small

Time: sized for 8 minutes on 2 CPU cores (small); measured: {time}

Published: On CIFAR-10 with the Inception net, best validation accuracy in 30 epochs at the rates 0.00001, 0.0001,
0.001, 0.01, 0.1, 1 and 10: with batch norm ~31, ~49, ~71, ~87, ~92, ~70 and ~10 %; without ~66 % at 0.01 and ~10 % at
all others (Kiefer 2020, read off a bar chart). On ImageNet, batch norm allowed a rate 30 times larger (Ioffe and
Szegedy 2015).

Finding: A rate works where the best test accuracy is at least 20 %, twice chance, with every seed. With batch norm
{batch_range}, without {none_range}. {extremes}. The best is {batch_best} with batch norm, and {none_best} without.
{verdict}.

Agreement: Agrees: with batch norm both larger and smaller rates work than without, and both nets are best at the
published rates; but with batch norm the two smallest rates do not work here, and without it the rate 0.1 works with
some seeds, while in the published runs it did not.

Refuted if: (1) the largest rate that works with batch norm is no larger than the largest that works without; (2) the
smallest is no smaller. A rate that works for one net alone counts as larger, and as smaller, than none at all.
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
COURSES = (1e-3, 0.1)  # the rates whose course is drawn
PUBLISHED_COLUMN = {"small": "published (full protocol)", "full": "published"}


def runs(preset: str) -> dict[str, Config]:
    """Returns every rate with batch norm and without; what `small` makes smaller is said in `SETUP`."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(epochs=5)
    return {_label(norm, rate): config.replace(norm=norm, learning_rate=rate) for rate in RATES for norm in ARMS}


def _label(norm, rate):
    return f"{norm}-{rate:g}"


SETUP = {
    "small": "Not the published net and protocol, but "
    f"{runs('small')['batch-0.01'].differences(runs('full')['batch-0.01'])}. Trial runs with another seed set the "
    "number of epochs, by the time they took.",
    "full": "The published net and protocol.",
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
    """Says whether every run of a rate has learned something."""
    return all(best_accuracy(run) >= WORKS for run in group)


def _range(rates):
    """Says which rates work."""
    if not rates:
        return "none of them does"
    return f"{len(rates)} of {len(RATES)} do{'es' * (len(rates) == 1)} ({', '.join(f'{rate:g}' for rate in rates)})"


def _extremes(batch, none):
    """Says how the largest and the smallest rates that work compare."""
    if not (batch and none):
        return "So there is no largest and no smallest rate to compare"
    largest, smallest = (_times(extreme(batch) / extreme(none)) for extreme in (max, min))
    return f"With batch norm the largest is {largest}, the smallest {smallest}"


def _times(ratio):
    if ratio == 1:
        return "the same"
    return f"{max(ratio, 1 / ratio):g} times {'larger' if ratio > 1 else 'smaller'}"


def _best(results, norm):
    """The accuracy at the rate where it is highest."""
    best = {rate: spread(map(best_accuracy, results[_label(norm, rate)])) for rate in RATES}
    rate = max(RATES, key=lambda rate: best[rate].mean)
    return f"{best[rate].text()} % at {rate:g}"


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per rate: the accuracies of both arms and of the same arms as published, and what diverged."""
    lines = []
    for rate in RATES:
        groups = [results[_label(norm, rate)] for norm in ARMS]
        gain = spread(paired_differences(best_accuracy, *groups))
        line = {"learning rate": f"{rate:g}"}
        line |= {f"best, {plots.NAMES[norm]}, %": _text(group) for norm, group in zip(ARMS, groups, strict=True)}
        line["difference, points"] = gain.text()
        line |= {
            f"{PUBLISHED_COLUMN[preset]}, {plots.NAMES[norm]}, %": f"~{accuracy}"
            for norm, accuracy in zip(ARMS, PUBLISHED[rate], strict=True)
        }
        line["diverged, batch norm + no norm"] = " + ".join(str(sum(map(diverged, group))) for group in groups)
        line["seeds"] = str(len(groups[0]))
        lines.append(line)
    return lines


def _text(group):
    return spread(map(best_accuracy, group)).text()


def plot(results: dict[str, list[dict]]) -> Figure:
    """Returns the best accuracy against the rate, and the course of the accuracy at the rates of `COURSES`."""
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
