"""Runs the benchmarks of `python -m experiments bench`, each in its own process.

Conventions: a benchmark is measured piece by piece, and continues with the next piece after an interruption. Its file
is replaced when it is complete. The environment of the process is part of what is measured, since JAX and the C library
read it once, at the start.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks import Settings

THREADS = 2
# On a CPU, the page faults of fresh memory take longer than a layer does. So the process keeps what it frees, and the
# rounds reuse it. PyTorch's worker inherits this environment.
TIMED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "PJRT_NPROC": str(THREADS),
    "OMP_NUM_THREADS": str(THREADS),
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # `steps` times the compilations
}
ENVIRONMENTS = {
    "layers": TIMED,
    "steps": TIMED,
    # Nothing is timed. The devices are simulated, as many as `collectives.GROWTH` needs at most.
    "collectives": {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "512"},
    # Nothing runs on the accelerators, so JAX must not look for them.
    "accelerators": TIMED | {"JAX_PLATFORMS": "cpu"},
    "numerics": {},
    "throughput": {},
    "folding": {},
    "calibration": {},
}
SHOWN_AS_TABLES = ("collectives", "throughput")  # more detailed than their blocks, from `tables(run)`


def run(names: Sequence[str], *, out: Path, settings: Settings) -> int:
    """Measures benchmarks one after the other; returns the exit status of the first that fails, or 0.

    Args:
      names: keys of `ENVIRONMENTS`.
      out: folder of the files.
      settings: how much is measured.

    Raises:
      ValueError: a name is unknown, or there is none.
    """
    if not names or set(names) - set(ENVIRONMENTS):
        raise ValueError(f"benchmarks must be some of {', '.join(ENVIRONMENTS)}, got {','.join(names)!r}.")
    for name in names:
        environment = os.environ | ENVIRONMENTS[name]
        if status := subprocess.run(command(name, out, settings), env=environment).returncode:
            return status
    return 0


def command(name: str, out: Path, settings: Settings) -> list[str]:
    """Returns the command that measures one benchmark in this environment."""
    return [sys.executable, "-m", "experiments.benchmarks", name, str(out), json.dumps(settings.to_json())]
