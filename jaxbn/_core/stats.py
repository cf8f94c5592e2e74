"""Moments of a batch, how they combine, and the running statistics made of them.

``axis`` names the feature axes of ``x``; every other axis is averaged over, and a statistic has the shape of the
feature axes, [C] for inputs [..., C].  Variances are biased: divided by the count m, not m - 1.  Statistics are
float32, or float64 where ``x`` is; of a complex ``x`` the mean is complex and the variance real.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core import checks
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import abs2
from jaxbn._core.measure import Measured, measure


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


class AccumulatedStats(NamedTuple):
    """Running statistics that move once every few batches, by the moments of all of them: gradient accumulation.

    Attributes:
      running: what evaluation normalises with, as of the last move.
      pending: moments of the batches since then, taken together, shape [C].
      batches: number of batches since then, int32, shape [].
      every: number of batches after which the running statistics move, integer, shape [].
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


_PENDING = "pending_"  # of the names of what waits, as variables of a layer
AnyStats = BatchStats | CountedStats | AccumulatedStats
STATS_TYPES = get_args(AnyStats)
Stats = TypeVar("Stats", bound=AnyStats)


def moments(
    x: ArrayLike,
    *,
    axis: Axes = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Measures mean, biased variance and count of each feature.

    ``mean = sum(x) / m``, ``var = sum(|x - mean|^2) / m``, over the m positions that the mask admits, on all devices.
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
    x, _, reduced = checks.inputs(x, axis)
    mask = checks.mask(mask, x)
    devices = Devices(*checks.axis_names(axis_name, axis_index_groups))
    return round_mean(measure(x, mask, reduced, devices, negligible=0.0))


def round_mean(measured: Measured) -> Moments:
    """Returns what was measured as moments, with the mean in one float."""
    return Moments(measured.pivot + measured.offset, measured.var, measured.count)


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

    Raises:
      ValueError: for moments of different features.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.
    """
    checks.same_features("the moments b", jnp.shape(b.mean), "the moments a", jnp.shape(a.mean))
    count = a.count + b.count
    weight_a, weight_b = a.count / jnp.maximum(count, 1), b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    mean = jnp.where(a.count > 0, a.mean + weight_b * delta, b.mean)
    var = weight_a * a.var + weight_b * b.var + weight_a * weight_b * abs2(delta)
    return Moments(mean, var, count)


def pool(batches: Moments, devices: Devices) -> Moments:
    """Combines the moments of many batches, stacked on the first axis, on all devices: [B, C] to [C].

    The same as :func:`combine` over them in any order, without a chain of B additions.
    """
    count, weighted = devices.total(batches.count.sum(0), (batches.count * batches.mean).sum(0))
    m = jnp.maximum(count, 1)
    mean = weighted / m
    spread = (batches.count * (batches.var + abs2(batches.mean - mean[None]))).sum(0)
    (spread,) = devices.total(spread)
    return Moments(mean, spread / m, count)


def init_stats(
    features: int | Sequence[int], *, counted: bool = False, accumulate: int = 1, dtype: DTypeLike = jnp.float32
) -> AnyStats:
    """Returns the running statistics before the first batch: mean 0, variance 1.

    >>> jaxbn.init_stats(2)
    BatchStats(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32))

    Args:
      features: number of features C, or the shape of the feature axes.
      counted: also count the batches, for averages without bias towards 0 and 1; see :func:`update_stats`.
      accumulate: number of batches that make one optimizer step, and one update of the statistics.
      dtype: of the mean, complex64 for complex inputs; the variance has its real counterpart.

    Returns:
      BatchStats, or CountedStats, of shape [C]; AccumulatedStats of them if ``accumulate`` exceeds 1.

    Raises:
      ValueError: if ``accumulate`` is no integer or below 1, ``features`` are no integers or negative, or ``dtype`` is
        that of integers.
    """
    accumulate = checks.whole("accumulate", accumulate, least=1)
    for size in features if isinstance(features, Iterable) else (features,):
        checks.whole("features", size, least=0)
    checks.inexact(dtype=dtype)
    real = jnp.finfo(dtype).dtype
    mean, var = jnp.zeros(features, dtype), jnp.ones(features, real)
    stats = CountedStats(mean, var, jnp.zeros(features, jnp.int32)) if counted else BatchStats(mean, var)
    if accumulate == 1:
        return stats
    # Pending sums are at least float32, whatever the running statistics are kept in.
    wide, wide_real = jnp.promote_types(dtype, jnp.float32), jnp.promote_types(real, jnp.float32)
    pending = Moments(jnp.zeros(features, wide), jnp.zeros(features, wide_real), jnp.zeros(features, wide_real))
    return AccumulatedStats(stats, pending, jnp.zeros((), jnp.int32), jnp.asarray(accumulate, jnp.int32))


def update_stats(stats: Stats, moments: Moments, *, momentum: ArrayLike | None, unbiased: bool = False) -> Stats:
    """Moves the running statistics towards those of a batch.

    new = momentum * old + (1 - momentum) * batch.  With CountedStats, 1 - momentum becomes
    (1 - momentum) / (1 - momentum^t) after t batches, or 1/t for ``momentum=None``, so that the start has no weight.
    AccumulatedStats combine the moments of several batches, and then move as for one batch of all of them.
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
      Statistics of the kind, shape and dtype given; a real mean becomes complex with complex moments.

    Raises:
      ValueError: for moments of other features, a momentum outside [0, 1], or None without a count.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980, section 3.
    """
    checks.momentum(momentum)
    checks.statistics(stats, STATS_TYPES)
    checks.same_features("the moments", jnp.shape(moments.mean), "the running statistics", jnp.shape(stats.mean))
    if isinstance(stats, AccumulatedStats):
        return _accumulate(stats, moments, momentum=momentum, unbiased=unbiased)
    if isinstance(stats, BatchStats) and momentum is None:
        raise ValueError(
            "momentum=None averages all batches alike, which needs their number, but BatchStats has no count; "
            "start from init_stats(features, counted=True), or give a momentum in [0, 1]."
        )
    traced = isinstance(moments.mean, jax.core.Tracer) and (momentum is None or isinstance(momentum, int | float))
    return (_moved_by_constant if traced else _moved)(stats, moments, momentum, bool(unbiased))


def _moved(stats, moments, momentum, unbiased):
    accepted = _accepted(moments)
    var = moments.var
    if unbiased:
        var = var * (moments.count / jnp.maximum(moments.count - 1, 1))
    if isinstance(stats, CountedStats):
        steps = stats.steps + accepted.astype(stats.steps.dtype)
        weight = _unbiased_weight(momentum, jnp.maximum(steps, 1).astype(var.dtype))
        stats = stats._replace(steps=steps)
        momentum = 1 - weight

    def move(old, new):
        new = _keep_dtype(momentum * old + (1 - momentum) * new, old)
        return lax.select(accepted, new, old.astype(new.dtype))

    return stats._replace(mean=move(stats.mean, moments.mean), var=move(stats.var, var))


# In a program: a net has many layers of the same kind, and tracing these few small operations for each takes a tenth of
# the time of tracing the whole training step.
_moved_by_constant = jax.jit(_moved, static_argnums=(2, 3))


def variable_names(*, counted: bool, accumulate: int) -> tuple[str, ...]:
    """Returns the names of the variables in which a layer keeps what :func:`init_stats` makes."""
    running = CountedStats._fields if counted else BatchStats._fields
    waiting = (*Moments._fields, "batches") if accumulate > 1 else ()
    return (*running, *(_PENDING + name for name in waiting))


def to_variables(stats: AnyStats) -> dict[str, jax.Array]:
    """Returns the arrays of running statistics by :func:`variable_names`."""
    if not isinstance(stats, AccumulatedStats):
        return stats._asdict()
    waiting = {**stats.pending._asdict(), "batches": stats.batches}
    return {**stats.running._asdict(), **{_PENDING + name: value for name, value in waiting.items()}}


def from_variables(variables: Mapping[str, jax.Array], *, accumulate: int = 1) -> AnyStats:
    """Returns the running statistics that :func:`to_variables` took apart."""
    running = {name: value for name, value in variables.items() if not name.startswith(_PENDING)}
    running = CountedStats(**running) if "steps" in running else BatchStats(**running)
    if len(variables) == len(running):
        return running
    pending = Moments(*(variables[_PENDING + name] for name in Moments._fields))
    return AccumulatedStats(running, pending, variables[_PENDING + "batches"], accumulate)


def _accumulate(stats, moments, *, momentum, unbiased):
    """Adds a batch to those that wait, and moves the running statistics when there are enough."""
    moments = jax.tree.map(lambda value: jnp.where(_accepted(moments), value, 0), moments)
    pending, batches = combine(stats.pending, moments), stats.batches + 1
    complete = batches >= stats.every
    moved = update_stats(stats.running, pending, momentum=momentum, unbiased=unbiased)
    return stats._replace(
        running=jax.tree.map(lambda new, old: jnp.where(complete, new, old), moved, stats.running),
        pending=jax.tree.map(lambda new, old: _keep_dtype(jnp.where(complete, 0, new), old), pending, stats.pending),
        batches=jnp.where(complete, 0, batches),
    )


def _accepted(moments: Moments) -> jax.Array:
    """Returns which features have moments that the running statistics can use."""
    return (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)


def _keep_dtype(new: jax.Array, old: jax.Array) -> jax.Array:
    """Returns ``new`` in the dtype of ``old``, so that a scan over steps has a carry of constant type."""
    return new.astype(jnp.promote_types(old.dtype, jnp.complex64) if jnp.iscomplexobj(new) else old.dtype)


def _unbiased_weight(momentum: ArrayLike | None, steps: jax.Array) -> jax.Array:
    """Returns the weight (1 - momentum) / (1 - momentum^t) of batch t; its limit 1/t where momentum is 1 or None."""
    if momentum is None:
        return 1 / steps
    new = jnp.asarray(1 - momentum, steps.dtype)
    # 1 - momentum^t from the same `new`: rounded otherwise, the weight of a batch could exceed 1, and the variance be
    # negative.
    forgotten = -jnp.expm1(steps * jnp.log1p(-jnp.minimum(new, 1 - 1e-6)))
    weight = jnp.where(new > 0, new / jnp.where(new > 0, forgotten, 1), 1 / steps)
    return jnp.minimum(jnp.where(steps == 1, 1, weight), 1)
