"""The command `bench`: each benchmark has its own process, and a whole run on tiny shapes writes the tables."""

import importlib
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
    """The commands that would be started, and their environments."""
    commands = []

    def run(command, env):
        commands.append((command[1:], env))
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(parts.subprocess, "run", run)
    return commands


def test_settings_come_back_from_json():
    assert Settings.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        Settings(rounds=0)


@pytest.mark.parametrize(
    ("name", "chosen"), [("targets", "v6e,v7"), ("kinds", "nets"), ("arms", "Flax,jax"), ("nets", "")]
)
def test_unknown_choice_is_refused(name, chosen):
    with pytest.raises(ValueError, match=f"^{name} must be some of .*; .*, got '{chosen}'"):
        Settings(**{name: tuple(chosen.split(",")) if chosen else ()})


def test_each_part_has_its_own_process_that_keeps_freed_memory_and_two_threads(started, tmp_path):
    assert parts.run(("layers", "steps"), out=tmp_path, settings=TINY) == 0
    for part, (command, environment) in zip(("layers", "steps"), started, strict=True):
        assert command == ["-m", "experiments.benchmarks", part, str(tmp_path), json.dumps(TINY.to_json())]
        assert environment["MALLOC_MMAP_MAX_"] == "0"
        assert environment["PJRT_NPROC"] == environment["OMP_NUM_THREADS"] == "2"
        assert environment["PATH"] == os.environ["PATH"]


@pytest.fixture
def shown(monkeypatch):
    """Benchmarks whose blocks the command prints."""
    names = []
    monkeypatch.setattr(cli, "_show", lambda chosen, folder: names.extend(chosen))
    return names


@pytest.mark.parametrize("chosen", [["collectives", "layers"], ["--only", "collectives,layers"]], ids=" ".join)
def test_command_measures_the_chosen_benchmarks_and_prints_blocks_unless_tables_were_printed(
    monkeypatch, started, shown, tmp_path, chosen
):
    assert call(monkeypatch, *chosen, "--rounds", 3, "--out", tmp_path) == 0
    names, settings = zip(*((command[2], json.loads(command[-1])) for command, _ in started), strict=True)
    assert names == ("collectives", "layers") and settings[1]["rounds"] == 3
    assert shown == ["layers"]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("collectives", {}),
        ("numerics", {}),
        ("throughput --batch-size 50 --rounds 3", {"throughput_batch_size": 50, "rounds": 3}),
        (
            "folding --batch-size 2 --inception-width 0.5 --rounds 4",
            {"folding_batch_size": 2, "inception_width": 0.5, "folding_rounds": 4},
        ),
        ("calibration --data-dir images", {"data_dir": "images"}),
    ],
)
def test_command_named_after_a_benchmark_is_an_alias(monkeypatch, started, shown, tmp_path, arguments, settings):
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments.split(), "--out", str(tmp_path)])
    assert cli.main() == 0
    (command, _), name = started[0], arguments.split()[0]
    assert command == ["-m", "experiments.benchmarks", name, str(tmp_path), command[-1]]
    assert Settings.from_json(json.loads(command[-1])) == Settings(**settings)


@pytest.mark.parametrize("name", parts.ENVIRONMENTS)
def test_every_benchmark_has_the_same_interface(name):
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    assert module.NAME and callable(module.header) and callable(module.pieces) and callable(module.block)
    assert callable(getattr(module, "tables", None)) == (name in parts.SHOWN_AS_TABLES)


@pytest.mark.slow
def test_mistake_of_the_user_is_an_error_in_a_sentence(tmp_path):
    command = parts.command("calibration", tmp_path, Settings(data_dir=str(tmp_path)))
    done = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and "does not hold CIFAR-10" in done.stderr


def test_command_passes_on_which_programs_are_compiled(monkeypatch, started, shown, tmp_path):
    chosen = {
        "targets": "v6e,h100",
        "kinds": "step",
        "nets": "ResNet-20",
        "arms": "Flax, stable,none",
        "dtypes": "float32",
    }
    options = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    assert call(monkeypatch, "--only", "accelerators", *options, "--out", tmp_path) == 0
    settings = Settings.from_json(json.loads(started[0][0][-1]))
    assert (settings.targets, settings.kinds, settings.nets) == (("v6e", "h100"), ("step",), ("ResNet-20",))
    assert settings.arms == ("Flax, stable", "none") and settings.dtypes == ("float32",)


def test_layers_steps_and_collectives_are_the_default(monkeypatch, started, shown, tmp_path):
    assert call(monkeypatch, "--out", tmp_path) == 0
    assert [command[2] for command, _ in started] == ["layers", "steps", "collectives"]


@pytest.mark.parametrize("chosen", ["nothing", "layers,nothing", ""])
def test_unknown_benchmark_is_an_error_in_a_sentence(monkeypatch, capsys, chosen):
    assert call(monkeypatch, "--only", chosen) == 2
    message = capsys.readouterr().err
    assert message.startswith("Error: benchmarks must be some of layers, steps,") and f"got '{chosen}'" in message


def test_benchmark_that_fails_ends_the_command_with_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(parts.subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=3))
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, "--out", tmp_path)
    assert exit.value.code == 3


@pytest.mark.slow
def test_whole_run_measures_every_row_and_the_tables_are_made_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # compiles several times faster
    assert parts.run(("layers", "steps"), out=tmp_path, settings=TINY) == 0
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
    again = subprocess.run(parts.command("layers", tmp_path, TINY), cwd=provenance.ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "(2 of 2)" in again.stdout
