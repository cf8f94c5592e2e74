"""The scoreboard: the committed README follows from the committed file, and every failure can be reproduced."""

import json
import subprocess
import sys
import types

import pytest

from experiments import __main__ as cli
from experiments.evidence import provenance
from experiments.scoreboard import board
from experiments.scoreboard.board import FOLDER
from experiments.scoreboard.peers import LIBRARIES, OURS, PEERS
from jaxbn.testing import LAWS

LAW, OTHER, THIRD = (law.name for law in LAWS[:3])
SCRIPTS = sorted(board.FAULTS.glob("*.py"))


@pytest.fixture(scope="module")
def committed():
    return board.load(FOLDER)


@pytest.fixture
def judged(monkeypatch):
    """The peers that break the laws, which a test adds; torch and keras cannot be tested, and the others break none."""
    broken = set()

    def judge(peer, laws):
        absent = {"torch": "not installed", "keras": "could not be made"}
        outcome = absent.get(peer, "broken" if peer in broken else "holds")
        detail = {
            "broken": "y: error 1, allowed 0",
            "not installed": "torch is not installed; pip install.",
            "could not be made": "ValueError: no backend.",
        }
        return [{"peer": peer, "law": law, "outcome": outcome, "detail": detail.get(outcome, "")} for law in laws]

    monkeypatch.setattr(board, "judge", judge)
    monkeypatch.setattr(board, "fault_scripts", lambda: [])
    monkeypatch.setattr(board, "FOLDER", None)
    return broken


def call(monkeypatch, *arguments):
    """Runs the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["experiments", "scoreboard", *map(str, arguments)])
    try:
        return cli.main()
    except SystemExit as exit:
        return exit.code


def test_committed_readme_is_the_one_the_file_gives():
    hint = "run `python -m experiments scoreboard` and commit both files"
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == board.readme(FOLDER), hint


def test_committed_file_has_every_law_for_every_peer(committed):
    assert committed["header"]["settings"]["laws"] == board.STATEMENTS
    lines = [(line["peer"], line["law"]) for line in committed["lines"]]
    assert lines == [(peer, law.name) for peer in PEERS for law in LAWS]
    assert not {"not installed", "could not be made"} & {line["outcome"] for line in committed["lines"]}
    assert not any("failed" in fault for fault in committed["faults"])


def test_this_library_breaks_no_law_in_the_committed_file(committed):
    assert {line["outcome"] for line in committed["lines"] if line["peer"] in OURS} <= {"holds", "not declared"}


@pytest.mark.parametrize(
    ("peer", "law"),
    [
        ("flax-linen", "nan_in_masked_positions"),
        ("flax-nnx", "batch_masked_everywhere"),
        ("equinox", "running_average_converges"),
        ("haiku", "variance_is_never_negative"),
    ],
)
def test_known_fault_is_in_the_committed_file(committed, peer, law):
    outcomes = {(line["peer"], line["law"]): line["outcome"] for line in committed["lines"]}
    assert outcomes[peer, law] == "broken"


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_fault_shows_without_this_library_as_the_readme_says(committed, path):
    if path not in board.fault_scripts():
        pytest.skip("the peer is not installed")
    assert "jaxbn" not in path.read_text()
    assert board.run_fault(path) in committed["faults"]


def test_every_failure_has_the_command_that_reproduces_it(committed):
    text = board.readme(FOLDER)
    for line in committed["lines"]:
        command = f"`python -m experiments scoreboard --peers {line['peer']} --laws {line['law']}`"
        assert (command in text) == (line["outcome"] == "broken")


@pytest.mark.slow
def test_peer_is_tested_in_its_own_process():
    asked = ["gradient_sums_to_zero", "batch_masked_everywhere"]
    lines = board.judge("flax-linen", asked)
    assert [line["law"] for line in lines] == asked
    assert [line["outcome"] for line in lines] == ["holds", "broken"] and "not finite" in lines[1]["detail"]


def test_crash_breaks_one_law_and_the_next_process_continues(monkeypatch):
    calls = []

    def crash_at_the_second(command, **_):
        path, peer, *laws = command[3:]
        calls.append(laws)
        with open(path, "w") as file:
            line = {"peer": peer, "law": laws[0], "outcome": "holds", "detail": ""}
            file.write(json.dumps(line) + "\n")
        return types.SimpleNamespace(returncode=-11 if OTHER in laws else 0, stderr="Fatal\nbad memory\n")

    monkeypatch.setattr(subprocess, "run", crash_at_the_second)
    lines = board.judge("haiku", [LAW, OTHER, THIRD])
    assert calls == [[LAW, OTHER, THIRD], [THIRD]]
    assert [line["outcome"] for line in lines] == ["holds", "broken", "holds"]
    assert lines[1]["law"] == OTHER and lines[1]["detail"] == "the process was killed by SIGSEGV: bad memory"


@pytest.mark.parametrize("status", [1, 0])
def test_process_that_ends_without_an_adapter_breaks_no_law(monkeypatch, status):
    calls = []

    def end(command, **_):
        calls.append(command)
        return types.SimpleNamespace(returncode=status, stderr="Traceback\nValueError: no backend\n")

    monkeypatch.setattr(subprocess, "run", end)
    lines = board.judge("keras", [LAW, OTHER])
    assert len(calls) == 1
    assert [(line["law"], line["outcome"]) for line in lines] == [(law, "could not be made") for law in (LAW, OTHER)]
    ending = f"the process ended with exit status {status}: ValueError: no backend"
    assert {line["detail"] for line in lines} == {ending}


@pytest.mark.slow
def test_error_in_making_an_adapter_is_reported_by_the_parent_process():
    (line,) = board.judge("nobody", [LAW])  # nobody is no peer
    assert line["outcome"] == "could not be made" and line["detail"].endswith("KeyError: 'nobody'")


def test_missing_library_is_no_failure(monkeypatch, tmp_path):
    def missing():
        raise ModuleNotFoundError("haiku is not installed; pip install it.", name="haiku")

    monkeypatch.setitem(PEERS, "haiku", missing)
    board.judge_here(tmp_path / "outcomes.jsonl", "haiku", [LAW])
    line = json.loads((tmp_path / "outcomes.jsonl").read_text())
    assert line == {
        "peer": "haiku",
        "law": LAW,
        "outcome": "not installed",
        "detail": "haiku is not installed; pip install it.",
    }


def test_error_in_an_adapter_is_not_taken_for_a_missing_library(monkeypatch, tmp_path):
    monkeypatch.setitem(PEERS, "haiku", lambda: __import__("jax.nonsense"))
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        board.judge_here(tmp_path / "outcomes.jsonl", "haiku", [LAW])
    assert not (tmp_path / "outcomes.jsonl").exists()


@pytest.mark.parametrize(("broken", "status"), [((), 0), (("haiku",), 0), (("jaxbn-nnx", "haiku"), 1)])
def test_exit_status_depends_on_this_library_alone(monkeypatch, judged, broken, status):
    judged.update(broken)
    assert call(monkeypatch, "--laws", LAW) == status


def test_failure_is_printed_with_the_command_that_reproduces_it(monkeypatch, capsys, judged):
    judged.add("haiku")
    assert call(monkeypatch, "--peers", "jaxbn,haiku,torch", "--laws", f"{LAW},{OTHER}") == 0
    printed = capsys.readouterr().out
    assert f"haiku breaks {LAW}: y: error 1, allowed 0" in printed
    assert f"python -m experiments scoreboard --peers haiku --laws {OTHER}" in printed
    assert "torch is not installed" in printed and "jaxbn breaks" not in printed


def test_adapter_that_could_not_be_made_is_printed_once(monkeypatch, capsys, judged):
    assert call(monkeypatch, "--peers", "jaxbn,keras", "--laws", f"{LAW},{OTHER}") == 0
    printed = capsys.readouterr().out
    assert printed.count("keras could not be made: ValueError: no backend.") == 1
    assert "keras breaks" not in printed


def test_exit_status_is_1_if_the_adapter_of_this_library_could_not_be_made(monkeypatch, judged):
    lines = [{"peer": "jaxbn", "law": LAW, "outcome": "could not be made", "detail": "ValueError: no."}]
    monkeypatch.setattr(board, "judge", lambda peer, laws: lines)
    assert call(monkeypatch, "--peers", "jaxbn", "--laws", LAW) == 1


def test_fault_script_that_fails_is_recorded_with_what_it_printed_and_all_else(monkeypatch, capsys, judged, tmp_path):
    script = tmp_path / "haiku_fails.py"
    script.write_text('"""Haiku: it fails."""\n\nprint("half way")\nraise ValueError("no more")\n')
    monkeypatch.setattr(board, "fault_scripts", lambda: [script])
    assert call(monkeypatch, "--peers", "jaxbn", "--laws", LAW, "--out", tmp_path) == 0
    run = board.load(tmp_path)
    (fault,), ending = run["faults"], "the process ended with exit status 1: ValueError: no more"
    assert fault["printed"] == "half way\n" and fault["failed"] == ending and len(run["lines"]) == 1
    assert f"It failed: {ending}" in (tmp_path / "README.md").read_text()
    assert f"haiku_fails: {ending}" in capsys.readouterr().out


def test_a_choice_is_written_only_to_a_folder_that_is_named(monkeypatch, judged):
    written = []
    monkeypatch.setattr(board.files, "write", lambda path, *_: written.append(path))
    assert call(monkeypatch, "--peers", "jaxbn") == call(monkeypatch, "--laws", LAW) == 0
    assert not written


def test_written_table_has_a_row_for_each_law_and_a_column_for_each_judged_peer(monkeypatch, judged, tmp_path):
    judged.add("haiku")
    peers, laws = "jaxbn,haiku,keras,torch", f"{LAW},{OTHER}"
    assert call(monkeypatch, "--peers", peers, "--laws", laws, "--out", tmp_path) == 0
    assert board.table(tmp_path).splitlines() == [
        "| law | jaxbn | haiku |",
        "| --- | --- | --- |",
        f"| `{LAW}` | holds | **broken** |",
        f"| `{OTHER}` | holds | **broken** |",
        "| laws passed, of those tested | 2 of 2 | 0 of 2 |",
    ]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == board.readme(tmp_path)
    assert "Not installed: torch. keras could not be made: ValueError: no backend. –:" in text


def test_summary_has_a_row_for_each_installed_peer_with_the_laws_that_it_breaks():
    outcomes = {"jaxbn": ("holds", "not declared"), "haiku": ("broken", "broken"), "torch": ("not installed",) * 2}
    lines = [
        {"peer": peer, "law": law, "outcome": outcome}
        for peer, of in outcomes.items()
        for law, outcome in zip(("first_law", "second_law"), of, strict=True)
    ]
    assert board.summary({"records": [*lines, {"fault": "of_haiku"}]}).splitlines()[2:4] == [
        "| jaxbn | 1 of 1 | – |",
        "| haiku | 0 of 2 | first law, second law |",
    ]


def test_versions_of_all_peers_are_recorded():
    assert set(LIBRARIES.values()) <= set(provenance.PEER_PACKAGES)


@pytest.mark.parametrize(("option", "kind"), [("--peers", "peer"), ("--laws", "law")])
def test_unknown_name_is_an_error_in_a_sentence(monkeypatch, capsys, option, kind):
    assert call(monkeypatch, option, "nope") == 2
    assert capsys.readouterr().err.startswith(f"Error: {kind}s must be a comma-separated list of ")
