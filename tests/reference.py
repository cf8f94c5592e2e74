"""The oracle: batch norm and its variants in NumPy float64, written from the papers.

Batch norm itself is in `jaxbn/testing/_oracle.py`, which `jaxbn.testing` needs and which shares no code with the rest
of the library; here are the variants.

References:
  Ioffe and Szegedy 2015, arXiv:1502.03167;  Ioffe 2017, arXiv:1702.03275 (renorm);
  Hoffer, Hubara and Soudry 2017, arXiv:1705.08741 (ghost).
"""

import numpy as np

from jaxbn.testing._oracle import batch_norm, gradients, moments, normalize, update

__all__ = ["batch_norm", "ghost", "gradients", "moments", "normalize", "renorm", "renorm_gradients", "update"]


def ghost(x, scale=None, bias=None, *, group_size, axis=-1, epsilon=1e-5, mask=None):
    """Returns the batch whose groups of consecutive examples are normalized separately (arXiv:1705.08741)."""
    mask = np.broadcast_to(True if mask is None else mask, np.shape(x))
    parts = [slice(i, i + group_size) for i in range(0, len(x), group_size)]
    options = {"axis": axis, "epsilon": epsilon}
    return np.concatenate([batch_norm(x[part], scale, bias, mask=mask[part], **options)[0] for part in parts])


def renorm(x, running_mean, running_var, scale=None, bias=None, *, r_max, d_max, axis=-1, epsilon=1e-5, mask=None):
    """Returns the batch-renormalized batch, r and d (arXiv:1702.03275, algorithm 1)."""
    mean, var, _ = moments(x, axis=axis, mask=mask)
    sigma, running_sigma = np.sqrt(var + epsilon), np.sqrt(np.asarray(running_var) + epsilon)
    r = np.clip(sigma / running_sigma, 1 / r_max, r_max)
    d = np.clip((mean - running_mean) / running_sigma, -d_max, d_max)
    gamma, beta = np.ones_like(r) if scale is None else scale, np.zeros_like(d) if bias is None else bias
    # r and d enter as a scale and a shift of the normalized x, before gamma and beta.
    return normalize(x, mean, var, gamma * r, gamma * d + beta, axis=axis, epsilon=epsilon), r, d


def renorm_gradients(x, running_mean, running_var, scale, bias, dy, *, r_max, d_max, axis=-1, epsilon=1e-5, mask=None):
    """Returns dx, dscale, dbias of renorm; r and d are constants there (arXiv:1702.03275, section 3).

    y = gamma (r z + d) + beta with z the normalized x: batch norm with the scale gamma r, and a shift.
    """
    _, r, d = renorm(x, running_mean, running_var, r_max=r_max, d_max=d_max, axis=axis, epsilon=epsilon, mask=mask)
    gamma = np.ones_like(r) if scale is None else scale
    dx, along_z, dbias = gradients(x, gamma * r, bias, dy, axis=axis, epsilon=epsilon, mask=mask)
    return dx, r * along_z + d * dbias, dbias
