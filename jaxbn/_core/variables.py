"""The variables in which a layer stores its running statistics, by name.

"mean" and "var" are Flax's; "steps" is stored if the layer counts batches, and "pending_..." if it accumulates them.
"""

from collections.abc import Mapping

import jax

from jaxbn._core.stats import AccumulatedStats, AnyStats, BatchStats, CountedStats, Moments


def variable_names(*, counted: bool, accumulate: int) -> tuple[str, ...]:
    """Returns the names of a layer's variables for the result of :func:`init_stats`."""
    names = CountedStats._fields if counted else BatchStats._fields
    if accumulate > 1:
        names += ("pending_mean", "pending_var", "pending_count", "pending_batches")
    return names


def to_variables(stats: AnyStats) -> dict[str, jax.Array]:
    """Returns the arrays of running statistics by the names of a layer's variables."""
    if not isinstance(stats, AccumulatedStats):
        return stats._asdict()
    return stats.running._asdict() | {
        "pending_mean": stats.pending.mean,
        "pending_var": stats.pending.var,
        "pending_count": stats.pending.count,
        "pending_batches": stats.batches,
    }


def from_variables(variables: Mapping[str, jax.Array], *, accumulate: int) -> AnyStats:
    """Returns running statistics from a layer's variables; the inverse of :func:`to_variables`."""
    running = BatchStats(variables["mean"], variables["var"])
    if "steps" in variables:
        running = CountedStats(*running, variables["steps"])
    if accumulate <= 1:
        return running
    pending = Moments(variables["pending_mean"], variables["pending_var"], variables["pending_count"])
    return AccumulatedStats(running, pending, variables["pending_batches"], accumulate)
