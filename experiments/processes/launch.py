"""Several processes on this machine, `--launch N`: a rehearsal of a run on several machines.

Conventions: the launcher starts its own command line once per worker and describes the processes to JAX by environment
variables; it never imports JAX itself.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

from rich.console import Console

WORKER = "JAXBN_WORKER"  # set in the environment of the workers


def run(count: int) -> int:
    """Runs this command line in `count` workers, and ends all of them when one fails.

    Worker 0 prints the output of the run; the others print only what goes to stderr.

    Returns:
      The exit status: 0, or that of a worker that failed.

    Raises:
      ValueError: there must be at least two workers.
    """
    if count < 2:
        raise ValueError(f"--launch must be at least 1, got {count}; 1 trains in this process.")
    address = f"127.0.0.1:{_free_port()}"
    workers = []
    try:
        for index in range(count):
            workers.append(_start(index, count, address))
        # None: still running; 0: done.
        while None in (statuses := [worker.poll() for worker in workers]) and not any(statuses):
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()  # nothing to tidy up: checkpoints and results appear only when they are complete
        for worker in workers:  # only now: those left alive in the meantime would complain of the lost ones
            worker.wait()
        Console(stderr=True).show_cursor()  # a killed progress bar leaves it hidden
    # Sorted by status: a worker that a signal has killed, with a negative status, is the cause if several have failed.
    failed = sorted((status, index) for index, status in enumerate(statuses) if status)
    for status, index in failed:
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        print(f"Worker {index} {cause}; the others were ended too.", file=sys.stderr, flush=True)
    status = failed[0][0] if failed else 0
    return status if status >= 0 else 128 - status  # as a shell reports a signal


def exit_with_launcher() -> None:
    """Makes this worker exit as soon as its launcher is gone, even if that is killed by SIGKILL.

    The worker's stdin is a pipe whose other end the launcher holds open; the system closes it with the launcher.
    """

    def wait_for_end() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _start(index: int, count: int, address: str) -> subprocess.Popen:
    variables = {
        WORKER: "1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # by default, JAX listens on all interfaces
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_PLATFORMS": "cpu",
        "no_grpc_proxy": "127.0.0.1",  # a proxy, set for downloads, cannot reach the coordinator
    }
    return subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if index else None,
        start_new_session=True,  # Ctrl-C reaches only the launcher, which ends the workers
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
