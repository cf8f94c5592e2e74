"""Several processes train as one does, and all end soon, with a message, when one of them is lost.

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
from experiments.processes.distributed import HEARTBEAT_SECONDS

ROOT = Path(cli.__file__).parents[1]
TRAIN = "train --data digits --image-size 8 --net cnn7 --width 0.25 --batch-size 52".split()  # the last one has 48
BOUND = 2 * HEARTBEAT_SECONDS + 60  # seconds until all must have ended; several times as long as it takes
# Runs the command after a change to the program.
CHANGED = "{}; import runpy, sys; sys.argv[0] = 'experiments'; runpy.run_module('experiments', run_name='__main__')"
# At the corner of ReLU at 0, rounding decides, from where two runs drift apart.
SMOOTH = "import flax.linen as nn; nn.relu = nn.silu"
SMALL = "from experiments.demos import synchronised as d; d.PER_DEVICE, d.EPOCHS, d.TRAIN_IMAGES = (2,), 1, 128"

slow = pytest.mark.slow


class Process:
    """A command of the experiments, and the lines it has printed."""

    def __init__(self, *arguments, change=None, program=None, environment=None):
        if change is not None:
            program = CHANGED.format(change)
        start = ["-m", "experiments"] if program is None else ["-c", program]
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
        """The ids of the processes it has started, in their order."""
        listed = subprocess.run(["pgrep", "-P", str(self.popen.pid)], capture_output=True, text=True)
        return sorted(map(int, listed.stdout.split()))


@pytest.fixture
def start(monkeypatch):
    """Returns a function that makes a `Process`; those that are left in the end are killed."""
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


def wait_until(condition, process=None):
    """Waits until a condition holds; meanwhile, the process must not end."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.popen.poll() is None, process.lines
        time.sleep(0.05)


def wait_for_checkpoint(folder, process):
    """Waits until a run has its first checkpoint."""
    wait_until(lambda: any(path.name.isdigit() for path in (folder / "result.unfinished").glob("*")), process)


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def rows(folder):
    _, *rows = map(json.loads, (folder / "result.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_less_than_one_process_is_refused():
    with pytest.raises(ValueError, match="--launch must be at least 1, got 0"):
        launch.run(0)


@pytest.fixture
def launch_program(monkeypatch):
    """Returns a function that launches three workers, which run a program instead of the experiments."""

    def launch_program(program):
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", program])
        return launch.run(3)

    return launch_program


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("pass", 0, ""),
        ("os.kill(os.getpid(), 9)", 137, "Worker 1 was killed by SIGKILL; the others were ended too.\n"),
        ("sys.exit('A mistake.')", 1, "A mistake.\nWorker 1 exited with status 1; the others were ended too.\n"),
    ],
)
def test_first_worker_that_fails_ends_the_others_and_is_named(launch_program, capfd, code, status, message):
    program = "import os, sys, time; index = int(os.environ['JAX_PROCESS_ID']); print('I am', index, flush=True)\n"
    program += f"if index == 1: {code}\nelif {bool(status)}: time.sleep(600)"
    assert launch_program(program) == status
    printed, errors = capfd.readouterr()
    assert errors == message
    assert printed == "I am 0\n" or (status and not printed)  # worker 0 may be ended before it prints


def test_workers_find_one_another_at_the_loopback_interface(launch_program, capfd):
    assert launch_program("import os; [print(f'{k}={v}') for k, v in os.environ.items() if k.startswith('JAX_')]") == 0
    described = dict(line.split("=") for line in capfd.readouterr().out.splitlines())
    assert (described["JAX_NUM_PROCESSES"], described["JAX_PROCESS_ID"]) == ("3", "0")
    assert described["JAX_COORDINATOR_ADDRESS"] == described["JAX_COORDINATOR_BIND_ADDRESS"]
    assert described["JAX_COORDINATOR_ADDRESS"].startswith("127.0.0.1:")


# A shell that starts pytest in the background makes it, and all processes under it, ignore Ctrl-C.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
WAITING = f"""
import os, sys, time
from experiments.processes import launch
{CTRL_C}
if launch.WORKER not in os.environ:
    sys.exit(launch.run(2))
launch.exit_with_launcher()
print("waiting", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_no_worker_outlives_its_launcher(start, sent):
    launcher = start(program=WAITING)
    wait_until(lambda: launcher.lines, launcher)
    workers = launcher.children()
    assert len(workers) == 2
    os.kill(launcher.popen.pid, sent)
    launcher.wait(timeout=30)
    wait_until(lambda: not any(map(is_running, workers)))


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
    assert "Worker 1 was killed by SIGKILL; the others were ended too." in printed
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
    # A connection that breaks is an error of the collective; silence ends the process by JAX's heartbeats.
    assert status in (1, -signal.SIGABRT)
    assert "JaxRuntimeError" in printed or "Terminating process because the JAX distributed service" in printed


@slow
def test_interrupt_ends_all(start, tmp_path):
    arguments = [*TRAIN, "--epochs", 1000, "--devices", 2, "--launch", 2, "--out", tmp_path]
    process = start(*arguments, change=CTRL_C)
    wait_for_checkpoint(tmp_path, process)
    children = process.children()
    os.killpg(process.popen.pid, signal.SIGINT)
    status, printed = process.wait(timeout=BOUND)
    assert status == 130 and "Interrupted; the same command continues from the last checkpoint." in printed
    assert "Traceback" not in printed
    assert not any(map(is_running, children))


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
def test_mistake_in_one_process_ends_the_other(start_pair, tmp_path):
    common = [*TRAIN, "--epochs", 1, "--devices", 2, "--out", tmp_path]
    first, second = start_pair(common, [*common, "--data", "cifar10", "--data-dir", tmp_path / "nowhere"])
    status, printed = second.wait(timeout=BOUND)
    assert status == 2 and "Error: data_dir (--data-dir)=" in printed
    assert first.wait(timeout=BOUND)[0] not in (0, None)


@slow
def test_mistake_that_process_0_alone_finds_is_what_the_launcher_reports(start, tmp_path):
    (tmp_path / "result.jsonl").write_text("no result")
    status, printed = start(*TRAIN, "--devices", 2, "--launch", 2, "--out", tmp_path).wait(timeout=BOUND)
    assert status == 2, printed
    assert "is not a result file" in printed
    assert "Worker 0 exited with status 2; the others were ended too." in printed


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
        assert status == 2, printed
    assert "must be on a disk shared by all processes" in printed


@slow
def test_proxy_is_not_asked_for_the_coordinator(start, tmp_path):
    nobody = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    arguments = [*TRAIN, "--epochs", 1, "--devices", 2, "--launch", 2, "--out", tmp_path]
    status, printed = start(*arguments, environment=nobody).wait(timeout=BOUND)
    assert status == 0 and "proxy variable" not in printed, printed
