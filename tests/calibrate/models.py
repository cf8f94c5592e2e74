"""Models to calibrate, with random parameters, and the statistics that they should get, in NumPy and float64."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests import reference

FEATURES = 4
# A dozen roundings in each of five layers.
ROUNDING = 5 * 12 * np.finfo(np.float32).eps
X = np.random.default_rng(0).normal(3, 2, (128, FEATURES)).astype(np.float32)
X[:40] += 2  # so that batches differ
HALVES = (slice(0, 64), slice(64, 128))
BATCHES = [X[rows] for rows in HALVES]  # the size that tests share, as each size is compiled


class Block(nn.Module):
    norm: Callable
    features: int = FEATURES

    @nn.compact
    def __call__(self, x, mask=None):
        return nn.relu(self.norm(use_running_average=True, name="norm")(nn.Dense(self.features)(x), mask=mask))


class Net(nn.Module):
    """A layer, two in parallel, and one that is called twice in a row: four levels."""

    norm: Callable = nn.BatchNorm
    wrap: Callable = staticmethod(lambda block: block)

    @nn.compact
    def __call__(self, x, mask=None):
        first, left, right, twice = (self.wrap(Block)(self.norm, name=name) for name in NAMES)
        x = first(x, mask)
        x = left(x, mask) + right(x, mask)
        return twice(twice(x, mask), mask)


class Chain(nn.Module):
    """The first two layers of :class:`Net` in a row, which compile sooner."""

    norm: Callable = nn.BatchNorm

    @nn.compact
    def __call__(self, x, mask=None):
        return Block(self.norm, name="left")(Block(self.norm, name="first")(x, mask), mask)


class NnxBlock(nnx.Module):
    def __init__(self, norm, values):
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0))
        self.norm = norm(FEATURES, rngs=nnx.Rngs(0))
        nnx.update(self, {"dense": values["Dense_0"], "norm": values["norm"]})

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class NnxNet(nnx.Module):
    """:class:`Net` with the same parameters, and with dropout."""

    def __init__(self, norm=nnx.BatchNorm, wrap=lambda block: block):
        for name in NAMES:
            setattr(self, name, NnxBlock(norm, VARIABLES["params"][name]))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.wrap = wrap

    def __call__(self, x):
        call = self.wrap(lambda block, x: block(x))
        x = call(self.first, self.dropout(x))
        x = call(self.left, x) + call(self.right, x)
        return call(self.twice, call(self.twice, x))


def randomized(tree, seed=1):
    """Returns a pytree of arrays or shapes with random values, far from initial parameters and statistics."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), leaf.dtype), tree)


def random_variables(model, x=X, **options):
    """Returns random variables of a linen model, without running it."""
    return randomized(jax.eval_shape(functools.partial(model.init, **options), jax.random.key(0), x))


NAMES = ("first", "left", "right", "twice")
NET, CHAIN, LAYER = Net(), Chain(), nn.BatchNorm(True)
VARIABLES = random_variables(NET)
CHAIN_VARIABLES = {kind: {name: tree[name] for name in ("first", "left")} for kind, tree in VARIABLES.items()}


def layer_variables(dtype=jnp.float32):
    """Returns the variables of a batch norm that is the whole model."""
    zeros, ones = jnp.zeros(FEATURES, dtype), jnp.ones(FEATURES, dtype)
    return {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}


def expected(parts=(slice(None),), params=None):
    """Computes mean and variance of each layer of :class:`Net`, where each part of the data is normalized by itself."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params or VARIABLES["params"])
    inputs = {name: [] for name in params}

    def block(name, x):
        dense, norm = params[name]["Dense_0"], params[name]["norm"]
        x = x @ dense["kernel"] + dense["bias"]
        inputs[name].append(x)
        return np.maximum(reference.batch_norm(x, **norm)[0], 0)

    for rows in parts:
        x = block("first", X[rows])
        x = block("left", x) + block("right", x)
        block("twice", block("twice", x))
    return {name: reference.moments(np.concatenate(values))[:2] for name, values in inputs.items()}


def expected_of_chain(parts=(slice(None),)):
    """Computes the same for :class:`Chain`."""
    return {name: stats for name, stats in expected(parts).items() if name in ("first", "left")}


def stats_of(calibrated):
    """Returns mean and variance of each layer of an nnx model, or in the variables of a linen model."""
    if isinstance(calibrated, nnx.Module):
        norms = {name: getattr(calibrated, name).norm for name in NAMES}
        return {name: (norm.mean[...], norm.var[...]) for name, norm in norms.items()}
    stats = calibrated["batch_stats"]
    blocks = {"": {"norm": stats}} if "mean" in stats else stats
    return {name: (block["norm"]["mean"], block["norm"]["var"]) for name, block in blocks.items()}


def assert_close(actual, desired, rounding=ROUNDING):
    """Compares statistics in units of the standard deviation and of the variance."""
    assert actual.keys() == desired.keys()
    for name, (mean, var) in desired.items():
        np.testing.assert_array_less(abs(actual[name][0] - mean) / np.sqrt(var), rounding, err_msg=name)
        np.testing.assert_array_less(abs(actual[name][1] - var) / var, rounding, err_msg=name)
