"""Running statistics, updated with the moments of a batch: exponential, debiased or plain averages.

The dtype of a running statistic is that of its first value, and at least float32: an average in half precision stops
moving as soon as a step is smaller than half of its last digit, and a variance above 65,504 overflows float16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._core import checks, lowering
from jaxbn._core.stats import (
    STATS_TYPES,
    AccumulatedStats,
    AnyStats,
    BatchStats,
    CountedStats,
    Moments,
    Running,
    Stats,
    combine,
)

# A number in [0, 1], a schedule of it, or None for a plain average.
Momentum = ArrayLike | Callable[[jax.Array], ArrayLike] | None

# The number of updates of statistics that were loaded without their number: so many that the initial values of a
# debiased average have no weight left, and one more does not overflow.
_MANY = 2**30


def update_stats(
    stats: Stats,
    moments: Moments,
    *,
    momentum: Momentum,
    unbiased: bool = False,
    debias: bool = True,
) -> Stats:
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
      momentum: weight of the old value, in [0, 1].  For CountedStats, also None, which weights all batches equally, or
        a schedule as in Optax: ``momentum(t)`` returns the weight, where t, an int32 scalar, counts earlier updates.
      unbiased: multiply the variance by m/(m - 1), as the paper and PyTorch do.
      debias: False only counts the batches of CountedStats: new = momentum * old + (1 - momentum) * batch.

    Returns:
      Statistics of the class and shape of ``stats``, and of their dtype, but at least float32; a real mean becomes
      complex with complex moments.

    Raises:
      ValueError: for moments of other features, a momentum outside [0, 1], or None or a schedule without a count.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2; Kingma and Ba 2015, arXiv:1412.6980, section 3.
    """
    checks.statistics(stats, STATS_TYPES)
    if callable(momentum):
        momentum = momentum(number_of_updates(stats, "momentum is a schedule"))
    checks.momentum(momentum)
    unbiased, debias = checks.boolean("unbiased", unbiased), checks.boolean("debias", debias)
    checks.same_features("the moments", jnp.shape(moments.mean), "the running statistics", jnp.shape(stats.mean))
    stats = jax.tree.map(_at_least_float32, stats)
    if isinstance(stats, AccumulatedStats):
        return _accumulate(stats, moments, momentum=momentum, unbiased=unbiased, debias=debias)
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
    return update(stats, moments, momentum, unbiased, debias)


def number_of_updates(stats: AnyStats, reason: str) -> jax.Array:
    """Returns the number of updates, an int32 scalar: that of the feature with the most; needs counted statistics."""
    running = stats.running if isinstance(stats, AccumulatedStats) else stats
    if not isinstance(running, CountedStats):
        raise ValueError(
            f"{reason}, which needs the number of updates, but stats are {type(running).__name__}; start from "
            "jaxbn.init_stats(features, counted=True), or pass a number."
        )
    return jnp.max(_known_steps(running), initial=0)


def has_lost_count(stats: CountedStats) -> jax.Array:
    """Tells which features hold an average of an unknown number of batches: loaded from a state without counts."""
    is_initial = (stats.mean == 0) & (stats.var == 1)
    return (stats.steps < 0) & ~is_initial


def _known_steps(stats: CountedStats) -> jax.Array:
    """Returns the number of updates, with 0 for new statistics, and many for an average of unknown length."""
    return jnp.where(has_lost_count(stats), _MANY, jnp.maximum(stats.steps, 0))


def _update(stats: Running, moments: Moments, momentum: Any, unbiased: bool, debias: bool) -> Running:
    is_usable = _is_usable(moments)
    var = moments.var
    if unbiased:  # Ioffe and Szegedy 2015, algorithm 2: Var[x] = m/(m-1) E[var]
        var = var * (moments.count / jnp.maximum(moments.count - 1, 1))
    weight = None
    if isinstance(stats, CountedStats):
        steps = _known_steps(stats) + is_usable.astype(stats.steps.dtype)
        t = jnp.maximum(steps, 1).astype(var.dtype)
        if momentum is None:
            # A plain average cannot go on without the number of batches, and NaN says so; the layers refuse earlier if
            # they can.
            weight = jnp.where(has_lost_count(stats), jnp.nan, _debiased_weight(None, t))
        elif debias:
            weight = _debiased_weight(momentum, t)
        stats = stats._replace(steps=steps)

    def average(old: jax.Array, batch: jax.Array) -> jax.Array:
        new = momentum * old + (1 - momentum) * batch if weight is None else _interpolate(old, batch, weight)
        new = _cast_like(new, old)
        return lowering.where(is_usable, new, old.astype(new.dtype))

    return stats._replace(mean=average(stats.mean, moments.mean), var=average(stats.var, var))


_update_jitted = jax.jit(_update, static_argnums=(2, 3, 4))


def _accumulate(
    stats: AccumulatedStats, moments: Moments, *, momentum: ArrayLike | None, unbiased: bool, debias: bool
) -> Any:
    """Adds a batch to the pending ones, and updates the running statistics once there are enough."""
    # A feature with unusable moments enters with count 0, the identity of `combine`.
    is_usable = _is_usable(moments)
    moments = jax.tree.map(lambda value: lowering.where(is_usable, value, 0), moments)
    pending = combine(stats.pending, moments)
    batches = stats.batches + 1
    # The update is computed at every batch, and selected at the last: a few numbers per feature are cheaper than a
    # conditional, and vmap would turn that into a select anyway.
    complete = batches >= stats.every
    updated = update_stats(stats.running, pending, momentum=momentum, unbiased=unbiased, debias=debias)
    return stats._replace(
        running=jax.tree.map(lambda new, old: lowering.where(complete, new, old), updated, stats.running),
        pending=jax.tree.map(
            lambda new, old: _cast_like(lowering.where(complete, 0, new), old), pending, stats.pending
        ),
        batches=jnp.where(complete, 0, batches),
    )


def _at_least_float32(value: Any) -> Any:
    """Widens half precision; leaves counts and wider dtypes."""
    dtype = jnp.result_type(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        return value
    return jnp.asarray(value).astype(jnp.promote_types(dtype, jnp.float32))


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
