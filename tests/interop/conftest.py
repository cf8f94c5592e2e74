"""Compiles the programs of these tests quickly, since each runs only a few times."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """Switches off most of XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
