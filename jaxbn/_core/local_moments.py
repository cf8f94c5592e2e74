"""Moments of the part of a batch that is on one device, by the algorithm that `ALGORITHMS` names for the platform.

The platform is not known when a function is traced: one trace may be exported for several platforms.  So the moments
are a primitive, `local_moments_p`, and its lowering rule chooses; it also knows over how many devices the program is
partitioned.  `lax.platform_dependent` could choose as well, but under vmap the conditional for a CPU would become a
select, which computes both branches.  The batching rule of the primitive prevents that.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.typing import ArrayLike

from jaxbn._core import lowering
from jaxbn._core.moment_algorithms import (
    ALGORITHMS,
    Algorithm,
    LocalMoments,
    combine_parts,
    two_pass,
)


def measure_locally(
    x: jax.Array,
    mask: jax.Array | None,
    count: jax.Array | None,
    negligible: ArrayLike,
    reduced: tuple[int, ...],
) -> LocalMoments:
    """Measures the part of a batch that is on this device; under jit, the whole batch, wherever it lies.

    Args:
      x: inputs.
      mask: booleans with as many axes as ``x``, of size 1 or as in ``x``; None admits all positions.
      count: number of values per feature, in the shape of the features; None if the shapes tell.
      negligible: a variance below which precision does not matter.
      reduced: axes to sum over, sorted; the others hold features.

    Returns:
      Moments, in the shape of the features.
    """
    operands = [x, jnp.asarray(negligible), *(operand for operand in (mask, count) if operand is not None)]
    options = {"reduced": reduced, "masked": mask is not None, "counted": count is not None}
    return LocalMoments(*local_moments_p.bind(*lowering.varying_alike(*operands), **options))


def _in_groups(algorithm: Algorithm, groups: int) -> Algorithm:
    """Makes an algorithm measure as many groups of the batch as there are devices, and combine them.

    In one program for several devices under jit, finding a pivot for the whole batch would take one more collective.
    The groups are equal parts of the batch, as JAX shards it, so each lies on one device if the batch is spread over
    all of them.
    """

    def measure(
        x: jax.Array,
        mask: jax.Array | None,
        m: Any,
        negligible: ArrayLike,
        reduced: tuple[int, ...],
    ) -> LocalMoments:
        batch = reduced[0]
        # A count that is not a float depends on a mask or an unknown size, and may differ from group to group.
        if not isinstance(m, float) or not isinstance(x.shape[batch], int) or x.shape[batch] % groups:
            return algorithm(x, mask, m, negligible, reduced)
        # [N, ...] to [groups, N / groups, ...]: the group becomes one more feature axis.
        split = x.reshape(*x.shape[:batch], groups, x.shape[batch] // groups, *x.shape[batch + 1 :])
        local = algorithm(split, None, m / groups, negligible, tuple(axis + 1 for axis in reduced))

        def add(*parts: jax.Array) -> list[jax.Array]:
            return [part.sum(batch) for part in parts]

        return combine_parts(local, m / groups, m, negligible, add, axis=batch)[0]

    return measure


# The primitive whose lowering rule chooses among the algorithms.  Its operands are x, the negligible variance, the mask
# if it is masked, and the count if it is counted.


def _of_operands(algorithm: Algorithm) -> Callable[..., list[jax.Array]]:
    """Wraps an algorithm as a function of the primitive's operands and parameters."""

    def run(x: jax.Array, negligible: jax.Array, *rest: jax.Array, reduced, masked, counted) -> list[jax.Array]:
        remaining = list(rest)
        mask = remaining.pop(0) if masked else None
        m = jnp.maximum(remaining.pop(0), 1) if counted else float(math.prod(x.shape[i] for i in reduced))
        return list(algorithm(x, mask, m, negligible, reduced))

    return run


def _lowering_for(platform: str) -> Callable:
    def lower(context: Any, *operands: Any, **options: Any) -> Any:
        chosen = lowering.lowered_for(platform)
        algorithm = ALGORITHMS[chosen]
        devices = lowering.devices_to_share(context)
        if chosen != "cpu" and any(context.avals_in[0].sharding.spec):
            # The types of JAX's operations hold the sharding of x, and cannot express a reshape into groups or a gather
            # of samples if the examples are sharded.
            algorithm = two_pass
        elif chosen != "cpu" and devices > 1:
            algorithm = _in_groups(algorithm, devices)
        return mlir.lower_fun(_of_operands(algorithm), multiple_results=True)(context, *operands, **options)

    return lower


def _batch(
    operands: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    reduced: tuple[int, ...],
    masked: bool,
    counted: bool,
) -> tuple[list[jax.Array], tuple[int, int, int]]:
    """Batching rule: the mapped axis becomes one more feature axis, in front.

    So one conditional decides for all mapped batches.  Left to itself, vmap would turn it into a select, which computes
    both branches.
    """
    size = next(v.shape[axis] for v, axis in zip(operands, axes, strict=True) if axis is not None)
    x, negligible, *rest = (
        v if axis is None else jnp.moveaxis(v, axis, 0) for v, axis in zip(operands, axes, strict=True)
    )
    x_is_mapped, negligible_is_mapped, *rest_is_mapped = (axis is not None for axis in axes)
    if not x_is_mapped:
        x = jnp.broadcast_to(x, (size, *x.shape))
    if negligible_is_mapped:  # to broadcast against the features
        features = x.ndim - len(reduced)
        negligible = negligible.reshape(size, *[1] * (features - negligible.ndim), *negligible.shape[1:])
    if masked and not rest_is_mapped[0]:
        rest[0] = rest[0][None]
    if counted and not rest_is_mapped[-1]:
        rest[-1] = jnp.broadcast_to(rest[-1], (size, *rest[-1].shape))
    reduced = tuple(axis + 1 for axis in reduced)
    return local_moments_p.bind(x, negligible, *rest, reduced=reduced, masked=masked, counted=counted), (0, 0, 0)


@functools.lru_cache(1024)  # networks have many layers of the same shape
def _types(*operands: Any, **options: Any) -> Any:
    """Returns the types of the results, which are the same for every algorithm."""
    return jax.make_jaxpr(functools.partial(_of_operands(two_pass), **options))(*operands).out_avals


local_moments_p = Primitive("local_moments")
local_moments_p.multiple_results = True
# Called with jit disabled only: everywhere else `_measure` is compiled.
local_moments_p.def_impl(_of_operands(two_pass))
local_moments_p.def_abstract_eval(lambda *operands, **options: _types(*operands, **options))
batching.primitive_batchers[local_moments_p] = _batch
# For platforms that are not listed, such as METAL.
mlir.register_lowering(local_moments_p, mlir.lower_fun(_of_operands(two_pass), multiple_results=True))
for _platform in ALGORITHMS:
    mlir.register_lowering(local_moments_p, _lowering_for(_platform), platform=_platform)
