"""Several processes on this machine, for a look at what runs on several machines: `--launch N`.

Convention: the processes get what `distributed.LAUNCHERS[0]` reads; this one only watches, and never touches JAX.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn

from experiments.processes.watch import CONTINUES, LOST

CAUSE_SECONDS = 8.0  # for the process to end that has ended another one; longer than `Watch.announce` takes
GRACE_SECONDS = 3.0  # for the others to end by themselves, and to say why
REFUSED = 2  # exit status of a command that a user's mistake has ended


def run(count: int, arguments: list[str]) -> int:
    """Runs `python -m experiments` with `arguments` in `count` processes; returns the exit status.

    The output of process 0 is the output of all; what the others print, or say on stderr, goes to stderr with their
    number in front. If one ends with an error, the others are ended too.

    Args:
      count: number of processes.
      arguments: of the command line, without `--launch`.

    Raises:
      ValueError: there must be at least two.
    """
    if count < 2:
        raise ValueError(f"launch={count}; 1 trains in this process, 2 and more start so many; choose one of those.")
    address = f"127.0.0.1:{_free_port()}"
    previous = signal.signal(signal.SIGTERM, _terminate)
    processes, readers = [], []
    try:
        for number in range(count):
            process = _start(number, count, address, arguments)
            processes.append(process)
            if number:
                readers.append(threading.Thread(target=_pass_on, args=(number, process.stdout), daemon=True))
                readers[-1].start()
        failed = _wait(processes)
    except KeyboardInterrupt:  # which the terminal has sent to all of them
        _end(processes)
        return 128 + signal.SIGINT
    finally:
        _end(processes, grace=0)
        signal.signal(signal.SIGTERM, previous)
    for reader in readers:
        reader.join(timeout=1)
    if failed is None:
        return 0
    print(_explain(failed, processes[failed].returncode), file=sys.stderr, flush=True)
    status = processes[failed].returncode
    return status if status > 0 else 128 - status


def without_option(arguments: list[str]) -> list[str]:
    """Returns the arguments of a command line without `--launch N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--launch="):
            skip = False
        elif argument == "--launch":
            skip = True
        else:
            kept.append(argument)
    return kept


def _start(number, count, address, arguments):
    described = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.Popen(command, env=os.environ | described, **(output if number else {}))


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _pass_on(number, lines):
    for line in lines:
        if not line.startswith("[Gloo]"):  # the transport's greetings
            print(f"[process {number}] {line}", end="", file=sys.stderr, flush=True)


def _wait(processes) -> int | None:
    """Waits for all; when one fails, ends the others and returns the number of the one that is the cause."""
    failed_at = None
    while True:
        statuses = [process.poll() for process in processes]
        if all(status == 0 for status in statuses):
            return None
        # One that ends because of another, with the status LOST, may be seen before the cause is.
        failed = sorted((status == LOST, number) for number, status in enumerate(statuses) if status)
        failed_at = failed_at or (time.monotonic() if failed else None)
        if failed and (None not in statuses or not failed[0][0] or time.monotonic() - failed_at > CAUSE_SECONDS):
            _end(processes)
            return failed[0][1]
        time.sleep(0.1)


def _end(processes, grace=None):
    """Ends the processes: waits, asks, and kills."""
    grace = GRACE_SECONDS if grace is None else grace
    for act in (None, signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if act is not None and process.poll() is None:
                process.send_signal(act)
        deadline = time.monotonic() + grace
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
    for process in processes:
        process.wait()


def _terminate(*_) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _explain(number, status) -> str:
    """Returns the line that says which process has ended all of them."""
    if status == REFUSED:
        return f"Process {number} has ended with exit status {status}, and so have the others; its error is above."
    if status == LOST:
        return f"Process {number} has lost another one, as it says above; all were ended. {CONTINUES}"
    cause = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"has ended with exit status {status}"
    return f"Process {number} {cause}; the others were ended too. {CONTINUES}"
