"""How many fewer steps does batch norm need to reach the best accuracy of the net without it?

Command: python -m experiments run steps_to_accuracy --preset small

Time: sized for eight minutes on 2 CPU cores (small); measured: {time}

Published: On ImageNet, Inception reaches its best accuracy of 72.2 % after 31.0 million steps; with batch norm it does
so after 13.3 million, at 5 times the learning rate after 2.1 million (14 times fewer), and at 30 times after 2.7
million, where it goes on to 74.8 %. With sigmoids in place of ReLUs it reaches 69.8 % with batch norm at 5 times the
rate, and does no better than chance without (Ioffe and Szegedy 2015). No number published for deep supervision beside
these.

Finding: The net without batch norm is at its best, {none} %, after {none_steps} steps. Of these steps, the same
accuracy takes {x1} with batch norm, {x5} at 5 times the learning rate and {x30} at 30 times, where the net goes on to
{x30_best} %, {gain} points higher; deep supervision in place of batch norm takes {deep}. With sigmoids the best is
{sigmoid_bn} % with batch norm and {sigmoid_none} % without. {verdict}.

Refuted if: batch norm does not reach the accuracy with every seed, or not in fewer steps than the net without, or at 5
times the learning rate not in fewer than at the same; or at 30 times the best accuracy is no higher than without; or,
with sigmoids, no higher with batch norm than without. All by more than twice the standard deviation over seeds; steps
as their ratio.
"""

import math

from matplotlib.figure import Figure

from experiments import plots
from experiments.config import PRESETS, Config
from experiments.measures import best_accuracy, column, exceeds, pairs, spread, steps_to, verdict

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
    config = PRESETS[preset].replace(net="cnn7", norm="none", evaluations={"small": 5, "full": 10}[preset])
    return {
        label: config.replace(learning_rate=config.learning_rate * factor, **changes)
        for label, (_, _, changes, factor) in ARMS.items()
    }


_RATES = "Nets with sigmoids learn at 5 times the rate, as in the published one with batch norm."
_DIFFERENT = runs("small")["none"].differences(runs("full")["none"])
SETUP = {
    "small": f"The protocol of full, but {_DIFFERENT}. {_RATES} Nothing was tuned but the number of evaluations.",
    "full": f"The published comparison's protocol on CIFAR-10, with a net of seven layers. {_RATES}",
}


def steps(results: dict[str, list[dict]], label: str) -> list[float]:
    """Returns the steps of each run to the best accuracy of the net without norm and of the same seed, or infinity."""
    return [steps_to(run, best_accuracy(none)) for run, none in pairs(results[label], results["none"])]


def ratios(results: dict[str, list[dict]], label: str, other: str) -> list[float]:
    """Returns the steps of one arm over those of another, seed by seed; infinite where the first is."""
    both = zip(steps(results, label), steps(results, other), strict=True)
    return [math.inf if math.isinf(first) else first / second for first, second in both]


def fewer(results: dict[str, list[dict]], label: str, other: str) -> bool:
    """Says whether an arm needs fewer steps than another, by more than twice the spread; never where it fails to."""
    found = ratios(results, label, other)
    return all(map(math.isfinite, found)) and exceeds(spread(1 - ratio for ratio in found))


def percentage(results: dict[str, list[dict]], label: str) -> str:
    """Returns the steps of an arm in % of those of the net without norm, in words where a seed does not get there."""
    found = [100 * ratio for ratio in ratios(results, label, "none")]
    reached = [ratio for ratio in found if math.isfinite(ratio)]
    if reached == found:
        return f"{spread(found).text()} %"
    return f"more than all ({len(reached)} of {len(found)} seeds get there)"


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    best = {label: spread(map(best_accuracy, results[label])) for label in ARMS}
    gain, sigmoid = (
        spread(best_accuracy(one) - best_accuracy(other) for one, other in pairs(results[label], results[reference]))
        for label, reference in (("bn-x30", "none"), ("sigmoid-bn", "sigmoid-none"))
    )
    claims = (
        fewer(results, "bn-x1", "none"),
        fewer(results, "bn-x5", "bn-x1"),
        exceeds(gain),
        exceeds(sigmoid),
    )
    return {
        "none": best["none"].text(),
        "none_steps": spread(steps(results, "none")).text(0),
        "x1": percentage(results, "bn-x1"),
        "x5": percentage(results, "bn-x5"),
        "x30": percentage(results, "bn-x30"),
        "x30_best": best["bn-x30"].text(),
        "gain": gain.text(),
        "sigmoid_bn": best["sigmoid-bn"].text(),
        "sigmoid_none": best["sigmoid-none"].text(),
        "deep": percentage(results, "deep-supervision"),
        "verdict": verdict(*claims, seeds=gain.n),
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
                "of the steps without norm": percentage(results, label),
                "published, million steps": PUBLISHED[label][0],
                "best test accuracy, %": spread(map(best_accuracy, results[label])).text(),
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
