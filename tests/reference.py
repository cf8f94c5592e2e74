"""The oracle: batch norm in NumPy float64, written from the papers and not from jaxbn.

``axis`` names the feature axes; statistics have their shape.  ``mask`` says which positions count.  Masked positions
are normalised with the moments of the others; there, a value that is not finite counts as 0 and has no derivative.

References:
  Ioffe and Szegedy 2015, arXiv:1502.03167;  Ioffe 2017, arXiv:1702.03275 (renorm);
  Hoffer, Hubara and Soudry 2017, arXiv:1705.08741 (ghost).
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


def ghost(x, scale=None, bias=None, *, group_size, axis=-1, epsilon=1e-5, mask=None):
    """Returns the batch whose groups of consecutive examples are normalised separately (arXiv:1705.08741)."""
    mask = np.broadcast_to(True if mask is None else mask, np.shape(x))
    parts = [slice(i, i + group_size) for i in range(0, len(x), group_size)]
    options = {"axis": axis, "epsilon": epsilon}
    return np.concatenate([batch_norm(x[part], scale, bias, mask=mask[part], **options)[0] for part in parts])


def renorm(x, running_mean, running_var, scale=None, bias=None, *, r_max, d_max, axis=-1, epsilon=1e-5, mask=None):
    """Returns the batch-renormalised batch, r and d (arXiv:1702.03275, algorithm 1)."""
    mean, var, _ = moments(x, axis=axis, mask=mask)
    sigma, running_sigma = np.sqrt(var + epsilon), np.sqrt(np.asarray(running_var) + epsilon)
    r = np.clip(sigma / running_sigma, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / running_sigma, -d_max, d_max)
    gamma, beta = np.ones_like(r) if scale is None else scale, np.zeros_like(d) if bias is None else bias
    # r and d enter as a scale and a shift of the normalised x, before gamma and beta.
    return normalize(x, mean, var, gamma * r, gamma * d + beta, axis=axis, epsilon=epsilon), r, d


def renorm_gradients(x, running_mean, running_var, scale, bias, dy, *, r_max, d_max, axis=-1, epsilon=1e-5, mask=None):
    """Returns dx, dscale, dbias of renorm; r and d are constants there (arXiv:1702.03275, section 3).

    y = gamma (r z + d) + beta with z the normalised x: batch norm with the scale gamma r, and a shift.
    """
    _, r, d = renorm(x, running_mean, running_var, r_max=r_max, d_max=d_max, axis=axis, epsilon=epsilon, mask=mask)
    gamma = np.ones_like(r) if scale is None else scale
    dx, along_z, dbias = gradients(x, gamma * r, bias, dy, axis=axis, epsilon=epsilon, mask=mask)
    return dx, r * along_z + d * dbias, dbias


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
