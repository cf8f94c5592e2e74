"""The command line: help at once, errors in a sentence, and a killed run that continues as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import __main__ as cli
from experiments.studies import protocol
from experiments.training import runs

ROOT = Path(cli.__file__).parents[1]
COMMANDS = [name.removesuffix("_command").replace("_", "-") for name in vars(cli) if name.endswith("_command")]
# 28 steps an epoch, a checkpoint after each.
TRAIN = "train --data digits --image-size 8 --net cnn7 --width 0.5 --batch-size 50 --epochs 8".split()


def call(monkeypatch, *arguments):
    """Runs a command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
    return cli.main()


def start(*arguments):
    """Starts a command in its own process."""
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_without_seconds(path):
    _, *rows = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def test_help_comes_without_importing_jax():
    code = "import sys, experiments.__main__; sys.exit('jax' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, command, "--help")
    assert exit.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.slow
def test_reader_that_has_seen_enough_is_no_error():
    listed = start("list")
    listed.stdout.close()
    assert listed.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize("command", ["run", "plot"])
def test_unknown_study_is_an_error_in_a_sentence(monkeypatch, capsys, command):
    assert call(monkeypatch, command, "nope") == 2
    assert capsys.readouterr().err.startswith("Error: study must be one of")


def test_wrong_data_dir_is_an_error_in_a_sentence(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "train", "--data-dir", tmp_path, "--out", tmp_path) == 2
    assert "does not hold CIFAR-10" in capsys.readouterr().err


def test_error_that_is_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(protocol, "select", lambda _: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        call(monkeypatch, "run", "all")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run all", "Interrupted; the same command continues from the last checkpoint.\n"),
        ("train", "Interrupted; the same command continues from the last checkpoint.\n"),
        ("plot", "Interrupted.\n"),
        ("table", "Interrupted.\n"),
    ],
)
def test_interrupt_says_how_to_continue_where_that_is_so(monkeypatch, capsys, command, message):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for module, function in ((protocol, "select"), (protocol, "names"), (runs, "train_missing")):
        monkeypatch.setattr(module, function, interrupt)
    assert call(monkeypatch, *command.split()) == 130
    assert capsys.readouterr().err == message


def test_list_shows_question_command_time_and_state(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "list", "--results-dir", tmp_path) == 0
    printed = capsys.readouterr().out
    for words in ("Does batch norm train", "python -m experiments run bn_vs_none", "2 CPU cores", "small: not run yet"):
        assert words in printed


def test_plot_without_results_says_so(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "plot", "--results-dir", tmp_path, "--out", tmp_path) == 0
    assert "bn_vs_none: nothing to draw" in capsys.readouterr().out


def test_table_writes_and_prints_the_report(monkeypatch, capsys, tmp_path):
    folders = ("--results-dir", tmp_path, "--measurements-dir", tmp_path, "--project", tmp_path)
    assert call(monkeypatch, "table", *folders, "--out", tmp_path / "R.md") == 0
    assert "bn_vs_none" in (tmp_path / "R.md").read_text() and "bn_vs_none" in capsys.readouterr().out


@pytest.mark.slow
def test_finished_training_is_not_repeated(monkeypatch, capsys, tmp_path):
    short = [*TRAIN, "--epochs", 1, "--out", tmp_path]
    assert call(monkeypatch, *short) == 0
    before = (tmp_path / "result.jsonl").read_bytes()
    assert call(monkeypatch, *short) == 0
    assert (tmp_path / "result.jsonl").read_bytes() == before and "already there" in capsys.readouterr().out


def test_training_with_other_settings_does_not_overwrite_a_result(monkeypatch, capsys, tmp_path):
    content = '{"config": {"data": "digits"}}\n{"step": 1}\n'
    (tmp_path / "result.jsonl").write_text(content)
    assert call(monkeypatch, *TRAIN, "--out", tmp_path) == 2
    assert "is the result of another run" in capsys.readouterr().err
    assert (tmp_path / "result.jsonl").read_text() == content


@pytest.mark.slow
def test_killed_run_continues_to_the_same_bits(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert start(*TRAIN, "--out", straight).wait(timeout=300) == 0
    folder = killed / "result.unfinished"

    def checkpoints():
        return {p.name for p in folder.iterdir() if p.name.isdigit()} if folder.is_dir() else set()

    def writing():
        return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())

    def kill_when(condition, *, after=0.0):
        process = start(*TRAIN, "--out", killed)
        try:
            deadline = time.monotonic() + 120
            while not condition():
                assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
                time.sleep(0.002)
            time.sleep(after)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert not (killed / "result.jsonl").exists()

    kill_when(folder.is_dir)  # before the first checkpoint
    kill_when(writing)  # while one is being written
    for seconds in (0.0, 0.03, 0.08):  # right after one, and between two
        before = checkpoints()
        kill_when(lambda before=before: checkpoints() - before, after=seconds)
    assert checkpoints()
    assert start(*TRAIN, "--out", killed).wait(timeout=300) == 0
    assert rows_without_seconds(killed / "result.jsonl") == rows_without_seconds(straight / "result.jsonl")
    assert not folder.exists()


def test_without_what_the_experiments_need_it_is_said_what_brings_it():
    program = "import sys, runpy; sys.modules['tyro'] = None; runpy.run_module('experiments', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("The experiments need more than the library: run make demo, which sets up .venv, or")
