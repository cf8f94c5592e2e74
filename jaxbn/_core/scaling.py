"""From moments to outputs: y = (x - pivot) a + shift, with a = scale / sqrt(v).

Here v = var + epsilon, or infinity for a feature that is masked everywhere, so that its a is 0.

This is scale * (x - mean) / sqrt(v) + bias, with mean = pivot + offset and shift = bias - offset a.  It is exact even
if x and its mean are large, because x - pivot is, and offset a is small.
"""

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
    return normalize_about(x, mask, lax.stop_gradient(batch.pivot), batch.offset, v, scale, bias, reduced)


def result_dtype(x: jax.Array, scale: ArrayLike | None, bias: ArrayLike | None) -> jnp.dtype:
    """Returns the dtype of y, to which x, scale and bias promote; None does not count."""
    return jnp.result_type(x, *(parameter for parameter in (scale, bias) if parameter is not None))


def normalize_about(
    x: jax.Array,
    mask: jax.Array | None,
    pivot: jax.Array,
    offset: jax.Array | None,
    v: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    reduced: tuple[int, ...],
) -> jax.Array:
    """Computes y = (x - pivot) a + (bias - offset a), with a = scale / sqrt(v); an offset of None means 0."""
    a, shift = _coefficients(offset, v, scale, bias)
    return scale_and_shift(x, mask, pivot, a, shift, reduced, result_dtype(x, scale, bias))


@jax.jit  # networks have many layers of the same shape, for which this is traced once
def _coefficients(
    offset: jax.Array | None,
    v: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes a = scale / sqrt(v), and bias - offset a; None for the latter if bias and offset are None."""
    a = _slope(jnp.ones_like(v) if scale is None else widen(jnp.asarray(scale)), v)
    shift = None if bias is None else widen(jnp.asarray(bias))
    if offset is not None:
        shift = -offset * a if shift is None else shift - offset * a
    return a, shift


@lowering.rematerialized(static_argnums=(5, 6))  # only x is kept for the backward pass, not x - pivot as well
def scale_and_shift(
    x: jax.Array,
    mask: jax.Array | None,
    pivot: jax.Array,
    a: jax.Array,
    shift: jax.Array | None,
    reduced: tuple[int, ...],
    dtype: jnp.dtype,
) -> jax.Array:
    """Computes (x - pivot) a + shift."""
    wide = widen(zero_masked(x, mask))
    centered = wide - broadcast(pivot, wide, reduced)
    if shift is None:
        y = centered * broadcast(a, wide, reduced)
    else:
        # As a pair, because the backward pass needs the sums of dy (x - pivot) and dy.
        a, shift = pair_broadcast(a, shift, wide, reduced, narrow=is_narrow(x))
        y = centered * a + shift
    return y.astype(dtype)


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
