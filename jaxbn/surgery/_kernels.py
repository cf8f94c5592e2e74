"""Computes the arrays of a linear layer that absorbs a batch norm.

In evaluation, a batch norm is y = a x + s, with a = scale / sqrt(var + epsilon) and s = bias - mean a.  Right after a
linear layer K x + b, it becomes part of it:

    a (K x + b) + s = (a K) x + (a b + s).

Right before one,

    K (a x + s) + b = (K a) x + (b + K s),

where "K s" is the layer's response to an input that is s everywhere.  It is a bias only if it is the same at all
positions.  Zero padding prevents that: at the border, the layer sees zeros in place of s.

Arrays are NumPy's, in float64.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn._core.dtypes import in_float64
from jaxbn._models.model import CONVOLUTIONS, LINEAR
from jaxbn.surgery._affine import affine_of
from jaxbn.surgery._foldable import CannotFold, Match, TracedLinear
from jaxbn.surgery._new_layers import make_with

# Responses to a constant, computed in float32, count as equal if they differ by no more than the rounding of a sum.
_ROUNDING = 1e-5

KernelAndBias = tuple[np.ndarray, np.ndarray]


def take_in(
    matches: list[Match], arrays: Mapping[str, dict[str, Any]], folded: Mapping[str, KernelAndBias]
) -> dict[str, KernelAndBias]:
    """Folds all calls of one batch norm into their layers.

    Args:
      matches: of the batch norm.
      arrays: those of all layers of the model, by path.
      folded: kernels and biases of layers that have absorbed another batch norm already, by path.

    Returns:
      The new kernels and biases, by path.

    Raises:
      CannotFold: if it would not be exact.
    """
    new = {}
    for norm, linear, layer_comes_first in matches:
        a, s = affine_of(arrays[norm.path], norm.call.options["epsilon"])
        stored = arrays[linear.path]
        kernel, bias = folded.get(linear.path, (stored["kernel"], stored.get("bias")))
        kernel = in_float64(kernel)
        bias = np.zeros(_bias_shape(linear, kernel)) if bias is None else in_float64(bias)
        if layer_comes_first:
            new[linear.path] = _take_in_after(linear, kernel, bias, a, s)
        else:
            new[linear.path] = _take_in_before(linear, kernel, bias, a, s)
    return new


def _take_in_after(
    linear: TracedLinear, kernel: np.ndarray, bias: np.ndarray, a: np.ndarray, s: np.ndarray
) -> KernelAndBias:
    """Returns a K and a b + s."""
    # Outputs are the last axis of a kernel, [..., in, out], but with transpose_kernel it is [..., out, in].
    per_output = a[:, None] if _is_transposed(linear) else a
    return per_output * kernel, a * bias + s


def _take_in_before(
    linear: TracedLinear, kernel: np.ndarray, bias: np.ndarray, a: np.ndarray, s: np.ndarray
) -> KernelAndBias:
    """Returns K a and b + K s; raises CannotFold if K s is not the same at all positions."""
    per_input = _per_input(linear, kernel, a)
    response = _response(linear, kernel, s).reshape(-1, *bias.shape)  # one row for each position
    varies = abs(response - response[0]).max() > _ROUNDING * abs(response).max()
    # A response that does not vary is not enough: the sample may have a size that this layer need not pad.
    may_pad = isinstance(linear.layer, CONVOLUTIONS) and _may_pad_with_zeros(linear.layer)
    if varies or (s.any() and may_pad):
        raise CannotFold(f"{linear.path} pads with zeros, which its shift would change")
    return kernel * per_input, bias + response.mean(0)


def _per_input(linear: TracedLinear, kernel: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Returns the factors a of the inputs in a shape that broadcasts with the kernel."""
    layer = linear.layer
    if not isinstance(layer, CONVOLUTIONS):  # a kernel [in, *out], or of other axes than the features
        ndim = len(linear.x.shape)
        if [axis % ndim for axis in np.atleast_1d(getattr(layer, "axis", -1))] != [ndim - 1]:
            raise CannotFold(f"{linear.path} multiplies along other axes than that of the features")
        return a.reshape(-1, *(1,) * (kernel.ndim - 1))
    if _is_transposed(linear):  # [..., out, in]
        return a
    # [..., in/groups, out]: outputs of one group share its in/groups inputs.
    groups = getattr(layer, "feature_group_count", 1)
    return np.repeat(a.reshape(groups, -1), kernel.shape[-1] // groups, axis=0).T


def _response(linear: TracedLinear, kernel: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Returns the layer's output, without its bias, for one example that is s everywhere."""
    positions = kernel.ndim - 2 if isinstance(linear.layer, CONVOLUTIONS) else 0
    shape = linear.x.shape[len(linear.x.shape) - 1 - positions :]
    dtype = jnp.promote_types(linear.kernel.dtype, jnp.float32)
    x = jnp.asarray(np.broadcast_to(s, (1, *shape)).astype(dtype))
    weights = jnp.asarray(kernel.astype(dtype))
    layer = make_with({"use_bias": False, "dtype": None}, linear.layer)
    # The call of Flax's layer, as it was traced; that of a subclass may compute more.
    call: Any = next(kind for kind in type(layer).__mro__ if kind in LINEAR).__call__
    with jax.default_matmul_precision("highest"):
        if isinstance(layer, flax.linen.Module):
            return np.asarray(layer.apply({"params": {"kernel": weights}}, x, method=call))
        layer.kernel, layer.bias = nnx.Param(weights), nnx.data(None)
        return np.asarray(call(layer, x))


def _may_pad_with_zeros(layer: Any) -> bool:
    """Tests whether a convolution may see a zero in place of an input, at inputs of some size."""
    if _not_all_ones(getattr(layer, "input_dilation", None)):
        return True  # the zeros are between the inputs
    is_transposed = isinstance(layer, flax.linen.ConvTranspose | nnx.ConvTranspose)
    if not isinstance(layer.padding, str):
        return is_transposed or bool(np.any(layer.padding))
    padding = layer.padding.upper()
    if padding in ("CIRCULAR", "REFLECT"):
        return False
    if not _not_all_ones(layer.kernel_size) and not (is_transposed and _not_all_ones(layer.strides)):
        return False  # an output reads a single input, so a string asks for no padding
    # A transposed convolution has zeros between and around its inputs, also where padding is "VALID".
    return is_transposed or padding != "VALID"


def _not_all_ones(sizes: Any) -> bool:
    """Tests whether sizes, which may be one number, or None for 1, have an entry that is not 1."""
    return sizes is not None and bool(np.any(np.asarray(sizes) != 1))


def _bias_shape(linear: TracedLinear, kernel: np.ndarray) -> tuple[int, ...]:
    layer = linear.layer
    if isinstance(layer, CONVOLUTIONS):
        return (kernel.shape[-2 if _is_transposed(linear) else -1],)
    features = layer.features if hasattr(layer, "features") else layer.out_features
    return tuple(np.atleast_1d(features))


def _is_transposed(linear: TracedLinear) -> bool:
    """Tests whether the kernel's last axes are [out, in]."""
    return getattr(linear.layer, "transpose_kernel", False)
