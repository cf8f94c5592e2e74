"""Does batch norm train the Inception network faster and better?

Command: python -m experiments run bn_vs_none --preset small

Time: planned for a quarter of an hour on 2 CPU cores (small); measured: {time}

Published: On CIFAR-10 at 32x32, best validation accuracy in 30 epochs is ~87 % with batch norm and ~66 % without, in
~43 and ~34 minutes (read off a bar chart). The author concludes that batch norm gives higher accuracy, faster training
and longer steps (Kiefer 2020).

Finding: With batch norm the network ends at {batch} % test accuracy, {gain} than without it, where it ends at {none} %.
{passes}. A step takes {batch_ms} ms with batch norm and {none_ms} ms without, {cost} times as long. {verdict}.

Agreement: Agrees: batch norm ends higher, by about as many points as published, and reaches the best accuracy of the
network without it in clearly less time. A step costs more with it, but by less than the published training times
suggest.

Refuted if: (1) the network with batch norm does not end with a higher test accuracy than the one without; (2) it does
not reach the best accuracy of the one without in less time, or not with every seed.
"""

from matplotlib.figure import Figure

from experiments.config import PRESETS, Config
from experiments.evidence import plots
from experiments.evidence.verdicts import (
    below,
    best_accuracy,
    column,
    compared,
    elapsed,
    exceeds,
    final_accuracy,
    first_above,
    gains,
    judge,
    paired_runs,
    spread,
    step_milliseconds,
    training_seconds,
)

ARMS = ("batch", "none")
PUBLISHED = {"batch": "~87", "none": "~66"}  # best validation accuracy in %, read off a bar chart


def runs(preset: str) -> dict[str, Config]:
    """Returns the two arms; `SETUP` says how `small` differs."""
    config = PRESETS[preset]
    if preset == "small":
        config = config.replace(net="inception", width=0.125, batch_size=50, lr_decay_epochs=6)
    return {norm: config.replace(norm=norm) for norm in ARMS}


SETUP = {
    "small": (
        f"The published network and protocol, except for {runs('small')['batch'].differences(runs('full')['batch'])}. "
        "After these results the criterion became stricter: before, a difference counted if it was more than one "
        "standard deviation."
    ),
    "full": "The published network and protocol.",
}


def summary(results: dict[str, list[dict]]) -> dict[str, str]:
    """Returns the fields of the finding. Differences and ratios are taken between runs of the same seed."""
    paired = paired_runs(*(results[norm] for norm in ARMS))
    gain = spread(gains(results, "batch", "none"))
    targets = [best_accuracy(none) for _, none in paired]
    reached = [first_above(batch, target) for (batch, _), target in zip(paired, targets, strict=True)]
    if None in reached:
        faster, passes = False, "It does not reach the best accuracy of the network without it with every seed"
    else:
        epochs = spread(batch["rows"][row]["epoch"] for (batch, _), row in zip(paired, reached, strict=True))
        time = spread(
            100 * training_seconds(batch, row) / training_seconds(none, first_above(none, target))
            for (batch, none), row, target in zip(paired, reached, targets, strict=True)
        )
        faster = below(time, 100)
        passes = (
            f"It reaches the best accuracy of the network without it after {epochs.text()} of "
            f"{paired[0][0]['header']['config']['epochs']} epochs, at a resolution of one epoch, in {time.text()} % of "
            "the time"
        )
    return {
        "batch": spread(map(final_accuracy, results["batch"])).text(),
        "none": spread(map(final_accuracy, results["none"])).text(),
        "gain": compared(gain, "more", "less"),
        "passes": passes,
        "batch_ms": spread(map(step_milliseconds, results["batch"])).text(),
        "none_ms": spread(map(step_milliseconds, results["none"])).text(),
        "cost": spread(step_milliseconds(batch) / step_milliseconds(none) for batch, none in paired).text(2),
        **judge(exceeds(gain), faster, seeds=gain.n),
    }


def table(results: dict[str, list[dict]], preset: str) -> list[dict[str, str]]:
    """Returns one line per arm, with the published accuracy if the protocol is the published one."""
    lines = []
    for norm in ARMS:
        group = results[norm]
        line = {
            "norm": plots.NAMES[norm],
            "final test accuracy, %": spread(map(final_accuracy, group)).text(),
            "best test accuracy, %": spread(map(best_accuracy, group)).text(),
        }
        if preset == "full":
            line["published best, %"] = PUBLISHED[norm]
        line |= {
            "time per step, ms": spread(map(step_milliseconds, group)).text(),
            "training time, s": spread(map(training_seconds, group)).text(),
            "seeds": str(len(group)),
        }
        lines.append(line)
    return lines


def plot(results: dict[str, list[dict]]) -> Figure:
    """Draws accuracy against epoch, accuracy against time, and the time of a step."""
    by_epoch, by_time, bars = [], [], []
    for norm in ARMS:
        name, color = plots.NAMES[norm], plots.COLORS[norm]
        accuracy = 100 * column(results[norm], "test_accuracy")
        epochs = column(results[norm], "epoch").max(axis=0)
        seconds = elapsed(results[norm]).mean(axis=0)
        by_epoch.append(plots.Line(name, epochs, accuracy, color))
        by_time.append(plots.Line(name, seconds, accuracy, color))
        bars.append(plots.Bar(name, [step_milliseconds(run) for run in results[norm]], color))
    return plots.draw(
        [
            plots.Lines("epoch", "test accuracy (%)", by_epoch),
            plots.Lines("training time (s)", "test accuracy (%)", by_time),
            plots.Bars("time per training step (ms)", bars),
        ]
    )
