"""Result files: what is written is what is read, completely or not at all, and never over another run's."""

import dataclasses
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.evidence import files

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


def test_unfinished_write_is_no_result(tmp_path, make_run, monkeypatch):
    run = make_run(CONFIG)
    monkeypatch.setattr(os, "replace", lambda *_: None)
    files.write(files.run_path(tmp_path, "study", "small", "a", 0), run["header"], run["rows"])
    assert files.read_study(tmp_path, "study", "small") == {}


def test_run_without_a_file_is_not_finished(tmp_path):
    assert not files.finished(tmp_path / "r.jsonl", CONFIG)


def test_run_with_its_file_is_finished(tmp_path, make_run):
    run = make_run(CONFIG)
    files.write(tmp_path / "r.jsonl", run["header"], run["rows"])
    assert files.finished(tmp_path / "r.jsonl", CONFIG)


def test_file_of_another_config_is_refused_and_says_what_differs(tmp_path, make_run):
    run = make_run(CONFIG)
    files.write(tmp_path / "r.jsonl", run["header"], run["rows"])
    with pytest.raises(ValueError, match=r"another run: learning_rate was 0\.1 and is now 0\.2\..*delete it"):
        files.finished(tmp_path / "r.jsonl", CONFIG.replace(learning_rate=0.2))


def test_setting_added_after_the_run_had_its_default_value(make_run):
    stored = make_run(CONFIG)["header"]["config"]
    del stored["evaluations"]
    assert files.differences(stored, CONFIG) == ""
    assert files.differences(stored, CONFIG.replace(evaluations=2)) == "evaluations was 1 and is now 2"


def test_differences_reach_into_the_run_that_another_starts_from():
    config = CONFIG.replace(classes=(1, 2), start=CONFIG.replace(classes=(3, 4)))
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    del stored["start"]["evaluations"]
    assert files.differences(stored, config) == ""
    other = config.replace(start=CONFIG.replace(classes=(3, 5)))
    assert files.differences(stored, other) == "start.classes was [3, 4] and is now [3, 5]"


def test_result_that_was_measured_with_other_settings_is_refused(tmp_path, make_run):
    run = make_run(CONFIG)
    files.write(tmp_path / "r.jsonl", run["header"] | {"settings": {"images": [10, 100]}}, run["rows"])
    assert files.finished(tmp_path / "r.jsonl", CONFIG, {"images": (10, 100)})
    with pytest.raises(ValueError, match=r"another run: images was \[10, 100\] and is now \[10\]\..*delete it"):
        files.finished(tmp_path / "r.jsonl", CONFIG, {"images": (10,)})


@pytest.mark.parametrize(
    "content", ["", "{}", '{"config": {}}', '{"config": {}}\n{"step": 1', '{"config": {}}\n[1]', "[]\n{}", "\n\n"]
)
def test_file_that_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"r\.jsonl is not a result file .*delete it"):
        files.read(tmp_path / "r.jsonl")


@pytest.mark.parametrize("label", ["", "../up", "a b", "a/b", ".hidden"])
def test_label_that_cannot_name_a_file_is_refused(label):
    with pytest.raises(ValueError, match="label=.*rename it"):
        files.run_path(Path(), "study", "small", label, 0)


def test_runs_of_a_study_come_by_label_in_the_order_of_seeds(tmp_path, make_run):
    for label, seed in (("a", 10), ("a", 2), ("b-1", 0)):
        run = make_run(CONFIG.replace(seed=seed))
        files.write(files.run_path(tmp_path, "study", "small", label, seed), run["header"], run["rows"])
    found = files.read_study(tmp_path, "study", "small")
    seeds = {label: [run["header"]["config"]["seed"] for run in runs] for label, runs in found.items()}
    assert seeds == {"a": [2, 10], "b-1": [0]}


def test_file_named_after_another_seed_is_refused(tmp_path, make_run):
    run = make_run(CONFIG)
    for seed in (0, 1):
        files.write(files.run_path(tmp_path, "study", "small", "a", seed), run["header"], run["rows"])
    with pytest.raises(ValueError, match=r"a-seed1\.jsonl is named after another run: its header has seed=0;.*delete"):
        files.read_study(tmp_path, "study", "small")


def test_file_whose_name_spells_its_seed_otherwise_is_refused(tmp_path, make_run):
    run = make_run(CONFIG.replace(seed=1))
    files.write(tmp_path / "study" / "small" / "a-seed01.jsonl", run["header"], run["rows"])
    with pytest.raises(ValueError, match=r"a-seed01\.jsonl is named after another run"):
        files.read_study(tmp_path, "study", "small")


@pytest.fixture
def repository(tmp_path):
    """A repository with sources and a result, all committed."""
    for name in (
        "jaxbn/a.py",
        "experiments/studies/b.py",
        "experiments/results/r.jsonl",
        "pyproject.toml",
        "docs/c.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def modified(repository):
    files.commit.cache_clear()
    return files.commit(repository).endswith("-modified")


@pytest.mark.parametrize("name", ["jaxbn/a.py", "experiments/studies/b.py", "experiments/new.py", "pyproject.toml"])
def test_commit_says_that_the_sources_differ(repository, name):
    assert not modified(repository)
    (repository / name).write_text("2")
    assert modified(repository)


@pytest.mark.parametrize("name", ["experiments/results/r.jsonl", "experiments/figures/f.png", "docs/c.py", "README.md"])
def test_what_no_run_depends_on_leaves_the_commit_as_it_is(repository, name):
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("2")
    assert not modified(repository)


def test_commit_stays_that_of_the_first_call(repository):
    before = files.commit(repository)
    (repository / "jaxbn" / "a.py").write_text("2")
    assert files.commit(repository) == before


def test_header_names_images_versions_hardware_and_commit():
    header = files.header(CONFIG, images="digits", parameters=5, seconds=1.5)
    assert header["images"] == "digits"
    assert set(header["versions"]) == {"python", "jax", "jaxlib", "flax", "optax"}
    assert set(header["hardware"]) == {"platform", "device", "devices", "processes", "cpu", "cpu_count"}
    assert (header["parameters"], header["seconds"]) == (5, 1.5) and "commit" in header


def test_header_names_neither_the_host_nor_a_path():
    text = json.dumps(files.header(CONFIG, images="digits", parameters=5, seconds=1.5))
    assert platform.node() not in text and str(Path.home()) not in text and str(Path.cwd()) not in text


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
    files.measure(tmp_path / "m.jsonl", SETTINGS, pieces([]), say=lambda _: None)
    found = files.read_records(tmp_path / "m.jsonl")
    assert found["header"] == SETTINGS and [record["x"] for record in found["records"]][::2] == [1.5, 3]
    assert math.isnan(found["records"][1]["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_interrupted_measurement_continues_with_the_next_piece(tmp_path):
    path, log = tmp_path / "m.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        files.measure(path, SETTINGS, pieces(log, stops_at="b"), say=lambda _: None)
    assert not path.exists()
    files.measure(path, SETTINGS | {"date": "2002-02-02"}, pieces(log), say=lambda _: None)
    assert log == ["a", "b"] and files.read_records(path)["header"]["date"] == "2001-01-01"


@pytest.mark.parametrize("changed", [{"settings": {"rounds": 4}}, {"commit": "decaf"}])
def test_measurement_that_was_begun_under_other_conditions_begins_anew_and_says_so(tmp_path, changed):
    path, log, said = tmp_path / "m.jsonl", [], []
    with pytest.raises(KeyboardInterrupt):
        files.measure(path, SETTINGS, pieces(log, stops_at="b"), say=said.append)
    files.measure(path, SETTINGS | changed, pieces(log), say=said.append)
    assert log == ["a", "a", "b"] and f"m.jsonl: begun with another {next(iter(changed))}; begins anew" in said


def test_finished_measurement_is_made_anew_and_replaced_when_that_is_complete(tmp_path):
    path, log = tmp_path / "m.jsonl", []
    files.measure(path, SETTINGS, pieces(log), say=lambda _: None)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        files.measure(path, SETTINGS | {"date": "2002-02-02"}, pieces(log, stops_at="b"), say=lambda _: None)
    assert path.read_bytes() == before
    files.measure(path, SETTINGS, pieces(log), say=lambda _: None)
    assert log == ["a", "b", "a", "b"] and files.read_records(path)["header"]["date"] == "2002-02-02"


@pytest.mark.parametrize("content", ["", "{}", '{"settings": 1}\n{}', '{"settings": {}}\n3', "no JSON"])
def test_file_that_holds_no_measurements_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match="m.jsonl is not a file of measurements"):
        files.read_records(tmp_path / "m.jsonl")


def test_header_of_measurements_says_what_and_when_and_with_what():
    header = files.measurement_header({"rounds": 3})
    assert header["settings"] == {"rounds": 3} and re.fullmatch(r"\d{4}-\d\d-\d\d", header["date"])
    assert {"jax", "flax", "python"} <= set(header["versions"]) and None not in header["versions"].values()
    assert header["hardware"]["cpu"] and "largest_cache" in header["hardware"]
