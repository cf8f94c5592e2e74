"""A batch and a compiled training step that several tests share."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.nnx

ROUNDING = float(jnp.finfo(jnp.float32).eps)
CLOSE = {"rtol": 32 * ROUNDING, "atol": 32 * ROUNDING}  # of values near 1, after sums of about a hundred numbers
SUMS = {"rtol": 64 * ROUNDING, "atol": 64 * ROUNDING}  # of such sums themselves


@functools.partial(jax.jit, static_argnames=("axis", "unbiased"))
def step(x, stats, scale, bias, dy, *, axis=-1, mask=None, momentum=0.9, unbiased=False):
    """Returns y, the new statistics, and the gradients of vdot(y, dy) in x, scale and bias."""

    def apply(x, scale, bias):
        options = {"axis": axis, "mask": mask, "momentum": momentum, "unbiased": unbiased}
        return jaxbn.batch_norm(x, stats, scale, bias, use_running_average=False, **options)

    y, vjp, stats = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, stats, vjp(dy)


normalize = jax.jit(jaxbn.normalize, static_argnames=("axis",))
evaluate = jax.jit(functools.partial(jaxbn.batch_norm, use_running_average=True))


def sample(shape, axis=-1, seed=0):
    """Returns x, scale, bias and the cotangent of y."""
    rng = np.random.default_rng(seed)
    features = tuple(shape[a] for a in np.atleast_1d(axis))
    arrays = rng.normal(2, 3, shape), rng.normal(1, 0.3, features), rng.normal(0, 1, features), rng.normal(size=shape)
    return tuple(a.astype(np.float32) for a in arrays)


SHAPE = (6, 4, 5, 3)
X, SCALE, BIAS, DY = sample(SHAPE)
STATS = jaxbn.BatchStats(np.array([1.0, -2.0, 3.0], np.float32), np.array([4.0, 0.5, 6.0], np.float32))
ROWS = np.array([True, False, True, True, False, True])
MASKS = {
    "one per example": ROWS[:, None, None, None],
    "per feature": np.array([True, False, True]),
    "full, unequal per feature": np.random.default_rng(2).random(SHAPE) < [0.2, 0.5, 0.9],
    "one example": np.arange(6)[:, None, None, None] == 2,
    "nothing": np.zeros((6, 1, 1, 1), bool),
}
LAYOUTS = [  # shape and feature axes
    ((40, 3), -1),
    (SHAPE, (1, 3)),
    pytest.param(SHAPE, 1, marks=pytest.mark.slow),
    pytest.param((4, 3, 2, 2, 3), -1, marks=pytest.mark.slow),
]


def train(x, stats=STATS, scale=SCALE, bias=BIAS, **options):
    """Returns y and the new statistics."""
    return step(x, stats, scale, bias, np.ones_like(x), **options)[:2]
