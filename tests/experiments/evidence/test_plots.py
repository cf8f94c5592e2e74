"""Figures: the same results give the same file, and a reader finds names, units and spread in them."""

import numpy as np
import pytest
from PIL import Image

from experiments.evidence import plots

X = np.array([1.0, 2.0, 3.0])
LINES = plots.Lines(
    "epoch",
    "test accuracy (%)",
    [
        plots.Line("batch norm", X, np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 3.1]]), plots.COLORS["batch"]),
        plots.Line("no norm", X, np.array([[1.0, 2.0, 2.9]]), plots.COLORS["none"], "--"),
    ],
)
BARS = plots.Bars("time (ms)", [plots.Bar("batch norm", [1.0, 2.0], "#0072B2"), plots.Bar("no norm", [1.0], "#D55E00")])


def test_same_results_give_the_same_bytes(tmp_path):
    first, second = (plots.save(plots.draw([LINES, BARS]), tmp_path / f"{i}.png", digest="d") for i in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_file_says_which_results_it_shows_and_no_date(tmp_path):
    path = plots.save(plots.draw([BARS]), tmp_path / "new" / "a.png", digest="abc")
    assert Image.open(path).text == {"Description": "results abc"}


@pytest.mark.parametrize("panel", [LINES, BARS])
def test_axes_name_quantity_and_unit(panel):
    label = panel.ylabel if isinstance(panel, plots.Lines) else panel.label
    assert plots.draw([panel]).axes[0].get_ylabel() == label


def test_band_shows_the_spread_where_there_are_seeds():
    assert len(plots.draw([LINES]).axes[0].collections) == 1


def test_every_line_bears_its_name():
    assert [text.get_text() for text in plots.draw([LINES]).axes[0].texts] == ["no norm", "batch norm"]


@pytest.mark.parametrize("heights", [[0.1, 0.1, 0.1], [0.0, 0.5, 1.0], [0.98, 0.99, 1.0], [0.5]])
def test_names_keep_their_distance_and_stay_below_the_top(heights):
    moved = plots.spread_out(heights)
    assert all(np.diff(moved) >= plots.LABEL_GAP - 1e-12) and max(moved) <= 1


def test_names_that_are_apart_stay_at_their_lines():
    assert plots.spread_out([0.1, 0.5, 0.9]) == [0.1, 0.5, 0.9]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((0.01, 0.1, 10), ["0.01", "0.1", "10"]),
        ((1e-5, 0.1, 1), ["$10^{-5}$", "$10^{-1}$", "$10^{0}$"]),
        ((250, 10_000), ["250", "$10^{4}$"]),
    ],
)
def test_ticks_take_little_room(values, texts):
    assert plots.ticks(values) == texts


def test_short_logarithmic_axis_has_plain_numbers():
    line = plots.Line("a", np.array([1, 2]), np.array([[2.5, 11.0]]), "black")
    figure = plots.draw([plots.Lines("epoch", "time (s)", [line], yscale="log")])
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    shown = [
        text.get_text()
        for which in ("major", "minor")
        for text in axes.get_yticklabels(which=which)
        if low <= text.get_position()[1] <= high and text.get_text()
    ]
    assert shown == ["3", "5", "10"]


DOTS = plots.Dots(
    "ours / theirs",
    ["Flax", "Haiku"],
    [plots.Series("float32", [[0.5, 2.0], [0.8]], "#0072B2"), plots.Series("bfloat16", [[0.25], []], "#D55E00")],
)


def test_every_ratio_is_a_dot_next_to_its_name_on_a_logarithmic_axis():
    axes = plots.draw([DOTS]).axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "ours / theirs"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["Flax", "Haiku"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert sorted(x for line in dots for x in line.get_xdata()) == [0.25, 0.5, 0.8, 2.0]
    assert {round(y) for line in dots for y in line.get_ydata() if 0.8 in line.get_xdata()} == {1}


def test_stroke_marks_the_geometric_mean_of_the_dots():
    strokes = [line for line in plots.draw([DOTS]).axes[0].lines if line.get_marker() == "|"]
    assert sorted(line.get_xdata()[0] for line in strokes) == pytest.approx([0.25, 0.8, 1.0])
