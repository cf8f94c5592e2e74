"""The oracle: batch norm in NumPy float64, written from the paper and not from the rest of the library.

``axis`` names the feature axes; statistics have their shape.  ``mask`` says which positions count.  Masked positions
are normalised with the moments of the others; there, a value that is not finite counts as 0 and has no derivative.

References:
  Ioffe and Szegedy 2015, arXiv:1502.03167.
"""

import numpy as np


def moments(x, *, axis=-1, mask=None):
    """Returns mean, biased variance and count of each feature, in two passes."""
    rows, admitted, shape = _rows(x, axis, mask)
    count = admitted.sum(0).astype(float)
    m = np.maximum(count, 1)
    mean = np.where(admitted, rows, 0).sum(0) / m
    var = np.where(admitted, abs(rows - mean) ** 2, 0).sum(0) / m
    return mean.reshape(shape), var.reshape(shape), count.reshape(shape)


def normalize(x, mean, var, scale=None, bias=None, *, axis=-1, epsilon=1e-5):
    """Returns scale * (x - mean) / sqrt(var + epsilon) + bias."""
    rows, _, shape = _rows(x, axis, None)
    y = (rows - _flat(mean)) / np.sqrt(_flat(var) + epsilon)
    y = y * (1 if scale is None else _flat(scale)) + (0 if bias is None else _flat(bias))
    return _restore(y, x, axis)


def batch_norm(x, scale=None, bias=None, *, axis=-1, epsilon=1e-5, mask=None):
    """Returns the normalised batch (arXiv:1502.03167, algorithm 1), its mean, biased variance and count."""
    mean, var, count = moments(x, axis=axis, mask=mask)
    y = normalize(_filled(x, mask), mean, var, scale, bias, axis=axis, epsilon=epsilon)
    rows, _, _ = _rows(y, axis, None)
    alone = np.zeros_like(rows) if bias is None else np.broadcast_to(_flat(bias), rows.shape)
    y = _restore(np.where(_flat(count) > 0, rows, alone), x, axis)
    return y, mean, var, count


def gradients(x, scale, bias, dy, *, axis=-1, epsilon=1e-5, mask=None):
    """Returns dx, dscale, dbias for the cotangent dy of the output (arXiv:1502.03167, section 3), for real x.

    dvar = -sum(dy scale (x - mean)) (var + epsilon)^(-3/2) / 2,  dmean = -sum(dy scale) / sqrt(var + epsilon),
    dx = dy scale / sqrt(var + epsilon) + (dvar 2 (x - mean) + dmean) / m.

    The sums run over all positions; the second term of dx belongs to the m positions that made the moments.
    """
    del bias
    mean, var, count = (_flat(s) for s in moments(x, axis=axis, mask=mask))
    rows, _, shape = _rows(_filled(x, mask), axis, None)
    _, admitted, _ = _rows(x, axis, mask)
    dy, _, _ = _rows(np.asarray(dy, float), axis, None)
    scale = np.ones_like(mean) if scale is None else _flat(scale)
    m = np.maximum(count, 1)
    rsqrt = np.where(count > 0, 1 / np.sqrt(var + epsilon), 0)
    centred = rows - mean
    dvar = -(dy * scale * centred).sum(0) * rsqrt**3 / 2
    dmean = -(dy * scale).sum(0) * rsqrt
    dx = dy * scale * rsqrt + np.where(admitted, (dvar * 2 * centred + dmean) / m, 0)
    original, _, _ = _rows(x, axis, None)
    dx = np.where(admitted | np.isfinite(original), dx, 0)
    dscale = (dy * centred * rsqrt).sum(0)
    return _restore(dx, x, axis), dscale.reshape(shape), dy.sum(0).reshape(shape)


def update(mean, var, batch_mean, batch_var, count, *, momentum, unbiased=False):
    """Returns the running mean and variance after a batch; empty and non-finite features keep theirs."""
    mean, var, batch_mean, batch_var, count = (np.asarray(v) for v in (mean, var, batch_mean, batch_var, count))
    if unbiased:
        batch_var = batch_var * count / np.maximum(count - 1, 1)
    accepted = (count > 0) & np.isfinite(batch_mean) & np.isfinite(batch_var)
    return (
        np.where(accepted, momentum * mean + (1 - momentum) * batch_mean, mean),
        np.where(accepted, momentum * var + (1 - momentum) * batch_var, var),
    )


def _flat(per_feature):
    return np.asarray(per_feature).ravel()


def _axes(x, axis):
    return tuple(sorted(a % np.ndim(x) for a in np.atleast_1d(axis)))


def _rows(x, axis, mask):
    """Returns x and the mask as [positions, features] in float64, and the features' shape."""
    x = np.asarray(x)
    x = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
    last = tuple(range(x.ndim - len(_axes(x, axis)), x.ndim))
    shape = tuple(x.shape[a] for a in _axes(x, axis))
    # Sizes are spelled out: with an empty batch, -1 would be ambiguous.
    size = (x.size // max(int(np.prod(shape)), 1), int(np.prod(shape)))
    admitted = np.broadcast_to(True if mask is None else np.asarray(mask, bool), x.shape)
    rows, admitted = (np.moveaxis(v, _axes(x, axis), last).reshape(size) for v in (x, admitted))
    return rows, admitted, shape


def _restore(rows, x, axis):
    """Undoes :func:`_rows`."""
    axes = _axes(x, axis)
    last = tuple(range(np.ndim(x) - len(axes), np.ndim(x)))
    shape = np.moveaxis(np.empty(np.shape(x)), axes, last).shape
    return np.moveaxis(rows.reshape(shape), last, axes)


def _filled(x, mask):
    x = np.asarray(x)
    return x if mask is None else np.where(np.asarray(mask, bool) | np.isfinite(x), x, 0)
