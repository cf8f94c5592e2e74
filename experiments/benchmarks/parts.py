"""`python -m experiments bench`: speed, memory and collectives of batch norm, this library's beside others'.

Conventions: each part runs in a process of its own, which keeps the memory that it has freed (on a CPU, page faults of
fresh memory take longer than the layer) and has two threads; PyTorch gets another, with the same environment. A part
is measured piece by piece, and continues where it was interrupted. Its file is replaced when it is complete.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.benchmarks import Settings

THREADS = 2
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "PJRT_NPROC": str(THREADS),
    "OMP_NUM_THREADS": str(THREADS),
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compilations are timed
}
COMPILING = {"JAX_PLATFORMS": "cpu"}  # nothing runs on the accelerators, and none is looked for
PARTS = ("layers", "steps", "collectives", "accelerators")


def run(*, only: Sequence[str], out: Path, settings: Settings) -> int:
    """Measures these parts; returns the exit status of the first that fails, or 0.

    Args:
      only: some of `PARTS`.
      out: folder of the files.
      settings: how much is measured.

    Raises:
      ValueError: there is no such part.
    """
    if not only or set(only) - set(PARTS):
        raise ValueError(f"only={','.join(only)!r}; some of {','.join(PARTS)} are accepted; name those.")
    for part in only:
        environment = os.environ | ENVIRONMENT | (COMPILING if part == "accelerators" else {})
        if status := subprocess.run(_command(part, out, settings), env=environment).returncode:
            return status
    return 0


def _command(part, out, settings):
    if part == "collectives":  # nothing is timed, and the devices are simulated: the command does it all
        return [sys.executable, "-m", "experiments", "collectives", "--out", str(out)]
    return [sys.executable, "-m", "experiments.benchmarks", part, str(out), json.dumps(settings.to_json())]
