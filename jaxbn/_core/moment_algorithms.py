"""Algorithms for the moments of a batch on one device, and for combining the moments of its parts.

Every algorithm sums z = x - pivot and |z|^2, with one pivot per feature.  From these sums,

    mean = pivot + offset,  offset = E[z],  var = E[|z|^2] - |offset|^2.

The difference loses as many digits as |offset|^2 exceeds var, so the pivot has to be near the mean.  Chan, Golub and
LeVeque 1983, "Algorithms for computing the sample variance", compare the choices ("textbook", "two-pass" and "shifted
data").  All algorithms here are as exact as the two-pass algorithm, or nearly; they differ in how often they read x.

Batch norm is bound by memory, so an algorithm costs as much as it reads x, and that depends on the platform.
`ALGORITHMS` assigns one to each:

- CPU, `raw_or_centered`: sums about 0, and about the mean only if those cancel.  Real activations rarely do, and a
  conditional costs little on a CPU.
- TPU, `two_pass`: sums about the mean.  The compiler takes the mean in the kernel that produces x, so only the second
  pass reads x, which may still be on the chip.
- GPU, `sampled`: sums about the median of a few values.  Every pass over x costs a kernel, so one pass must do, except
  for small and masked batches.

Accelerators get no conditional over the batch.  The operand of a conditional has to lie in device memory, whereas a TPU
may otherwise keep all of x on the chip; and on a GPU, the host may have to wait for the predicate.

``reduced`` names the axes that are summed over, a sorted tuple; the others hold features.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core.dtypes import abs2, is_narrow, widen
from jaxbn._core.sums import broadcast, masked_pair_sum

# The ratio mean^2 / var above which sums about 0 are taken again, about the mean.  A variance from raw sums,
# E[x^2] - E[x]^2, loses as many digits as that ratio, and an output x a - mean a half as many.  Just under 4 the loss
# is about five roundings.  Activations of real networks pass 4 now and then and 16 hardly ever, but just under 16 the
# error would be four times as large; they pass 2 half of the time.
CANCELLATION = 4.0

# The number of values whose median is a pivot, a power of three, and the smallest batch to sample.
SAMPLES = 27
SMALLEST_SAMPLED = 128 * SAMPLES


class LocalMoments(NamedTuple):
    """Moments of one device's part of a batch; the mean is pivot + offset, as in `jaxbn._core.measure.Measured`."""

    pivot: jax.Array
    offset: jax.Array
    var: jax.Array


# The signature that the algorithms share.  The arguments are x, a mask or None, the number of values per feature (a
# float if the shapes tell), a variance below which precision does not matter, and the axes to sum over.
Algorithm = Callable[[jax.Array, jax.Array | None, Any, ArrayLike, tuple[int, ...]], LocalMoments]


def sums_about(
    pivot: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    reduced: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Sums x - pivot and its square, in one pass over x."""
    wide = widen(x)
    centered = wide - broadcast(pivot, wide, reduced)
    return masked_pair_sum(centered, abs2(centered), mask, reduced, narrow=is_narrow(x))


def from_sums(pivot: jax.Array, total: jax.Array, squares: jax.Array, m: ArrayLike) -> LocalMoments:
    """Computes the moments of m values from their sums about a pivot."""
    offset = total / m
    return LocalMoments(pivot, offset, jnp.maximum(squares / m - abs2(offset), 0))


def _cancels(mean: jax.Array, square: jax.Array, negligible: ArrayLike) -> jax.Array:
    """Tells whether E[x] and E[x^2] lose too many digits of the variance, in any feature."""
    mean2 = abs2(mean)
    # The sum of a few floats compiles faster than `any`.
    return (mean2 > CANCELLATION * (square - mean2 + negligible)).astype(jnp.float32).sum() > 0


@jax.custom_batching.custom_vmap
def _in_any_mapped_batch(condition: jax.Array) -> jax.Array:
    """Returns a scalar condition, under vmap whether it holds for any of the mapped batches.

    So one conditional decides for all of them.  Left to itself, vmap would turn it into a select, which computes both
    branches, and which is refused on a mesh with explicit axes if features are sharded.
    """
    return condition


@_in_any_mapped_batch.def_vmap
def _(size: int, is_mapped: list[bool], condition: jax.Array) -> tuple[jax.Array, bool]:
    del size, is_mapped
    return _in_any_mapped_batch(condition.astype(jnp.float32).sum(0) > 0), False


# The algorithms.


def raw_or_centered(
    x: jax.Array,
    mask: jax.Array | None,
    m: Any,
    negligible: ArrayLike,
    reduced: tuple[int, ...],
) -> LocalMoments:
    """Sums about 0, and then about the mean if those cancel: one pass over x, or two."""
    wide = widen(x)
    total, squares = masked_pair_sum(wide, abs2(wide), mask, reduced, narrow=is_narrow(x))
    cancels = _cancels(total / m, squares / m, negligible)

    def sum_about_mean(x: jax.Array, total: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del squares
        # Widened in here: an operand of the conditional is written to memory, and the wide copy is larger than x.
        pivot, wide = total / m, widen(x)
        centered = wide - broadcast(pivot, wide, reduced)
        # The same values negated, behind a barrier.  XLA would compute a difference that both sums share only once, and
        # write it to memory.
        negative = broadcast(lax.optimization_barrier(pivot), wide, reduced) - wide
        return pivot, *masked_pair_sum(centered, abs2(negative), mask, reduced, narrow=is_narrow(x))

    def keep_raw(x: jax.Array, total: jax.Array, squares: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        del x
        return jnp.zeros_like(total), total, squares

    # Both branches return a pivot and the sums about it.  As the result of a conditional, the pivot is the same number
    # everywhere.  Without that, XLA would compute total / m wherever it is used, and contract it into a fused
    # multiply-add there, with another rounding.
    pivot, total, squares = lax.cond(cancels, sum_about_mean, keep_raw, x, total, squares)
    return from_sums(pivot, total, squares, m)


def two_pass(
    x: jax.Array,
    mask: jax.Array | None,
    m: Any,
    negligible: ArrayLike,
    reduced: tuple[int, ...],
) -> LocalMoments:
    """Sums about the mean: two passes over x, and no digits are lost for any x."""
    del negligible
    wide = widen(x)
    # Divided before the sum rather than after it, for two reasons.  It saves a kernel.  And the pivot, which need not
    # be exactly the mean, has to be the same number everywhere: XLA would fuse a division after the sum into x - pivot,
    # as a fused multiply-add.
    share = 1 / m if isinstance(m, float) else broadcast(1 / m, wide, reduced)
    pivot = jnp.sum(wide * share, reduced, where=mask)
    return from_sums(pivot, *sums_about(pivot, x, mask, reduced), m)


def sampled(
    x: jax.Array,
    mask: jax.Array | None,
    m: Any,
    negligible: ArrayLike,
    reduced: tuple[int, ...],
) -> LocalMoments:
    """Sums about the median of a sample: one pass over x, and a bounded loss unless the sample is very unlucky.

    The loss.  The pivot is more than t standard deviations from the mean only if the median of the sample is.  By
    Chebyshev's inequality fewer than 1 in t^2 of the values are that far off, in any batch, and a tree of medians of
    three passes them on only if they are frequent in the sample: each level turns a probability p into 3 p^2 - 2 p^3.
    With 27 values, t^2 > 8 (six roundings) is less likely than 1e-4, and t^2 > 64 (an error of 5e-6 in the outputs)
    less likely than 1e-11.

    The positions are irregular, one in each of 27 equal parts of the batch, and fixed.  An example, a border or every
    n-th position that is constant or far off does not move the median, unless it is half of the batch, and then it is
    near the mean.  An adversary who knows the positions can move the median with 8 of the values.  But 8 far values
    raise the variance too, so the loss stays below n / 8 roundings, for n values per feature.

    Batches that are read twice instead: a masked one, whose sample may hold no valid value; a small one, for which a
    second pass costs nothing; one of unknown size; and a complex one, which has no median.
    """
    sizes = [x.shape[i] for i in reduced]
    is_exported_for_any_size = not all(isinstance(size, int) for size in sizes)
    if mask is not None or jnp.iscomplexobj(x) or is_exported_for_any_size or math.prod(sizes) < SMALLEST_SAMPLED:
        return two_pass(x, mask, m, negligible, reduced)
    indices = np.unravel_index(sample_positions(math.prod(sizes)), sizes)
    features_last = jnp.moveaxis(x, reduced, range(len(reduced)))
    values = widen(features_last[tuple(map(jnp.asarray, indices))])
    while len(values) > 1:
        values = _median_of_three(*values.reshape(3, -1, *values.shape[1:]))
    return from_sums(values[0], *sums_about(values[0], x, mask, reduced), m)


# The algorithm of each platform; local_moments.py chooses when a program is lowered.  Others, such as METAL, get
# `two_pass`.
ALGORITHMS: dict[str, Algorithm] = {"cpu": raw_or_centered, "tpu": two_pass, "cuda": sampled, "rocm": sampled}


def sample_positions(total: int) -> np.ndarray:
    """Returns the positions, out of ``total``, whose values are sampled, in the order in which they are compared."""
    rng = np.random.default_rng(0)
    parts = np.linspace(0, total, SAMPLES, endpoint=False)
    # Shuffled, so that neighbors do not meet in one median of three.
    return rng.permutation((parts + rng.uniform(0, total / SAMPLES, SAMPLES)).astype(np.int64))


def _median_of_three(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def combine_parts(
    local: LocalMoments,
    count: float | jax.Array,
    size: float,
    negligible: ArrayLike,
    add: Callable[..., Sequence[jax.Array]],
    own: Callable[..., Sequence[jax.Array]] = lambda *totals: totals,
    axis: int | None = None,
) -> tuple[LocalMoments, jax.Array]:
    """Combines the moments of the parts of a batch, in one addition, and in a second one if that cancels.

    mean = sum(n_i mean_i) / m,  var = sum(n_i (var_i + |mean_i - pivot|^2)) / m - |mean - pivot|^2, with the pivot 0,
    and if that loses digits, with the pivot mean.  Unlike x, the operands of this conditional are a few numbers per
    feature, so accelerators can afford it.

    Args:
      local: moments of the parts.
      count: number of values n_i in a part.
      size: number of values m in all parts; 0.0 if only the running program can tell.
      negligible: a variance below which precision does not matter.
      add: adds arrays over the parts.
      own: picks what belongs to this part from the result of ``add``, or from a function of it.
      axis: axis of ``local`` that holds the parts; None if they are on different devices.

    Returns:
      The moments of all parts together, and their number of values.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, equations 2.1.
    """

    def weighted(pivot: ArrayLike) -> tuple[jax.Array, jax.Array]:
        distance = (local.pivot - pivot) + local.offset
        return count * distance, count * (local.var + abs2(distance))

    total, squares, *counts = add(*weighted(0), *(() if size else (count,)))
    m = size or jnp.maximum(counts[0], 1)
    # Decided before each part picks its own totals: all devices must take the same branch, because a collective in it
    # waits for all of them.
    cancels = _in_any_mapped_batch(_cancels(total / m, squares / m, negligible))
    total, squares, *counts = own(total, squares, *counts)
    m = size or jnp.maximum(counts[0], 1)

    def about_mean(mean: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        pivot = mean if axis is None else jnp.expand_dims(mean, axis)
        total, squares = own(*add(*weighted(pivot)))
        return mean, total / m, squares / m

    mean, square = total / m, squares / m
    about_zero = jnp.zeros_like(mean), mean, square  # pivot, offset, E[|z|^2]
    if axis is None:
        pivot, offset, square = lax.cond(
            cancels, lambda moments: about_mean(moments[1]), lambda moments: moments, about_zero
        )
    else:
        # A loop that runs once or not at all, in place of a conditional.  On a GPU, XLA executes both branches of a
        # conditional that look cheap, and selects.  They look cheap here, because the collective is only inserted when
        # XLA partitions the program afterward.
        _, (pivot, offset, square) = lax.while_loop(
            lambda state: state[0],
            lambda state: (jnp.zeros_like(cancels), about_mean(state[1][1])),
            (cancels, about_zero),
        )
    var = jnp.maximum(square - abs2(offset), 0)
    return LocalMoments(pivot, offset, var), jnp.full_like(var, size) if size else counts[0]
