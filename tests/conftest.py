"""Settings that must be made before JAX is first used, and what all tests share."""

import gc
import os
import pathlib
import sys

import jax
import pytest

TESTS = pathlib.Path(__file__).parent
# Tests whose programs run once or twice, so that XLA's optimizations take longer than they save.
COMPILED_QUICKLY = (
    "calibrate",
    "interop",
    "surgery",
    "models/test_third_party.py",
    "experiments/probes",
    "experiments/studies/test_all_studies.py",
)
MANY_MAPS = 20_000  # of the 65,530 memory maps that Linux allows a process by default

jax.config.update("jax_num_cpu_devices", 8)
os.environ.setdefault("PJRT_NPROC", "32")  # threads: with one for each device, two collectives at once can hang


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(request):
    """Switches off most of XLA's optimizations for the tests in COMPILED_QUICKLY."""
    is_listed = any(request.path.is_relative_to(TESTS / name) for name in COMPILED_QUICKLY)
    jax.config.update("jax_disable_most_optimizations", is_listed)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
