"""Several processes: the same curve as one, and an end within bounded time, with a clear message, when one is lost.

The processes are real ones on this machine. A wait that ends only by its timeout is a failure.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import __main__ as cli
from experiments.processes import launch
from experiments.processes.watch import CONTINUES, LOST, SILENCE_SECONDS

ROOT = Path(cli.__file__).parents[1]
TRAIN = "train --data digits --image-size 8 --net cnn7 --width 0.25 --batch-size 52".split()  # the last one has 48
BOUND = 2 * SILENCE_SECONDS + 40  # seconds until all must have ended; several times as long as it takes
# Runs the command after a change; ReLU is not smooth at 0, where a rounding decides, and so would hide what differs.
CHANGED = "{}; import runpy, sys; sys.argv[0] = 'experiments'; runpy.run_module('experiments', run_name='__main__')"
SMOOTH = "import flax.linen as nn; nn.relu = nn.silu"
STUCK = "import time; from experiments import train; train.evaluate = lambda *_: time.sleep(600)"

SMALL = "from experiments import sync_demo as d; d.PER_DEVICE, d.EPOCHS, d.TRAIN_IMAGES = (2,), 1, 128"

slow = pytest.mark.slow


class Process:
    """A command of the experiments, and the lines it has printed."""

    def __init__(self, *arguments, change=None, environment=None):
        start = ["-m", "experiments"] if change is None else ["-c", CHANGED.format(change)]
        self.popen = subprocess.Popen(
            [sys.executable, *start, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.popen.stdout:
            self.lines.append(line)

    def wait(self, timeout=300):
        """The exit status, and all that was printed."""
        status = self.popen.wait(timeout=timeout)
        self._reader.join(timeout=10)
        return status, "".join(self.lines)

    def children(self):
        """The numbers of the processes it has started, in their order."""
        listed = subprocess.run(["pgrep", "-P", str(self.popen.pid)], capture_output=True, text=True)
        return sorted(map(int, listed.stdout.split()))


@pytest.fixture
def start(monkeypatch):
    """Returns `Process`; whatever is left of them is killed in the end."""
    started = []

    def start(*arguments, **options):
        started.append(Process(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        try:
            os.killpg(process.popen.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.popen.wait()


@pytest.fixture
def start_pair(start):
    """Returns a function that starts two processes by hand, with the arguments and changes of each."""

    def start_pair(first, second, changes=(None, None), **environment):
        described = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{launch._free_port()}", "JAX_NUM_PROCESSES": "2"}
        return [
            start(*arguments, change=change, environment=described | {"JAX_PROCESS_ID": str(number)} | environment)
            for number, (arguments, change) in enumerate(zip((first, second), changes, strict=True))
        ]

    return start_pair


def wait_for_checkpoint(folder, process):
    """Waits until a run has its first checkpoint."""
    deadline = time.monotonic() + 300
    while not any(path.name.isdigit() for path in (folder / "result.unfinished").glob("*")):
        assert process.popen.poll() is None and time.monotonic() < deadline, process.lines
        time.sleep(0.05)


def rows(folder):
    _, *rows = map(json.loads, (folder / "result.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_option_is_left_out_for_the_processes():
    assert launch.without_option(["run", "all", "--launch", "2", "--seeds", "1"]) == ["run", "all", "--seeds", "1"]
    assert launch.without_option(["run", "--launch=2", "all"]) == ["run", "all"]


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_process_are_refused(count):
    with pytest.raises(ValueError, match=f"launch={count}; 1 trains in this process"):
        launch.run(count, [])


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("", 0, ""),
        ("os.kill(os.getpid(), 9)", 137, "Process 1 was ended by SIGKILL; the others were ended too. " + CONTINUES),
        ("sys.exit(2)", 2, "Process 1 has ended with exit status 2, and so have the others; its error is above."),
        ("sys.exit(3)", 3, "Process 1 has ended with exit status 3; the others were ended too. " + CONTINUES),
    ],
)
def test_first_process_that_fails_ends_the_others_and_is_named(monkeypatch, capfd, code, status, message):
    program = "import os, sys, time; number = int(os.environ['JAX_PROCESS_ID']); print('I am', number, flush=True)\n"
    program += f"if number == 1:\n    {code or 'pass'}\nelif {bool(code)}:\n    time.sleep(600)"

    def start(number, count, address, arguments):
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if number else {}
        environment = os.environ | {"JAX_PROCESS_ID": str(number)}
        return subprocess.Popen([sys.executable, "-c", program], env=environment, **output)

    monkeypatch.setattr(launch, "_start", start)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.1)
    assert launch.run(3, []) == status
    printed, errors = capfd.readouterr()
    assert "I am 0" in printed and "[process 1] I am 1" in errors and message in errors


@slow
def test_one_process_and_eight_devices_and_two_processes_give_the_same_curve(start, start_pair, tmp_path):
    short = [*TRAIN, "--epochs", 2]
    for devices in (1, 8):
        status, printed = start(*short, "--devices", devices, "--out", tmp_path / str(devices), change=SMOOTH).wait()
        assert status == 0, printed
    arguments = [*short, "--devices", 8, "--out", tmp_path / "2x4"]
    for process in start_pair(arguments, arguments, (SMOOTH, SMOOTH), JAX_PLATFORMS="cpu"):
        status, printed = process.wait()
        assert status == 0, printed
    header = json.loads((tmp_path / "2x4" / "result.jsonl").read_text().splitlines()[0])
    assert (header["hardware"]["devices"], header["hardware"]["processes"]) == (8, 2)
    one, eight, pair = (rows(tmp_path / name) for name in ("1", "8", "2x4"))
    for name in ("train_loss", "test_loss"):
        # float32, 54 steps; what a rounding of 1e-7 grows to
        for others in (eight, pair):
            np.testing.assert_allclose([r[name] for r in others], [r[name] for r in one], rtol=1e-4)
    for name in ("train_accuracy", "test_accuracy"):
        for others in (eight, pair):
            np.testing.assert_allclose([r[name] for r in others], [r[name] for r in one], atol=3e-3)


@slow
def test_killed_process_ends_all_and_the_same_command_gives_the_same_bits(start, tmp_path):
    arguments = [*TRAIN, "--epochs", 8, "--devices", 2, "--launch", 2]
    status, printed = start(*arguments, "--out", tmp_path / "straight").wait()
    assert status == 0, printed
    killed = start(*arguments, "--out", tmp_path / "killed")
    wait_for_checkpoint(tmp_path / "killed", killed)
    os.kill(killed.children()[1], signal.SIGKILL)
    status, printed = killed.wait(timeout=BOUND)
    assert status == 128 + signal.SIGKILL
    assert f"Process 1 was ended by SIGKILL; the others were ended too. {CONTINUES}" in printed
    assert not (tmp_path / "killed" / "result.jsonl").exists()
    status, printed = start(*arguments, "--out", tmp_path / "killed").wait()
    assert status == 0, printed
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")


@slow
@pytest.mark.parametrize(
    ("lost", "sent"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)]
)
def test_process_ends_by_itself_when_the_other_is_lost(start_pair, tmp_path, lost, sent):
    arguments = [*TRAIN, "--epochs", 1000, "--devices", 2, "--out", tmp_path]
    pair = start_pair(arguments, arguments)
    wait_for_checkpoint(tmp_path, pair[0])
    os.kill(pair[lost].popen.pid, sent)
    status, printed = pair[1 - lost].wait(timeout=BOUND)
    assert status == LOST
    *_, last = printed.splitlines()
    assert last.startswith(f"Process {1 - lost} ends: ") and last.endswith(CONTINUES)
    # JAX's own runtime ends a process at once when the connection to the coordinator breaks.
    named = "JAX's runtime has aborted it" if (lost, sent) == (0, signal.SIGKILL) else f"process {lost} for"
    assert named in last


@slow
def test_interrupt_ends_all(start, tmp_path):
    process = start(*TRAIN, "--epochs", 1000, "--devices", 2, "--launch", 2, "--out", tmp_path)
    wait_for_checkpoint(tmp_path, process)
    children = process.children()
    os.killpg(process.popen.pid, signal.SIGINT)
    status, printed = process.wait(timeout=BOUND)
    assert status == 130 and "Interrupted; the same command continues from the last checkpoint." in printed
    assert "Traceback" not in printed
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@slow
def test_other_settings_end_all_by_their_name(start_pair, tmp_path):
    common = [*TRAIN, "--epochs", 1, "--devices", 2, "--out", tmp_path]
    for process in start_pair(common, [*common, "--batch-size", 32]):
        status, printed = process.wait(timeout=BOUND)
        assert status == 2 and "process 1 has batch_size=32, process 0 has batch_size=52; start all" in printed


@slow
def test_other_program_ends_all_before_the_first_step(start_pair, tmp_path):
    common = [*TRAIN, "--epochs", 1, "--devices", 2, "--out", tmp_path]
    for process in start_pair(common, common, (None, SMOOTH)):
        status, printed = process.wait(timeout=BOUND)
        assert status == 2 and "process 1 has program=" in printed and "from the same sources" in printed


@slow
def test_mistake_in_one_process_ends_the_other_with_its_reason(start_pair, tmp_path):
    common = [*TRAIN, "--epochs", 1, "--devices", 2, "--out", tmp_path]
    first, second = start_pair(common, [*common, "--data", "cifar10", "--data-dir", tmp_path / "nowhere"])
    assert second.wait(timeout=BOUND)[0] == 2
    status, printed = first.wait(timeout=BOUND)
    assert status == LOST and "process 1 has ended. Error: data_dir (--data-dir)=" in printed


@slow
def test_process_that_is_alive_and_stuck_ends_all(start_pair, tmp_path):
    common = [*TRAIN, "--epochs", 1, "--devices", 2, "--out", tmp_path]
    pair = start_pair(common, common, (None, STUCK), JAXBN_STALL_SECONDS="10")
    statuses, printed = zip(*(process.wait(timeout=BOUND + 60) for process in pair), strict=True)
    assert statuses == (LOST, LOST)
    assert "no step, evaluation or checkpoint has ended for 10 s" in "".join(printed)


@slow
def test_mistake_that_process_0_alone_finds_is_what_the_launcher_reports(start, tmp_path):
    (tmp_path / "result.jsonl").write_text("no result")
    status, printed = start(*TRAIN, "--devices", 2, "--launch", 2, "--out", tmp_path).wait(timeout=BOUND)
    assert status == launch.REFUSED, printed
    assert "is not a result file" in printed
    assert printed.endswith("Process 0 has ended with exit status 2, and so have the others; its error is above.\n")


@slow
def test_sync_demo_runs_in_two_processes_and_the_first_one_reports(start_pair, tmp_path):
    arguments = ["sync-demo", "--devices", 4, "--out", tmp_path]
    first, second = (process.wait() for process in start_pair(arguments, arguments, (SMALL, SMALL)))
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    assert "4 devices of 2 process(es)" in first[1] and "mean ± std over 1 seed(s)" in first[1]
    assert "images" not in second[1]
    assert (tmp_path / "sync_demo.png").is_file() and (tmp_path / "measured.jsonl").is_file()


@slow
def test_folder_that_is_not_shared_is_refused(start_pair, tmp_path):
    pair = start_pair(*([*TRAIN, "--devices", 2, "--out", tmp_path / name] for name in ("here", "there")))
    (tmp_path / "there" / "result.unfinished").mkdir(parents=True)
    for process in pair:
        status, printed = process.wait(timeout=BOUND + 60)
        assert status == launch.REFUSED, printed
    assert "must be on a disk that all processes share" in printed


@slow
def test_proxy_is_not_asked_for_the_coordinator(start_pair, tmp_path):
    common = [*TRAIN, "--epochs", 1, "--devices", 2, "--out", tmp_path]
    nobody = "http://127.0.0.1:9"
    for process in start_pair(common, common, http_proxy=nobody, https_proxy=nobody):
        status, printed = process.wait(timeout=BOUND + 60)
        assert status == 0, printed
