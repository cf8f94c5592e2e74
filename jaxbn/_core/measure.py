"""The moments of a batch on all devices, and their derivative.

``reduced`` names the axes that are summed over, a sorted tuple; the others hold features.  Nothing is checked here: the
public functions have done it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._core import platforms
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import is_narrow, wide_dtype, widen
from jaxbn._core.local import combine, from_sums, measure_locally, sums_about
from jaxbn._core.sums import broadcast, sum_both


class Measured(NamedTuple):
    """Moments whose mean is kept as two floats, so that x - pivot - offset is exact to the precision of x.

    Attributes:
      pivot: a number whose distance from the mean is not large against the spread, shape [C]; constant to
        differentiation.
      offset: the mean less the pivot, shape [C]; carries the derivative of both.
      var: biased variance, shape [C].
      count: number of values behind each feature, on all devices, shape [C].
    """

    pivot: jax.Array
    offset: jax.Array
    var: jax.Array
    count: jax.Array


def measure(x, mask, reduced: tuple[int, ...], devices: Devices, negligible, about=None) -> Measured:
    """Measures a batch.

    Args:
      x: inputs.
      mask: booleans with as many axes as ``x``, of size 1 or as in ``x``; None admits all positions.
      reduced: axes to sum over.
      devices: what to add over.
      negligible: a variance whose rounding does not matter.
      about: a pivot that is near the mean, the same on all devices; None to find one.

    Returns:
      Statistics of the shape of the other axes.
    """
    size = _known_size(x, mask, reduced, devices)
    count = None if size else _count(x, mask, reduced)
    return Measured(*_measure(x, mask, count, negligible, about, reduced, devices, size))


def fill(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns ``x`` with 0 where it is masked and not finite, so that it reaches neither outputs nor gradients."""
    return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, jnp.zeros_like(x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
@functools.partial(jax.jit, static_argnums=(5, 6, 7))  # called eagerly, the branches would be compiled at every call
def _measure(x, mask, count, negligible, about, reduced, devices, size):
    """Returns pivot, offset, variance and count: those of each device, combined.

    ``size`` is the number of values behind each feature on all devices; where that is 0.0, ``count`` is the number on
    this device.
    """
    if about is not None:
        sums = sums_about(about, x, mask, reduced)
        total, squares, *counts = devices.total(*sums, *(() if size else (count,)))
        if size:
            return *from_sums(about, total, squares, size), jnp.full_like(squares, size)
        nothing = counts[0] == 0  # the mean of nothing is 0
        return *from_sums(jnp.where(nothing, 0, about), total, squares, jnp.maximum(counts[0], 1)), counts[0]
    local = measure_locally(x, mask, count, negligible, reduced)
    if not devices.names:
        return *local, jnp.full_like(local.var, size) if size else count
    here = count if count is not None else size / devices.size()
    whole, count = combine(local, here, size, negligible, devices.totals, devices.own)
    return *whole, count


@_measure.defjvp
def _measure_jvp(reduced, devices, size, primals, tangents):
    """Derivative of the moments: d mean = E[dx],  d var = 2 E[Re(conj(x - mean) dx)].

    The whole derivative of the mean goes to the offset.  With the pivot constant, the cotangent of the mean is a
    multiple of sum(dy), which the bias needs anyway, and a reading of x and dy is saved.
    """
    x, mask, *_ = primals
    pivot, offset, var, count = _measure(*primals, reduced, devices, size)
    share = 1 / size if size else 1 / jnp.maximum(count, 1)
    sum_dot, squares_dot = devices.total(*_sums_dot(x, mask, pivot, offset, tangents[0], reduced))
    tangents = jnp.zeros_like(pivot), sum_dot * share, squares_dot * (2 * share), jnp.zeros_like(count)
    return (pivot, offset, var, count), tangents


@platforms.rematerialized(static_argnums=(5,))  # keeps x alone for the backward pass, not x - pivot as well
def _sums_dot(x, mask, pivot, offset, x_dot, reduced):
    wide, wide_dot = widen(fill(x, mask)), widen(x_dot)
    centred = (wide - broadcast(pivot, wide, reduced)) - broadcast(offset, wide, reduced)
    products = (jnp.conj(centred) * wide_dot).real
    return sum_both(wide_dot, products, mask, reduced, narrow=is_narrow(x))


def _known_size(x, mask, reduced, devices):
    """Returns the number of values behind each feature on all devices; 0.0 where only the running program can tell."""
    sizes = [x.shape[i] for i in reduced]
    if mask is not None or not all(isinstance(size, int) for size in sizes):  # exported for a batch of any size
        return 0.0
    return float((devices.size() or 0) * math.prod(sizes))  # a float: there may be more values than an int32 holds


def _count(x, mask, reduced):
    """Returns the number of values behind each feature on this device."""
    dtype = jnp.finfo(wide_dtype(x.dtype)).dtype
    features = tuple(x.shape[i] for i in range(x.ndim) if i not in reduced)
    if mask is None:
        return jnp.full(features, math.prod(x.shape[i] for i in reduced), dtype)
    repeats = math.prod(x.shape[i] for i in reduced if mask.shape[i] == 1)
    # Added as whole numbers, since a float32 sum of ones stops at 2^24; over the examples as floats, where they are
    # fewer, so that jit adds them over devices in one collective with the other sums.
    last = tuple(i for i in reduced[:1] if mask.shape[i] < 2**24)
    admitted = jnp.sum(mask, tuple(i for i in reduced if i not in last), dtype=jnp.int32, keepdims=True)
    admitted = jnp.sum(admitted.astype(dtype), last, keepdims=True).squeeze(reduced)
    return jnp.broadcast_to(admitted * repeats, features)
