"""A batch norm in evaluation as a scale and a bias."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._core.dtypes import in_float64
from jaxbn._core.scaling import result_dtype
from jaxbn._models.intercept import call_model
from jaxbn._models.model import arrays_of
from jaxbn.surgery._exchange import NewLayer, make_affine
from jaxbn.surgery._operation import Layers, Surgery, find_batch_norms, operate, select


def to_affine(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
    learnable: bool = True,
) -> Surgery:
    """Turns batch norms into y = scale' * x + bias', with their statistics in two arrays: for fine-tuning.

    scale' = scale / sqrt(var + epsilon),  bias' = bias - mean scale'.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.to_affine(net, net.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jnp.shape, done.variables["params"]["layers_1"])
    {'bias': (4,), 'scale': (4,)}

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      learnable: False keeps both arrays with the statistics (``batch_stats``, ``BatchStat``), out of an optimizer's
        sight.

    Returns:
      The new model, with :class:`jaxbn.linen.Affine` or :class:`jaxbn.nnx.Affine` layers.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    before, found = find_batch_norms(model, variables, sample, call)
    stored, new = arrays_of(before), {}
    for path, norm in select(found, layers).items():
        arrays = zip(("scale", "bias"), affine_of(stored[path], norm.options["epsilon"]), strict=True)
        dtype = jnp.promote_types(norm.options["param_dtype"], norm.stats.mean.dtype)
        arrays = {name: jnp.asarray(value.astype(dtype)) for name, value in arrays}
        make = functools.partial(make_affine, {"dtype": result_dtype_of(norm), "fixed": not learnable})
        new[path] = NewLayer(make, arrays if learnable else {}, {} if learnable else arrays)
    return operate(before, new, [*new], {}, sample, call)


def result_dtype_of(norm):
    return norm.options["dtype"] or result_dtype(norm.x, norm.scale, norm.bias)


def affine_of(arrays: Mapping[str, Any], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scale a and the shift s that a batch norm is in evaluation, in float64, shape [C]."""
    arrays = {name: in_float64(value) for name, value in arrays.items()}
    a = arrays.get("scale", 1.0) / np.sqrt(arrays["var"] + epsilon)
    return a, arrays.get("bias", 0.0) - arrays["mean"] * a
