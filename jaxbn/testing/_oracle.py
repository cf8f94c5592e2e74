"""The oracle: batch norm in NumPy and float64, written from the paper and not from the rest of the library.

``axis`` has the feature axes; statistics have their shape.  ``mask`` is True at the positions that count.  Masked
positions are normalized with the moments of the other positions; a masked value that is not finite counts as 0 and
gets no gradient.

References:
  Ioffe and Szegedy 2015, arXiv:1502.03167.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Axes = int | Sequence[int]
Array = np.ndarray


def moments(x: Any, *, axis: Axes = -1, mask: Any = None) -> tuple[Array, Array, Array]:
    """Computes mean, biased variance and count of each feature, in two passes."""
    rows, admitted, shape = _rows(x, axis, mask)
    count = admitted.sum(0).astype(float)
    m = np.maximum(count, 1)
    mean = np.where(admitted, rows, 0).sum(0) / m
    var = np.where(admitted, abs(rows - mean) ** 2, 0).sum(0) / m
    return mean.reshape(shape), var.reshape(shape), count.reshape(shape)


def normalize(
    x: Any,
    mean: Any,
    var: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
) -> Array:
    """Computes scale * (x - mean) / sqrt(var + epsilon) + bias."""
    rows, _, shape = _rows(x, axis, None)
    y = (rows - _flat(mean)) / np.sqrt(_flat(var) + epsilon)
    if scale is not None:
        y = y * _flat(scale)
    if bias is not None:
        y = y + _flat(bias)
    return _restore(y, x, axis)


def batch_norm(
    x: Any,
    scale: Any = None,
    bias: Any = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    mask: Any = None,
) -> tuple[Array, Array, Array, Array]:
    """Computes the normalized batch (arXiv:1502.03167, algorithm 1), its mean, biased variance and count."""
    mean, var, count = moments(x, axis=axis, mask=mask)
    y = normalize(_filled(x, mask), mean, var, scale, bias, axis=axis, epsilon=epsilon)
    # A feature without any valid value has no moments: its output is the bias.
    rows, _, _ = _rows(y, axis, None)
    without_values = 0 if bias is None else _flat(bias)
    rows = np.where(_flat(count) > 0, rows, without_values)
    return _restore(rows, x, axis), mean, var, count


def gradients(
    x: Any,
    scale: Any,
    bias: Any,
    dy: Any,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    mask: Any = None,
) -> tuple[Array, Array, Array]:
    """Computes dx, dscale, dbias for the cotangent dy of the output (arXiv:1502.03167, section 3), for real x.

    dvar = -sum(dy scale (x - mean)) (var + epsilon)^(-3/2) / 2,  dmean = -sum(dy scale) / sqrt(var + epsilon),
    dx = dy scale / sqrt(var + epsilon) + (dvar 2 (x - mean) + dmean) / m.

    The sums run over all positions; only the m unmasked positions, which determine the moments, have the second term of
    dx.
    """
    del bias  # the gradients do not depend on it
    mean, var, count = (_flat(s) for s in moments(x, axis=axis, mask=mask))
    original, admitted, shape = _rows(x, axis, mask)
    rows, _, _ = _rows(_filled(x, mask), axis, None)
    dy, _, _ = _rows(np.asarray(dy, float), axis, None)
    scale = np.ones_like(mean) if scale is None else _flat(scale)

    m = np.maximum(count, 1)
    rsqrt = np.where(count > 0, 1 / np.sqrt(var + epsilon), 0)
    centered = rows - mean
    dvar = -(dy * scale * centered).sum(0) * rsqrt**3 / 2
    dmean = -(dy * scale).sum(0) * rsqrt
    through_moments = (dvar * 2 * centered + dmean) / m
    dx = dy * scale * rsqrt + np.where(admitted, through_moments, 0)
    # A masked value that is not finite was replaced by the constant 0.
    dx = np.where(admitted | np.isfinite(original), dx, 0)

    dscale = (dy * centered * rsqrt).sum(0)
    dbias = dy.sum(0)
    return _restore(dx, x, axis), dscale.reshape(shape), dbias.reshape(shape)


def update(
    mean: Any,
    var: Any,
    batch_mean: Any,
    batch_var: Any,
    count: Any,
    *,
    momentum: float,
    unbiased: bool = False,
) -> tuple[Array, Array]:
    """Updates the running mean and variance; features that are empty or not finite keep theirs."""
    mean, var = np.asarray(mean), np.asarray(var)
    batch_mean, batch_var, count = np.asarray(batch_mean), np.asarray(batch_var), np.asarray(count)
    if unbiased:
        batch_var = batch_var * count / np.maximum(count - 1, 1)
    accepted = (count > 0) & np.isfinite(batch_mean) & np.isfinite(batch_var)
    return (
        np.where(accepted, momentum * mean + (1 - momentum) * batch_mean, mean),
        np.where(accepted, momentum * var + (1 - momentum) * batch_var, var),
    )


def _flat(per_feature: Any) -> Array:
    return np.asarray(per_feature).ravel()


def _axes(x: Any, axis: Axes) -> tuple[int, ...]:
    return tuple(sorted(a % np.ndim(x) for a in np.atleast_1d(axis)))


def _rows(x: Any, axis: Axes, mask: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """Returns x and the mask as [positions, features], x in float64 or complex128, and the shape of the features."""
    x = np.asarray(x)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    admitted = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    axes = _axes(x, axis)
    last = tuple(range(x.ndim - len(axes), x.ndim))
    shape = tuple(x.shape[a] for a in axes)
    # Both sizes are explicit, because -1 is ambiguous for an empty batch.
    features = int(np.prod(shape))
    size = (x.size // max(features, 1), features)
    rows, admitted = (np.moveaxis(value, axes, last).reshape(size) for value in (x, admitted))
    return rows, admitted, shape


def _restore(rows: Array, x: Any, axis: Axes) -> Array:
    """Undoes :func:`_rows`."""
    axes = _axes(x, axis)
    last = tuple(range(np.ndim(x) - len(axes), np.ndim(x)))
    shape = np.moveaxis(np.empty(np.shape(x)), axes, last).shape
    return np.moveaxis(rows.reshape(shape), last, axes)


def _filled(x: Any, mask: Any) -> Array:
    """Replaces masked values that are not finite with 0."""
    x = np.asarray(x)
    if mask is None:
        return x
    return np.where(np.asarray(mask, bool) | np.isfinite(x), x, 0)
