"""From moments to outputs: y = (x - pivot) a + shift, with a = scale / sqrt(v).

Here v = var + epsilon, or infinity for a feature that is masked everywhere, so that its a is 0.

This is scale * (x - mean) / sqrt(v) + bias, with mean = pivot + offset and shift = bias - offset a.  It is exact even
if x and its mean are large, because x - pivot is, and offset a is small.

Evaluation, where the pivot is the mean and the offset 0, has its own functions, of plain operations only: without rules
for derivatives, choices of a platform, or primitives of our own.  Programs that read other programs know no more, such
as exporters to ONNX and the transformations in `jax.experimental`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import lowering
from jaxbn._core.dtypes import is_narrow, widen
from jaxbn._core.measure import Measured, zero_masked
from jaxbn._core.sums import broadcast, pair_broadcast


def apply_measured(
    x: jax.Array,
    mask: jax.Array | None,
    batch: Measured,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    reduced: tuple[int, ...],
    epsilon: ArrayLike,
) -> jax.Array:
    """Normalizes x, shape [..., C], with moments that were measured on it."""
    v = batch.var + epsilon
    if mask is not None:  # a feature that is masked everywhere becomes its bias
        v = lowering.where(batch.count > 0, v, jnp.inf)
    a, shift = _coefficients(batch.offset, v, scale, bias)
    pivot = lax.stop_gradient(batch.pivot)
    return _scale_and_shift(x, mask, pivot, a, shift, reduced, result_dtype(x, scale, bias))


def apply_given(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    reduced: tuple[int, ...],
    epsilon: ArrayLike,
) -> jax.Array:
    """Normalizes x, shape [..., C], with given statistics."""
    a = _given_slope(scale, widen(var) + epsilon)
    return scale_and_shift(x, widen(mean), a, bias, reduced, result_dtype(x, scale, bias))


def result_dtype(x: jax.Array, scale: ArrayLike | None, bias: ArrayLike | None) -> jnp.dtype:
    """Returns the dtype of y, to which x, scale and bias promote; None does not count."""
    return jnp.result_type(x, *(parameter for parameter in (scale, bias) if parameter is not None))


# In evaluation.  Compiled for eager calls; inlined into any other program, which then holds no calls.


@functools.partial(jax.jit, inline=True)
def _given_slope(scale: ArrayLike | None, v: jax.Array) -> jax.Array:
    """Computes a = scale / sqrt(v)."""
    return lax.rsqrt(v) if scale is None else widen(jnp.asarray(scale)) * lax.rsqrt(v)


def scale_and_shift(
    x: jax.Array,
    mean: jax.Array | None,
    a: jax.Array | None,
    shift: ArrayLike | None,
    reduced: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """Computes (x - mean) a + shift; None stands for a mean or shift of 0 and a factor of 1."""
    if a is not None and _is_differentiated(a):
        # The gradient of a needs x - mean.  As in training, only x is kept, where plain operations would keep both.
        mean = jnp.zeros_like(a) if mean is None else mean
        shift = jnp.zeros_like(a) if shift is None else widen(jnp.asarray(shift))
        return _scale_and_shift(x, None, mean, a, shift, reduced, dtype)
    return _scale_and_shift_plainly(x, mean, a, shift, reduced, dtype)


def _is_differentiated(value: jax.Array) -> bool:
    """Tells whether the value is being differentiated now, not in a program that is recorded to be used later.

    If JAX names its traces differently one day, the answer is False, which costs memory and nothing else.
    """
    trace = getattr(value, "_trace", None)
    while trace is not None:
        if type(trace).__name__ in ("JVPTrace", "LinearizeTrace"):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


@functools.partial(jax.jit, static_argnums=(4, 5), inline=True)
def _scale_and_shift_plainly(
    x: jax.Array,
    mean: jax.Array | None,
    a: jax.Array | None,
    shift: ArrayLike | None,
    reduced: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    y = widen(x)
    if mean is not None:
        y = y - _varying_broadcast(mean, y, reduced)
    if a is not None:
        y = y * _varying_broadcast(a, y, reduced)
    if shift is not None:
        y = y + _varying_broadcast(widen(jnp.asarray(shift)), y, reduced)
    return y.astype(dtype)


def _varying_broadcast(values: jax.Array, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Broadcasts like :func:`broadcast`, so that under shard_map gradients are added per feature."""
    values, x = lowering.varying_alike(values, x)  # see `pair_broadcast`
    return broadcast(values, x, reduced)


# In training.


@jax.jit  # networks have many layers of the same shape, for which this is traced once
def _coefficients(
    offset: jax.Array,
    v: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """Computes a = scale / sqrt(v), and bias - offset a."""
    a = _slope(jnp.ones_like(v) if scale is None else widen(jnp.asarray(scale)), v)
    shift = -offset * a if bias is None else widen(jnp.asarray(bias)) - offset * a
    return a, shift


@lowering.rematerialized(static_argnums=(5, 6))  # only x is kept for the backward pass, not x - pivot as well
def _scale_and_shift(
    x: jax.Array,
    mask: jax.Array | None,
    pivot: jax.Array,
    a: jax.Array,
    shift: jax.Array,
    reduced: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """Computes (x - pivot) a + shift."""
    wide = widen(zero_masked(x, mask))
    centered = wide - broadcast(pivot, wide, reduced)
    # As a pair, because the backward pass needs the sums of dy (x - pivot) and dy.
    a, shift = pair_broadcast(a, shift, wide, reduced, narrow=is_narrow(x))
    return (centered * a + shift).astype(dtype)


@jax.custom_jvp
def _slope(scale: jax.Array, v: jax.Array) -> jax.Array:
    """Computes a = scale / sqrt(v)."""
    return scale * lax.rsqrt(v)


@_slope.defjvp
def _slope_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple:
    """Derivative: da = dscale / sqrt(v) - a dv / (2 v), with a division last in the backward pass.

    XLA keeps the result of a division, an array per feature.  It would repeat a product of such arrays for every value
    of the batch to which it is applied.
    """
    scale, v = primals
    scale_dot, v_dot = tangents
    return _slope(scale, v), scale_dot * lax.rsqrt(v) - (0.5 * _slope(scale, v)) * (v_dot / v)
