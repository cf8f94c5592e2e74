"""Settings that must be made before JAX is first used, and what all tests share."""

import gc
import os
import pathlib
import sys

import jax
import pytest

MANY_MAPS = 20_000  # of the 65,530 memory maps that Linux allows a process by default

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("PJRT_NPROC", "32")  # threads: with one for each device, two collectives at once can hang


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Forgets compiled programs when there are many: XLA crashes when it gets no more memory maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        if programs := sys.modules.get("experiments.training.programs"):
            programs.release()
        else:
            jax.clear_caches()
            gc.collect()
