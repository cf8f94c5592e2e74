"""linen layers, a batch and a tolerance that several tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxbn.linen import BatchNorm

RNG = np.random.default_rng(0)
X = (2 * RNG.normal(size=(8, 4, 3)) + [0.0, 1.0, -3.0]).astype(np.float32)
MASK = RNG.random((8, 4, 1)) < 0.6
KEY = jax.random.key(0)
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
# Flax takes the variance from raw sums: with mean^2 <= 3 var it loses two bits, and each side rounds some tens of
# times, at values of at most 10.
CLOSE = {"rtol": 0, "atol": 64 * 10 * np.finfo(np.float32).eps}
BF16_EPS = float(jnp.finfo(jnp.bfloat16).eps)

ours = functools.partial(BatchNorm, momentum=0.9)
flaxs = functools.partial(nn.BatchNorm, momentum=0.9)


def variables_of(layer, x=X):
    """Returns variables whose parameters and statistics are not the initial ones."""
    shapes = jax.eval_shape(functools.partial(layer.init, use_running_average=True), KEY, x)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype), shapes)


def train(layer, variables, x=X, **options):
    step = functools.partial(layer.apply, use_running_average=False, mutable=["batch_stats"])
    return jax.jit(step)(variables, x, **options)


def evaluate(layer, variables, x=X, **options):
    return jax.jit(functools.partial(layer.apply, use_running_average=True))(variables, x, **options)


class Net(nn.Module):
    """Dense, batch norm, Dense."""

    norm: type = BatchNorm

    @nn.compact
    def __call__(self, x, use_running_average=True):
        x = nn.Dense(3)(x)
        x = self.norm(momentum=0.9)(x, use_running_average)
        return nn.Dense(3)(x)
