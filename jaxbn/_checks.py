"""What the public functions accept, and what they say when given something else.

Every check reads static facts (shapes, dtypes, Python numbers), so it costs nothing in a compiled step.
Each message says what was given, what is accepted, and what to do.
"""

import math
import numbers
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

Axes = int | Sequence[int]
AxisNames = str | Sequence[str]


def feature_axes(shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    """Returns the feature axes as sorted, non-negative integers."""
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    rank = len(shape)
    for one in given:
        if not -rank <= operator.index(one) < rank:
            raise ValueError(
                f"axis={axis} is out of range for an input of shape {shape}; "
                f"an axis lies between {-rank} and {rank - 1}; name an axis that holds features."
            )
    found = sorted(one % rank for one in given)
    if not found or len(set(found)) < len(found):
        raise ValueError(
            f"axis={axis} names {'no axis' if not found else 'an axis twice'} of an input of shape {shape}; "
            "give each feature axis once."
        )
    return tuple(found)


def inexact(x: jax.Array) -> None:
    """Refuses integers and booleans, which have no place for a normalised value."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"x has dtype {x.dtype}; batch norm takes floating-point or complex inputs; "
            "convert it first, for example with x.astype(jnp.float32)."
        )


def per_feature(name: str, value: ArrayLike | None, x: jax.Array, axes: tuple[int, ...]) -> None:
    """Refuses a parameter or statistic that does not hold one value per feature of ``x``."""
    expected = tuple(x.shape[axis] for axis in axes)
    if value is not None and jnp.shape(value) != expected:
        raise ValueError(
            f"{name} has shape {jnp.shape(value)}, but an input of shape {x.shape} has features of shape {expected} "
            f"on axis {axes}; pass {name} of that shape, or set axis to where the features are."
        )


def momentum(value: ArrayLike | None) -> None:
    """Refuses a momentum outside [0, 1]; values known only at run time pass."""
    if isinstance(value, numbers.Real) and not 0 <= value <= 1:
        raise ValueError(
            f"momentum={value} is outside [0, 1]; it is the weight of the old value, 0.99 by default; "
            "PyTorch's momentum is 1 minus ours."
        )


def epsilon(value: ArrayLike) -> None:
    """Refuses an epsilon that lets a feature of no variance divide by zero."""
    if isinstance(value, numbers.Real) and not value > 0:
        raise ValueError(f"epsilon={value} is not positive; it is added to the variance; use for example 1e-5.")


def mask(value: ArrayLike, x: jax.Array) -> jax.Array:
    """Returns the mask as booleans with as many axes as ``x``; refuses weights and shapes that do not broadcast."""
    dtype = jnp.result_type(value)
    if not (dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(
            f"mask has dtype {dtype}; a mask says which positions count, as booleans or as integers 0 and 1; "
            "pass for example mask > 0."
        )
    shape = jnp.shape(value)
    try:
        fits = jnp.broadcast_shapes(shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of shape {shape} does not broadcast to an input of shape {x.shape}; "
            f"for one entry per example, pass a mask of shape {(x.shape[0],) + (1,) * (x.ndim - 1)}."
        )
    return jnp.asarray(value, bool).reshape((1,) * (x.ndim - len(shape)) + shape)


def axis_names(names: AxisNames | None, groups: Sequence[Sequence[int]] | None) -> None:
    """Refuses axis names that are not bound here, and groups that do not partition the axis."""
    if names is None:
        if groups is not None:
            raise ValueError(
                f"axis_index_groups={groups} without axis_name; groups divide a named axis of devices; pass its name."
            )
        return
    try:
        size = math.prod(lax.axis_size(name) for name in ((names,) if isinstance(names, str) else names))
    except NameError:
        raise ValueError(
            f"axis_name={names!r} is not bound here; it names an axis of jax.shard_map, jax.pmap or jax.vmap; "
            "call inside one of them, or leave axis_name out: under jax.jit a sharded batch needs none."
        ) from None
    if groups is not None and sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={groups} does not partition axis_name={names!r} of size {size}; "
            f"name each index from 0 to {size - 1} in exactly one group."
        )
