"""Flax: a masked NaN makes the whole gradient NaN; fully masked features become NaN, and so do their statistics.

The loss is over the unmasked positions. The last line masks whole features, like Flax's test of `nnx.BatchNorm` against
`linen.BatchNorm`: after the next layer, all outputs of both are NaN, and the test takes them as equal.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

norm = nn.BatchNorm(use_running_average=False)
x, mask = jnp.array([[1.0], [3.0], [jnp.nan]]), jnp.array([[True], [True], [False]])
variables = norm.init(jax.random.key(0), x)


def train(x, mask):
    """Returns a loss over the unmasked positions, and the running statistics."""
    y, updates = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return jnp.sum(y**2, where=mask), updates["batch_stats"]


gradient, stats = jax.grad(train, has_aux=True)(x, mask)
print("NaN where masked: running mean", stats["mean"], "gradient", gradient.ravel())
_, stats = train(jnp.array([[1.0], [3.0], [5.0]]), jnp.zeros((3, 1), bool))
print("masked everywhere: running mean", stats["mean"], "variance", stats["var"])
model = nn.Sequential([norm, nn.Dense(4)])
x, mask = jax.random.normal(jax.random.key(0), (10, 5)), jnp.array([True, False, True, False, True])
y, _ = model.apply(model.init(jax.random.key(0), x), x, mask=mask, mutable=["batch_stats"])
print("features masked:", jnp.isnan(y).sum(), "of", y.size, "outputs of the next layer are NaN")
