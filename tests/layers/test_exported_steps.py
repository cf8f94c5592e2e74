"""A training step on the pure functions, exported, serialized and loaded, gives the values of the step."""

import chex
import jax
import numpy as np
import pytest
from jax import export

import jaxbn

X = (np.random.default_rng(0).normal(size=(8, 3)) + [0, 2, -1]).astype(np.float32)
STATS = {
    "plain": jaxbn.init_stats(3),
    "counted": jaxbn.init_stats(3, counted=True),
    "accumulated": jaxbn.init_stats(3, accumulate=2),
    "counted and accumulated": jaxbn.init_stats(3, counted=True, accumulate=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATS)
def test_a_serialized_step_takes_and_returns_the_statistics(kind):
    def step(stats, x):
        y, stats = jaxbn.batch_norm(x, stats, use_running_average=False, momentum=0.9)
        return y, stats, jaxbn.moments(x)

    exported = export.export(jax.jit(step))(STATS[kind], X)
    found = export.deserialize(exported.serialize()).call(STATS[kind], X)
    expected = jax.jit(step)(STATS[kind], X)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
