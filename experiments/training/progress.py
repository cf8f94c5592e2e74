"""Shows the progress of training runs: live bars on a terminal, plain lines elsewhere.

Conventions: `Display.run` returns the callback that `loop.fit` takes as `on_progress`.
"""

from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.training import loop


class Display:
    """Shows this number of runs, one after the other. Use it in a `with` statement."""

    def __init__(self, runs: int, console: Console | None = None):
        self._console = console or Console()
        self._runs = runs
        self._done = 0
        self._bars = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
            )
            self._bars = Progress(*columns, console=self._console)
            self._total = self._bars.add_task("all runs", total=runs, status=f"0 of {runs}")

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bars:
            self._bars.stop()

    def line(self, text: str) -> None:
        """Prints a line, above the bars if there are any."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def skip(self, name: str) -> None:
        """Counts a run that was finished before."""
        self.line(f"{name}: already there")
        self._finish()

    def run(self, name: str) -> Callable:
        """Returns the `on_progress` of the next run. A finished run leaves one line on the screen."""
        bar = self._bars.add_task(name, total=1, status="compiling") if self._bars else None

        def on_progress(progress: loop.Progress) -> None:
            row = progress.row
            ends = row is not None and (progress.step == progress.steps or row["diverged"])
            if bar is None:
                # Without bars, only whole epochs and the last row are worth a line.
                if row is not None and (ends or row["epoch"] == int(row["epoch"])):
                    self.line(f"{name}: {summarize(row)}")
            else:
                status = summarize(row) if row else f"step {progress.step}  train loss {progress.loss:.3f}"
                self._bars.update(bar, total=progress.steps, completed=progress.step, status=status)
                self._bars.update(self._total, completed=self._done + progress.step / progress.steps)
                if ends:
                    self._bars.remove_task(bar)
                    self.line(f"{name}: {summarize(row)}")
            if ends:
                self._finish()

        return on_progress

    def _finish(self) -> None:
        self._done += 1
        if self._bars:
            self._bars.update(self._total, completed=self._done, status=f"{self._done} of {self._runs}")


def summarize(row: dict) -> str:
    """Formats a row in a few words."""
    diverged = "  DIVERGED" if row["diverged"] else ""
    return (
        f"epoch {row['epoch']:g}  train loss {row['train_loss']:.3f}  "
        f"test accuracy {100 * row['test_accuracy']:.1f} %{diverged}"
    )
