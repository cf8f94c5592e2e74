"""Networks on which operations are tested, in linen and nnx, and all operations."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn import surgery

X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4, 4, 3)), jnp.float32)
# Initial kernels, which random values replace: they take less time to trace and to compile.
ZEROS = nn.initializers.zeros
GHOST = functools.partial(jaxbn.ghost_normalize, group_size=4)
OPERATIONS = {
    "replace": surgery.replace,
    "synchronized": functools.partial(surgery.replace, axis_name="data"),
    "ghost": functools.partial(surgery.replace, method=GHOST),
    "renorm": functools.partial(surgery.replace, method=jaxbn.batch_renormalize),
    "debias": functools.partial(surgery.replace, debias=True, steps=100),
    "freeze": surgery.freeze,
    "to_affine": surgery.to_affine,
    "to_affine, fixed": functools.partial(surgery.to_affine, learnable=False),
    "fold": surgery.fold,
    "group norm": functools.partial(surgery.replace_by_group_norm, num_groups=2),
}
FAST = {"replace", "freeze", "to_affine", "fold"}  # the others go the same ways
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in OPERATIONS]


def randomized(tree):
    """Returns arrays of these shapes, away from their initial values; vectors, such as variances, are positive."""
    rng = np.random.default_rng(0)

    def random(a):
        values = rng.normal(size=a.shape)
        return jnp.asarray(abs(values) + 0.1 if a.ndim == 1 else values, a.dtype)

    return jax.tree.map(random, tree)


def variables_of(net, x):
    """Returns random variables of a linen net."""
    return randomized(jax.eval_shape(net.init, jax.random.key(0), x))


class LinenNet(nn.Module):
    """The train flag goes to the constructor of one batch norm, and to the call of the other."""

    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.dense = nn.Dense(6, kernel_init=ZEROS)
        self.second = nn.BatchNorm(momentum=0.9, epsilon=1e-3)

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="first")(self.conv(x)))
        return self.head(self.second(self.dense(x), not train))

    def head(self, x):
        return x.mean((1, 2))


class NnxNet(nnx.Module):
    """The same, with one batch norm in two places."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), kernel_init=ZEROS, rngs=rngs)
        self.first = nnx.BatchNorm(4, rngs=rngs)
        dense = nnx.Linear(4, 6, kernel_init=ZEROS, rngs=rngs)
        self.rest = nnx.Sequential(dense, nnx.BatchNorm(6, momentum=0.9, epsilon=1e-3, rngs=rngs))
        self.again = nnx.Dict(first=self.first)

    def __call__(self, x):
        return self.rest(nnx.relu(self.again["first"](self.conv(x)))).mean((1, 2))


class LayersInALoop(nn.Module):
    """Two blocks in a loop, their arrays stacked."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.Dense(3, kernel_init=ZEROS)(x)
                return nn.relu(nn.BatchNorm(use_running_average=False, name="norm")(x)), None

        lifted = {"params": 0, "batch_stats": 0}
        loop = nn.scan(Block, lifted, length=2, split_rngs={"params": True}, in_axes=nn.broadcast)
        return loop(name="blocks")(x, None)[0]


@functools.cache
def linen_net():
    return LinenNet(), variables_of(LinenNet(), X)


def nnx_net():
    net = NnxNet()
    nnx.update(net, randomized(nnx.state(net)))
    return net, None


NETS = {"linen": linen_net, "nnx": nnx_net}
PATHS = {"linen": ("first", "second"), "nnx": ("again/first", "rest/layers/1")}


class Operated(NamedTuple):
    """A net, its description and a copy of its arrays from before an operation, and the result of that."""

    net: Any
    variables: Any
    description: Any
    copy: Any
    done: surgery.Surgery


@functools.cache
def operated(framework, operation):
    """Returns an operation on a net of a framework, which several tests look at."""
    net, variables = NETS[framework]()
    description, copy = describe(net, variables), arrays(net, variables)
    return Operated(net, variables, description, copy, OPERATIONS[operation](net, variables, X))


def describe(net, variables):
    return nnx.graphdef(net) if variables is None else repr(net)


def arrays(net, variables):
    return jax.tree.map(np.array, nnx.state(net) if variables is None else variables)


def output(net, variables, train=False):
    """Returns the output for X, and the statistics after it."""
    if variables is None:
        net = nnx.clone(net)
        net.train() if train else net.eval()
        definition, variables = nnx.split(net)

        def apply(variables):
            merged = nnx.merge(definition, variables)
            return merged(X), nnx.state(merged, nnx.BatchStat)
    else:

        def apply(variables):
            y, updates = net.apply(variables, X, train, mutable=["batch_stats"])
            return y, updates.get("batch_stats", {})

    return jax.jit(apply)(variables)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def refused(message, operation, net, variables, x=X, **options):
    """Checks that an operation raises a ValueError, and changes nothing."""
    before = arrays(net, variables)
    with pytest.raises(ValueError, match=message):
        operation(net, variables, x, **options)
    assert_equal(arrays(net, variables), before)
