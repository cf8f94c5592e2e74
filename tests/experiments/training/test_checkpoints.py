"""Checkpoints: an interruption leaves no trace in the rows and variables of a run."""

import numpy as np
import pytest

from experiments.training import loop
from experiments.training.checkpoints import Checkpoints
from experiments.training.loop import fit
from tests.experiments.conftest import mesh_of
from tests.experiments.training.conftest import Stop, assert_same_bits, assert_same_curve, stop_at, without_seconds


@pytest.mark.slow
def test_run_continues_on_another_number_of_devices(tmp_path, tiny, blobs, small_net):
    straight = fit(tiny, blobs)
    with pytest.raises(Stop):
        fit(tiny, blobs, checkpoint_dir=tmp_path, on_progress=stop_at(8), mesh=mesh_of(8))
    resumed = fit(tiny, blobs, checkpoint_dir=tmp_path)
    assert_same_curve(resumed.rows, straight.rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stops", "checkpoint_steps"),
    [pytest.param((4,), 500, id="at a row"), pytest.param((2, 6), 1, id="twice"), pytest.param((7,), 3, id="later")],
)
def test_interruption_leaves_no_trace_in_rows_and_variables(tmp_path, tiny, blobs, stops, checkpoint_steps, small_net):
    config = tiny.replace(evaluations=2)
    straight = fit(config, blobs)
    keep = {"checkpoint_dir": tmp_path, "checkpoint_steps": checkpoint_steps}
    for stop in stops:
        with pytest.raises(Stop):
            fit(config, blobs, on_progress=stop_at(stop), **keep)
    resumed = fit(config, blobs, **keep)
    assert without_seconds(resumed.rows) == without_seconds(straight.rows)
    assert_same_bits(resumed.variables, straight.variables)


def test_continued_run_does_not_repeat_finished_steps(tmp_path, tiny, blobs, monkeypatch, small_net):
    compile_programs, taken = loop.compile_programs, []

    def counting(*args):
        compiled = compile_programs(*args)

        def train(state, *rest):
            taken.append(state.step)
            return compiled.train(state, *rest)

        return compiled._replace(train=train, train_last=train)

    monkeypatch.setattr(loop, "compile_programs", counting)
    with pytest.raises(Stop):
        fit(tiny, blobs, checkpoint_dir=tmp_path, checkpoint_steps=3, on_progress=stop_at(8))
    assert len(taken) == 8
    taken.clear()
    fit(tiny, blobs, checkpoint_dir=tmp_path)
    assert len(taken) == 2  # the newest checkpoint is that of step 6


def test_continued_run_reports_the_rows_it_already_has(tmp_path, tiny, blobs, small_net):
    rows, again = fit(tiny, blobs, checkpoint_dir=tmp_path).rows, []
    fit(tiny, blobs, checkpoint_dir=tmp_path, on_progress=again.append)
    assert [(progress.step, progress.row) for progress in again] == [(8, rows[-1])]


@pytest.mark.slow
def test_half_written_checkpoint_is_passed_over(tmp_path, tiny, blobs, small_net):
    straight = fit(tiny, blobs)
    with pytest.raises(Stop):
        fit(tiny, blobs, checkpoint_dir=tmp_path, on_progress=stop_at(8))
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    resumed = fit(tiny, blobs, checkpoint_dir=tmp_path)
    assert without_seconds(resumed.rows) == without_seconds(straight.rows)


def test_checkpoint_holds_the_rows_of_its_step_though_it_is_written_while_the_run_goes_on(tmp_path, tiny, monkeypatch):
    written, rows = [], [{"step": 1}]
    with Checkpoints(tmp_path, tiny) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", lambda step, args: written.append(args.progress.item))
        checkpoints.save(1, {"x": np.zeros(2)}, {"rows": rows})
    rows.append({"step": 2})
    assert written[0]["progress"] == {"rows": [{"step": 1}]}


def test_checkpoint_of_another_config_is_refused(tmp_path, tiny, blobs, small_net):
    fit(tiny, blobs, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"another run: learning_rate was 0\.05 and is now 0\.5.*delete that folder"):
        fit(tiny.replace(learning_rate=0.5), blobs, checkpoint_dir=tmp_path)


def test_diverged_run_is_not_continued(tmp_path, tiny, blobs, small_net):
    config = tiny.replace(learning_rate=1e38, epochs=4)
    first, again = (fit(config, blobs, checkpoint_dir=tmp_path).rows for _ in range(2))
    assert len(again) == len(first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"noise": "matched", "group_size": 8, "dropout": 0.5},
        {"noise": "shifting"},
        {"sampling": "half_the_classes"},
        {"norm": "none", "deep_supervision": True},
    ],
    ids=str,
)
def test_interruption_leaves_no_trace_in_runs_of_the_studies(tmp_path, tiny, blobs, changes):
    config = tiny.replace(**changes)

    def probe(state, learning_rate):
        return {"step_of_state": int(state.step), "rate": learning_rate}

    straight = fit(config, blobs, probe=probe)
    with pytest.raises(Stop):
        fit(config, blobs, probe=probe, checkpoint_dir=tmp_path, checkpoint_steps=3, on_progress=stop_at(5))
    resumed = fit(config, blobs, probe=probe, checkpoint_dir=tmp_path)
    assert without_seconds(resumed.rows) == without_seconds(straight.rows)
    assert [row["step_of_state"] for row in resumed.rows] == [4, 8]
    assert_same_bits(resumed.variables, straight.variables)


@pytest.mark.slow
def test_run_that_starts_from_another_continues_with_the_same_bits(tmp_path, tiny, blobs):
    start = fit(tiny, blobs).variables
    config = tiny.replace(start=tiny, tuning="affine", seed=1)
    straight = fit(config, blobs, start_variables=start)
    with pytest.raises(Stop):
        fit(config, blobs, start_variables=start, checkpoint_dir=tmp_path, checkpoint_steps=3, on_progress=stop_at(5))
    assert_same_bits(fit(config, blobs, start_variables=start, checkpoint_dir=tmp_path).variables, straight.variables)
