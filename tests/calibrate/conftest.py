"""Programs here run once or twice: compiling them with few optimizations takes half the time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compile_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
