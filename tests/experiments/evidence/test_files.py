"""Result files: what is written is what is read, completely or not at all, and never over another run's."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.evidence import files
from experiments.evidence.provenance import ROOT

CONFIG = Config(data="digits", image_size=8, learning_rate=0.1)


def test_reading_gives_what_was_written(tmp_path, make_run):
    run = make_run(CONFIG)
    run["measured"] = [{"images": 10, "sizes": [1.0, 2.0]}, {"images": 20, "sizes": [0.5]}]
    files.write(tmp_path / "a" / "b.jsonl", run["header"], run["rows"], run["measured"])
    assert files.read(tmp_path / "a" / "b.jsonl") == run


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path, make_run):
    run = make_run(CONFIG)
    run["rows"][0] |= {"train_loss": math.nan, "test_loss": math.inf}
    files.write(tmp_path / "r.jsonl", run["header"], run["rows"])
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])["train_loss"] is None
    assert math.isnan(files.read(tmp_path / "r.jsonl")["rows"][0]["test_loss"])


def test_interrupted_write_leaves_the_old_file_as_it_was(tmp_path, make_run, monkeypatch):
    path, run = tmp_path / "r.jsonl", make_run(CONFIG)
    files.write(path, run["header"], run["rows"])

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, run["header"], run["rows"][:1])
    assert files.read(path) == run


def add(folder, run, label="a", seed=None):
    """Adds a run to the file of a study; its name has the seed of its config, if no other is given."""
    seed = run["header"]["config"]["seed"] if seed is None else seed
    place = files.place_in_study(folder, "study", "small", label, seed)
    files.save(place, run["header"], run["rows"], run["measured"])
    return place


def test_unfinished_write_is_no_result(tmp_path, make_run, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: None)
    add(tmp_path, make_run(CONFIG))
    assert files.read_study(tmp_path, "study", "small") == {}


@pytest.fixture(params=[None, "a-seed0"], ids=["file of one run", "file of a study"])
def place(request, tmp_path):
    """Where a run with the seed 0 may be kept."""
    return files.Place(tmp_path / "r.jsonl", request.param)


def test_run_without_a_result_is_not_finished(place, make_run):
    assert not files.finished(place, CONFIG)
    other_seed = make_run(CONFIG.with_seed(1))
    if place.name is not None:
        files.save(place._replace(name="a-seed1"), other_seed["header"], other_seed["rows"])
        assert not files.finished(place, CONFIG)


def test_run_with_its_result_is_finished(place, make_run):
    run = make_run(CONFIG)
    files.save(place, run["header"], run["rows"])
    assert files.finished(place, CONFIG)


def test_result_of_another_config_is_refused_and_says_what_differs(place, make_run):
    run = make_run(CONFIG)
    files.save(place, run["header"], run["rows"])
    with pytest.raises(
        ValueError, match=r"r\.jsonl is .*another run: learning_rate was 0\.1 and is now 0\.2\..*delete"
    ):
        files.finished(place, CONFIG.replace(learning_rate=0.2))


def test_result_that_was_measured_with_other_settings_is_refused(place, make_run):
    run = make_run(CONFIG)
    files.save(place, run["header"] | {"settings": {"images": [10, 100]}}, run["rows"])
    assert files.finished(place, CONFIG, {"images": (10, 100)})
    with pytest.raises(ValueError, match=r"another run: images was \[10, 100\] and is now \[10\]\..*delete it"):
        files.finished(place, CONFIG, {"images": (10,)})


def test_what_belongs_to_a_run_alone_is_next_to_the_file():
    assert files.Place(Path("out/result.jsonl")).working_path(".unfinished") == Path("out/result.unfinished")
    place = files.place_in_study(Path("results"), "study", "small", "0.99", 3)
    assert place.working_path(".unfinished") == Path("results/study/small/0.99-seed3.unfinished")


@pytest.mark.parametrize(
    "content", ["", "{}", '{"config": {}}', '{"config": {}}\n{"step": 1', '{"config": {}}\n[1]', "[]\n{}", "\n\n"]
)
def test_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"r\.jsonl is not a result file .*delete it"):
        files.read(tmp_path / "r.jsonl")


@pytest.mark.parametrize("label", ["", "../up", "a b", "a/b", ".hidden"])
def test_label_that_cannot_name_a_file_is_refused(label):
    with pytest.raises(ValueError, match="label must consist of letters.*rename it"):
        files.place_in_study(Path(), "study", "small", label, 0)


def test_runs_of_a_study_come_by_label_in_the_order_of_seeds(tmp_path, make_run):
    for label, seed in (("b-1", 0), ("a", 10), ("a", 2)):
        add(tmp_path, make_run(CONFIG.with_seed(seed)), label)
    stored = files.read_study(tmp_path, "study", "small")
    assert list(stored) == ["a", "b-1"]
    seeds = {label: [run["header"]["config"]["seed"] for run in runs] for label, runs in stored.items()}
    assert seeds == {"a": [2, 10], "b-1": [0]}


def test_file_of_a_study_does_not_depend_on_the_order_in_which_its_runs_end(tmp_path, make_run):
    runs = [make_run(CONFIG.with_seed(seed), accuracies=(0.1 * seed,)) for seed in range(3)]
    for folder, order in ((tmp_path / "1", runs), (tmp_path / "2", runs[::-1])):
        for run in order:
            add(folder, run)
    first, second = ((tmp_path / folder / "study" / "small.jsonl").read_text() for folder in "12")
    assert first == second


def test_run_that_is_added_leaves_the_others_as_they_are(tmp_path, make_run):
    first, second = make_run(CONFIG), make_run(CONFIG.with_seed(1))
    first["rows"][0]["test_loss"] = 1 / 3
    first["measured"] = [{"images": 10, "sizes": [1.0, 0.1 + 0.2]}]
    file = add(tmp_path, first).file
    before = file.read_text()
    add(tmp_path, second)
    assert file.read_text().startswith(before)
    assert files.read_study(tmp_path, "study", "small") == {"a": [first, second]}


def test_runs_added_by_two_processes_at_once_are_all_kept(tmp_path, make_run):
    """Without the lock, each process would write back the runs that it had read, without the other's."""
    run = make_run(CONFIG)
    (tmp_path / "run.json").write_text(json.dumps(run))
    code = """
import json, pathlib, sys, time
from experiments.evidence import files
folder, first = pathlib.Path(sys.argv[1]), int(sys.argv[2])
run = json.loads((folder / "run.json").read_text())
(folder / f"ready-{first}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.001)
for seed in range(first, first + 20):
    run["header"]["config"]["seed"] = seed
    files.save(files.place_in_study(folder, "study", "small", "a", seed), run["header"], run["rows"])
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(first)], cwd=ROOT) for first in (0, 20)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    seeds = [run["header"]["config"]["seed"] for run in files.read_study(tmp_path, "study", "small")["a"]]
    assert seeds == list(range(40))


def test_run_is_saved_where_the_file_system_has_no_locks(tmp_path, make_run, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    run = make_run(CONFIG)
    add(tmp_path, run)
    assert files.read_study(tmp_path, "study", "small") == {"a": [run]}


@pytest.mark.parametrize("name", ["a-seed1", "a-seed00", "a", "seed0", None])
def test_run_whose_name_does_not_fit_its_seed_is_refused(tmp_path, make_run, name):
    run = make_run(CONFIG)
    header = run["header"] if name is None else {"run": name} | run["header"]
    files.write(tmp_path / "study" / "small.jsonl", header, run["rows"])
    with pytest.raises(ValueError, match=r"small\.jsonl has a run with seed=0 that is named .*correct the name"):
        files.read_study(tmp_path, "study", "small")


def test_two_runs_of_the_same_name_are_refused(tmp_path, make_run):
    file = add(tmp_path, make_run(CONFIG)).file
    file.write_text(2 * file.read_text())
    with pytest.raises(ValueError, match=r"small\.jsonl has two runs named 'a-seed0'"):
        files.read_study(tmp_path, "study", "small")


def test_file_of_a_study_is_not_taken_for_a_single_run(tmp_path, make_run):
    for seed in (0, 1):
        file = add(tmp_path, make_run(CONFIG.with_seed(seed))).file
    with pytest.raises(ValueError, match="not a result file of one run: it holds 2"):
        files.read(file)


def test_digest_tells_other_results(make_run):
    first, same, other = (files.digest({"a": [make_run(CONFIG, accuracies=a)]}) for a in ((0.1,), (0.1,), (0.2,)))
    assert first == same != other


SETTINGS = {"settings": {"rounds": 3}, "date": "2001-01-01", "commit": "c0ffee"}


def pieces(log, *, stops_at=None):
    """Two pieces of work that tell the log, of one and two records; the work is interrupted at one of them."""

    def work(name, records):
        if name == stops_at:
            raise KeyboardInterrupt
        log.append(name)
        return records

    return {"a": lambda: work("a", [{"x": 1.5}]), "b": lambda: work("b", [{"x": math.nan}, {"x": 3}])}


def test_measurements_are_a_header_and_the_records_of_all_pieces(tmp_path):
    files.measure_in_pieces(tmp_path / "m.jsonl", SETTINGS, pieces([]), say=lambda _: None)
    found = files.read_records(tmp_path / "m.jsonl")
    assert found["header"] == SETTINGS and [record["x"] for record in found["records"]][::2] == [1.5, 3]
    assert math.isnan(found["records"][1]["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_interrupted_measurement_continues_with_the_next_piece(tmp_path):
    path, log = tmp_path / "m.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        files.measure_in_pieces(path, SETTINGS, pieces(log, stops_at="b"), say=lambda _: None)
    assert not path.exists()
    files.measure_in_pieces(path, SETTINGS | {"date": "2002-02-02"}, pieces(log), say=lambda _: None)
    assert log == ["a", "b"] and files.read_records(path)["header"]["date"] == "2001-01-01"


@pytest.mark.parametrize("changed", [{"settings": {"rounds": 4}}, {"commit": "decaf"}])
def test_measurement_that_was_begun_under_other_conditions_starts_over_and_says_so(tmp_path, changed):
    path, log, said = tmp_path / "m.jsonl", [], []
    with pytest.raises(KeyboardInterrupt):
        files.measure_in_pieces(path, SETTINGS, pieces(log, stops_at="b"), say=said.append)
    files.measure_in_pieces(path, SETTINGS | changed, pieces(log), say=said.append)
    assert log == ["a", "a", "b"] and f"m.jsonl: begun with another {next(iter(changed))}; starts over" in said


def test_finished_measurement_is_made_again_and_replaced_when_that_is_complete(tmp_path):
    path, log = tmp_path / "m.jsonl", []
    files.measure_in_pieces(path, SETTINGS, pieces(log), say=lambda _: None)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        files.measure_in_pieces(path, SETTINGS | {"date": "2002-02-02"}, pieces(log, stops_at="b"), say=lambda _: None)
    assert path.read_bytes() == before
    files.measure_in_pieces(path, SETTINGS, pieces(log), say=lambda _: None)
    assert log == ["a", "b", "a", "b"] and files.read_records(path)["header"]["date"] == "2002-02-02"


@pytest.mark.parametrize("content", ["", "{}", '{"settings": 1}\n{}', '{"settings": {}}\n3', "no JSON"])
def test_file_that_holds_no_measurements_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match="m.jsonl is not a file of measurements"):
        files.read_records(tmp_path / "m.jsonl")
