"""The layouts of layers with a kernel: convolutions and dense layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.interop._layout import Layout, to_flax_order, to_torch_order
from jaxbn.interop._weights import Arrays, Variables, copies, flat, nested, read, read_keras


class Moves(NamedTuple):
    """How to move the values of one array from another framework to Flax, and back."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    from_flax: Callable[[np.ndarray], np.ndarray]


_SAME = Moves(np.asarray, np.asarray)
_CONV_NDIMS = (3, 4, 5)  # one to three spatial axes, and those of inputs and outputs


def conv_layout() -> Layout:
    """Returns the layout of ``Conv`` with one to three spatial axes k, and any number of groups.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> interop.conv_layout().to_torch({'params': {'kernel': np.ones((3, 5, 2, 8))}})['weight'].shape
    (8, 2, 3, 5)

    Returns:
      The layout, of a kernel and, if the layer has one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
      https://keras.io/api/layers/convolution_layers/convolution2d
    """
    return _layout("a convolution", _CONV_NDIMS, torch_kernel=Moves(_channels_last, _channels_first))


def depthwise_conv_layout(*, multiplier: int = 1) -> Layout:
    """Returns the layout of ``Conv`` with as many groups as input features, which Keras stores in another shape.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.depthwise_conv_layout(multiplier=2)
    >>> layout.from_keras([np.ones((3, 3, 4, 2))])['params']['kernel'].shape
    (3, 3, 1, 8)

    Args:
      multiplier: output features for each input feature; in Keras, ``depth_multiplier``.

    Returns:
      The layout, of a kernel and, if the layer has one, a bias of shape [in*multiplier].

    References:
      https://keras.io/api/layers/convolution_layers/depthwise_convolution2d
    """

    def from_keras(kernel: np.ndarray) -> np.ndarray:
        if kernel.shape[-1] != multiplier:
            raise ValueError(
                f"a depthwise kernel of shape {kernel.shape} in Keras has the multiplier {kernel.shape[-1]}, "
                f"not {multiplier}; use depthwise_conv_layout(multiplier={kernel.shape[-1]})."
            )
        # Flax orders the outputs by their input feature, and so does Keras, which has two axes for them.
        return kernel.reshape(*kernel.shape[:-2], 1, -1)

    def to_keras(kernel: np.ndarray) -> np.ndarray:
        if kernel.shape[-2] != 1 or kernel.shape[-1] % multiplier:
            raise ValueError(
                f"a kernel of shape {kernel.shape} in Flax is not depthwise with the multiplier {multiplier}, "
                f"which has the shape [*k, 1, in*{multiplier}]; use another multiplier, or conv_layout()."
            )
        return kernel.reshape(*kernel.shape[:-2], -1, multiplier)

    return _layout(
        "a depthwise convolution",
        _CONV_NDIMS,
        torch_kernel=Moves(_channels_last, _channels_first),
        keras_kernel=Moves(from_keras, to_keras),
    )


def conv_transpose_layout(*, transpose_kernel: bool = False) -> Layout:
    """Returns the layout of ``ConvTranspose``, whose kernel is reversed along each spatial axis k.

    PyTorch and Keras store the kernel of the convolution whose gradient the layer computes; Flax's layer is itself a
    convolution, of inputs with zeros in between.  It has no groups: grouped weights are refused if they have a bias;
    without one, they look like those of fewer features.  PyTorch's dilation d, padding p and output_padding q are
    ``kernel_dilation=d`` and ``padding=[(d*(k - 1) - p, d*(k - 1) - p + q), ...]`` in Flax, with a pair for each axis.
    Transposed convolutions must be in ``layouts``, because their weights look like those of a convolution.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.conv_transpose_layout()
    >>> layout.from_torch({'weight': np.ones((8, 4, 3, 3)), 'bias': np.zeros(4)})['params']['kernel'].shape
    (3, 3, 8, 4)

    Args:
      transpose_kernel: as in Flax's layer; if True, its kernel is as in Keras, ``[*k, out, in]`` and not reversed.

    Returns:
      The layout, of a kernel and, if the layer has one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html
      https://keras.io/api/layers/convolution_layers/convolution2d_transpose
    """

    def reverse(kernel: np.ndarray) -> np.ndarray:
        """From Keras's kernel to Flax's, and back."""
        if transpose_kernel:
            return kernel
        # The transpose of a convolution is a convolution with the reversed kernel, inputs and outputs exchanged.
        spatial_axes = tuple(range(kernel.ndim - 2))
        return np.flip(kernel, spatial_axes).swapaxes(-1, -2)

    return _layout(
        "a transposed convolution without groups",
        _CONV_NDIMS,
        torch_kernel=Moves(
            to_flax=lambda weight: reverse(_channels_last(weight)),
            from_flax=lambda kernel: _channels_first(reverse(kernel)),
        ),
        keras_kernel=Moves(reverse, reverse),
        features_axis=-2 if transpose_kernel else -1,
    )


def dense_layout(*, flattened: Sequence[int] | None = None, unflattened: Sequence[int] | None = None) -> Layout:
    """Returns the layout of ``Dense``, and of ``nnx.Linear``.

    Flattening an image orders its features as ``[C, *k]`` in PyTorch, and as ``[*k, C]`` in Flax and Keras.  So the
    inputs of a dense layer after a flattening have another order, and the outputs of one before an unflattening.  Such
    layers must be in ``layouts``, and so must norms on flat features, with :func:`batch_norm_layout`: their weights do
    not show this.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.dense_layout(flattened=(2, 3))
    >>> layout.from_torch({'weight': np.arange(6.)[None]})['params']['kernel'].ravel()
    array([0., 3., 1., 4., 2., 5.])

    Args:
      flattened: the shape ``[C, *k]`` of one example in PyTorch before the flattening that comes before this layer;
        layers in between may act on each feature separately, such as norms and activations.
      unflattened: the shape ``[C, *k]`` of one example in PyTorch after the unflattening that comes after this layer.

    Returns:
      The layout, of a kernel and, if the layer has one, a bias of shape [out].

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html
      https://keras.io/api/layers/core_layers/dense
    """

    def outputs_to_flax(array: np.ndarray) -> np.ndarray:
        return to_flax_order(array, unflattened, "unflattened", axis=-1)

    def outputs_to_torch(array: np.ndarray) -> np.ndarray:
        return to_torch_order(array, unflattened, "unflattened", axis=-1)

    return _layout(
        "a dense layer",
        (2,),
        torch_kernel=Moves(
            to_flax=lambda weight: outputs_to_flax(to_flax_order(weight.T, flattened, "flattened")),
            from_flax=lambda kernel: outputs_to_torch(to_torch_order(kernel, flattened, "flattened")).T,
        ),
        torch_bias=Moves(outputs_to_flax, outputs_to_torch),
    )


def _layout(
    what: str,
    ndims: tuple[int, ...],
    *,
    torch_kernel: Moves,
    torch_bias: Moves = _SAME,
    keras_kernel: Moves = _SAME,
    features_axis: int = -1,
) -> Layout:
    """Returns the layout of a layer with a kernel and perhaps a bias.

    Args:
      what: the layer, for errors.
      ndims: numbers of axes that its kernel may have.
      torch_kernel: between the kernel in PyTorch and in Flax.
      torch_bias: between the bias in PyTorch and in Flax.
      keras_kernel: between the kernel in Keras and in Flax; the bias is the same.
      features_axis: that of the output features in Flax's kernel.

    Returns:
      The layout.
    """

    def check(kernel: np.ndarray, bias: np.ndarray | None) -> None:
        features = kernel.shape[features_axis]
        if bias is not None and bias.shape != (features,):
            raise ValueError(
                f"{what} with a kernel of shape {kernel.shape} in Flax has {features} features, but its bias has the "
                f"shape {bias.shape}; pass kernel and bias of one layer, of this kind."
            )

    def check_ndim(kernel: np.ndarray) -> None:
        if kernel.ndim not in ndims:
            raise ValueError(
                f"the kernel of {what} must have {' or '.join(map(str, ndims))} axes, got the shape {kernel.shape}; "
                "use the layout of the layer that it comes from."
            )

    def to_flax(weight: np.ndarray, bias: np.ndarray | None, kernel_moves: Moves, bias_moves: Moves) -> Variables:
        check_ndim(weight)
        kernel = kernel_moves.to_flax(weight)
        check(kernel, bias)
        if bias is not None:
            bias = bias_moves.to_flax(bias)
        return nested(copies({"params/kernel": kernel, "params/bias": bias}))

    def from_flax(
        variables: Mapping[str, Any], kernel_moves: Moves, bias_moves: Moves
    ) -> tuple[np.ndarray, np.ndarray | None]:
        arrays = read(f"{what} in Flax", flat(variables), ["params/kernel"], ["params/bias"])
        kernel, bias = arrays["params/kernel"], arrays.get("params/bias")
        check_ndim(kernel)
        check(kernel, bias)
        if bias is not None:
            bias = bias_moves.from_flax(bias)
        return kernel_moves.from_flax(kernel), bias

    def from_torch(entries: Mapping[str, Any]) -> Variables:
        arrays = read(f"{what} in PyTorch", entries, ["weight"], ["bias"])
        return to_flax(arrays["weight"], arrays.get("bias"), torch_kernel, torch_bias)

    def to_torch(variables: Mapping[str, Any]) -> Arrays:
        weight, bias = from_flax(variables, torch_kernel, torch_bias)
        return copies({"weight": weight, "bias": bias})

    def from_keras(weights: Sequence[Any] | Mapping[str, Any]) -> Variables:
        arrays = read_keras(f"{what} in Keras", weights, ["kernel"], ["kernel", "bias"])
        return to_flax(arrays["kernel"], arrays.get("bias"), keras_kernel, _SAME)

    def to_keras(variables: Mapping[str, Any]) -> list[np.ndarray]:
        kernel, bias = from_flax(variables, keras_kernel, _SAME)
        return list(copies({"kernel": kernel, "bias": bias}).values())

    return Layout(from_torch, to_torch, from_keras, to_keras)


def _channels_last(weight: np.ndarray) -> np.ndarray:
    """[out, in, *k] to [*k, in, out]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _channels_first(kernel: np.ndarray) -> np.ndarray:
    """[*k, in, out] to [out, in, *k]."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))
