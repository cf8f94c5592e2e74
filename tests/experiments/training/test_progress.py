"""The progress display, on a terminal and off it."""

import io

import pytest
from rich.console import Console

from experiments.config import Config
from experiments.training.loop import Progress
from experiments.training.progress import Display


def shown(rows, *, terminal):
    """The text that a display prints for one run with these rows."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with Display(2, console) as display:
        on_progress = display.run("net")
        on_progress(Progress(1, rows[-1]["step"], 2.0, None))
        for row in rows:
            on_progress(Progress(row["step"], rows[-1]["step"], row["train_loss"], row))
        display.skip("other")
    return console.file.getvalue()


@pytest.fixture
def rows(make_run):
    return make_run(Config(), accuracies=(0.25, 0.5))["rows"]


def test_off_a_terminal_each_epoch_is_a_plain_line(rows):
    assert shown(rows, terminal=False).splitlines() == [
        "net: epoch 1  train loss 1.000  test accuracy 25.0 %",
        "net: epoch 2  train loss 1.000  test accuracy 50.0 %",
        "other: already there",
    ]


def test_off_a_terminal_parts_of_an_epoch_are_left_out(rows):
    rows[0]["epoch"] = 0.5
    assert "0.5" not in shown(rows, terminal=False)


def test_on_a_terminal_a_finished_run_leaves_one_line(rows):
    assert shown(rows, terminal=True).count("net: epoch") == 1


def test_on_a_terminal_all_runs_are_counted(rows):
    assert "2 of 2" in shown(rows, terminal=True)


def test_divergence_is_shown(rows):
    rows[-1]["diverged"] = True
    assert "DIVERGED" in shown(rows, terminal=False)
