"""How one layer is written in Flax, PyTorch and Keras; :mod:`jaxbn.interop` tables the layouts and converts models."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
Variables = dict[str, Any]

# The variables of batch norm by their paths in Flax, and their names in PyTorch.
_NORM = {
    "params/scale": "weight",
    "params/bias": "bias",
    "batch_stats/mean": "running_mean",
    "batch_stats/var": "running_var",
    "batch_stats/steps": "num_batches_tracked",
}
_CONV_AXES = (3, 4, 5)


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
      from_keras: from the list that ``layer.get_weights()`` returns to variables.
      to_keras: from variables to the list that ``layer.set_weights`` takes.
    """

    from_torch: Callable[[Mapping[str, Any]], Variables]
    to_torch: Callable[[Mapping[str, Any]], Arrays]
    from_keras: Callable[[Sequence[Any]], Variables]
    to_keras: Callable[[Mapping[str, Any]], list[np.ndarray]]


def batch_norm_layout(*, use_scale: bool = True, use_bias: bool = True, counted: bool = False) -> Layout:
    """Returns the layout of batch norm, and of the other norms, which have ``weight`` and ``bias`` alone.

    Without ``affine``, PyTorch has no scale and bias; without ``track_running_stats``, it has no mean and var, and uses
    those of the batch always.  A scale that Flax's layer lacks is written as 1 beside a bias, and a bias as 0 beside a
    scale; they are read only if they are so.  ``num_batches_tracked`` is the largest of ``steps``, or 0 without them:
    PyTorch uses it with ``momentum=None`` alone.  Keras has no such count.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> entries = {'running_mean': np.zeros(2), 'running_var': np.ones(2), 'num_batches_tracked': np.array(7)}
    >>> interop.batch_norm_layout(counted=True).from_torch(entries)
    {'batch_stats': {'mean': array([0., 0.]), 'var': array([1., 1.]), 'steps': array([7, 7], dtype=int32)}}

    Args:
      use_scale: as Flax's layer has it; in Keras, ``scale``.
      use_bias: as Flax's layer has it; in Keras, ``center``.
      counted: whether Flax's layer keeps ``steps``, as jaxbn's do with ``momentum=None`` or ``debias=True``.

    Returns:
      The layout, of arrays of shape [C] and a scalar ``num_batches_tracked``.

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
      https://keras.io/api/layers/normalization_layers/batch_normalization
    """
    own = ["params/scale"] * use_scale + ["params/bias"] * use_bias + ["batch_stats/mean", "batch_stats/var"]
    in_keras = ["gamma"] * use_scale + ["beta"] * use_bias + ["moving_mean", "moving_variance"]
    tracked = list(_NORM.values())[2 : 4 + counted]

    def from_torch(entries):
        needed = [] if {*entries} <= {"weight", "bias"} else tracked
        arrays = _read("a batch norm in PyTorch", entries, needed, _NORM.values())
        count = arrays.pop("num_batches_tracked", 0)
        shape = _one_shape(arrays)
        for name, used, neutral in (("weight", use_scale, 1), ("bias", use_bias, 0)):
            if not used and np.any(arrays.pop(name, neutral) != neutral):
                raise ValueError(
                    f"the {name} of this batch norm is not {neutral} everywhere, and Flax's layer has none; "
                    "make Flax's layer with use_scale=True and use_bias=True."
                )
        if counted and needed:
            arrays["num_batches_tracked"] = np.full(shape, int(count), np.int32)
        return nested(_copies({key: arrays.get(name) for key, name in _NORM.items()}))

    def to_torch(variables):
        given = flat(variables)
        needed = [] if {*given} <= {"params/scale", "params/bias"} else own[-2:]
        arrays = _read("a batch norm in Flax", given, needed, [*own, "batch_stats/steps"])
        shape = _one_shape(arrays)
        scale, bias, mean, var, steps = map(arrays.get, _NORM)
        if scale is None and bias is not None:
            scale = np.ones(shape, bias.dtype)
        if bias is None and scale is not None:
            bias = np.zeros(shape, scale.dtype)
        count = None if mean is None else np.array(0 if steps is None else steps.max(), np.int64)
        return _copies(dict(zip(_NORM.values(), (scale, bias, mean, var, count), strict=True)))

    def from_keras(weights):
        arrays = _listed("a batch norm in Keras", weights, in_keras, in_keras)
        _one_shape(arrays)
        return nested(_copies(dict(zip(own, arrays.values(), strict=True))))

    def to_keras(variables):
        arrays = _read("a batch norm in Flax", flat(variables), own, ["batch_stats/steps"])
        _one_shape(arrays)
        return list(_copies({key: arrays[key] for key in own}).values())

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
    of several are refused.  What PyTorch does with dilation d, padding p and output_padding q, Flax does with
    ``kernel_dilation=d`` and ``padding=[(d*(k - 1) - p, d*(k - 1) - p + q), ...]``, a pair for each axis.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.conv_transpose_layout()
    >>> layout.from_torch({'weight': np.ones((8, 4, 3, 3)), 'bias': np.zeros(4)})['params']['kernel'].shape
    (3, 3, 8, 4)

    Args:
      transpose_kernel: as Flax's layer has it; with True its kernel is as in Keras, [*k, out, in] and not reversed.

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


def dense_layout(*, flattened: Sequence[int] | None = None) -> Layout:
    """Returns the layout of ``Dense``, and of ``nnx.Linear``.

    After a flattening its input features are in another order: PyTorch flattens [C, *k], Flax and Keras [*k, C].

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.dense_layout(flattened=(2, 3))
    >>> layout.from_torch({'weight': np.arange(6.)[None]})['params']['kernel'].ravel()
    array([0., 3., 1., 4., 2., 5.])

    Args:
      flattened: the shape [C, *k] of one example in PyTorch before a flattening right before this layer.

    Returns:
      The layout, of a kernel and, where there is one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
      https://keras.io/api/layers/core_layers/dense
    """

    def order(features):
        """Returns the place in PyTorch of each input feature of Flax."""
        places = np.arange(features)
        if flattened is None:
            return places
        if math.prod(flattened) != features:
            raise ValueError(
                f"flattened={tuple(flattened)} makes {math.prod(flattened)} features, but the kernel has {features}; "
                "give the shape [C, *k] of one example before it is flattened."
            )
        return np.moveaxis(places.reshape(flattened), 0, -1).ravel()

    return _kernel_layout(
        "a dense layer",
        axes=(2,),
        torch=(
            lambda weight: weight.T[order(weight.shape[1])],
            lambda kernel: kernel[np.argsort(order(kernel.shape[0]))].T,
        ),
    )


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


def flat(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the leaves of nested mappings by their paths, such as ``params/kernel``."""
    leaves = {}
    for key, value in tree.items():
        here = (*path, str(key))
        leaves |= flat(value, here) if isinstance(value, Mapping) else {"/".join(here): value}
    return leaves


def nested(leaves: Mapping[str, Any]) -> Variables:
    """Returns the variables of one layer out of its leaves by their paths."""
    variables = {}
    for key, leaf in leaves.items():
        collection, _, name = key.partition("/")
        variables.setdefault(collection, {})[name] = leaf
    return variables


def _kernel_layout(what, *, torch, keras=(np.asarray, np.asarray), axes=_CONV_AXES, features=-1):
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

    def into_flax(arrays, name, convert):
        kernel, bias = convert(check_axes(arrays[name])), arrays.get("bias")
        check(kernel, bias)
        return nested(_copies({"params/kernel": kernel, "params/bias": bias}))

    def out_of_flax(variables, name, convert):
        arrays = _read(f"{what} in Flax", flat(variables), ["params/kernel"], ["params/bias"])
        kernel, bias = check_axes(arrays["params/kernel"]), arrays.get("params/bias")
        check(kernel, bias)
        return _copies({name: convert(kernel), "bias": bias})

    in_keras = ["kernel", "bias"]
    return Layout(
        lambda entries: into_flax(_read(f"{what} in PyTorch", entries, ["weight"], ["bias"]), "weight", torch[0]),
        lambda variables: out_of_flax(variables, "weight", torch[1]),
        lambda weights: into_flax(_listed(f"{what} in Keras", weights, ["kernel"], in_keras), "kernel", keras[0]),
        lambda variables: list(out_of_flax(variables, "kernel", keras[1]).values()),
    )


def _channels_last(weight):
    """[out, in, *k] to [*k, in, out]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _channels_first(kernel):
    """[*k, in, out] to [out, in, *k]."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _read(what, given, needed: Iterable[str], optional: Iterable[str]):
    """Returns the arrays of a layer by name; refuses an entry that is missing or unknown."""
    names = list(dict.fromkeys([*needed, *optional]))
    if not given or not {*needed} <= {*given} <= {*names}:
        raise ValueError(
            f"{_parts(what, needed, names)}, but {', '.join(given) or 'nothing'} is given; "
            "pass what belongs to this layer alone, by these names."
        )
    return {name: _array(given[name]) for name in names if name in given}


def _listed(what, weights, needed, names):
    """Returns the arrays of a list by name."""
    if not len(needed) <= len(weights) <= len(names):
        raise ValueError(
            f"{_parts(what, needed, names)}, but {len(weights)} arrays are given; "
            "pass what get_weights() returns of this layer, and give the layout the options of the layer."
        )
    return {name: _array(value) for name, value in zip(names, weights, strict=False)}


def _parts(what, needed, names):
    """Says what a layer has, and what it may have."""
    parts = {"has": [*needed], "may have": [name for name in names if name not in needed]}
    return f"{what} " + " and ".join(f"{verb} {', '.join(part)}" for verb, part in parts.items() if part)


def _one_shape(arrays):
    """Returns the shape of the arrays; refuses different ones."""
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({*shapes.values()}) != 1:
        raise ValueError(f"the arrays of a norm have one shape, but {shapes} are given; pass those of one layer.")
    return next(iter(shapes.values()))


def _array(value):
    """Returns an array of NumPy, in float32 if NumPy lacks its dtype."""
    if hasattr(value, "detach"):  # a tensor of PyTorch, perhaps a parameter, perhaps on another device
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _copies(arrays):
    """Returns copies of the arrays that there are: PyTorch trains in place, and JAX may keep the memory it is given."""
    return {name: np.array(array, order="C") for name, array in arrays.items() if array is not None}
