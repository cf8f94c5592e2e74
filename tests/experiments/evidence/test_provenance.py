"""Headers: which sources, versions and hardware a result comes from, and whether it is that of a config."""

import dataclasses
import json
import platform
import re
import subprocess
from pathlib import Path

import pytest

from experiments.config import Config
from experiments.evidence import provenance

CONFIG = Config(data="digits", image_size=8, learning_rate=0.1)


def test_setting_added_after_the_run_had_its_default_value(make_run):
    stored = make_run(CONFIG)["header"]["config"]
    del stored["evaluations"]
    assert provenance.differences(stored, CONFIG) == ""
    assert provenance.differences(stored, CONFIG.replace(evaluations=2)) == "evaluations was 1 and is now 2"


def test_differences_reach_into_the_run_that_another_starts_from():
    config = CONFIG.replace(classes=(1, 2), start=CONFIG.replace(classes=(3, 4)))
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    del stored["start"]["evaluations"]
    assert provenance.differences(stored, config) == ""
    other = config.replace(start=CONFIG.replace(classes=(3, 5)))
    assert provenance.differences(stored, other) == "start.classes was [3, 4] and is now [3, 5]"


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
    provenance.commit.cache_clear()
    return provenance.commit(repository).endswith("-modified")


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
    before = provenance.commit(repository)
    (repository / "jaxbn" / "a.py").write_text("2")
    assert provenance.commit(repository) == before


def test_header_names_images_versions_hardware_and_commit():
    header = provenance.run_header(CONFIG, images="digits", parameters=5, seconds=1.5)
    assert header["images"] == "digits"
    assert set(header["versions"]) == {"python", "jax", "jaxlib", "flax", "optax"}
    assert set(header["hardware"]) == {"platform", "device", "devices", "processes", "cpu", "cpu_count"}
    assert (header["parameters"], header["seconds"]) == (5, 1.5) and "commit" in header


def test_header_names_neither_the_host_nor_a_path():
    text = json.dumps(provenance.run_header(CONFIG, images="digits", parameters=5, seconds=1.5))
    assert platform.node() not in text and str(Path.home()) not in text and str(Path.cwd()) not in text


def test_header_of_measurements_has_settings_date_versions_and_hardware():
    header = provenance.measurement_header({"rounds": 3})
    assert header["settings"] == {"rounds": 3} and re.fullmatch(r"\d{4}-\d\d-\d\d", header["date"])
    assert {"jax", "flax", "python"} <= set(header["versions"]) and None not in header["versions"].values()
    assert header["hardware"]["cpu"] and "largest_cache" in header["hardware"]
