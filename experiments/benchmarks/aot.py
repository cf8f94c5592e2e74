"""Compiles programs ahead of time for TPUs and GPUs that this machine does not have, each in its own process.

Conventions: a program is a function from the target's devices to a lowered computation; it must be picklable, since it
is called in the other process. The compiler may crash, which ends only that process. For a TPU, code generation takes
most of the time and does not change the counts, so the process ends as soon as the optimized program and its buffers
are written. Only `generate_code` shows whether code can be generated.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.benchmarks import targets

ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes compile at the same time
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to describe a TPU
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
TIMEOUT = 600.0  # seconds
PROGRAM, MEMORY, ERROR, LOG = "program.txt", "memory.json", "error.txt", "log.txt"
# Files that libtpu writes, in this order, before it generates code.
BUFFERS = "*.cl_*.after_optimizations-buffer-assignment.txt"
OPTIMIZED = "*.cl_*.after_optimizations_after_buffer_assignment.txt"
SETTLED = 0.3  # seconds without a change after which a file counts as complete
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_COLOR = re.compile(r"\bcolor (\d+)")


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      hlo: text of the optimized program.
      temporaries: bytes in device memory besides arguments and results.
      peak: bytes of temporaries, arguments and results together.
    """

    hlo: str
    temporaries: int
    peak: int


class CompilationError(Exception):
    """A program was not compiled; the message is the reason, on one line."""


def compile_apart(
    program: Callable[[list[Any]], jax.stages.Lowered],
    target: str,
    *,
    chips: int = 1,
    timeout: float = TIMEOUT,
    generate_code: bool = False,
) -> Compiled:
    """Compiles a program in its own process.

    Args:
      program: devices -> the lowered program; see the module.
      target: key of `targets.TARGETS`.
      chips: number of devices.
      timeout: seconds after which the process is killed.
      generate_code: also generates the code for a TPU, which takes several times as long.

    Raises:
      CompilationError: the compiler rejected the program, crashed, or took too long.
      ModuleNotFoundError: the target's compiler is not installed.
    """
    if reason := targets.missing(target):
        raise ModuleNotFoundError(f"cannot compile for {target}: {reason}; {targets.HINT}.")
    with tempfile.TemporaryDirectory(prefix="jaxbn-aot-") as folder:
        process = _processes().Process(
            target=_compile, args=(program, target, chips, folder, generate_code), daemon=True
        )
        process.start()
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        return _result(Path(folder), process.exitcode, f"not compiled within {timeout:g} s" if late else None)


def end_all() -> None:
    """Kills all processes that are compiling."""
    for process in multiprocessing.active_children():
        process.kill()


@functools.cache
def _processes() -> multiprocessing.context.ForkServerContext:
    """Returns the context that starts processes.

    They are forked from a server that has imported the modules and started no backend: forking a process with a running
    backend can deadlock, and importing again takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.benchmarks.accelerators"])
    return context


def _compile(program: Callable, target: str, chips: int, folder: str, generate_code: bool) -> None:
    """Compiles in this process, writes the results to a folder, and ends the process."""
    results = Path(folder)
    # The compilers write to the file descriptors, not to sys.stdout. `crash_reason` needs the log if they crash.
    log = os.open(results / LOG, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        only_dump = targets.TARGETS[target].platform == "tpu" and not generate_code
        dump = f"--xla_dump_to={results} --xla_dump_hlo_as_text" if only_dump else ""
        os.environ.update(ENVIRONMENT, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip())
        jax.config.update("jax_platforms", "cpu")
        lowered = program(targets.devices(target, chips))
        if only_dump:
            threading.Thread(target=_exit_after_dump, args=(results,), daemon=True).start()
            lowered.compile()
        else:
            _write(lowered.compile(), results)
    except BaseException as error:
        (results / ERROR).write_text("".join(traceback.format_exception_only(error)), encoding="utf-8")
    os._exit(0)  # skips the clean-up of the interpreter and of the compiler


def _exit_after_dump(folder: Path) -> None:
    """Ends this process when the optimized program is written."""
    while True:
        time.sleep(0.1)
        for path in folder.glob(OPTIMIZED):
            if path.stat().st_size and time.time() - path.stat().st_mtime > SETTLED:
                os._exit(0)


def _write(compiled: jax.stages.Compiled, folder: Path) -> None:
    """Writes a completely compiled program and its memory."""
    memory = compiled.memory_analysis()
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    # Donated arguments share their memory with results.
    sizes = {"temporaries": memory.temp_size_in_bytes, "peak": total - memory.alias_size_in_bytes}
    (folder / MEMORY).write_text(json.dumps(sizes), encoding="utf-8")
    (folder / PROGRAM).write_text(compiled.as_text(), encoding="utf-8")


def _result(folder: Path, status: int | None, late: str | None) -> Compiled:
    """Reads the results of a process.

    Args:
      folder: where it wrote them.
      status: its exit status.
      late: the reason why it was killed, if it was.

    Raises:
      CompilationError: there is no complete program.
    """
    if (folder / PROGRAM).exists():
        sizes = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
        return Compiled((folder / PROGRAM).read_text(encoding="utf-8"), **sizes)
    failed = (folder / ERROR).exists()
    optimized, assigned = sorted(folder.glob(OPTIMIZED)), sorted(folder.glob(BUFFERS))
    if optimized and assigned and not failed and not late:
        text = optimized[0].read_text(encoding="utf-8")
        if text.rstrip().endswith("}"):  # complete, although the process may have crashed afterward
            return Compiled(text, **buffers(assigned[0].read_text(encoding="utf-8")))
    if late:
        reason = late
    elif failed:
        reason = (folder / ERROR).read_text(encoding="utf-8")
    else:
        reason = crash_reason(status, (folder / LOG).read_text("utf-8", "replace"))
    raise CompilationError(one_line(reason))


def buffers(assignment: str) -> dict[str, int]:
    """Reads the temporaries and the peak of a program, in bytes, from libtpu's text of its buffer assignment."""
    temporaries = others = 0
    for size, kind in _ALLOCATION.findall(assignment):
        color = _COLOR.search(kind)
        if color and color[1] != "0":  # not in device memory
            continue
        if "parameter" in kind or "live-out" in kind:
            others += int(size)
        elif "temp" in kind:
            temporaries += int(size)
    return {"temporaries": temporaries, "peak": temporaries + others}


def crash_reason(status: int | None, log: str) -> str:
    """Describes how a process ended without a result.

    Args:
      status: its exit status; negative for a signal.
      log: its output.
    """
    ended = f"exit status {status}"
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            ended = signal.Signals(-status).name
    checks = [line for line in log.splitlines() if "Check failed" in line]
    return f"the compiler died ({ended})" + (f": {checks[0]}" if checks else "")


def one_line(text: str, length: int = 200) -> str:
    """Returns the beginning of a text on one line."""
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 3]}..."
