"""Moments of a batch, how they combine, and the running statistics made of them.

``axis`` names the feature axes of ``x``; every other axis is averaged over, and a statistic has the shape of the
feature axes, [C] for inputs [..., C].  Variances are biased: divided by the count m, not m - 1.  Statistics are
float32, or float64 where ``x`` is; of a complex ``x`` the mean is complex and the variance real.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _checks
from jaxbn._checks import Axes, AxisNames

# A variance taken from raw sums, E[x^2] - E[x]^2, loses as many digits as mean^2 exceeds the variance.  Above this
# ratio the sums are taken again, centred on the mean, which costs a second reading of x.  Just under 4 the loss is
# five roundings (an output error of 4e-6), and training ResNet-20 on CIFAR-10 passes it in 0 to 4 of its 19 layers a
# step; 16 would never be passed there, but lets the error grow to 2e-5; at 2 half of the layers pay.
CANCELLATION = 4.0


class Moments(NamedTuple):
    """Mean and variance of a batch, and the number of values behind them.

    With :func:`combine` they form a commutative monoid whose identity has count 0.

    Attributes:
      mean: shape [C].
      var: biased variance, shape [C].
      count: number of values behind each feature, shape [C].
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


class BatchStats(NamedTuple):
    """Running statistics: what evaluation normalises with.

    Attributes:
      mean: shape [C].
      var: shape [C].
    """

    mean: jax.Array
    var: jax.Array


class CountedStats(NamedTuple):
    """Running statistics that know how many batches they have seen, and so are never biased towards their start.

    Attributes:
      mean: shape [C].
      var: shape [C].
      steps: batches accepted for each feature, int32, shape [C].
    """

    mean: jax.Array
    var: jax.Array
    steps: jax.Array


Stats = TypeVar("Stats", bound=BatchStats | CountedStats)


class Measured(NamedTuple):
    """Moments whose mean is kept as two floats, so that x - mean - residue is exact to the precision of x.

    Attributes:
      mean: leading part of the mean, shape [C]; constant to differentiation.
      residue: rest of the mean, shape [C]; carries the derivative of both.
      var: biased variance, shape [C].
      count: number of values behind each feature, shape [C].
    """

    mean: jax.Array
    residue: jax.Array
    var: jax.Array
    count: jax.Array

    def moments(self) -> Moments:
        """Returns the moments with the mean as one float."""
        return Moments(self.mean + self.residue, self.var, self.count)


def moments(
    x: ArrayLike,
    *,
    axis: Axes = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Measures mean, biased variance and count of each feature.

    mean = sum(x) / m,  var = sum(|x - mean|^2) / m, over the m positions that the mask admits, on all devices.
    Both are accurate to the precision of ``x`` at any mean, and differentiable in every mode.

    >>> mean, var, count = jaxbn.moments(jnp.array([[1., 10.], [3., 30.]]))
    >>> mean, var, count
    (Array([ 2., 20.], dtype=float32), Array([  1., 100.], dtype=float32), Array([2., 2.], dtype=float32))

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      axis: feature axis or axes of ``x``.
      mask: booleans that broadcast to ``x``; False leaves a position out, whatever it holds.
      axis_name: name or names of the device axes to measure over, under shard_map, pmap or vmap.
      axis_index_groups: groups of device indices to measure over separately, as in :func:`jax.lax.psum`.

    Returns:
      Moments of shape [C]; zeros where the count is zero.

    Raises:
      ValueError: for an axis, mask, axis name or dtype that does not fit ``x``; the message says what would.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    x = jnp.asarray(x)
    return measure(
        x, axis=axis, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups, negligible=0.0
    ).moments()


def combine(a: Moments, b: Moments) -> Moments:
    """Returns the moments of two batches taken together.

    n = n_a + n_b,  mean = mean_a + d n_b/n,  var = (n_a var_a + n_b var_b)/n + d^2 n_a n_b/n^2,  d = mean_b - mean_a.

    >>> a, b = jaxbn.moments(jnp.array([[1.], [2.]])), jaxbn.moments(jnp.array([[6.]]))
    >>> jaxbn.combine(a, b).mean
    Array([3.], dtype=float32)

    Args:
      a: moments of one batch, shape [C].
      b: moments of another, shape [C].

    Returns:
      Moments of shape [C].

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.
    """
    count = a.count + b.count
    weight_a, weight_b = a.count / jnp.maximum(count, 1), b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    mean = jnp.where(a.count > 0, a.mean + weight_b * delta, b.mean)
    var = weight_a * a.var + weight_b * b.var + weight_a * weight_b * _abs2(delta)
    return Moments(mean, var, count)


def pool(
    batches: Moments,
    *,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Combines the moments of many batches, stacked on the first axis, on all devices: [B, C] to [C].

    The same as :func:`combine` over them in any order, without a chain of B additions.
    """
    total = _total(axis_name, axis_index_groups)
    count, weighted = total(batches.count.sum(0), (batches.count * batches.mean).sum(0))
    mean = weighted / jnp.maximum(count, 1)
    (spread,) = total((batches.count * (batches.var + _abs2(batches.mean - mean[None]))).sum(0))
    return Moments(mean, spread / jnp.maximum(count, 1), count)


def init_stats(features: int | Sequence[int], *, counted: bool = False) -> BatchStats | CountedStats:
    """Returns the running statistics before the first batch: mean 0, variance 1, float32.

    >>> jaxbn.init_stats(2)
    BatchStats(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32))

    Args:
      features: number of features C, or the shape of the feature axes.
      counted: also count the batches, for averages without bias towards 0 and 1; see :func:`update_stats`.

    Returns:
      BatchStats, or CountedStats, of shape [C].
    """
    mean, var = jnp.zeros(features, jnp.float32), jnp.ones(features, jnp.float32)
    return CountedStats(mean, var, jnp.zeros(features, jnp.int32)) if counted else BatchStats(mean, var)


def update_stats(stats: Stats, moments: Moments, *, momentum: ArrayLike | None, unbiased: bool = False) -> Stats:
    """Moves the running statistics towards those of a batch.

    new = momentum * old + (1 - momentum) * batch.  With CountedStats, 1 - momentum becomes
    (1 - momentum) / (1 - momentum^t) after t batches, or 1/t for ``momentum=None``, so that the start has no weight.
    A feature whose moments are not finite, or whose count is zero, keeps what it has.

    >>> batch = jaxbn.moments(jnp.array([[1.], [3.]]))
    >>> jaxbn.update_stats(jaxbn.init_stats(1), batch, momentum=0.9)
    BatchStats(mean=Array([0.2], dtype=float32), var=Array([1.], dtype=float32))

    Args:
      stats: running statistics, shape [C].
      moments: of one batch, shape [C].
      momentum: weight of the old value, in [0, 1]; None, for CountedStats only, averages all batches alike.
      unbiased: multiply the variance by m/(m - 1), as the paper and PyTorch do.

    Returns:
      Statistics of the kind, shape and dtype given.

    Raises:
      ValueError: for a momentum outside [0, 1], or None without a count.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980, section 3.
    """
    _checks.momentum(momentum)
    accepted = (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
    var = moments.var
    if unbiased:
        var = var * (moments.count / jnp.maximum(moments.count - 1, 1))
    if isinstance(stats, CountedStats):
        steps = stats.steps + accepted.astype(stats.steps.dtype)
        weight = _unbiased_weight(momentum, jnp.maximum(steps, 1).astype(stats.var.dtype))
        stats = stats._replace(steps=steps)
        momentum = 1 - weight
    elif momentum is None:
        raise ValueError(
            "momentum=None averages all batches alike, which needs their number, but BatchStats has no count; "
            "start from init_stats(features, counted=True), or give a momentum in [0, 1]."
        )

    def move(old, new):
        # The kept dtype is the old one, so that a scan over steps has a carry of constant type.
        dtype = jnp.promote_types(old.dtype, jnp.complex64) if jnp.iscomplexobj(new) else old.dtype
        return jnp.where(accepted, momentum * old + (1 - momentum) * new, old).astype(dtype)

    return stats._replace(mean=move(stats.mean, moments.mean), var=move(stats.var, var))


def _unbiased_weight(momentum: ArrayLike | None, steps: jax.Array) -> jax.Array:
    """Returns the weight (1 - momentum) / (1 - momentum^t) of batch t; its limit 1/t where momentum is 1 or None."""
    if momentum is None:
        return 1 / steps
    forgotten = -jnp.expm1(steps * jnp.log(jnp.maximum(momentum, 1e-30)))
    return jnp.where(forgotten == 0, 1 / steps, (1 - momentum) / jnp.where(forgotten == 0, 1, forgotten))


def measure(
    x: jax.Array,
    *,
    axis: Axes,
    mask: ArrayLike | None,
    axis_name: AxisNames | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    negligible: float,
) -> Measured:
    """Measures a batch with the mean in two floats; ``negligible`` is a variance whose rounding does not matter."""
    _checks.inexact(x)
    axes = _checks.feature_axes(x.shape, axis)
    reduced = tuple(i for i in range(x.ndim) if i not in axes)
    _checks.axis_names(axis_name, axis_index_groups)
    total = _total(axis_name, axis_index_groups)
    if mask is not None:
        mask = _checks.mask(mask, x)
    return Measured(*_measure(x, mask, _count(x, mask, reduced), reduced, total, negligible))


def fill(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns ``x`` with 0 where it is masked and not finite, so that it reaches neither outputs nor gradients."""
    return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, jnp.zeros_like(x))


def widen(x: jax.Array) -> jax.Array:
    """Returns ``x`` in at least float32; inside a reduction or a fused loop the wide copy is never in memory."""
    return x.astype(_wide(x.dtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _measure(x, mask, count, reduced, total, negligible):
    """Returns mean, residue, variance and count: raw sums in one reading of x, centred sums only where those cancel."""
    expand = functools.partial(jnp.expand_dims, axis=reduced)
    wide = widen(x)
    count, raw, squares = total(count, _sum(wide, reduced, mask), _sum(_abs2(wide), reduced, mask))
    m = jnp.maximum(count, 1)
    mean = raw / m
    var = jnp.maximum(squares / m - _abs2(mean), 0)

    def again(x):
        centred = widen(x) - expand(mean)  # widened in here: outside, the wide copy of x would be written to memory
        raw, squares = total(_sum(centred, reduced, mask), _sum(_abs2(centred), reduced, mask))
        residue = raw / m
        high = mean + residue
        return high, residue - (high - mean), jnp.maximum(squares / m - _abs2(residue), 0)

    # The mean goes through the branches, changed by one of them, so that it is written to memory: recomputed from the
    # sum where it is used, it would be contracted to a fused multiply-add, and the residue would be that of another.
    cancels = jnp.any(_abs2(mean) > CANCELLATION * (var + negligible))
    mean, residue, var = lax.cond(cancels, again, lambda x: (mean, jnp.zeros_like(mean), var), x)
    return mean, residue, var, count


@_measure.defjvp
def _measure_jvp(reduced, total, negligible, primals, tangents):
    """Derivative of the moments: d mean = E[dx],  d var = 2 E[Re(conj(x - mean) dx)].

    The whole derivative of the mean goes to the residue.  With the leading part constant, the cotangent of the mean
    is a multiple of sum(dy), which the bias needs anyway, and a reading of x and dy is saved.
    """
    x, mask, local_count = primals
    mean, residue, var, count = _measure(x, mask, local_count, reduced, total, negligible)
    m = jnp.maximum(count, 1)

    @jax.checkpoint  # keeps x alone for the backward pass, not x - mean as well
    def tangent(x, mask, mean, residue, x_dot):
        expand = functools.partial(jnp.expand_dims, axis=reduced)
        x_dot = widen(x_dot)
        centred = (widen(fill(x, mask)) - expand(mean)) - expand(residue)
        mean_dot, var_dot = total(_sum(x_dot, reduced, mask), _sum((jnp.conj(centred) * x_dot).real, reduced, mask))
        return mean_dot / m, 2 * var_dot / m

    mean_dot, var_dot = tangent(x, mask, mean, residue, tangents[0])
    return (mean, residue, var, count), (jnp.zeros_like(mean), mean_dot, var_dot, jnp.zeros_like(count))


def _wide(dtype):
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def _sum(values, reduced, mask):
    return jnp.sum(values, reduced, where=mask)


def _abs2(x):
    """Returns |x|^2, real also where x is complex."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def _count(x, mask, reduced):
    """Returns the number of values behind each feature on this device."""
    dtype = jnp.finfo(_wide(x.dtype)).dtype
    features = tuple(x.shape[i] for i in range(x.ndim) if i not in reduced)
    if mask is None:
        return jnp.full(features, math.prod(x.shape[i] for i in reduced), dtype)
    repeats = math.prod(x.shape[i] for i in reduced if mask.shape[i] == 1)
    admitted = jnp.sum(mask, reduced, dtype=jnp.int32)  # a float32 sum of ones stops at 2^24
    return jnp.broadcast_to(admitted.astype(dtype) * repeats, features)


def _total(axis_name, axis_index_groups):
    """Returns the function that adds over the devices: nothing to add without a named axis."""
    if axis_name is None:
        return _as_they_are
    return functools.partial(_psum_together, axis_name=axis_name, axis_index_groups=axis_index_groups)


def _as_they_are(*sums: jax.Array) -> tuple[jax.Array, ...]:
    return sums


def _psum_together(*sums: jax.Array, axis_name, axis_index_groups) -> tuple[jax.Array, ...]:
    """Adds several arrays over the devices in one collective."""
    parts = [part for s in sums for part in ((s.real, s.imag) if jnp.iscomplexobj(s) else (s,))]
    added = iter(lax.psum(jnp.stack(parts), axis_name, axis_index_groups=axis_index_groups))
    return tuple(lax.complex(next(added), next(added)) if jnp.iscomplexobj(s) else next(added) for s in sums)
