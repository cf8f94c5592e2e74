"""A small net with our layer in linen and nnx, and what operations make of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import surgery

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6, 6, 3)).astype(np.float32)
OPERATIONS = {
    "affine": surgery.to_affine,
    "fixed": functools.partial(surgery.to_affine, learnable=False),
    "frozen": surgery.freeze,
    "folded": surgery.fold,
}


def relu(x):
    """ReLU without a rule for its derivative, which not every converter can read."""
    return jnp.maximum(x, 0)


class LinenNet(nn.Module):
    """Convolution, batch norm, ReLU, a dense layer."""

    norm: type = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        x = relu(self.norm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """Convolution, batch norm, ReLU, a dense layer."""

    def __init__(self, norm=jaxbn.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = norm(4, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(relu(self.norm(self.conv(x))).mean((1, 2)))


def random(tree):
    """Returns arrays of these shapes away from initial values; vectors, such as variances, are positive."""
    rng = np.random.default_rng(1)

    def value(a):
        values = rng.normal(size=a.shape)
        return jnp.asarray(abs(values) + 0.1 if a.ndim == 1 else values, a.dtype)

    return jax.tree.map(value, tree)


@functools.cache
def programs():
    """Returns functions of X by name: evaluation of each net, and of the nets that operations make."""
    net, evaluated = LinenNet(), NnxNet()
    variables = random(jax.eval_shape(net.init, jax.random.key(0), X))
    nnx.update(evaluated, random(nnx.state(evaluated)))
    evaluated.eval()
    functions = {"linen": functools.partial(net.apply, variables), "nnx": evaluated}
    for name, operation in OPERATIONS.items():
        done = operation(net, variables, X, check=False)
        functions[f"linen, {name}"] = functools.partial(done.model.apply, done.variables)
        functions[f"nnx, {name}"] = operation(evaluated, None, X, check=False).model
    return functions


NAMES = ["linen", "nnx", *(f"{library}, {name}" for name in OPERATIONS for library in ("linen", "nnx"))]
