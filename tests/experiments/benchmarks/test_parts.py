"""The command `bench`: parts in processes of their own, and a whole run on shapes so small that it takes minutes."""

import json
import os
import subprocess
import sys
import types

import pytest

from experiments import __main__ as cli
from experiments.benchmarks import Settings, parts
from experiments.evidence import files, provenance
from experiments.report import pages

TINY = Settings(
    rounds=2,
    step_processes=2,
    step_rounds=3,
    shapes=((4, 3, 3, 2), (6, 5)),
    dtypes=("bfloat16",),
    batch_size=2,
    inception_batch_size=2,
    image_size=8,
    width=1 / 16,
    inception_width=1 / 16,
)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments", "bench", *map(str, arguments)])
    return cli.main()


@pytest.fixture
def started(monkeypatch):
    """What would be started, and with which environment."""
    commands = []

    def run(command, env):
        commands.append((command[1:], env))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(parts.subprocess, "run", run)
    return commands


def test_settings_come_back_from_json():
    assert Settings.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="rounds=0; at least 1 is accepted"):
        Settings(rounds=0)


@pytest.mark.parametrize(
    ("name", "given"), [("targets", "v6e,v7"), ("kinds", "nets"), ("arms", "Flax,jax"), ("nets", "")]
)
def test_unknown_choice_is_refused(name, given):
    with pytest.raises(ValueError, match=f"^{name}='{given}'; choose some of .*; "):
        Settings(**{name: tuple(given.split(",")) if given else ()})


def test_each_part_has_its_own_process_that_keeps_freed_memory_and_two_threads(started, tmp_path):
    assert parts.run(only=("layers", "steps"), out=tmp_path, settings=TINY) == 0
    for part, (command, environment) in zip(("layers", "steps"), started, strict=True):
        assert command == ["-m", "experiments.benchmarks", part, str(tmp_path), json.dumps(TINY.to_json())]
        assert environment["MALLOC_MMAP_MAX_"] == "0"
        assert environment["PJRT_NPROC"] == environment["OMP_NUM_THREADS"] == "2"
        assert environment["PATH"] == os.environ["PATH"]


def test_command_measures_and_shows_the_parts_that_are_named(monkeypatch, started, tmp_path):
    shown = []
    monkeypatch.setattr(cli, "_show", lambda *what: shown.append(what))
    assert call(monkeypatch, "--only", "collectives,layers", "--rounds", 3, "--out", tmp_path) == 0
    (collectives, _), (layers, _) = started
    assert collectives == ["-m", "experiments", "collectives", "--out", str(tmp_path)]
    assert json.loads(layers[-1])["rounds"] == 3
    assert shown == [(["layers"], tmp_path)]


def test_command_passes_on_which_programs_are_compiled(monkeypatch, started, tmp_path):
    monkeypatch.setattr(cli, "_show", lambda *what: None)
    chosen = {
        "targets": "v6e,h100",
        "kinds": "step",
        "nets": "ResNet-20",
        "arms": "Flax, stable,none",
        "dtypes": "float32",
    }
    options = [each for name, value in chosen.items() for each in (f"--{name}", value)]
    assert call(monkeypatch, "--only", "accelerators", *options, "--out", tmp_path) == 0
    settings = Settings.from_json(json.loads(started[0][0][-1]))
    assert (settings.targets, settings.kinds, settings.nets) == (("v6e", "h100"), ("step",), ("ResNet-20",))
    assert settings.arms == ("Flax, stable", "none") and settings.dtypes == ("float32",)


def test_compiling_for_accelerators_is_not_among_the_defaults(monkeypatch, started, tmp_path):
    monkeypatch.setattr(cli, "_show", lambda *what: None)
    assert call(monkeypatch, "--out", tmp_path) == 0
    assert "accelerators" not in [part for command, _ in started for part in command]


@pytest.mark.parametrize("only", ["nothing", "layers,nothing", ""])
def test_unknown_part_is_an_error_in_a_sentence(monkeypatch, capsys, only):
    assert call(monkeypatch, "--only", only) == 2
    assert f"only='{only}'; some of layers,steps,collectives,accelerators are accepted" in capsys.readouterr().err


def test_part_that_fails_ends_the_command_with_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(parts.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, "--out", tmp_path)
    assert exit.value.code == 3


@pytest.mark.slow
def test_whole_run_measures_every_row_and_the_tables_are_made_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compiles several times faster
    assert parts.run(only=("layers", "steps"), out=tmp_path, settings=TINY) == 0
    layers, steps = (files.read_records(tmp_path / f"bench-{part}.jsonl") for part in ("layers", "steps"))
    assert layers["header"]["copy_bandwidth"] > 0
    ours = [record for record in layers["records"] if record["arm"] == "jaxbn"]
    assert len(ours) == 3 * 2 * 2  # passes, activations, shapes
    assert all(record["seconds"]["median"] > 0 for record in layers["records"])
    assert len(steps["records"]) == 2 * 2 * 4  # nets, processes, arms
    assert all(len(record["seconds"]) == 3 and record["temporaries"] > 0 for record in steps["records"])
    (tmp_path / "README.md").write_text(
        "".join(f"<!-- measured: {name} -->\n<!-- end -->\n" for name in ("layers", "steps"))
    )
    assert len(pages.write(tmp_path, tmp_path)) == 3
    assert "| ResNet-20, bfloat16 | jaxbn |" in (tmp_path / "README.md").read_text()
    again = subprocess.run(
        parts._command("layers", tmp_path, TINY), cwd=provenance.ROOT, capture_output=True, text=True
    )
    assert again.returncode == 0 and "(2 of 2)" in again.stdout
