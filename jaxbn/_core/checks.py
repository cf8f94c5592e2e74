"""What the public functions accept, and what they say when given something else.

Every check reads static facts (shapes, dtypes), and values where they are known before the program runs, so it costs
nothing in a compiled step.
Each message says what was given, what is accepted, and what to do.
"""

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

Axes = int | Sequence[int]
AxisNames = str | Sequence[str]


def inputs(x: ArrayLike, axis: Axes) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """Returns ``x`` as an array, its feature axes and its other axes, sorted and not negative."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"x has dtype {x.dtype}; batch norm takes floating-point or complex inputs; "
            "convert it first, for example with x.astype(jnp.float32)."
        )
    axes = feature_axes(x.shape, axis)
    return x, axes, tuple(i for i in range(x.ndim) if i not in axes)


def feature_axes(shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    """Returns the feature axes as sorted, non-negative integers."""
    rank = len(shape)
    if rank == 0:
        raise ValueError("x is a scalar; batch norm takes inputs with an axis of features, such as [N, C]; reshape it.")
    given = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    try:
        given = tuple(operator.index(one) for one in given)
    except TypeError:
        raise ValueError(f"axis={axis} is not an integer or a sequence of integers; use for example axis=-1.") from None
    for one in given:
        if not -rank <= one < rank:
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


def parameters(x: jax.Array, axes: tuple[int, ...], epsilon: ArrayLike, **per_feature: ArrayLike | None) -> None:
    """Refuses an epsilon that is not positive, and parameters or statistics that do not fit the features of ``x``."""
    if _known("epsilon", epsilon, lambda value: not (value > 0).all()):
        raise ValueError(f"epsilon={epsilon} is not positive; it is added to the variance; use for example 1e-5.")
    expected = tuple(x.shape[axis] for axis in axes)
    for name, value in per_feature.items():
        if value is not None and jnp.shape(value) != expected:
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}, but an input of shape {x.shape} has features of shape "
                f"{expected} on axis {axes}; pass {name} of that shape (does it come from another layer?), "
                "or set axis to where the features are."
            )


def same_features(given: str, shape: tuple[int, ...], accepted: str, expected: tuple[int, ...]) -> None:
    """Refuses to combine statistics of different features."""
    if shape != expected:
        raise ValueError(
            f"{given} have features of shape {shape}, but {accepted} of shape {expected}; "
            "combine statistics of the same layer."
        )


def num_features(num: int, x: jax.Array, axis: int) -> None:
    """Refuses an input with another number of features than a layer was made for."""
    (found,) = (x.shape[i] for i in feature_axes(x.shape, axis))
    if found != num:
        raise ValueError(
            f"num_features={num}, but an input of shape {x.shape} has {found} features on axis {axis}; "
            f"construct the layer with num_features={found}, or set axis to where the features are."
        )


def momentum(value: ArrayLike | None) -> None:
    """Refuses a momentum outside [0, 1]; values known only at run time pass."""
    if value is not None and _known("momentum", value, lambda value: not ((0 <= value) & (value <= 1)).all()):
        raise ValueError(
            f"momentum={value} is outside [0, 1]; it is the weight of the old value, 0.99 by default; "
            "PyTorch's momentum is 1 minus ours."
        )


def at_least(name: str, value: ArrayLike, least: float) -> None:
    """Refuses a value below ``least``; values known only at run time pass."""
    if _known(name, value, lambda value: not (value >= least).all()):
        raise _too_small(name, value, least)


def _too_small(name, value, least):
    return ValueError(f"{name}={value} is below {least}, its smallest value; use {name}={least} or more.")


def whole(name: str, value: Any, *, least: int) -> int:
    """Returns an integer; refuses what is none, or is below ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; an integer is accepted; pass one.") from None
    if number < least:
        raise _too_small(name, number, least)
    return number


def boolean(name: str, value: Any) -> None:
    """Refuses a number in the place of a flag."""
    if not isinstance(value, bool | np.bool_ | np.ndarray | jax.Array):
        raise ValueError(
            f"{name}={value!r} is a {type(value).__name__}; accepted are True and False; the number of features is "
            "taken from the input, and is no argument of the linen layer."
        )


def has_steps(present: bool, path: str) -> None:
    """Refuses running statistics that do not say how many batches are behind them, to a layer that counts."""
    if not present:
        raise ValueError(
            f"the statistics of {path or 'the layer'} have no 'steps', the number of batches behind them, which "
            "debias=True and momentum=None count on from; add it beside 'mean', int32 and of the same shape, or let "
            "jaxbn.surgery.replace(..., steps=...) do that."
        )


def statistics(stats: Any, accepted: tuple[type, ...]) -> None:
    """Refuses running statistics that are of none of these classes, such as a dict."""
    if not isinstance(stats, accepted):
        raise ValueError(
            f"stats is a {type(stats).__name__}; accepted are {', '.join(one.__name__ for one in accepted)}; "
            "start with jaxbn.init_stats(features), or put arrays into jaxbn.BatchStats(mean=mean, var=var)."
        )


def method(value: Any) -> None:
    """Refuses what cannot be called as batch_normalize is, such as a variant whose own options are not bound."""
    remedy = (
        "pass jaxbn.batch_normalize, or a variant with its options bound, as in "
        "functools.partial(jaxbn.ghost_normalize, group_size=16)."
    )
    if not callable(value):
        raise ValueError(f"method={value!r} is a {type(value).__name__}; accepted is a function; {remedy}")
    function = getattr(value, "func", value)  # of functools.partial
    names = ("axis", "epsilon", "axis_name", "axis_index_groups", "mask", "stats")
    try:
        inspect.signature(function)
    except ValueError:  # a compiled function may not say what it takes
        return
    try:
        inspect.signature(value).bind("x", "scale", "bias", **dict.fromkeys(names))
    except (TypeError, ValueError) as error:  # the latter where a partial binds an option that the function lacks
        bound = sorted(getattr(value, "keywords", {}))
        why = error if isinstance(error, TypeError) else f"{bound} are not all options of it"
        raise ValueError(
            f"method={getattr(function, '__name__', value)} cannot be called as batch_normalize is: {why}; {remedy}"
        ) from None


def several_values(shape: tuple[int, ...], reduced: tuple[int, ...], axis_name: AxisNames | None) -> None:
    """Warns of a batch with one value per feature, which is its own mean."""
    if axis_name is None and math.prod(shape[i] for i in reduced) == 1:
        warnings.warn(
            f"an input of shape {shape} has one value per feature, so that training normalises it to 0; "
            "use a batch of at least two examples, or use_running_average=True.",
            stacklevel=3,
        )


def mask(value: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Returns the mask as booleans with as many axes as ``x``; refuses weights, and shapes that do not broadcast.

    Integers other than 0 and 1 are refused where they are known before the program runs.
    """
    if value is None:
        return None
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if not (value.dtype == np.bool_ or jnp.issubdtype(value.dtype, jnp.integer)):
        raise ValueError(
            f"mask has dtype {value.dtype}; a mask says which positions count, as booleans or as integers 0 and 1; "
            "pass for example mask > 0."
        )
    try:
        fits = jnp.broadcast_shapes(value.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of shape {value.shape} does not broadcast to an input of shape {x.shape}; "
            f"{_mask_hint(value.shape, x.shape)}"
        )
    if value.dtype != np.bool_ and _known("mask", value, lambda value: ((value != 0) & (value != 1)).any()):
        raise ValueError(
            "mask holds integers other than 0 and 1; a mask says which positions count, and does not weigh them; "
            "pass for example mask > 0, or for lengths, jnp.arange(size) < lengths[:, None]."
        )
    return jnp.asarray(value, bool).reshape((1,) * (x.ndim - value.ndim) + value.shape)


def _mask_hint(mask_shape, shape):
    """What to do about a mask that does not fit an input of that shape."""
    last_axes_are_missing = mask_shape == shape[: len(mask_shape)]
    kept = mask_shape if last_axes_are_missing else shape[:1]
    entry = "example" if len(kept) == 1 else "position"
    return f"for one entry per {entry}, pass a mask of shape {kept + (1,) * (len(shape) - len(kept))}."


def inexact(**dtypes: Any) -> None:
    """Refuses dtypes that cannot hold results, parameters or statistics; None is a default."""
    for name, dtype in dtypes.items():
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{name}={dtype!r}; a floating-point or complex dtype is accepted; use for example jnp.float32."
            )


def axis_names(
    names: AxisNames | None, groups: Sequence[Sequence[int]] | None
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Returns the axis names and the groups as tuples, empty for none.

    Refuses names that are not bound here, and groups that do not partition the axis.
    """
    # Read once, since an iterator cannot be read again.
    shown = [[operator.index(index) for index in group] for group in (() if groups is None else groups)]
    if names is None:
        if groups is not None:
            raise ValueError(
                f"axis_index_groups={shown} without axis_name; groups divide a named axis of devices; pass its name."
            )
        return (), ()
    if not isinstance(names, Iterable):
        raise ValueError(
            f"axis_name={names!r} is no name; accepted are the name of an axis of devices and a sequence of names; "
            'name the axis, as in jax.pmap(..., axis_name="data").'
        )
    spread_over = (names,) if isinstance(names, str) else tuple(names)
    try:
        size = math.prod(lax.axis_size(name) for name in spread_over)
    except NameError:
        raise ValueError(
            f"axis_name={names!r} is not bound here; it names an axis of jax.shard_map, jax.pmap or jax.vmap; "
            "call inside one of them, or leave axis_name out: under jax.jit a sharded batch needs none."
        ) from None
    if groups is not None and sorted(index for group in shown for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups={shown} does not partition axis_name={names!r} of size {size}; "
            f"name each index from 0 to {size - 1} in exactly one group."
        )
    return spread_over, tuple(map(tuple, shown))


def _known(name: str, value: ArrayLike, wrong: Callable[[np.ndarray], bool]) -> bool:
    """Returns whether ``value`` is known before the program runs, and wrong; refuses what is no number at all."""
    try:
        known = np.asarray(value)
    except ValueError:  # a ragged list
        known = np.asarray(None)
    except (jax.errors.TracerArrayConversionError, RuntimeError):  # the latter of an array on several machines
        return False
    if not jnp.issubdtype(known.dtype, jnp.number):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}; a number is accepted; pass one.")
    return bool(wrong(known))
