"""Shared by the tests of probes: programs that run once are compiled quickly."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
