"""Argument checks of the public functions, and their error messages.

Every check reads static facts (shapes and dtypes), or values that are known before the program runs, so it costs
nothing in a compiled step.  A message says what an argument must be, what it was, and what to do.
"""

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

Axes = int | Sequence[int]
AxisNames = str | Sequence[str]


def inputs(x: ArrayLike, axis: Axes) -> tuple[jax.Array, tuple[int, ...], tuple[int, ...]]:
    """Returns ``x`` as an array, its feature axes, and the other axes, both sorted and non-negative."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(
            f"x must be floating-point or complex, got dtype {x.dtype}. "
            "Convert it first, for example with x.astype(jnp.float32)."
        )
    axes = feature_axes(x.shape, axis)
    return x, axes, tuple(i for i in range(x.ndim) if i not in axes)


def feature_axes(shape: tuple[int, ...], axis: Axes) -> tuple[int, ...]:
    """Returns the feature axes as sorted, non-negative integers."""
    rank = len(shape)
    if rank == 0:
        raise ValueError("x must have a feature axis, as in shape [N, C], got a scalar. Reshape it.")
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    try:
        axes = tuple(map(operator.index, axes))
    except TypeError:
        raise ValueError(
            f"axis must be an integer or a sequence of integers, got {axis}. Use for example axis=-1."
        ) from None
    if any(not -rank <= i < rank for i in axes):
        raise ValueError(
            f"axis must be between {-rank} and {rank - 1} for an input of shape {shape}, got {axis}. "
            "Choose an axis that holds features."
        )
    axes = sorted(i % rank for i in axes)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(
            f"axis must name at least one axis of an input of shape {shape}, and none twice, got {axis}. "
            "List each feature axis once."
        )
    return tuple(axes)


def parameters(x: jax.Array, axes: tuple[int, ...], epsilon: ArrayLike, **per_feature: ArrayLike | None) -> None:
    """Refuses a non-positive epsilon, and parameters or statistics that do not fit the features of ``x``."""
    if _known("epsilon", epsilon, lambda value: not (value > 0).all()):
        raise ValueError(f"epsilon must be positive, got {epsilon}. It is added to the variance; use for example 1e-5.")
    expected = tuple(x.shape[axis] for axis in axes)
    for name, value in per_feature.items():
        if value is not None and np.shape(value) != expected:
            raise ValueError(
                f"{name} must have shape {expected}, the features of an input of shape {x.shape} on axis {axes}, "
                f"got {np.shape(value)}. Check that {name} belongs to this layer, or set axis to where the features "
                "are."
            )


def same_features(name: str, shape: tuple[int, ...], reference: str, expected: tuple[int, ...]) -> None:
    """Refuses to combine statistics of different features."""
    if shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, like {reference}, got {shape}. "
            "Combine only statistics of the same layer."
        )


def num_features(num: int, x: jax.Array, axis: int) -> None:
    """Refuses an input with another number of features than the layer was constructed for."""
    (size,) = (x.shape[i] for i in feature_axes(x.shape, axis))
    if size != num:
        raise ValueError(
            f"num_features must be {size} for an input of shape {x.shape} with features on axis {axis}, got {num}. "
            f"Construct the layer with num_features={size}, or set axis to where the features are."
        )


def momentum(value: ArrayLike | None) -> None:
    """Refuses a momentum outside [0, 1]; a value known only at run time passes."""
    if value is not None and _known("momentum", value, lambda value: not ((0 <= value) & (value <= 1)).all()):
        raise ValueError(
            f"momentum must be between 0 and 1, got {value}. It is the weight of the old value, 0.99 by default; "
            "PyTorch's momentum is 1 minus ours."
        )


def at_least(name: str, value: ArrayLike, least: float) -> None:
    """Refuses a value below ``least``; a value known only at run time passes."""
    if _known(name, value, lambda value: not (value >= least).all()):
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def whole(name: str, value: Any, *, least: int) -> int:
    """Returns ``value`` as an integer; refuses other types, and values below ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}, a {type(value).__name__}.") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number


def boolean(name: str, value: Any) -> bool:
    """Returns a flag as a bool; refuses other types, and a value known only at run time."""
    remedy = "Pass one of the two."
    if isinstance(value, bool | np.bool_ | np.ndarray | jax.Array):
        shape, dtype = np.shape(value), value.dtype if hasattr(value, "dtype") else np.dtype(bool)
        is_traced = isinstance(value, jax.core.Tracer)
        if shape == () and dtype == np.bool_ and not is_traced:
            return bool(value)
        shown = f"{'a traced array' if is_traced else 'an array'} of shape {shape} and dtype {dtype}"
        if shape:
            remedy = f"If it is a mask, pass it by name: mask=...; it is not {name}."
        elif dtype == np.bool_:
            remedy = (
                "It decides which program is compiled, so its value must be known when the program is traced: let "
                f'jax.jit treat it as static, as in jax.jit(step, static_argnames="{name}"), bind it with '
                "functools.partial, or choose between two calls with jax.lax.cond."
            )
    else:
        shown = repr(value)
        if name == "use_running_average" and isinstance(value, int) and value > 1:
            remedy = "The linen layer takes the number of features from its input; do not pass it."
    raise ValueError(f"{name} must be True or False, got {shown}. {remedy}")


def has_steps(present: bool, path: str) -> None:
    """Refuses running statistics that do not say how many batches they average, in a layer that counts batches."""
    if not present:
        raise ValueError(
            f"the statistics of {path or 'the layer'} must include 'steps', the number of batches that they average, "
            "because debias=True, momentum=None and schedules continue from it. Add it next to 'mean', int32 and of "
            "the same shape, or let jaxbn.surgery.replace(..., steps=...) add it."
        )


def counted(arrays: dict[str, jax.Array]) -> None:
    """Refuses an average of an unknown number of batches: ``steps`` of -1 beside statistics that are not initial.

    Under jit the values are not known, and pass; see :func:`jaxbn._core.running.update_stats`.
    """
    if any(isinstance(arrays[name], jax.core.Tracer) for name in ("mean", "var", "steps")):
        return
    is_initial = (arrays["mean"] == 0) & (arrays["var"] == 1)
    if ((arrays["steps"] < 0) & ~is_initial).any():
        has_steps(False, "")


def statistics(stats: Any, accepted: tuple[type, ...]) -> None:
    """Refuses running statistics of any other class, such as a dict."""
    if not isinstance(stats, accepted):
        raise ValueError(
            f"stats must be one of {', '.join(kind.__name__ for kind in accepted)}, got a {type(stats).__name__}. "
            "Start with jaxbn.init_stats(features), or wrap arrays as jaxbn.BatchStats(mean=mean, var=var)."
        )


def method(value: Any) -> None:
    """Refuses what cannot be called like batch_normalize, such as a variant whose own options are not bound."""
    remedy = (
        "Pass jaxbn.batch_normalize, or a variant with its options bound, such as "
        "functools.partial(jaxbn.ghost_normalize, group_size=16)."
    )
    if not callable(value):
        raise ValueError(f"method must be a function, got {value!r}. {remedy}")
    function = getattr(value, "func", value)  # of functools.partial
    try:
        inspect.signature(function)
    except ValueError:  # some compiled functions have no signature
        return
    options = ("axis", "epsilon", "axis_name", "axis_index_groups", "mask", "stats")
    try:
        inspect.signature(value).bind("x", "scale", "bias", **dict.fromkeys(options))
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError):
            reason = str(error)
        else:  # `inspect.signature` raises ValueError if a partial binds an option that the function lacks
            reason = f"it does not have all of the options {sorted(getattr(value, 'keywords', {}))}"
        name = getattr(function, "__name__", value)
        raise ValueError(
            f"method must accept the arguments of batch_normalize, got {name}: {reason}. {remedy}"
        ) from None


def several_values(shape: tuple[int, ...], reduced: tuple[int, ...], axis_name: AxisNames | None) -> None:
    """Warns about a batch with one value per feature, which is its own mean."""
    if axis_name is None and math.prod(shape[i] for i in reduced) == 1:
        warnings.warn(
            f"an input of shape {shape} has one value per feature, so training normalizes it to 0; "
            "use a batch of at least two examples, or use_running_average=True.",
            stacklevel=3,
        )


@overload
def mask(value: None, x: jax.Array) -> None: ...
@overload
def mask(value: ArrayLike, x: jax.Array) -> jax.Array: ...
def mask(value: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Returns the mask as booleans with as many axes as ``x``; refuses weights, and shapes that do not fit.

    A mask with fewer axes than ``x`` belongs to the first axes of ``x``, like [N, T] for [N, T, C], or to the last
    ones, as NumPy broadcasts.  It is read in the way in which it fits, and refused if it fits both ways.

    Integers other than 0 and 1 are refused if they are known before the program runs.
    """
    if value is None:
        return None
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if not (value.dtype == np.bool_ or jnp.issubdtype(value.dtype, jnp.integer)):
        raise ValueError(
            f"mask must hold booleans, or integers 0 and 1, got dtype {value.dtype}. "
            "It says which positions count, not how much; pass for example mask > 0."
        )
    if value.dtype != np.bool_ and _known("mask", value, lambda value: ((value != 0) & (value != 1)).any()):
        raise ValueError(
            "mask must hold booleans, or integers 0 and 1, got other integers. "
            "Pass for example mask > 0, or for lengths, jnp.arange(size) < lengths[:, None]."
        )
    return jnp.asarray(value, bool).reshape(_mask_shape(value.shape, x.shape))


def _mask_shape(mask_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a mask with all axes of an input; refuses a shape with no reading, or with two."""
    ones = (1,) * (len(shape) - len(mask_shape))
    of_last, of_first = ones + mask_shape, mask_shape + ones
    fits_last, fits_first = _broadcasts(of_last, shape), _broadcasts(of_first, shape)
    if not (fits_last or fits_first):
        raise ValueError(
            f"mask of shape {mask_shape} does not broadcast to an input of shape {shape}; "
            f"for one entry per example, pass a mask of shape {shape[:1] + (1,) * (len(shape) - 1)}."
        )
    # Both readings of a mask of one entry are the same, and so are those for an input without values.
    if of_last != of_first and fits_last and fits_first and 0 not in shape:
        raise ValueError(
            f"mask of shape {mask_shape} fits an input of shape {shape} in two ways. "
            f"Reshape it to {of_first} for one entry per {'example' if len(mask_shape) == 1 else 'position'} (the "
            f"first axes), or to {of_last} to mask along the last axes."
        )
    return of_last if fits_last else of_first


def _broadcasts(mask_shape: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tells whether a mask with as many axes as an input broadcasts to it."""
    return len(mask_shape) == len(shape) and all(a in (1, b) for a, b in zip(mask_shape, shape, strict=True))


def inexact(**dtypes: Any) -> None:
    """Refuses integer dtypes for results, parameters and statistics; None stands for a default."""
    for name, dtype in dtypes.items():
        if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"{name} must be floating-point or complex, got {dtype!r}. Use for example jnp.float32.")


def axis_names(
    names: AxisNames | None, groups: Sequence[Sequence[int]] | None
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Returns the axis names and the groups as tuples, empty for None.

    Refuses names that are not bound here, and groups that do not partition the axis.
    """
    # Copied first: either level may be an iterator, which can be read only once.
    groups = None if groups is None else [[operator.index(index) for index in group] for group in groups]
    if names is None:
        if groups is not None:
            raise ValueError(
                f"axis_name must be given with axis_index_groups={groups}. The groups divide a named axis of devices."
            )
        return (), ()
    if not isinstance(names, Iterable):
        raise ValueError(
            f"axis_name must be a string or a sequence of strings, got {names!r}. "
            'Name the axis of devices, as in jax.pmap(..., axis_name="data").'
        )
    names = (names,) if isinstance(names, str) else tuple(names)
    shown = repr(names[0] if len(names) == 1 else names)
    try:
        size = math.prod(lax.axis_size(name) for name in names)
    except NameError:
        raise ValueError(
            f"axis_name must be an axis of an enclosing jax.shard_map, jax.pmap or jax.vmap, got {shown}. "
            "Call inside one of them, or leave axis_name out: under jax.jit a sharded batch does not need it."
        ) from None
    if groups is not None and sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups must hold each index of axis_name={shown}, 0 to {size - 1}, exactly once, got {groups}."
        )
    return names, tuple(map(tuple, groups or ()))


def _known(name: str, value: ArrayLike, is_wrong: Callable[[np.ndarray], bool]) -> bool:
    """Tells whether ``value`` is known before the program runs, and wrong; refuses anything but numbers."""
    try:
        known = np.asarray(value)
    except ValueError:  # a ragged list
        known = np.asarray(None)
    except (jax.errors.TracerArrayConversionError, RuntimeError):  # the latter for an array on several machines
        return False
    if not jnp.issubdtype(known.dtype, jnp.number):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return bool(is_wrong(known))
