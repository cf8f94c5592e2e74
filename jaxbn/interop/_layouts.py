"""How one layer is written in Flax, PyTorch and Keras; :mod:`jaxbn.interop` tables the layouts and converts models."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.interop._weights import Arrays, Variables, copies, flat, nested, one_size, read, read_keras

# The variables of batch norm by their paths in Flax, and their names in PyTorch.
_NORM = {
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
    "batch_stats/steps": "num_batches_tracked",
}
_CONV_AXES = (3, 4, 5)
_SAME = (np.asarray, np.asarray)


class Layout(NamedTuple):
    """How one kind of layer is written: functions between its variables in Flax and its weights elsewhere.

    They move values and compute none, so that the way there and back is exact.  Each refuses, with a ValueError, what
    such a layer does not have.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.conv_layout()
    >>> variables = layout.from_torch({'weight': np.ones((8, 2, 3, 5))})
    >>> variables['params']['kernel'].shape, layout.to_torch(variables)['weight'].shape
    ((3, 5, 2, 8), (8, 2, 3, 5))

    Attributes:
      from_torch: from the layer's entries of a ``state_dict``, by their last names, to its variables, such as
        ``{"params": {"kernel": ..., "bias": ...}}``, without those, and those collections, that it lacks.
      to_torch: from variables to entries.
      from_keras: from ``layer.weights``, from arrays by their names, or from what ``layer.get_weights()`` returns, to
        variables.  The last has no names that could be checked.
      to_keras: from variables to the list that ``layer.set_weights`` takes.
    """

    from_torch: Callable[[Mapping[str, Any]], Variables]
    to_torch: Callable[[Mapping[str, Any]], Arrays]
    from_keras: Callable[[Sequence[Any] | Mapping[str, Any]], Variables]
    to_keras: Callable[[Mapping[str, Any]], list[np.ndarray]]


def batch_norm_layout(
    *, use_scale: bool = True, use_bias: bool = True, counted: bool = False, flattened: Sequence[int] | None = None
) -> Layout:
    """Returns the layout of batch norm, and of the other norms, which have a scale and a bias alone.

    Without ``affine``, PyTorch has no scale and bias; without ``track_running_stats``, it has no mean and var, and uses
    those of the batch always.  Where Flax's layer has statistics, a scale that it lacks is written as 1 beside a bias,
    and a bias as 0 beside a scale; they are read only if they are so.  Momenta and gradients come without statistics,
    and get no such partner.

    ``num_batches_tracked`` is the largest of ``steps``, or 0 without them.  PyTorch uses it with ``momentum=None``, and
    for this alone it is converted; Keras has none.  Averages of ``debias=True`` hold nothing of their start, those of
    PyTorch a share m**n of 0 and 1, after n batches and with m the weight of the old value: for such a layer take
    mean/(1 - m**n) and (var - m**n)/(1 - m**n), or set ``steps`` to 0, and the next batch replaces the averages.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> entries = {'running_mean': np.zeros(2), 'running_var': np.ones(2), 'num_batches_tracked': np.array(7)}
    >>> interop.batch_norm_layout(counted=True).from_torch(entries)
    {'batch_stats': {'mean': array([0., 0.]), 'var': array([1., 1.]), 'steps': array([7, 7], dtype=int32)}}

    Args:
      use_scale: as Flax's layer has it; in Keras, ``scale``.
      use_bias: as Flax's layer has it; in Keras, ``center``.
      counted: whether Flax's layer keeps ``steps``, as jaxbn's do with ``momentum=None`` or ``debias=True``.
      flattened: the shape ``[C, *k]`` of one example in PyTorch before a flattening in front of this layer, or after
        an unflattening behind it; as in :func:`dense_layout`.  Such norms must be in ``layouts``: nothing shows it.

    Returns:
      The layout, of arrays of shape [C] and a scalar ``num_batches_tracked``.

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
      https://keras.io/api/layers/normalization_layers/batch_normalization
    """
    params = ["params/scale"] * use_scale + ["params/bias"] * use_bias
    own = [*params, "batch_stats/mean", "batch_stats/var"]
    in_keras = ["gamma"] * use_scale + ["beta"] * use_bias + ["moving_mean", "moving_variance"]
    tracked = list(_NORM.values())[2 : 4 + counted]

    def from_torch(entries):
        needed = [] if {*entries} <= {"weight", "bias"} else tracked
        arrays = read("a batch norm in PyTorch", entries, needed, _NORM.values())
        count = arrays.pop("num_batches_tracked", None)
        features = one_size(arrays)
        for name, used, neutral in (("weight", use_scale, 1), ("bias", use_bias, 0)):
            if not used and np.any(arrays.pop(name, neutral) != neutral):
                raise ValueError(
                    f"the {name} of this batch norm is not {neutral} everywhere, and Flax's layer has none; make "
                    "Flax's layer with use_scale=True and use_bias=True, or leave it out of momenta and gradients."
                )
        arrays = {name: _in_order(array, flattened, "flattened") for name, array in arrays.items()}
        if counted and needed:
            arrays["num_batches_tracked"] = np.full(features, _steps(count), np.int32)
        return nested(copies({key: arrays.get(name) for key, name in _NORM.items()}))

    def to_torch(variables):
        given = flat(variables)
        needed = [] if {*given} <= {"params/scale", "params/bias"} else own[-2:]
        arrays = read("a batch norm in Flax", given, needed, [*own, "batch_stats/steps"])
        features = one_size(arrays)
        arrays = {key: _in_order(array, flattened, "flattened", back=True) for key, array in arrays.items()}
        scale, bias, mean, var, steps = map(arrays.get, _NORM)
        if mean is None:
            return copies({"weight": scale, "bias": bias})
        if scale is None and bias is not None:
            scale = np.ones(features, bias.dtype)
        if bias is None and scale is not None:
            bias = np.zeros(features, scale.dtype)
        count = np.array(0 if steps is None else steps.max(), np.int64)
        return copies(dict(zip(_NORM.values(), (scale, bias, mean, var, count), strict=True)))

    def from_keras(weights):
        without_statistics = 0 < len(weights) == len(params)
        names = in_keras[: len(params)] if without_statistics else in_keras
        arrays = read_keras("a batch norm in Keras", weights, names, names)
        one_size(arrays)
        return nested(copies(dict(zip(own, arrays.values(), strict=False))))

    def to_keras(variables):
        given = flat(variables)
        needed = params if {*given} == {*params} else own
        arrays = read("a batch norm in Flax", given, needed, ["batch_stats/steps"])
        one_size(arrays)
        return list(copies({key: arrays[key] for key in needed}).values())

    return Layout(from_torch, to_torch, from_keras, to_keras)


def conv_layout() -> Layout:
    """Returns the layout of ``Conv`` with one to three axes k, in any number of groups.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> interop.conv_layout().to_torch({'params': {'kernel': np.ones((3, 5, 2, 8))}})['weight'].shape
    (8, 2, 3, 5)

    Returns:
      The layout, of a kernel and, where there is one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
      https://keras.io/api/layers/convolution_layers/convolution2d
    """
    return _kernel_layout("a convolution", torch=(_channels_last, _channels_first))


def depthwise_conv_layout(*, multiplier: int = 1) -> Layout:
    """Returns the layout of ``Conv`` with as many groups as input features, which Keras writes in another way.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.depthwise_conv_layout(multiplier=2)
    >>> layout.from_keras([np.ones((3, 3, 4, 2))])['params']['kernel'].shape
    (3, 3, 1, 8)

    Args:
      multiplier: output features for each input feature; in Keras, ``depth_multiplier``.

    Returns:
      The layout, of a kernel and, where there is one, a bias of shape [in*multiplier].

    References:
      https://keras.io/api/layers/convolution_layers/depthwise_convolution2d
    """

    def from_keras(kernel):
        if kernel.shape[-1] != multiplier:
            raise ValueError(
                f"a depthwise kernel of shape {kernel.shape} in Keras has the multiplier {kernel.shape[-1]}, "
                f"not {multiplier}; use depthwise_conv_layout(multiplier={kernel.shape[-1]})."
            )
        return kernel.reshape(*kernel.shape[:-2], 1, -1)

    def to_keras(kernel):
        if kernel.shape[-2] != 1 or kernel.shape[-1] % multiplier:
            raise ValueError(
                f"a kernel of shape {kernel.shape} in Flax is not depthwise with the multiplier {multiplier}, "
                f"which has the shape [*k, 1, in*{multiplier}]; use another multiplier, or conv_layout()."
            )
        return kernel.reshape(*kernel.shape[:-2], -1, multiplier)

    torch = (_channels_last, _channels_first)
    return _kernel_layout("a depthwise convolution", torch=torch, keras=(from_keras, to_keras))


def conv_transpose_layout(*, transpose_kernel: bool = False) -> Layout:
    """Returns the layout of ``ConvTranspose``, whose kernel is the others' reversed along each axis of k.

    The others hold the kernel of the convolution whose gradient they compute.  Flax's layer has no groups, so weights
    of several are refused with a bias; without one they look like those of fewer features.  What PyTorch does with
    dilation d, padding p and output_padding q, Flax does with ``kernel_dilation=d`` and
    ``padding=[(d*(k - 1) - p, d*(k - 1) - p + q), ...]``, a pair for each axis.  Transposed convolutions must be in
    ``layouts``: their weights do not show it.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.conv_transpose_layout()
    >>> layout.from_torch({'weight': np.ones((8, 4, 3, 3)), 'bias': np.zeros(4)})['params']['kernel'].shape
    (3, 3, 8, 4)

    Args:
      transpose_kernel: as Flax's layer has it; with True its kernel is as in Keras, ``[*k, out, in]`` and not
        reversed.

    Returns:
      The layout, of a kernel and, where there is one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html
      https://keras.io/api/layers/convolution_layers/convolution2d_transpose
    """

    def reverse(kernel):
        return kernel if transpose_kernel else np.flip(kernel, tuple(range(kernel.ndim - 2))).swapaxes(-1, -2)

    return _kernel_layout(
        "a transposed convolution without groups",
        torch=(lambda weight: reverse(_channels_last(weight)), lambda kernel: _channels_first(reverse(kernel))),
        keras=(reverse, reverse),
        features=-2 if transpose_kernel else -1,
    )


def dense_layout(*, flattened: Sequence[int] | None = None, unflattened: Sequence[int] | None = None) -> Layout:
    """Returns the layout of ``Dense``, and of ``nnx.Linear``.

    After a flattening its input features are in another order, and before an unflattening its output features:
    PyTorch has ``[C, *k]`` there, Flax and Keras ``[*k, C]``.  Such layers must be in ``layouts``, and so must the
    norms, with :func:`batch_norm_layout`, whose features are flat: nothing in the weights shows it.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.dense_layout(flattened=(2, 3))
    >>> layout.from_torch({'weight': np.arange(6.)[None]})['params']['kernel'].ravel()
    array([0., 3., 1., 4., 2., 5.])

    Args:
      flattened: the shape ``[C, *k]`` of one example in PyTorch before a flattening in front of this layer, nothing
        but layers of single features, such as norms and activations, in between.
      unflattened: the shape ``[C, *k]`` of one example in PyTorch after an unflattening behind this layer.

    Returns:
      The layout, of a kernel and, where there is one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
      https://keras.io/api/layers/core_layers/dense
    """

    def move_outputs(array, back=False):
        return _in_order(array, unflattened, "unflattened", axis=-1, back=back)

    def from_torch(weight):
        return move_outputs(_in_order(weight.T, flattened, "flattened"))

    def to_torch(kernel):
        return move_outputs(_in_order(kernel, flattened, "flattened", back=True), back=True).T

    bias = (move_outputs, functools.partial(move_outputs, back=True))
    return _kernel_layout("a dense layer", axes=(2,), torch=(from_torch, to_torch), torch_bias=bias)


def layout_of(leaves: Mapping[str, Any]) -> Layout:
    """Returns the layout that a layer with these variables, by their paths, is likely to have."""
    if "params/kernel" in leaves:
        return dense_layout() if np.ndim(leaves["params/kernel"]) == 2 else conv_layout()
    if {*leaves} <= {*_NORM}:
        use_scale, use_bias, counted = (name in leaves for name in ("params/scale", "params/bias", "batch_stats/steps"))
        return batch_norm_layout(use_scale=use_scale, use_bias=use_bias, counted=counted)
    raise ValueError(
        f"its variables in Flax, {', '.join(sorted(leaves))}, are not those of a norm, convolution or dense layer; "
        "pass its layout in layouts, or take it out of both models."
    )


def _in_order(array, shape, option, *, axis=0, back=False):
    """Returns an array with the flat features of an axis in the order of Flax, from that of PyTorch, or back."""
    if shape is None:
        return array
    features = array.shape[axis]
    if math.prod(shape) != features:
        raise ValueError(
            f"{option}={tuple(shape)} makes {math.prod(shape)} features, but this layer has {features}; "
            "give the shape [C, *k] of one example in PyTorch where it is not flat."
        )
    places = np.moveaxis(np.arange(features).reshape(shape), 0, -1).ravel()
    return np.take(array, np.argsort(places) if back else places, axis)


def _steps(count):
    """Returns num_batches_tracked as the int32 of Flax."""
    if count.shape or not 0 <= count < 2**31:
        raise ValueError(
            f"num_batches_tracked={count} is not one number from 0 to 2**31 - 1, which Flax's int32 holds; "
            "give a smaller one: the average changes by less than it rounds."
        )
    return int(count)


def _kernel_layout(what, *, torch, torch_bias=_SAME, keras=_SAME, axes=_CONV_AXES, features=-1):
    """Returns the layout of a kernel and perhaps a bias; ``torch`` and ``keras`` take a kernel from there, and back."""

    def check(kernel, bias):
        if bias is not None and bias.shape != (kernel.shape[features],):
            raise ValueError(
                f"{what} with a kernel of shape {kernel.shape} in Flax has {kernel.shape[features]} features, but its "
                f"bias has the shape {bias.shape}; pass kernel and bias of one layer, of this kind."
            )

    def check_axes(kernel):
        if kernel.ndim not in axes:
            raise ValueError(
                f"the kernel of {what} has {' or '.join(map(str, axes))} axes, but the shape {kernel.shape} is given; "
                "use the layout of the layer that it comes from."
            )
        return kernel

    def into_flax(arrays, name, convert, move=np.asarray):
        kernel, bias = convert(check_axes(arrays[name])), arrays.get("bias")
        check(kernel, bias)
        return nested(copies({"params/kernel": kernel, "params/bias": None if bias is None else move(bias)}))

    def out_of_flax(variables, name, convert, move=np.asarray):
        arrays = read(f"{what} in Flax", flat(variables), ["params/kernel"], ["params/bias"])
        kernel, bias = check_axes(arrays["params/kernel"]), arrays.get("params/bias")
        check(kernel, bias)
        return copies({name: convert(kernel), "bias": None if bias is None else move(bias)})

    def from_torch(entries):
        return into_flax(read(f"{what} in PyTorch", entries, ["weight"], ["bias"]), "weight", torch[0], torch_bias[0])

    def from_keras(weights):
        return into_flax(read_keras(f"{what} in Keras", weights, ["kernel"], ["kernel", "bias"]), "kernel", keras[0])

    return Layout(
        from_torch,
        lambda variables: out_of_flax(variables, "weight", torch[1], torch_bias[1]),
        from_keras,
        lambda variables: list(out_of_flax(variables, "kernel", keras[1]).values()),
    )


def _channels_last(weight):
    """[out, in, *k] to [*k, in, out]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _channels_first(kernel):
    """[*k, in, out] to [out, in, *k]."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))
