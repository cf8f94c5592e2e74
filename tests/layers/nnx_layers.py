"""nnx layers, a batch and a tolerance that several tests share."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn.nnx import BatchNorm

RNG = np.random.default_rng(0)
X = (2 * RNG.normal(size=(8, 4, 3)) + [0.0, 1.0, -3.0]).astype(np.float32)
MASK = RNG.random((8, 4, 1)) < 0.6
AFFINE = [(True, True), (True, False), (False, True), (False, False)]
# Flax takes the variance from raw sums: with mean^2 <= 3 var it loses two bits, and each side rounds some tens of
# times, at values of at most 10.
CLOSE = {"rtol": 0, "atol": 64 * 10 * np.finfo(np.float32).eps}

SIGNATURES = {cls: inspect.signature(cls.__init__).parameters for cls in (BatchNorm, nnx.BatchNorm)}


def layer_of(cls=BatchNorm, **options):
    """Returns a layer whose parameters and statistics are not the initial ones."""
    layer = cls(3, momentum=0.9, **options, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype), nnx.state(layer))
    nnx.update(layer, random)
    return layer


@nnx.jit
def call(layer, x, **options):
    return layer(x, **options)


def values(layer):
    return nnx.to_pure_dict(nnx.state(layer))


class Net(nnx.Module):
    """Linear, batch norm, Linear."""

    def __init__(self, norm, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = norm(3, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))
