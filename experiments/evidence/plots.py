"""All drawing: figures of lines and bars, with their spread over seeds, and of dots for single values.

Conventions: a study says what is shown (`Lines`, `Bars`, `Dots`), this module says how. The colours are those of Okabe
and Ito, which colour-blind readers tell apart, and every line bears its name at its end. The same results give the same
file.
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
STANDING_BARS = 4  # so many have room for their names below
TICK_LETTERS = 4  # numbers of so many stand below an axis as they are
ROOMY_TICKS = 6  # so many have room for numbers of the usual size
LABEL_GAP = 0.07  # smallest vertical distance between two names, as a part of the axes' height


class Line(NamedTuple):
    """One line: the mean over seeds, and a band of one standard deviation to both sides.

    Attributes:
      name: written at the end of the line.
      x: positions, shape [points].
      y: values, shape [seeds, points].
      color: of the line, the band and the name.
      dashes: matplotlib's line style.
      marker: matplotlib's marker at each point; for lines of few points.
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
      lines: what is drawn.
      xscale: linear from 0; or logarithmic, with a tick at each point of the first line ("log").
      yscale: linear or logarithmic ("log").
      bottom: where a linear y axis begins; None leaves it to the values.
      title: above the panel, where several show the same quantities.
    """

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    xscale: Literal["linear", "log"] = "linear"
    yscale: Literal["linear", "log"] = "linear"
    bottom: float | None = 0
    title: str = ""


class Bar(NamedTuple):
    """One bar: the mean of `values` over seeds, an error bar of one standard deviation, and a dot for each."""

    name: str
    values: Sequence[float]
    color: str


class Bars(NamedTuple):
    """A panel of bars, their names below; from five on they lie, with their names on the left.

    Attributes:
      label: quantity and unit.
      bars: what is drawn.
      title: above the panel, where several show the same quantity.
    """

    label: str
    bars: Sequence[Bar]
    title: str = ""


class Series(NamedTuple):
    """One colour of dots: some values for each name."""

    name: str
    values: Sequence[Sequence[float]]
    color: str


class Dots(NamedTuple):
    """A panel of ratios: a dot for each, below each other by name, on a logarithmic axis with a line at 1.

    A stroke marks the geometric mean of the dots of a name and series.

    Attributes:
      label: quantity.
      names: on the left, from the top.
      series: each with values for every name.
      title: above the panel, where several show the same quantity.
    """

    label: str
    names: Sequence[str]
    series: Sequence[Series]
    title: str = ""


def draw(panels: Sequence[Lines | Bars | Dots]) -> Figure:
    """Returns a figure with the panels side by side, at most three in a row."""
    columns = min(len(panels), PANELS_IN_A_ROW)
    rows = -(-len(panels) // columns)
    width, height = PANEL_INCHES
    width = width * columns if columns > 1 else 1.5 * width
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(places, panels, strict=False):
            _DRAW[type(panel)](axes, panel)
            axes.set_title(panel.title, fontsize=13, loc="left" if isinstance(panel, Dots) else "center")
            axes.set_axisbelow(True)
        for axes in places[len(panels) :]:
            axes.remove()
    return figure


def save(figure: Figure, path: Path, *, digest: str) -> Path:
    """Writes a figure as PNG, without a date, and returns its path.

    Args:
      figure: what to write.
      path: where.
      digest: of the results it was drawn from (`files.digest`). The file keeps it as its description, so that a
        figure older than its results can be told from a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None, "Description": f"results {digest}"})
    return path


def _draw_lines(axes: Axes, panel: Lines):
    axes.grid(axis="y", alpha=0.3)
    for line in panel.lines:
        mean = line.y.mean(axis=0)
        axes.plot(line.x, mean, color=line.color, linestyle=line.dashes, marker=line.marker)
        if len(line.y) > 1:
            std = line.y.std(axis=0, ddof=1)
            low = mean - std
            if panel.yscale == "log":
                low = np.maximum(low, line.y.min(axis=0))  # a mean less its deviation may be below 0
            axes.fill_between(line.x, low, mean + std, color=line.color, alpha=0.2, linewidth=0)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, yscale=panel.yscale)
    if panel.yscale == "linear" and panel.bottom is not None:
        axes.set_ylim(bottom=panel.bottom)
    low, high = axes.get_ylim()
    if panel.yscale == "log" and high < 100 * low:  # few powers of ten, if any
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.xscale == "log":
        axes.set_xscale("log")
        points = panel.lines[0].x
        size = "small" if len(points) > ROOMY_TICKS else "medium"
        axes.set_xticks(points, ticks(points), fontsize=size)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _name_lines(axes, panel.lines)


def ticks(values: Sequence[float]) -> list[str]:
    """Returns numbers as they stand below an axis: powers of ten are written as such where one would take more room."""
    plain = [f"{x:g}" for x in values]
    if max(map(len, plain)) <= TICK_LETTERS:
        return plain
    exponents = [round(np.log10(x)) for x in values]
    return [
        f"$10^{{{exponent}}}$" if np.isclose(x, 10.0**exponent, atol=0) else text
        for x, exponent, text in zip(values, exponents, plain, strict=True)
    ]


def _name_lines(axes, lines):
    """Writes each name, with a piece of its line, to the right of the line's end, but no two over each other."""
    axes.get_ylim()  # settles the limits, which the transformations below do not
    means = [line.y.mean(axis=0) for line in lines]
    ends = [mean[np.isfinite(mean)][-1:] for mean in means]  # a line that breaks off is named where it does
    heights = [axes.transLimits.transform(axes.transScale.transform((1, end[0])))[1] if len(end) else 0 for end in ends]
    order = np.argsort(heights, kind="stable")
    for i, height in zip(order, spread_out([heights[i] for i in order]), strict=True):
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
    lying = len(panel.bars) > STANDING_BARS
    axes.grid(axis="x" if lying else "y", alpha=0.3)
    for position, bar in enumerate(panel.bars):
        values = np.asarray(bar.values, float)
        std = values.std(ddof=1) if len(values) > 1 else None
        options = {"color": bar.color, "capsize": 6}
        if lying:
            axes.barh(position, values.mean(), xerr=std, height=0.6, **options)
        else:
            axes.bar(position, values.mean(), yerr=std, width=0.6, **options)
        dots = (values, np.full(len(values), position))
        axes.plot(*(dots if lying else dots[::-1]), "o", color="black", markersize=3.5, alpha=0.6)
    places, names = range(len(panel.bars)), [bar.name for bar in panel.bars]
    if lying:
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set(xlabel=panel.label)
    else:
        axes.set_xticks(places, names)
        axes.set(ylabel=panel.label)


def _draw_dots(axes: Axes, panel: Dots):
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.axvline(1, color="black", linewidth=1)
    room = 0.8 / len(panel.series)  # of the distance between two names
    for number, series in enumerate(panel.series):
        offset = room * (number - (len(panel.series) - 1) / 2)
        for position, values in enumerate(series.values):
            heights = np.full(len(values), position + offset)
            axes.plot(values, heights, "o", color=series.color, markersize=5, alpha=0.5, markeredgewidth=0)
            if len(values):
                mean = np.exp(np.log(values).mean())
                axes.plot([mean], [position + offset], "|", color=series.color, markersize=18, markeredgewidth=3)
    axes.set_xscale("log")
    every = [1.0, *(value for series in panel.series for values in series.values for value in values)]
    axes.set_xlim(min(every) / 1.2, max(every) * 1.2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(panel.names)), panel.names)
    axes.set_ylim(len(panel.names) - 0.5, -0.5)
    axes.set(xlabel=panel.label)
    _name_series(axes, panel.series)


def _name_series(axes, series):
    """Writes the names above the axes, on the right, each in its colour: where no dot is."""
    place = {"transform": axes.transAxes, "ha": "right", "va": "bottom", "fontsize": 12, "clip_on": False}
    for number, each in enumerate(reversed(series)):
        axes.text(1.0 - 0.19 * number, 1.01, each.name, color=each.color, **place)


_DRAW = {Lines: _draw_lines, Bars: _draw_bars, Dots: _draw_dots}
