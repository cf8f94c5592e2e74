"""The layout of batch norm, and of other norms, which have only a scale and a bias."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn.interop._layout import Layout, to_flax_order, to_torch_order
from jaxbn.interop._weights import Arrays, Variables, copies, flat, nested, one_size, read, read_keras

# The variables of batch norm: their paths in Flax, and their names in PyTorch.
NORM = {
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
    "batch_stats/steps": "num_batches_tracked",
}


def batch_norm_layout(
    *, use_scale: bool = True, use_bias: bool = True, counted: bool = False, flattened: Sequence[int] | None = None
) -> Layout:
    """Returns the layout of batch norm, and of other norms, which have only a scale and a bias.

    PyTorch has no scale and bias without ``affine``, and no mean and var without ``track_running_stats``: it then
    always uses those of the batch.  It has both scale and bias or neither.  So if Flax's layer has only a bias, a scale
    of 1 is written, and if it has only a scale, a bias of 0; when read back, they must have these values.  This holds
    only for layers with statistics: momenta and gradients have none, and get no such partner.

    ``num_batches_tracked`` is the largest of ``steps``, or 0 without them.  PyTorch uses it only with
    ``momentum=None``; Keras has none.  With ``debias=True``, averages are free of their initial values, whereas
    PyTorch's still contain a fraction m**n of 0 and 1 after n batches, where m is the weight of the old value.  For
    such a layer, use mean/(1 - m**n) and (var - m**n)/(1 - m**n), or set ``steps`` to 0: the next batch then replaces
    the averages.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> entries = {'running_mean': np.zeros(2), 'running_var': np.ones(2), 'num_batches_tracked': np.array(7)}
    >>> interop.batch_norm_layout(counted=True).from_torch(entries)
    {'batch_stats': {'mean': array([0., 0.]), 'var': array([1., 1.]), 'steps': array([7, 7], dtype=int32)}}

    Args:
      use_scale: as in Flax's layer; in Keras, ``scale``.
      use_bias: as in Flax's layer; in Keras, ``center``.
      counted: whether Flax's layer has ``steps``, as jaxbn's do with ``momentum=None`` or ``debias=True``.
      flattened: the shape ``[C, *k]`` of one example in PyTorch if this layer comes after a flattening, or before an
        unflattening; as in :func:`dense_layout`.  Such norms must be in ``layouts``: their weights do not show it.

    Returns:
      The layout, of arrays of shape [C] and a scalar ``num_batches_tracked``.

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
      https://keras.io/api/layers/normalization_layers/batch_normalization
    """
    params = []
    keras_names = []
    if use_scale:
        params.append("params/scale")
        keras_names.append("gamma")
    if use_bias:
        params.append("params/bias")
        keras_names.append("beta")
    variable_names = [*params, "batch_stats/mean", "batch_stats/var"]
    keras_names += ["moving_mean", "moving_variance"]

    def from_torch(entries: Mapping[str, Any]) -> Variables:
        # Entries of a norm without statistics, or gradients or momenta of one with them.
        has_statistics = not {*entries} <= {"weight", "bias"}
        needed = []
        if has_statistics:
            needed = ["running_mean", "running_var"]
            if counted:
                needed.append("num_batches_tracked")
        arrays = read("a batch norm in PyTorch", entries, needed, NORM.values())
        count = arrays.pop("num_batches_tracked", None)
        features = one_size(arrays)
        if not use_scale:
            _drop_neutral(arrays, "weight", 1)
        if not use_bias:
            _drop_neutral(arrays, "bias", 0)
        arrays = {name: to_flax_order(array, flattened, "flattened") for name, array in arrays.items()}
        if counted and count is not None:
            arrays["num_batches_tracked"] = np.full(features, _steps(count), np.int32)
        return nested(copies({path: arrays.get(name) for path, name in NORM.items()}))

    def to_torch(variables: Mapping[str, Any]) -> Arrays:
        leaves = flat(variables)
        has_statistics = not {*leaves} <= {"params/scale", "params/bias"}
        needed = ["batch_stats/mean", "batch_stats/var"] if has_statistics else []
        arrays = read("a batch norm in Flax", leaves, needed, [*variable_names, "batch_stats/steps"])
        features = one_size(arrays)
        arrays = {path: to_torch_order(array, flattened, "flattened") for path, array in arrays.items()}
        entries = {name: arrays.get(path) for path, name in NORM.items()}
        if has_statistics:
            scale, bias, steps = entries["weight"], entries["bias"], entries["num_batches_tracked"]
            if scale is None and bias is not None:
                entries["weight"] = np.ones(features, bias.dtype)
            if bias is None and scale is not None:
                entries["bias"] = np.zeros(features, scale.dtype)
            entries["num_batches_tracked"] = np.array(0 if steps is None else steps.max(), np.int64)
        return copies(entries)

    def from_keras(weights: Sequence[Any] | Mapping[str, Any]) -> Variables:
        # As many weights as there are parameters: a norm without statistics, or gradients of one with them.
        has_statistics = not params or len(weights) != len(params)
        names = keras_names if has_statistics else keras_names[: len(params)]
        arrays = read_keras("a batch norm in Keras", weights, names, names)
        one_size(arrays)
        return nested(copies(dict(zip(variable_names, arrays.values(), strict=False))))

    def to_keras(variables: Mapping[str, Any]) -> list[np.ndarray]:
        leaves = flat(variables)
        has_statistics = {*leaves} != {*params}
        needed = variable_names if has_statistics else params
        arrays = read("a batch norm in Flax", leaves, needed, ["batch_stats/steps"])
        one_size(arrays)
        return list(copies({path: arrays[path] for path in needed}).values())

    return Layout(from_torch, to_torch, from_keras, to_keras)


def _drop_neutral(arrays: Arrays, name: str, neutral: int) -> None:
    """Removes an array that Flax's layer lacks, and that must therefore do nothing."""
    if name in arrays and np.any(arrays.pop(name) != neutral):
        raise ValueError(
            f"the {name} of this batch norm is not {neutral} everywhere, but Flax's layer has none; make Flax's layer "
            "with use_scale=True and use_bias=True, or leave this entry out of momenta and gradients."
        )


def _steps(count: np.ndarray) -> int:
    """Returns num_batches_tracked as a number that fits into the int32 of Flax."""
    if count.shape or not 0 <= count < 2**31:
        raise ValueError(
            f"num_batches_tracked must be one number from 0 to 2**31 - 1, as Flax's int32 is, got {count}; pass a "
            "smaller one, since after so many batches the average changes by less than it is rounded."
        )
    return int(count)
