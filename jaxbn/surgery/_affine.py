"""Turns batch norms into the affine map that they compute in evaluation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._core.dtypes import in_float64
from jaxbn._core.scaling import result_dtype
from jaxbn._models.intercept import call_model
from jaxbn._models.model import arrays_of
from jaxbn.surgery._new_layers import NewLayer, make_affine
from jaxbn.surgery._operation import LayerPaths, Surgery, find_batch_norms, operate, select


def to_affine(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: LayerPaths | None = None,
    check: bool = True,
    learnable: bool = True,
) -> Surgery:
    """Turns batch norms into affine layers y = scale' * x + bias', for fine-tuning.

    The statistics are merged into both: scale' = scale / sqrt(var + epsilon),  bias' = bias - mean scale'.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.to_affine(net, net.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jnp.shape, done.variables["params"]["layers_1"])
    {'bias': (4,), 'scale': (4,)}

    Args:
      model: a linen or nnx module.
      variables: variables of the linen module; None for an nnx module.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      check: whether to run the model before and after, for ``difference`` and ``scale``; both are NaN without.
      learnable: whether both arrays are parameters; False puts them with the statistics (``batch_stats``,
        ``BatchStat``), where an optimizer does not see them.

    Returns:
      The new model, with :class:`jaxbn.linen.Affine` or :class:`jaxbn.nnx.Affine` layers.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    before = find_batch_norms(model, variables, sample, call)
    stored = arrays_of(before.model)
    new_layers = {}
    for path, norm in select(before.norms, layers).items():
        scale, bias = affine_of(stored[path], norm.options["epsilon"])
        # Statistics may be wider than parameters, and both arrays hold statistics now.
        dtype = jnp.promote_types(norm.options["param_dtype"], norm.stats.mean.dtype)
        arrays = {"scale": jnp.asarray(scale.astype(dtype)), "bias": jnp.asarray(bias.astype(dtype))}
        # The output keeps its dtype, which the dtypes of the new arrays might promote.
        output_dtype = norm.options["dtype"] or result_dtype(norm.x, norm.scale, norm.bias)
        make = functools.partial(make_affine, {"dtype": output_dtype, "fixed": not learnable})
        if learnable:
            new_layers[path] = NewLayer(make, params=arrays, batch_stats={})
        else:
            new_layers[path] = NewLayer(make, params={}, batch_stats=arrays)
    return operate(before, new_layers, [*new_layers], {}, check=check)


def affine_of(arrays: Mapping[str, Any], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns a and s of a batch norm y = a x + s in evaluation, in float64, shape [C]."""
    wide = {name: in_float64(array) for name, array in arrays.items()}
    a = wide.get("scale", 1.0) / np.sqrt(wide["var"] + epsilon)
    s = wide.get("bias", 0.0) - wide["mean"] * a
    return a, s
