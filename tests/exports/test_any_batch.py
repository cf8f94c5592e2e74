"""Steps exported for batches of any size, with masks, come back from bytes and compute the same."""

import chex
import jax
import jax.export
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

pytest.importorskip("flatbuffers")  # serializes programs
RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(7, 5, 3)) + [0, 10, -4]).astype(np.float32)
MASKS = {"[b]": np.arange(7) != 2, "[b, 1]": (np.arange(7) != 2)[:, None], "[b, T]": RNG.random((7, 5)) < 0.7}
# Another program for another size: some roundings at values of at most 10.
CLOSE = {"rtol": 0, "atol": 64 * 10 * np.finfo(np.float32).eps}


def function_step(stats, x, mask, train):
    return jaxbn.batch_norm(x, jaxbn.BatchStats(**stats), use_running_average=not train, momentum=0.9, mask=mask)


def linen_step(stats, x, mask, train):
    layer = jaxbn.linen.BatchNorm(not train, momentum=0.9, use_scale=False, use_bias=False)
    y, updates = layer.apply({"batch_stats": stats}, x, mask=mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def nnx_step(stats, x, mask, train):
    layer = jaxbn.nnx.BatchNorm(3, momentum=0.9, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = stats["mean"], stats["var"]
    return layer(x, use_running_average=not train, mask=mask), layer.mean[...]


STEPS = {"function": function_step, "linen": linen_step, "nnx": nnx_step}


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("name", STEPS)
def test_a_masked_step_is_exported_for_batches_of_any_size(name, shape, train):
    step = jax.jit(lambda *arguments: jax.tree.leaves(STEPS[name](*arguments, train)))
    stats = {"mean": np.ones(3, np.float32), "var": np.full(3, 2, np.float32)}
    (b,) = jax.export.symbolic_shape("b")
    mask = MASKS[shape]
    of_x, of_mask = (jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in (X, mask))
    exported = jax.export.export(step)(jax.tree.map(jax.typeof, stats), of_x, of_mask)
    copy = jax.export.deserialize(exported.serialize())
    for size in (7, 4):
        arguments = stats, X[:size], mask[:size]
        chex.assert_trees_all_close(copy.call(*arguments), step(*arguments), **CLOSE)
    y, mean = copy.call(stats, X, mask)[:2]
    counted = X[np.broadcast_to(mask.reshape(mask.shape + (1,) * (2 - mask.ndim)), (7, 5))].astype(np.float64)
    expected = 0.9 + 0.1 * counted.mean(0) if train else stats["mean"]
    np.testing.assert_allclose(mean, expected, **CLOSE)
    assert np.isfinite(y).all()
