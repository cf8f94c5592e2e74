"""The calls of a layer in one batch, and their sums over examples and values.

A layer may be called several times in a batch.  Each call gives a `CallRecord`; `sum_calls` makes `Sums` of them, which
no longer grow with the number of examples.
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxbn._core import checks
from jaxbn._core.dtypes import abs2, widen
from jaxbn._core.measure import zero_masked
from jaxbn._core.stats import BatchStats
from jaxbn._core.variants import batch_renormalize, ghost_normalize
from jaxbn._models.batch_norms import NormCall
from jaxbn.diagnose._anova import GroupSums


class Settings(NamedTuple):
    """The options of a layer that matter for a diagnosis, and what is known of its inputs.

    Attributes:
      training: whether it normalizes with the batch where ``call`` should evaluate.
      tracking: whether training updates its statistics; if not, it normalizes with the batch on purpose.
      frozen: whether it always evaluates.
      epsilon: added to the variance.
      momentum: weight of the old running statistics.
      counted: whether its averages count the batches, and so are not biased toward their start.
      unbiased: whether the running variance is multiplied by m/(m - 1).
      synchronized: whether it has an axis name.
      devices_in_group: number of devices that share statistics; None where all or none of them do.
      renormalized: whether training stays close to the running statistics, by batch renormalization.
      group_size: number of examples in a group of ghost batch norm; None for any other method.
      by_example: whether its inputs have one row, or several, for each example of the batch.
    """

    training: bool
    tracking: bool
    frozen: bool
    epsilon: float
    momentum: float | None
    counted: bool
    unbiased: bool
    synchronized: bool
    devices_in_group: int | None
    renormalized: bool
    group_size: int | None
    by_example: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallRecord:
    """One call of a layer, on a batch of n examples.

    Attributes:
      mean: mean of the batch, shape [C].
      counts: number of values of each example, shape [n, C].
      sums: sum over the values of each example of value - mean, shape [n, C].
      squares: sum over the values of each example of |value - mean|^2, shape [n, C].
      stats: running statistics.
      scale: shape [C], or None.
      settings: static.
    """

    mean: Any
    counts: Any
    sums: Any
    squares: Any
    stats: BatchStats
    scale: Any
    settings: Settings = dataclasses.field(metadata={"static": True})


class Sums(NamedTuple):
    """Sums of a layer's inputs over some batches, in evaluation or in training mode.

    Attributes:
      values: sums over all values.
      means: sums over the examples of the mean of their values.
      squares: sums over the examples of the mean squared distance of their values from the mean of the batch.
      skipped: number of batches that are not finite, shape [C].
    """

    values: GroupSums
    means: GroupSums
    squares: GroupSums
    skipped: Any

    def add(self, other: Self) -> Self:
        """Combines the sums over two sets of batches."""
        return self._replace(
            values=self.values.add(other.values),
            means=self.means.add(other.means),
            squares=self.squares.add(other.squares),
            skipped=self.skipped + other.skipped,
        )


def record_call(norm: NormCall, sizes: frozenset[int]) -> tuple[CallRecord, BatchStats]:
    """Records a call of a layer, and computes the moments of the batch.

    Args:
      norm: the inputs of the call, and the layer.
      sizes: sizes of the first axes of the arrays in the batch, any of which may be the number of examples.
    """
    x, axes, reduced = checks.inputs(norm.x, norm.options["axis"])
    mask = checks.mask(norm.mask, x)
    examples = _number_of_examples(x, sizes) if 0 in reduced else 1
    features = tuple(x.shape[axis] for axis in axes)

    def by_example(values):
        """Adds up the valid values of each example: [..., C] to [n, C]."""
        values = values if mask is None else jnp.where(mask, values, 0)
        # With the features last, the values of an example are next to one another.
        rows = values.transpose(*reduced, *axes).reshape(examples, -1, *features)
        return rows.sum(1)

    wide = widen(zero_masked(x, mask))
    counts = by_example(jnp.ones(x.shape, wide.real.dtype))
    count = jnp.maximum(counts.sum(0), 1)
    mean = by_example(wide).sum(0) / count
    # Centered before it is squared: a mean far above the standard deviation then costs no digits.
    centered = wide - jnp.expand_dims(mean, reduced)
    sums = by_example(centered)
    squares = by_example(abs2(centered))
    settings = _settings(norm, by_example=0 in reduced and examples in sizes)
    record = CallRecord(mean, counts, sums, squares, norm.stats, norm.scale, settings)
    return record, BatchStats(mean, squares.sum(0) / count)


def _number_of_examples(x: jax.Array, sizes: frozenset[int]) -> int:
    """Guesses the number of examples in the inputs of a layer: their rows, or the largest size that divides these.

    A layer may see several rows of each example, such as the positions of a sequence.  Where no size divides the rows,
    all of them count as one example.
    """
    rows = x.shape[0]
    if rows not in sizes:
        rows = max((size for size in sizes if size and rows % size == 0), default=1)
    return max(rows, 1)


def _settings(norm: NormCall, by_example: bool) -> Settings:
    options = norm.options
    momentum = options["momentum"]
    if callable(momentum):  # a schedule: the value at its end
        with jax.ensure_compile_time_eval():
            momentum = momentum(jnp.asarray(2**30))
    groups = options.get("axis_index_groups")
    method = options.get("method")
    function = getattr(method, "func", method)  # functools.partial may bind options of the method
    is_ghost = function is ghost_normalize
    # Options that only jaxbn's layers have are absent for Flax's.
    return Settings(
        training=not norm.use_running_average,
        tracking=options.get("update_stats", True),
        frozen=options.get("frozen", False),
        epsilon=float(options["epsilon"]),
        momentum=None if momentum is None else float(momentum),
        counted=momentum is None or options.get("debias", False),
        unbiased=options.get("unbiased", False),
        synchronized=options.get("axis_name") is not None,
        devices_in_group=None if groups is None else min(map(len, groups)),
        renormalized=function is batch_renormalize,
        group_size=getattr(method, "keywords", {}).get("group_size") if is_ghost else None,
        by_example=by_example,
    )


def sum_calls(calls: list[CallRecord]) -> Sums:
    """Computes the sums over one batch; several calls of a layer count as further positions of each example."""
    mean, counts, sums, squares = _merge(calls)
    total = counts.sum(0)
    within = squares.sum(0)
    # The batch is one group, so all squares are within groups.
    values = _one_group(total, mean, within)
    means = _over_examples(sums, counts)
    means = means._replace(mean=mean + means.mean)  # `sums` are sums of distances from the mean
    skipped = ~(jnp.isfinite(mean) & jnp.isfinite(within))
    return Sums(values, means, _over_examples(squares, counts), skipped)


def _merge(calls: list[CallRecord]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Merges calls into one: the mean of all values, and counts, sums and squares about that mean, per example."""
    if len({len(call.counts) for call in calls}) > 1:  # the calls differ in what they take for an example
        calls = [_as_one_example(call) for call in calls]
    counts = jnp.stack([call.counts for call in calls])
    means = jnp.stack([call.mean for call in calls])
    sums = jnp.stack([call.sums for call in calls])
    squares = jnp.stack([call.squares for call in calls])
    total = counts.sum((0, 1))
    mean = (means * counts.sum(1) + sums.sum(1)).sum(0) / jnp.maximum(total, 1)
    # Each call has summed about a different mean.  About the mean of all, with delta the difference of the two,
    #   sum of (x - mean)     = sums + delta count
    #   sum of |x - mean|^2   = squares + 2 Re(conj(delta) sums) + |delta|^2 count
    delta = (means - mean)[:, None]
    squares = squares + 2 * (jnp.conj(delta) * sums).real + abs2(delta) * counts
    sums = sums + delta * counts
    return mean, counts.sum(0), sums.sum(0), squares.sum(0)


def _as_one_example(call: CallRecord) -> CallRecord:
    return dataclasses.replace(
        call,
        counts=call.counts.sum(0, keepdims=True),
        sums=call.sums.sum(0, keepdims=True),
        squares=call.squares.sum(0, keepdims=True),
    )


def _over_examples(sums: jax.Array, counts: jax.Array) -> GroupSums:
    """Makes a group of the examples, each of which contributes the mean of its values.

    Args:
      sums: sum over the values of each example, shape [n, C].
      counts: number of values of each example, shape [n, C].
    """
    # One number for each example: examples may be independent, but the positions within an example are not.
    valid = counts > 0
    examples = valid.sum(0).astype(counts.dtype)
    of_example = jnp.where(valid, sums / jnp.maximum(counts, 1), 0)
    mean = of_example.sum(0) / jnp.maximum(examples, 1)
    within = jnp.where(valid, abs2(of_example - mean), 0).sum(0)
    return _one_group(examples, mean, within)


def _one_group(count: jax.Array, mean: jax.Array, within: jax.Array) -> GroupSums:
    """Returns the sums of a single group, which is none where it is empty."""
    return GroupSums(jnp.sign(count), count, mean, jnp.zeros_like(within), within)
