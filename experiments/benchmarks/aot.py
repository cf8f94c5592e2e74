"""Compiles programs ahead of time for TPUs and GPUs that are not there, each in a process of its own.

Conventions: a program is a function that gets the target's devices and returns it lowered; it can be pickled, since it
is called in that process. The compiler may die, which ends that process alone. For a TPU, code generation takes most of
the time and changes none of what is counted, so the process ends as soon as the optimised program and its buffers are
written; whether code can be generated shows only with `generate_code`.
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
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes compile at once
    "TPU_SKIP_MDS_QUERY": "1",  # there is no server that knows a TPU
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
TIMEOUT = 600.0  # seconds
PROGRAM, MEMORY, ERROR, LOG = "program.txt", "memory.json", "error.txt", "log.txt"
# What libtpu writes before it generates code; the second comes after the first.
BUFFERS = "*.cl_*.after_optimizations-buffer-assignment.txt"
OPTIMIZED = "*.cl_*.after_optimizations_after_buffer_assignment.txt"
SETTLED = 0.3  # seconds in which a file that is being written would change
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
_COLOR = re.compile(r"\bcolor (\d+)")


class Compiled(NamedTuple):
    """What is known of a compiled program.

    Attributes:
      hlo: the optimised program.
      temporaries: bytes in device memory besides arguments and results.
      peak: bytes of all three together.
    """

    hlo: str
    temporaries: int
    peak: int


class CompilationError(Exception):
    """A program was not compiled; the message is one line that says why."""


def compile_apart(
    program: Callable[[list[Any]], jax.stages.Lowered],
    target: str,
    *,
    chips: int = 1,
    timeout: float = TIMEOUT,
    generate_code: bool = False,
) -> Compiled:
    """Compiles a program in a process of its own.

    Args:
      program: devices -> the lowered program; see the module.
      target: one of `targets.TARGETS`.
      chips: number of devices.
      timeout: seconds after which the process is ended.
      generate_code: for a TPU too, which takes several times as long.

    Raises:
      CompilationError: the compiler refused the program, died, or took too long.
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
    """Ends the processes that are compiling."""
    for process in multiprocessing.active_children():
        process.kill()


@functools.cache
def _processes():
    """Where processes come from: one that has imported what they need, and has started no backend."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.benchmarks.accelerators"])
    return context


def _compile(program, target, chips, folder, generate_code):
    """Compiles in this process, and leaves what comes of it in a folder."""
    folder = Path(folder)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        only_dump = targets.TARGETS[target].platform == "tpu" and not generate_code
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text" if only_dump else ""
        os.environ.update(ENVIRONMENT, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip())
        jax.config.update("jax_platforms", "cpu")
        lowered = program(targets.devices(target, chips))
        if only_dump:
            threading.Thread(target=_end_when_dumped, args=(folder,), daemon=True).start()
            lowered.compile()
        else:
            _keep(lowered.compile(), folder)
    except BaseException as error:
        (folder / ERROR).write_text("".join(traceback.format_exception_only(error)), encoding="utf-8")
    os._exit(0)


def _end_when_dumped(folder):
    """Ends this process when the optimised program has been written."""
    while True:
        time.sleep(0.1)
        for path in folder.glob(OPTIMIZED):
            if path.stat().st_size and time.time() - path.stat().st_mtime > SETTLED:
                os._exit(0)


def _keep(compiled, folder):
    """Writes what is known of a program that has been compiled to the end."""
    memory = compiled.memory_analysis()
    of_all = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    sizes = {"temporaries": memory.temp_size_in_bytes, "peak": of_all - memory.alias_size_in_bytes}
    (folder / MEMORY).write_text(json.dumps(sizes), encoding="utf-8")
    (folder / PROGRAM).write_text(compiled.as_text(), encoding="utf-8")


def _result(folder, status, late):
    """What a process has left, or the error that says why there is nothing."""
    if (folder / PROGRAM).exists():
        sizes = json.loads((folder / MEMORY).read_text(encoding="utf-8"))
        return Compiled((folder / PROGRAM).read_text(encoding="utf-8"), **sizes)
    failed = (folder / ERROR).exists()
    optimized, assigned = sorted(folder.glob(OPTIMIZED)), sorted(folder.glob(BUFFERS))
    if optimized and assigned and not failed and not late:
        text = optimized[0].read_text(encoding="utf-8")
        if text.rstrip().endswith("}"):  # not cut off by the end of the process
            return Compiled(text, **buffers(assigned[0].read_text(encoding="utf-8")))
    reason = late
    if not reason and failed:
        reason = (folder / ERROR).read_text(encoding="utf-8")
    raise CompilationError(one_line(reason or death(status, (folder / LOG).read_text("utf-8", "replace"))))


def buffers(assignment: str) -> dict[str, int]:
    """Returns the temporaries and the peak of a program, in bytes, from libtpu's text of its buffer assignment."""
    temporaries = others = 0
    for size, kind in _ALLOCATION.findall(assignment):
        color = _COLOR.search(kind)
        if color and color[1] != "0":  # another memory than that of the device
            continue
        if "parameter" in kind or "live-out" in kind:
            others += int(size)
        elif "temp" in kind:
            temporaries += int(size)
    return {"temporaries": temporaries, "peak": temporaries + others}


def death(status: int | None, log: str) -> str:
    """Returns how a process ended that left no result.

    Args:
      status: its exit status; negative for a signal.
      log: what it printed.
    """
    ended = f"exit status {status}"
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            ended = signal.Signals(-status).name
    checks = [line for line in log.splitlines() if "Check failed" in line]
    return f"the compiler died ({ended}){f': {checks[0]}' if checks else ''}"


def one_line(text: str, length: int = 200) -> str:
    """Returns the beginning of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= length else f"{words[: length - 3]}..."
