"""The moments of a batch on all devices, and their derivative.

``reduced`` names the axes that are summed over, a sorted tuple; the others hold features.  Nothing is checked here: the
public functions have checked their arguments.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._core import lowering
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import is_narrow, wide_dtype, widen
from jaxbn._core.local_moments import measure_locally
from jaxbn._core.moment_algorithms import combine_parts, from_sums, sums_about
from jaxbn._core.sums import broadcast, masked_pair_sum


class Measured(NamedTuple):
    """Moments whose mean is kept as two floats, so that x - pivot - offset is exact to the precision of x.

    If the mean is large compared to the spread, its rounding alone would shift every normalized value.

    Attributes:
      pivot: a number near the mean, compared to the spread, shape [C]; a constant to differentiation.
      offset: mean - pivot, shape [C]; carries the derivative of both.
      var: biased variance, shape [C].
      count: number of values per feature, on all devices, shape [C].
    """

    pivot: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array


def measure(
    x: jax.Array,
    mask: jax.Array | None,
    reduced: tuple[int, ...],
    devices: Devices,
    negligible: ArrayLike,
    about: jax.Array | None = None,
) -> Measured:
    """Measures a batch.

    Args:
      x: inputs.
      mask: booleans with as many axes as ``x``, of size 1 or as in ``x``; None admits all positions.
      reduced: axes to sum over.
      devices: devices to add over.
      negligible: a variance below which precision does not matter.
      about: a pivot near the mean, the same on all devices; None to choose one.

    Returns:
      Moments, in the shape of the other axes.
    """
    size = _static_count(x, mask, reduced, devices)
    local_count = None if size else _local_count(x, mask, reduced)
    return Measured(*_measure(x, mask, local_count, negligible, about, reduced, devices, size))


def zero_masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Replaces masked values that are not finite with 0.

    Left in place they would reach the outputs, and also the gradients: a cotangent of 0 times nan is nan.
    """
    return x if mask is None else lowering.where(mask | jnp.isfinite(x), x, jnp.zeros_like(x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
@functools.partial(jax.jit, static_argnums=(5, 6, 7))  # without it, eager calls would compile the branches every time
def _measure(
    x: jax.Array,
    mask: jax.Array | None,
    local_count: jax.Array | None,
    negligible: ArrayLike,
    about: jax.Array | None,
    reduced: tuple[int, ...],
    devices: Devices,
    size: float,
) -> tuple[Any, ...]:
    """Computes pivot, offset, variance and count over all devices.

    Args:
      x: inputs.
      mask: as in :func:`measure`.
      local_count: number of values per feature on this device; None if ``size`` is known.
      negligible: as in :func:`measure`.
      about: as in :func:`measure`.
      reduced: axes to sum over.
      devices: devices to add over.
      size: number of values per feature on all devices; 0.0 if only the running program can tell.
    """
    if about is not None:
        return _measure_about(about, x, mask, local_count, reduced, devices, size)
    local = measure_locally(x, mask, local_count, negligible, reduced)
    if not devices.names:
        return *local, (jnp.full_like(local.var, size) if size else local_count)
    # Without a count, all devices hold equally many values: else `size` would be 0.
    part_size = float(math.prod(x.shape[i] for i in reduced)) if local_count is None else local_count
    moments, count = combine_parts(local, part_size, size, negligible, devices.totals, devices.own)
    return *moments, count


def _measure_about(
    pivot: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    local_count: jax.Array | None,
    reduced: tuple[int, ...],
    devices: Devices,
    size: float,
) -> tuple[jax.Array, ...]:
    """Computes the same as `_measure`, about a pivot that all devices share, so their sums can be added as they are."""
    sums = sums_about(pivot, x, mask, reduced)
    if local_count is None:
        total, squares = devices.total(*sums)
        return *from_sums(pivot, total, squares, size), jnp.full_like(squares, size)
    total, squares, count = devices.total(*sums, local_count)
    pivot = lowering.where(count == 0, 0, pivot)  # the mean of no values is 0 by convention
    return *from_sums(pivot, total, squares, jnp.maximum(count, 1)), count


@_measure.defjvp
def _measure_jvp(
    reduced: tuple[int, ...],
    devices: Devices,
    size: float,
    primals: tuple,
    tangents: tuple,
) -> tuple[tuple, tuple]:
    """Derivative of the moments: d mean = E[dx],  d var = 2 E[Re(conj(x - mean) dx)].

    With this rule the moments need no derivative of the sums, of the choice of a pivot, or of a conditional.

    The offset carries the whole derivative of the mean.  With the pivot a constant, the cotangent of the mean is a
    multiple of sum(dy), which the gradient of the bias needs as well, and one pass over x and dy is saved.
    """
    x, mask, *_ = primals
    x_dot = tangents[0]
    pivot, offset, var, count = _measure(*primals, reduced, devices, size)
    share = 1 / size if size else 1 / jnp.maximum(count, 1)
    sum_dot, squares_dot = devices.total(*_sums_dot(x, mask, pivot, offset, x_dot, reduced))
    tangents_out = jnp.zeros_like(pivot), sum_dot * share, squares_dot * (2 * share), jnp.zeros_like(count)
    return (pivot, offset, var, count), tangents_out


@lowering.rematerialized(static_argnums=(5,))  # only x is kept for the backward pass, not x - pivot as well
def _sums_dot(
    x: jax.Array,
    mask: jax.Array | None,
    pivot: jax.Array,
    offset: jax.Array,
    x_dot: jax.Array,
    reduced: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Sums dx and Re(conj(x - mean) dx)."""
    wide, wide_dot = widen(zero_masked(x, mask)), widen(x_dot)
    # In this order: x - pivot is exact or nearly so, while pivot + offset would be rounded.
    centered = (wide - broadcast(pivot, wide, reduced)) - broadcast(offset, wide, reduced)
    products = (jnp.conj(centered) * wide_dot).real
    return masked_pair_sum(wide_dot, products, mask, reduced, narrow=is_narrow(x))


def _static_count(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], devices: Devices) -> float:
    """Returns the number of values per feature on all devices; 0.0 if only the running program can tell."""
    sizes = [x.shape[i] for i in reduced]
    is_exported_for_any_size = not all(isinstance(size, int) for size in sizes)
    if mask is not None or is_exported_for_any_size:
        return 0.0
    return float((devices.size() or 0) * math.prod(sizes))  # a float, since an int32 does not hold every count


def _local_count(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    """Counts the values per feature on this device."""
    dtype = jnp.finfo(wide_dtype(x.dtype)).dtype
    features = tuple(x.shape[i] for i in range(x.ndim) if i not in reduced)
    if mask is None:
        return jnp.full(features, math.prod(x.shape[i] for i in reduced), dtype)
    # A mask that broadcasts along an axis is counted once, and multiplied.
    repeats = math.prod(x.shape[i] for i in reduced if mask.shape[i] == 1)
    # Integers first, because a float32 sum of ones stops at 2^24.  The sum over the examples, of which there are fewer,
    # is in floats: then jit adds it over devices in one collective with the sums of x, which are floats too.
    # A number of examples that only the exported program knows may be too large for it.
    float_axes = tuple(i for i in reduced[:1] if isinstance(mask.shape[i], int) and mask.shape[i] < 2**24)
    integer_axes = tuple(i for i in reduced if i not in float_axes)
    admitted = jnp.sum(mask, integer_axes, dtype=jnp.int32, keepdims=True)
    admitted = jnp.sum(admitted.astype(dtype), float_axes, keepdims=True).squeeze(reduced)
    return jnp.broadcast_to(admitted * repeats, features)
