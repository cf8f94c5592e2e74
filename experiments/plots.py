"""All drawing: figures of lines and bars, with their spread over seeds.

Conventions: a study says what is shown (`Lines`, `Bars`), this module says how. The colours are those of Okabe and Ito,
which colour-blind readers tell apart, and every line bears its name at its end. The same results give the same file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = {"batch": "#0072B2", "none": "#D55E00", "group": "#009E73"}
NAMES = {"batch": "batch norm", "none": "no norm", "group": "group norm"}
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.2,
}
DPI = 120
PANEL_INCHES = (5.6, 4.0)
LABEL_GAP = 0.07  # smallest vertical distance between two names, as a part of the axes' height


class Line(NamedTuple):
    """One line: the mean over seeds, and a band of one standard deviation to both sides.

    Attributes:
      name: written at the end of the line.
      x: positions, shape [points].
      y: values, shape [seeds, points].
      color: of the line, the band and the name.
      dashes: matplotlib's line style.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: str
    dashes: str = "-"


class Lines(NamedTuple):
    """A panel of lines; `xlabel` and `ylabel` name quantity and unit.

    With `doubling`, x has a logarithmic scale to base 2, with a mark at each point of the first line.
    """

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    doubling: bool = False


class Bar(NamedTuple):
    """One bar: the mean of `values` over seeds, with an error bar of one standard deviation to both sides."""

    name: str
    values: Sequence[float]
    color: str


class Bars(NamedTuple):
    """A panel of bars; `ylabel` names quantity and unit."""

    ylabel: str
    bars: Sequence[Bar]


def draw(panels: Sequence[Lines | Bars]) -> Figure:
    """Returns a figure with the panels side by side."""
    width, height = PANEL_INCHES
    width = width * len(panels) if len(panels) > 1 else 1.5 * width
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            (_draw_lines if isinstance(panel, Lines) else _draw_bars)(axes, panel)
            axes.set_axisbelow(True)
            axes.grid(axis="y", alpha=0.3)
    return figure


def save(figure: Figure, path: Path, *, digest: str) -> Path:
    """Writes a figure as PNG, without a date, and returns its path.

    Args:
      figure: what to write.
      path: where.
      digest: of the results it was drawn from (`results.digest`). The file keeps it as its description, so that a
        figure older than its results can be told from a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None, "Description": f"results {digest}"})
    return path


def _draw_lines(axes: Axes, panel: Lines):
    for line in panel.lines:
        mean = line.y.mean(axis=0)
        axes.plot(line.x, mean, color=line.color, linestyle=line.dashes)
        if len(line.y) > 1:
            std = line.y.std(axis=0, ddof=1)
            axes.fill_between(line.x, mean - std, mean + std, color=line.color, alpha=0.2, linewidth=0)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.set_ylim(bottom=0)
    if panel.doubling:
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.lines[0].x, [f"{x:g}" for x in panel.lines[0].x])
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _name_lines(axes, panel.lines)


def _name_lines(axes, lines):
    """Writes each name, with a piece of its line, to the right of the line's end, but no two over each other."""
    low, high = axes.get_ylim()
    ends = sorted(((line.y.mean(axis=0)[-1] - low) / (high - low), i) for i, line in enumerate(lines))
    for (_, i), height in zip(ends, spread_out([end for end, _ in ends]), strict=True):
        line = lines[i]
        place = {"color": line.color, "transform": axes.transAxes, "clip_on": False}
        axes.plot([1.02, 1.1], [height, height], line.dashes, **place)
        axes.text(1.12, height, line.name, va="center", fontsize=12, **place)


def spread_out(heights: list[float]) -> list[float]:
    """Returns increasing heights, moved up or down until they are `LABEL_GAP` apart, below 1 where there is room."""
    moved = []
    for height in heights:
        moved.append(max(height, moved[-1] + LABEL_GAP) if moved else height)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], moved[i + 1] - LABEL_GAP if i + 1 < len(moved) else 1.0)
    return moved


def _draw_bars(axes: Axes, panel: Bars):
    for position, bar in enumerate(panel.bars):
        std = np.std(bar.values, ddof=1) if len(bar.values) > 1 else None
        axes.bar(position, np.mean(bar.values), yerr=std, color=bar.color, width=0.6, capsize=6)
    axes.set_xticks(range(len(panel.bars)), [bar.name for bar in panel.bars])
    axes.set(ylabel=panel.ylabel)
