"""Which batch norms can go into the linear layer before or after them, and the arithmetic that puts them there.

In evaluation a batch norm is y = a x + s with a = gamma / sqrt(var + epsilon) and s = beta - mean a.  After a linear
layer that multiplies by a kernel K and adds b, it becomes part of that layer: kernel a K, bias a b + s.  Before one, it
becomes kernel K a, along the kernel's inputs, and bias b + K s; that is exact where every position of the output sees
all of s, which zero padding prevents.  Arrays are NumPy's, in float64.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn._core.dtypes import in_float64
from jaxbn._models.batch_norms import NormCall
from jaxbn._models.model import CONVOLUTIONS
from jaxbn.surgery import _exchange
from jaxbn.surgery._affine import affine_of

# A constant that went through a layer counts as a constant where it varies by no more than the rounding of a sum.
_ROUNDING = 1e-5


class LayerCall(NamedTuple):
    """A call of a batch norm or of a linear layer, as a trial run of the model saw it.

    Attributes:
      path: of the layer.
      index: number of this call among those of the layer.
      layer: the linen module, unbound, or the nnx module.
      norm: what a batch norm has, with shapes for arrays; None for a linear layer.
      kernel: shape and dtype of the kernel that a linear layer uses; None for a batch norm.
      x: shape and dtype of the inputs.
      y: shape and dtype of the output.
    """

    path: str
    index: int
    layer: Any
    norm: NormCall | None
    kernel: jax.ShapeDtypeStruct | None
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct

    @property
    def options(self) -> dict[str, Any]:
        """Settings of a batch norm; none of a linear layer."""
        return {} if self.norm is None else self.norm.options

    @property
    def mark(self) -> str:
        """What the call's values are called in the graph, after "in" and "out"."""
        return f"{self.path}#{self.index}"


class Match(NamedTuple):
    """A batch norm and the linear layer that takes it in.

    Attributes:
      norm: the call of the batch norm.
      linear: the call of the layer.
      before: whether the layer comes before the batch norm.
    """

    norm: LayerCall
    linear: LayerCall
    before: bool


def take_in(
    stored: Mapping[str, dict[str, Any]], pairs: list[Match], changed: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, tuple[np.ndarray, np.ndarray]] | str:
    """Folds the calls of one batch norm into the layers found for them.

    Args:
      stored: the arrays of all layers, by path.
      pairs: of the batch norm.
      changed: kernels and biases of layers that have taken in another batch norm already, by path.

    Returns:
      Kernels and biases of the layers concerned, by path; or why it would not be exact.
    """
    folded = {}
    for norm, linear, before in pairs:
        a, s = affine_of(stored[norm.path], norm.options["epsilon"])
        given = stored[linear.path]
        kernel, bias = changed.get(linear.path, (given["kernel"], given.get("bias")))
        kernel = in_float64(kernel)
        bias = np.zeros(_out_shape(linear, kernel)) if bias is None else in_float64(bias)
        result = (_into_outputs if before else _into_inputs)(linear, kernel, bias, a, s)
        if isinstance(result, str):
            return result
        folded[linear.path] = result
    return folded


def _into_outputs(linear, kernel, bias, a, s):
    """Returns a K and a b + s: the layer takes in the batch norm behind it."""
    along_outputs = a[:, None] if getattr(linear.layer, "transpose_kernel", False) else a
    return kernel * along_outputs, bias * a + s


def _into_inputs(linear, kernel, bias, a, s):
    """Returns K a and b + K s: the layer takes in the batch norm in front of it; or why that is not exact."""
    layer, rank = linear.layer, len(linear.x.shape)
    if not isinstance(layer, CONVOLUTIONS):
        if [axis % rank for axis in np.atleast_1d(getattr(layer, "axis", -1))] != [rank - 1]:
            return f"{linear.path} multiplies along other axes than that of the features"
        along_inputs = a.reshape(-1, *(1,) * (kernel.ndim - 1))
    elif getattr(layer, "transpose_kernel", False):
        along_inputs = a
    else:  # the inputs of a group are a row, which all outputs of the group share
        groups = getattr(layer, "feature_group_count", 1)
        along_inputs = np.repeat(a.reshape(groups, -1), kernel.shape[-1] // groups, axis=0).T
    constant = _through(linear, kernel, s).reshape(-1, *bias.shape)
    varies = abs(constant - constant[0]).max() > _ROUNDING * abs(constant).max()
    if varies or (s.any() and isinstance(layer, CONVOLUTIONS) and _pads_with_zeros(layer)):
        return f"{linear.path} pads with zeros, which its shift would change"
    return kernel * along_inputs, bias + constant.mean(0)


def _pads_with_zeros(layer):
    """Says whether some output of a convolution may see a zero instead of an input; the sample may be too lucky."""
    if {*np.atleast_1d(getattr(layer, "input_dilation", None) or 1)} != {1}:
        return True
    padding = layer.padding
    if isinstance(padding, str) and padding.upper() in ("CIRCULAR", "REFLECT"):
        return False
    transposed = not hasattr(layer, "feature_group_count")
    strides = {*np.atleast_1d(layer.strides or 1)} if transposed else {1}
    if {*np.atleast_1d(layer.kernel_size)} | strides == {1} and isinstance(padding, str):
        return False
    if isinstance(padding, str):
        return transposed or padding.upper() != "VALID"
    return transposed or bool(np.any(padding))


def _out_shape(linear, kernel):
    """Returns the shape of a layer's bias."""
    if not isinstance(linear.layer, CONVOLUTIONS):
        features = linear.layer.features if hasattr(linear.layer, "features") else linear.layer.out_features
        return tuple(np.atleast_1d(features))
    return (kernel.shape[-2 if getattr(linear.layer, "transpose_kernel", False) else -1],)


def _through(linear, kernel, s):
    """Returns what a layer without its bias makes of one example that is s everywhere."""
    positions = kernel.ndim - 2 if isinstance(linear.layer, CONVOLUTIONS) else 0
    shape = linear.x.shape[len(linear.x.shape) - 1 - positions :]
    dtype = jnp.promote_types(linear.kernel.dtype, jnp.float32)
    x = jnp.asarray(np.broadcast_to(s, (1, *shape)).astype(dtype))
    layer = _exchange.make_with({"use_bias": False, "dtype": None}, linear.layer)
    kernel = jnp.asarray(kernel.astype(dtype))
    with jax.default_matmul_precision("highest"):
        if isinstance(layer, flax.linen.Module):
            return np.asarray(layer.apply({"params": {"kernel": kernel}}, x))
        layer.kernel, layer.bias = nnx.Param(kernel), nnx.data(None)
        return np.asarray(layer(x))
