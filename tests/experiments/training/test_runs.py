"""Runs that become result files: their images are named, and their checkpoints go once they are done."""

import pytest

from experiments.evidence import files
from experiments.training import loop, runs


def test_result_says_which_images_were_used(tmp_path, tiny, blobs, make_run, monkeypatch):
    monkeypatch.setattr(runs, "_load", lambda *_: blobs._replace(provenance="blobs of the tests"))
    trained = loop.Trained(make_run(tiny)["rows"], {"params": {}}, 1.0)
    (tmp_path / "r.unfinished").mkdir()
    runs.train_to_file(tiny, files.Place(tmp_path / "r.jsonl"), data_dir=None, fit=lambda *_, **__: trained)
    assert files.read(tmp_path / "r.jsonl")["header"]["images"] == "blobs of the tests"


def test_checkpoints_of_a_finished_run_are_removed(tmp_path, tiny, make_run):
    run = make_run(tiny)
    files.write(tmp_path / "r.jsonl", run["header"], run["rows"])
    (tmp_path / "r.unfinished").mkdir()  # as if killed between writing the result and removing them
    runs.train_missing([("r", files.Place(tmp_path / "r.jsonl"), tiny)], data_dir=None)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.slow
def test_finished_run_leaves_a_result_and_no_checkpoints(tmp_path, tiny, blobs, monkeypatch):
    monkeypatch.setattr(runs, "_load", lambda *_: blobs)
    runs.train_to_file(tiny, files.Place(tmp_path / "r.jsonl"), data_dir=None)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    assert files.read(tmp_path / "r.jsonl")["header"]["parameters"] > 1000
