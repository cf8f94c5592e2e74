"""Figures: lines and bars with their spread over seeds, and dots for single values.

Conventions: a study says what to show (`Lines`, `Bars`, `Dots`), and this module decides how. Colors are those of Okabe
and Ito, which color-blind readers can distinguish, and every line has its name at its end instead of in a legend. The
same results give the same file, byte for byte.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

PALETTE = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#000000",
}
COLORS = {
    "batch": PALETTE["blue"],
    "none": PALETTE["vermilion"],
    "group": PALETTE["green"],
    "ghost": PALETTE["purple"],
    "renorm": PALETTE["orange"],
}
NAMES = {
    "batch": "batch norm",
    "none": "no norm",
    "group": "group norm",
    "ghost": "ghost batch norm",
    "renorm": "batch renorm",
}
STYLE = {
    "font.size": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2.2,
}
DPI = 120
PANEL_INCHES = (5.6, 4.0)
PANELS_IN_A_ROW = 3
VERTICAL_BARS = 4  # up to this many bars are vertical: more names would overlap below the axis
TICK_LETTERS = 4  # tick labels of up to this many letters are written out
ROOMY_TICKS = 6  # up to this many tick labels have the usual font size
LABEL_GAP = 0.07  # smallest vertical distance between two names, as a fraction of the height of the axes


class Line(NamedTuple):
    """A line through the means over seeds, with a band of one standard deviation on either side.

    Attributes:
      name: written at the end of the line.
      x: positions, shape [points].
      y: values, shape [seeds, points].
      color: of the line, the band and the name.
      dashes: line style of matplotlib.
      marker: marker of matplotlib at each point, for lines with few points.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: str
    dashes: str = "-"
    marker: str = ""


class Lines(NamedTuple):
    """A panel of lines.

    Attributes:
      xlabel: quantity and unit.
      ylabel: quantity and unit.
      lines: the lines.
      xscale: "linear", which starts at 0, or "log", which has a tick at each point of the first line.
      yscale: "linear" or "log".
      bottom: lower limit of a linear y axis; None fits it to the values.
      title: above the panel, if several panels show the same quantities.
    """

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    xscale: Literal["linear", "log"] = "linear"
    yscale: Literal["linear", "log"] = "linear"
    bottom: float | None = 0
    title: str = ""


class Bar(NamedTuple):
    """A bar for the mean over seeds, with an error bar of one standard deviation and a dot for each seed."""

    name: str
    values: Sequence[float]
    color: str


class Bars(NamedTuple):
    """A panel of bars: vertical with their names below; horizontal with their names on the left if there are many.

    Attributes:
      label: quantity and unit.
      bars: the bars.
      title: above the panel, if several panels show the same quantity.
    """

    label: str
    bars: Sequence[Bar]
    title: str = ""


class Series(NamedTuple):
    """Dots of one color: some values for each name of the panel."""

    name: str
    values: Sequence[Sequence[float]]
    color: str


class Dots(NamedTuple):
    """A panel of ratios: a row of dots for each name, on a logarithmic axis with a line at 1.

    A vertical stroke marks the geometric mean of the dots of a name and series.

    Attributes:
      label: quantity.
      names: of the rows, from the top.
      series: each has values for every name.
      title: above the panel, if several panels show the same quantity.
    """

    label: str
    names: Sequence[str]
    series: Sequence[Series]
    title: str = ""


def draw(panels: Sequence[Lines | Bars | Dots]) -> Figure:
    """Draws panels side by side, at most three in a row."""
    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)  # rounded up
    width, height = PANEL_INCHES
    figure_width = width * columns if columns > 1 else 1.5 * width  # a single panel needs room for the names, too
    with rc_context(STYLE):
        figure = Figure(figsize=(figure_width, height * rows), layout="constrained")
        FigureCanvasAgg(figure)  # instead of pyplot, which would open a window where there is a display
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(places, panels, strict=False):
            _DRAW[type(panel)](axes, panel)
            axes.set_title(panel.title, fontsize=13, loc="left" if isinstance(panel, Dots) else "center")
            axes.set_axisbelow(True)
        for axes in places[len(panels) :]:
            axes.remove()
    return figure


def save(figure: Figure, path: Path, *, digest: str) -> Path:
    """Writes a figure as PNG and returns its path.

    Args:
      figure: the figure.
      path: where to write it.
      digest: of the results from which it was drawn (`files.digest`). It becomes the description of the file, so that a
        figure older than its results can be recognized.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # "Software" would hold the version of matplotlib, and make the bytes of the same figure differ.
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None, "Description": f"results {digest}"})
    return path


def ticks(values: Sequence[float]) -> list[str]:
    """Formats tick labels; if one would be long, powers of ten are written as such."""
    plain = [f"{x:g}" for x in values]
    if max(map(len, plain)) <= TICK_LETTERS:
        return plain
    texts = []
    for x, text in zip(values, plain, strict=True):
        exponent = round(np.log10(x))
        is_power = np.isclose(x, 10.0**exponent, atol=0)
        texts.append(f"$10^{{{exponent}}}$" if is_power else text)
    return texts


def spread_out(heights: list[float]) -> list[float]:
    """Moves increasing heights up or down until they are `LABEL_GAP` apart, and below 1 if there is room."""
    moved = []
    for height in heights:
        moved.append(max(height, moved[-1] + LABEL_GAP) if moved else height)
    # The first pass only moves names up. Those that it moved above the top come down again, and push others down.
    highest = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], highest)
        highest = moved[i] - LABEL_GAP
    return moved


def _draw_lines(axes: Axes, panel: Lines) -> None:
    axes.grid(axis="y", alpha=0.3)
    for line in panel.lines:
        mean = line.y.mean(axis=0)
        axes.plot(line.x, mean, color=line.color, linestyle=line.dashes, marker=line.marker)
        if len(line.y) > 1:
            std = line.y.std(axis=0, ddof=1)
            low = mean - std
            if panel.yscale == "log":
                low = np.maximum(low, line.y.min(axis=0))  # mean - std may be negative
            axes.fill_between(line.x, low, mean + std, color=line.color, alpha=0.2, linewidth=0)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    _scale_y(axes, panel)
    _scale_x(axes, panel)
    _name_lines(axes, panel.lines)


def _scale_y(axes: Axes, panel: Lines) -> None:
    axes.set_yscale(panel.yscale)
    if panel.yscale == "linear" and panel.bottom is not None:
        axes.set_ylim(bottom=panel.bottom)
    low, high = axes.get_ylim()
    if panel.yscale == "log" and high < 100 * low:
        # There is hardly a power of ten in the range, so that matplotlib would label next to nothing.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _scale_x(axes: Axes, panel: Lines) -> None:
    if panel.xscale == "linear":
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return
    axes.set_xscale("log")
    points = panel.lines[0].x
    axes.set_xticks(points, ticks(points), fontsize="small" if len(points) > ROOMY_TICKS else "medium")
    axes.xaxis.set_minor_locator(NullLocator())


def _name_lines(axes: Axes, lines: Sequence[Line]) -> None:
    """Writes each name, with a piece of its line, to the right of where the line ends, without overlaps."""
    axes.get_ylim()  # settles the limits, which the transformations below do not
    heights = [_end_height(axes, line) for line in lines]
    order = np.argsort(heights, kind="stable")
    for i, height in zip(order, spread_out([heights[i] for i in order]), strict=True):
        line = lines[i]
        options = {"color": line.color, "transform": axes.transAxes, "clip_on": False}
        axes.plot([1.02, 1.1], [height, height], line.dashes, **options)
        axes.text(1.12, height, line.name, va="center", fontsize=12, **options)


def _end_height(axes: Axes, line: Line) -> float:
    """Returns the height of the last finite point of a line, as a fraction of the height of the axes."""
    mean = line.y.mean(axis=0)
    finite = mean[np.isfinite(mean)]
    if not len(finite):
        return 0.0
    data_to_axes = axes.transScale + axes.transLimits
    return data_to_axes.transform((1, finite[-1]))[1]


def _draw_bars(axes: Axes, panel: Bars) -> None:
    horizontal = len(panel.bars) > VERTICAL_BARS
    axes.grid(axis="x" if horizontal else "y", alpha=0.3)
    for position, bar in enumerate(panel.bars):
        values = np.asarray(bar.values, float)
        mean, std = values.mean(), values.std(ddof=1) if len(values) > 1 else None
        positions = np.full(len(values), position)
        if horizontal:
            axes.barh(position, mean, xerr=std, height=0.6, color=bar.color, capsize=6)
            axes.plot(values, positions, "o", color="black", markersize=3.5, alpha=0.6)
        else:
            axes.bar(position, mean, yerr=std, width=0.6, color=bar.color, capsize=6)
            axes.plot(positions, values, "o", color="black", markersize=3.5, alpha=0.6)
    places, names = range(len(panel.bars)), [bar.name for bar in panel.bars]
    if horizontal:
        axes.set_yticks(places, names)
        axes.invert_yaxis()  # the first bar at the top
        axes.set(xlabel=panel.label)
    else:
        axes.set_xticks(places, names)
        axes.set(ylabel=panel.label)


def _draw_dots(axes: Axes, panel: Dots) -> None:
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.axvline(1, color="black", linewidth=1)
    room = 0.8 / len(panel.series)  # for one series, as a fraction of the distance between two names
    for number, series in enumerate(panel.series):
        offset = room * (number - (len(panel.series) - 1) / 2)
        for row, values in enumerate(series.values):
            heights = np.full(len(values), row + offset)
            axes.plot(values, heights, "o", color=series.color, markersize=5, alpha=0.5, markeredgewidth=0)
            if len(values):
                mean = np.exp(np.log(values).mean())
                axes.plot([mean], [row + offset], "|", color=series.color, markersize=18, markeredgewidth=3)
    axes.set_xscale("log")
    all_values = [value for series in panel.series for values in series.values for value in values]
    axes.set_xlim(min([1.0, *all_values]) / 1.2, max([1.0, *all_values]) * 1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(panel.names)), panel.names)
    axes.set_ylim(len(panel.names) - 0.5, -0.5)
    axes.set(xlabel=panel.label)
    _name_series(axes, panel.series)


def _name_series(axes: Axes, series: Sequence[Series]) -> None:
    """Writes the names of the series above the axes on the right, where there are no dots, each in its color."""
    options = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 12, "clip_on": False}
    for number, one_series in enumerate(reversed(series)):
        axes.text(1.0 - 0.19 * number, 1.01, one_series.name, color=one_series.color, **options)


_DRAW = {Lines: _draw_lines, Bars: _draw_bars, Dots: _draw_dots}
