"""Folds batch norms into linear layers.

:mod:`jaxbn.surgery._foldable` decides which layer can absorb a batch norm, :mod:`jaxbn.surgery._kernels` computes its
new arrays.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._models.intercept import call_model
from jaxbn._models.model import split
from jaxbn.surgery._foldable import CannotFold, Finder
from jaxbn.surgery._kernels import take_in
from jaxbn.surgery._new_layers import NewLayer, make_affine, make_with
from jaxbn.surgery._operation import LayerPaths, Surgery, found, operate, select


def fold(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: LayerPaths | None = None,
    check: bool = True,
) -> Surgery:
    """Folds batch norms into the convolution or dense layer before them, or after them where that is exact.

    In evaluation, a batch norm is y = a x + s with a = scale / sqrt(var + epsilon) and s = bias - mean a.  The layer
    before it gets the kernel K' = a K and the bias b' = a b + s.  The layer after it gets K' = K a and b' = b + K s,
    which is exact for dense layers, and for convolutions that do not pad with zeros.  The layers are found in a trace
    of the model; their names do not matter.  The new model can only evaluate, and costs as much as one without norms.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.relu])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.fold(net, net.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jnp.shape, done.variables)
    {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 4)}}}

    Args:
      model: a linen or nnx module.
      variables: variables of the linen module; None for an nnx module.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them, all of which must fold; None folds those that can.
      check: whether to run the model before and after, for ``difference`` and ``scale``; both are NaN without.

    Returns:
      The new model; ``kept`` lists the batch norms that cannot be folded, with the reason.

    Raises:
      ValueError: if one of ``layers``, or all batch norms, cannot be folded; the message says why.
    """
    split_model = split(model, variables)
    finder = Finder(split_model, sample, call)
    before = found(split_model, finder.norms(), variables, sample, call)
    new_layers: dict[str, NewLayer] = {}
    kept: dict[str, str] = {}
    # Kernels and biases of layers that have absorbed batch norms; one layer may do so on both sides.
    folded: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for path in select(before.norms, layers):
        try:
            matches = finder.matches(path)
            folded |= take_in(matches, finder.arrays, folded)
        except CannotFold as reason:
            kept[path] = str(reason)
        else:
            # What remains of the batch norm is the identity, and the cast to its dtype.
            identity = {"use_scale": False, "use_bias": False, "dtype": matches[0].norm.y.dtype}
            new_layers[path] = NewLayer(functools.partial(make_affine, identity), params={}, batch_stats={})
    if kept and (layers is not None or not new_layers):
        reasons = "; ".join(f"{path or 'the model'}: {reason}" for path, reason in kept.items())
        raise ValueError(
            f"cannot fold {reasons}. Nothing was changed; name layers that can be folded with layers=, or make these "
            "affine with to_affine."
        )
    changed = [*new_layers]
    for path, (kernel, bias) in folded.items():
        dtype = finder.arrays[path]["kernel"].dtype
        params = {"kernel": jnp.asarray(kernel.astype(dtype)), "bias": jnp.asarray(bias.astype(dtype))}
        new_layers[path] = NewLayer(functools.partial(make_with, {"use_bias": True}), params)
    return operate(before, new_layers, changed, kept, check=check)
