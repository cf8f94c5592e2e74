"""The demo: a small network with and without batch norm, at three learning rates, in under two minutes on two cores.

It downloads nothing: it uses CIFAR-10 if it finds it, otherwise the handwritten digits of scikit-learn.
"""

import time
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.config import Config
from experiments.evidence import plots
from experiments.evidence.verdicts import column, final_accuracy, first_above, training_seconds
from experiments.training import loop, small_run
from experiments.training.progress import Display

NORMS = ("batch", "none")
RATES = (0.01, 0.1, 1.0)
DASHES = {0.01: "-", 0.1: "--", 1.0: ":"}
TARGETS = {"cifar10": 35, "digits": 90}  # test accuracy in %; the table counts the steps to reach it


def run(*, data_dir: Path | None, out: Path) -> None:
    """Trains the six networks, prints a table and writes a figure to the folder `out`."""
    began = time.perf_counter()
    console = Console()
    dataset, reason = small_run.choose_data(data_dir)
    arms = configs(dataset.name)
    _print(console, "A 7-layer convolutional network, with and without batch norm, at three learning rates.")
    _print(console, f"Data: {dataset.source}. {reason}")
    runs = {}
    with Display(len(arms), console) as display:
        for name, config in arms.items():
            runs[name] = {"rows": loop.fit(config, dataset, on_progress=display.run(name)).rows}
    figure = plots.save(plot(arms, runs), out / "accuracy.png", digest="of the demo")
    console.print(table(arms, runs, TARGETS[dataset.name]))
    _print(console, f"Figure: {figure}")
    _print(console, f"Total time: {time.perf_counter() - began:.0f} s")


def configs(name: str) -> dict[str, Config]:
    """Returns the six runs on a data set by name."""
    return {
        f"{plots.NAMES[norm]}, rate {rate:g}": small_run.CONFIGS[name].replace(norm=norm, learning_rate=rate)
        for norm in NORMS
        for rate in RATES
    }


def table(arms: dict[str, Config], runs: dict[str, dict], target: float) -> Table:
    """Returns the table of accuracy, steps to the `target` accuracy (in %), and seconds of training."""
    printed = Table(
        "norm", "learning rate", "test accuracy", f"steps to {target} %", "training", title="Result (one seed)"
    )
    for name, config in arms.items():
        run = runs[name]
        row = first_above(run, target)
        printed.add_row(
            plots.NAMES[config.norm],
            f"{config.learning_rate:g}",
            f"{final_accuracy(run):.1f} %" + (" (diverged)" if run["rows"][-1]["diverged"] else ""),
            "never" if row is None else str(run["rows"][row]["step"]),
            f"{training_seconds(run):.1f} s",
            end_section=config.learning_rate == RATES[-1],
        )
    return printed


def plot(arms: dict[str, Config], runs: dict[str, dict]) -> Figure:
    """Draws accuracy against training step, one line for each run."""
    lines = [
        plots.Line(
            name,
            column([runs[name]], "step")[0],
            100 * column([runs[name]], "test_accuracy"),
            plots.COLORS[config.norm],
            DASHES[config.learning_rate],
        )
        for name, config in arms.items()
    ]
    return plots.draw([plots.Lines("training step", "test accuracy (%)", lines)])


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
