"""Moments of a batch, how they combine, and the running statistics.

``axis`` names the feature axes of ``x``.  All other axes are averaged over, and a statistic has the shape of the
feature axes: [C] for inputs [..., C].  Variances are biased: divided by the count m, not m - 1.  Statistics are
float32, or float64 if ``x`` is; for a complex ``x``, the mean is complex and the variance real.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax import export
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import checks, lowering
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import abs2
from jaxbn._core.measure import Measured, measure


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


class BatchStats(NamedTuple):
    """Running statistics, with which evaluation normalizes.

    Attributes:
      mean: shape [C].
      var: shape [C].
    """

    mean: jax.Array
    var: jax.Array


class CountedStats(NamedTuple):
    """Running statistics that count their batches, and so are not biased toward their initial values.

    Attributes:
      mean: shape [C].
      var: shape [C].
      steps: number of updates of each feature, int32, shape [C].
    """

    mean: jax.Array
    var: jax.Array
    steps: jax.Array


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

# So that jax.export can serialize a function that takes or returns them; it finds the class by this name.
for _kind in (Moments, *STATS_TYPES):
    export.register_namedtuple_serialization(_kind, serialized_name=f"jaxbn.{_kind.__name__}")


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
      dtype: dtype of the mean, complex64 for complex inputs; the variance has its real counterpart.

    Returns:
      BatchStats, or CountedStats, of shape [C]; wrapped in AccumulatedStats if ``accumulate`` exceeds 1.

    Raises:
      ValueError: if ``accumulate`` is not a positive integer, ``features`` are not non-negative integers, or ``dtype``
        is an integer dtype.
    """
    accumulate = checks.whole("accumulate", accumulate, least=1)
    for size in features if isinstance(features, Iterable) else (features,):
        checks.whole("features", size, least=0)
    checks.inexact(dtype=dtype)
    counted = checks.boolean("counted", counted)
    real_dtype = jnp.finfo(dtype).dtype
    mean, var = jnp.zeros(features, dtype), jnp.ones(features, real_dtype)
    running = CountedStats(mean, var, jnp.zeros(features, jnp.int32)) if counted else BatchStats(mean, var)
    if accumulate == 1:
        return running
    # Pending moments are at least float32, even if the running statistics are stored in half precision.
    wide_dtype = jnp.promote_types(dtype, jnp.float32)
    wide_real_dtype = jnp.promote_types(real_dtype, jnp.float32)
    pending = Moments(
        mean=jnp.zeros(features, wide_dtype),
        var=jnp.zeros(features, wide_real_dtype),
        count=jnp.zeros(features, wide_real_dtype),
    )
    return AccumulatedStats(running, pending, jnp.zeros((), jnp.int32), jnp.asarray(accumulate, jnp.int32))


def update_stats(stats: Stats, moments: Moments, *, momentum: ArrayLike | None, unbiased: bool = False) -> Stats:
    """Updates the running statistics with the moments of a batch.

    new = momentum * old + (1 - momentum) * batch.  With CountedStats, 1 - momentum becomes
    (1 - momentum) / (1 - momentum^t) after t batches, or 1/t for ``momentum=None``, so that the initial values have no
    weight.  AccumulatedStats combine the moments of several batches, and then update once, as if for one batch.
    A feature whose moments are not finite, or whose count is zero, keeps its statistics.

    >>> batch = jaxbn.moments(jnp.array([[1.], [3.]]))
    >>> jaxbn.update_stats(jaxbn.init_stats(1), batch, momentum=0.9)
    BatchStats(mean=Array([0.2], dtype=float32), var=Array([1.], dtype=float32))

    Args:
      stats: running statistics, shape [C].
      moments: moments of the batch, shape [C].
      momentum: weight of the old value, in [0, 1]; None, for CountedStats only, weights all batches equally.
      unbiased: multiply the variance by m/(m - 1), as the paper and PyTorch do.

    Returns:
      Statistics of the class, shape and dtype of ``stats``; a real mean becomes complex with complex moments.

    Raises:
      ValueError: for moments of other features, a momentum outside [0, 1], or None without a count.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980, section 3.
    """
    checks.momentum(momentum)
    unbiased = checks.boolean("unbiased", unbiased)
    checks.statistics(stats, STATS_TYPES)
    checks.same_features("the moments", jnp.shape(moments.mean), "the running statistics", jnp.shape(stats.mean))
    if isinstance(stats, AccumulatedStats):
        return _accumulate(stats, moments, momentum=momentum, unbiased=unbiased)
    if isinstance(stats, BatchStats) and momentum is None:
        raise ValueError(
            "momentum must be a number in [0, 1] for BatchStats, got None: weighting all batches equally needs their "
            "number. Start from init_stats(features, counted=True), or pass a momentum."
        )
    # Models have many layers of the same shape, and tracing these small operations for each of them takes about a tenth
    # of the time of tracing a training step.  Called under jit, a jitted function is traced once for all of them.
    # Eagerly, the operations are called as they are: momentum is a static argument, so that 1 - momentum keeps its
    # digits, and every new value of it would compile a program, in hundreds of times the time of the operations.
    is_traced = isinstance(moments.mean, jax.core.Tracer)
    is_constant = momentum is None or isinstance(momentum, int | float)
    update = _update_jitted if is_traced and is_constant else _update
    return update(stats, moments, momentum, unbiased)


def _update(stats: Running, moments: Moments, momentum: Any, unbiased: bool) -> Running:
    is_usable = _is_usable(moments)
    var = moments.var
    if unbiased:  # Ioffe and Szegedy 2015, algorithm 2: Var[x] = m/(m-1) E[var]
        var = var * (moments.count / jnp.maximum(moments.count - 1, 1))
    weight = None
    if isinstance(stats, CountedStats):
        steps = stats.steps + is_usable.astype(stats.steps.dtype)
        weight = _debiased_weight(momentum, jnp.maximum(steps, 1).astype(var.dtype))
        stats = stats._replace(steps=steps)

    def average(old: jax.Array, batch: jax.Array) -> jax.Array:
        new = momentum * old + (1 - momentum) * batch if weight is None else _interpolate(old, batch, weight)
        new = _cast_like(new, old)
        return lowering.where(is_usable, new, old.astype(new.dtype))

    return stats._replace(mean=average(stats.mean, moments.mean), var=average(stats.var, var))


_update_jitted = jax.jit(_update, static_argnums=(2, 3))


def _accumulate(stats: AccumulatedStats, moments: Moments, *, momentum: ArrayLike | None, unbiased: bool) -> Any:
    """Adds a batch to the pending ones, and updates the running statistics once there are enough."""
    # A feature with unusable moments enters with count 0, the identity of `combine`.
    is_usable = _is_usable(moments)
    moments = jax.tree.map(lambda value: lowering.where(is_usable, value, 0), moments)
    pending = combine(stats.pending, moments)
    batches = stats.batches + 1
    # The update is computed at every batch, and selected at the last: a few numbers per feature are cheaper than a
    # conditional, and vmap would turn that into a select anyway.
    complete = batches >= stats.every
    updated = update_stats(stats.running, pending, momentum=momentum, unbiased=unbiased)
    return stats._replace(
        running=jax.tree.map(lambda new, old: lowering.where(complete, new, old), updated, stats.running),
        pending=jax.tree.map(
            lambda new, old: _cast_like(lowering.where(complete, 0, new), old), pending, stats.pending
        ),
        batches=jnp.where(complete, 0, batches),
    )


def _is_usable(moments: Moments) -> jax.Array:
    """Tells which features have moments that may enter the running statistics."""
    return (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)


def _cast_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """Casts ``new`` to the dtype of ``old``, or to its complex counterpart if ``new`` is complex.

    The latter changes the type of the carry of a scan over steps, so start that from ``init_stats(dtype=complex64)``.
    """
    return new.astype(jnp.promote_types(old.dtype, jnp.complex64) if jnp.iscomplexobj(new) else old.dtype)


def _interpolate(old: jax.Array, new: jax.Array, weight: jax.Array) -> jax.Array:
    """Computes (1 - weight) old + weight new, for a weight that may be tiny: 1/t after t batches.

    A small weight is applied to the difference: 1 - weight, rounded, keeps few of its digits, so the factors of the sum
    would not add up to 1, and after many batches an average would be off by 0.1 % at a weight of 1e-5.  A large weight
    is applied in the sum, because old + (new - old) is new only up to a rounding of old; there 1 - weight is exact
    (Sterbenz's lemma).  Neither form makes a variance negative, because rounding is monotonic.
    """
    return lowering.where(weight < 0.5, old + weight * (new - old), (1 - weight) * old + weight * new)


def _debiased_weight(momentum: ArrayLike | None, steps: jax.Array) -> jax.Array:
    """Computes the weight (1 - momentum) / (1 - momentum^t) of batch t; its limit 1/t if momentum is 1 or None.

    Kingma and Ba 2015, section 3, divide the average by 1 - momentum^t; this is the same as a recursion on the result.
    """
    if momentum is None:
        return 1 / steps
    # momentum^t is exp(t log(momentum)), with log1p and expm1 because a momentum near 1 keeps few digits of the
    # difference.  Numerator and denominator come from the same rounded `new`; otherwise the weight could exceed 1, and
    # the variance become negative.
    new = jnp.asarray(1 - momentum, steps.dtype)
    bounded = jnp.minimum(new, 1 - 1e-6)  # log1p(-1) is infinite
    denominator = -jnp.expm1(steps * jnp.log1p(-bounded))
    # `where` inside of the division, too, so that its gradient is not nan where it is not used.
    weight = jnp.where(new > 0, new / jnp.where(new > 0, denominator, 1), 1 / steps)
    # Exactly 1 for the first batch, which replaces the initial values; later, the quotient may round to above 1.
    return jnp.minimum(jnp.where(steps == 1, 1, weight), 1)
