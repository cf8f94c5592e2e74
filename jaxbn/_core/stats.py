"""Moments of a batch, how they combine, and the running statistics.

``axis`` names the feature axes of ``x``.  All other axes are averaged over, and a statistic has the shape of the
feature axes: [C] for inputs [..., C].  Variances are biased: divided by the count m, not m - 1.  Statistics are
float32, or float64 if ``x`` is; for a complex ``x``, the mean is complex and the variance real.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar, get_args

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import checks, lowering
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import abs2
from jaxbn._core.measure import Measured, measure


def _reduce(stats: tuple) -> tuple:
    """Pickles a named tuple as a call of its class: protocols 0 and 1 refuse classes with ``__slots__`` otherwise."""
    return type(stats), tuple(stats)


class Moments(NamedTuple):
    """Mean and variance of a batch, and the number of values that they average.

    With :func:`combine` they form a commutative monoid, whose identity has count 0.

    Attributes:
      mean: shape [C].
      var: biased variance, shape [C].
      count: number of values per feature, shape [C].
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array

    __reduce__ = _reduce


class BatchStats(NamedTuple):
    """Running statistics, with which evaluation normalizes.

    Attributes:
      mean: shape [C].
      var: shape [C].
    """

    mean: jax.Array
    var: jax.Array

    __reduce__ = _reduce


class CountedStats(NamedTuple):
    """Running statistics that count their batches, and so are not biased toward their initial values.

    Attributes:
      mean: shape [C].
      var: shape [C].
      steps: number of updates of each feature, int32, shape [C]; -1 if it is not known, as in an nnx layer into which
        the statistics of a layer that does not count were loaded.
    """

    mean: jax.Array
    var: jax.Array
    steps: jax.Array

    __reduce__ = _reduce


class AccumulatedStats(NamedTuple):
    """Running statistics for gradient accumulation: updated once every few batches, with the moments of all of them.

    Attributes:
      running: running statistics as of the last update.
      pending: combined moments of the batches since then, shape [C].
      batches: number of batches since then, int32, shape [].
      every: number of batches per update, integer, shape [].
    """

    running: BatchStats | CountedStats
    pending: Moments
    batches: jax.Array
    every: ArrayLike

    __reduce__ = _reduce

    @property
    def mean(self) -> jax.Array:
        """Running mean, shape [C]."""
        return self.running.mean

    @property
    def var(self) -> jax.Array:
        """Running variance, shape [C]."""
        return self.running.var


AnyStats = BatchStats | CountedStats | AccumulatedStats
STATS_TYPES = get_args(AnyStats)
Stats = TypeVar("Stats", bound=AnyStats)
Running = TypeVar("Running", bound=BatchStats | CountedStats)

# So that a step which takes or returns them can be exported, serialized, and loaded by any program that imports jaxbn.
for _kind in (Moments, *STATS_TYPES):
    jax.export.register_namedtuple_serialization(_kind, serialized_name=f"jaxbn.{_kind.__name__}")


def moments(
    x: ArrayLike,
    *,
    axis: Axes = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Computes the mean, biased variance and count of each feature.

    ``mean = sum(x) / m``, ``var = sum(|x - mean|^2) / m``, over the m positions that the mask admits, on all devices.
    Both are accurate to the precision of ``x`` at any mean, and differentiable in forward and reverse mode.

    >>> mean, var, count = jaxbn.moments(jnp.array([[1., 10.], [3., 30.]]))
    >>> mean, var, count
    (Array([ 2., 20.], dtype=float32), Array([  1., 100.], dtype=float32), Array([2., 2.], dtype=float32))

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      axis: feature axis or axes of ``x``.
      mask: booleans that broadcast to ``x``; False excludes a position, even if it holds NaN or infinity.
      axis_name: name or names of the device axes to measure over, under shard_map, pmap or vmap.
      axis_index_groups: groups of device indices to measure over separately, as in :func:`jax.lax.psum`.

    Returns:
      Moments of shape [C]; zeros where the count is zero.

    Raises:
      ValueError: for an axis, mask, axis name or dtype that does not fit ``x``; the message says what does.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    x, _, reduced = checks.inputs(x, axis)
    mask = checks.mask(mask, x)
    devices = Devices(*checks.axis_names(axis_name, axis_index_groups))
    return round_mean(measure(x, mask, reduced, devices, negligible=0.0))


def round_mean(measured: Measured) -> Moments:
    """Rounds the mean, two floats in ``measured``, to one."""
    return Moments(measured.pivot + measured.offset, measured.var, measured.count)


def combine(a: Moments, b: Moments) -> Moments:
    """Combines the moments of two batches into those of both batches together.

    n = n_a + n_b,  mean = mean_a + d n_b/n,  var = (n_a var_a + n_b var_b)/n + d^2 n_a n_b/n^2,  d = mean_b - mean_a.

    >>> a, b = jaxbn.moments(jnp.array([[1.], [2.]])), jaxbn.moments(jnp.array([[6.]]))
    >>> jaxbn.combine(a, b).mean
    Array([3.], dtype=float32)

    Args:
      a: moments of one batch, shape [C].
      b: moments of another, shape [C].

    Returns:
      Moments of shape [C].

    Raises:
      ValueError: for moments of different features.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.
    """
    checks.same_features("the moments b", jnp.shape(b.mean), "the moments a", jnp.shape(a.mean))
    count = a.count + b.count
    weight_a = a.count / jnp.maximum(count, 1)
    weight_b = b.count / jnp.maximum(count, 1)
    # From the difference of the means: the sums of weighted means and of weighted squares would cancel at large means.
    delta = b.mean - a.mean
    # Moments of no values may hold any finite mean, and a + 1 (b - a) is b only up to rounding.
    mean = lowering.where(a.count > 0, a.mean + weight_b * delta, b.mean)
    var = weight_a * a.var + weight_b * b.var + weight_a * weight_b * abs2(delta)
    return Moments(mean, var, count)


def pool(batches: Moments, devices: Devices) -> Moments:
    """Combines the moments of many batches, stacked on the first axis, on all devices: [B, C] to [C].

    Equal to :func:`combine` over them in any order, but without a chain of B additions.
    """
    count, weighted_means = devices.total(batches.count.sum(0), (batches.count * batches.mean).sum(0))
    m = jnp.maximum(count, 1)
    mean = weighted_means / m
    # About the common mean, which costs a second collective, but cancels at no mean.
    squares = (batches.count * (batches.var + abs2(batches.mean - mean[None]))).sum(0)
    (squares,) = devices.total(squares)
    return Moments(mean, squares / m, count)


def init_stats(
    features: int | Sequence[int],
    *,
    counted: bool = False,
    accumulate: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> AnyStats:
    """Creates running statistics as they are before the first batch: mean 0, variance 1.

    >>> jaxbn.init_stats(2)
    BatchStats(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32))

    Args:
      features: number of features C, or the shape of the feature axes.
      counted: also count the batches, for averages that are not biased toward 0 and 1; see :func:`update_stats`.
      accumulate: number of batches per optimizer step, and so per update of the statistics.
      dtype: dtype of the mean, float32 or wider, complex64 for complex inputs; the variance has its real counterpart.

    Returns:
      BatchStats, or CountedStats, of shape [C]; wrapped in AccumulatedStats if ``accumulate`` exceeds 1.

    Raises:
      ValueError: if ``accumulate`` is not a positive integer, ``features`` are not non-negative integers, or ``dtype``
        is an integer dtype or half precision.
    """
    accumulate = checks.whole("accumulate", accumulate, least=1)
    for size in features if isinstance(features, Iterable) else (features,):
        checks.whole("features", size, least=0)
    checks.inexact(dtype=dtype)
    if jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"dtype must be float32 or wider, got {jnp.dtype(dtype).name}: a running average in half precision stops "
            "moving when its steps get small, and overflows at a variance of 65,504 in float16."
        )
    counted = checks.boolean("counted", counted)
    real_dtype = jnp.finfo(dtype).dtype
    mean, var = jnp.zeros(features, dtype), jnp.ones(features, real_dtype)
    running = CountedStats(mean, var, jnp.zeros(features, jnp.int32)) if counted else BatchStats(mean, var)
    if accumulate == 1:
        return running
    pending = Moments(
        mean=jnp.zeros(features, dtype),
        var=jnp.zeros(features, real_dtype),
        count=jnp.zeros(features, real_dtype),
    )
    return AccumulatedStats(running, pending, jnp.zeros((), jnp.int32), jnp.asarray(accumulate, jnp.int32))
