"""Which batch norms can go into the linear layer before or after them, and the arithmetic that puts them there.

In evaluation a batch norm is y = a x + s with a = gamma / sqrt(var + epsilon) and s = beta - mean a.  After a linear
layer that multiplies by a kernel K and adds b, it becomes part of that layer: kernel a K, bias a b + s.  Before one, it
becomes kernel K a, along the kernel's inputs, and bias b + K s; that is exact where every position of the output sees
all of s, which zero padding prevents.  Arrays are NumPy's, in float64.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn._core import checks
from jaxbn._core.dtypes import in_float64
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import Norm, evaluated, kernel_of, norm_of
from jaxbn._models.intercept import evaluation
from jaxbn._models.model import BATCH_NORMS, CONVOLUTIONS, LINEAR, Model, arrays_of, modules, shapes, sharing
from jaxbn.surgery import _exchange

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
    norm: Norm | None
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


class Pair(NamedTuple):
    """A batch norm and the linear layer that takes it in.

    Attributes:
      norm: the call of the batch norm.
      linear: the call of the layer.
      before: whether the layer comes before the batch norm.
    """

    norm: LayerCall
    linear: LayerCall
    before: bool


def trace_layers(model: Model, sample: Any, call: Callable) -> tuple[list[LayerCall], dataflow.Graph]:
    """Returns the calls of batch norms and linear layers in order of execution, and what flows between them."""
    calls, layers = [], modules(model)

    def handle(one):
        mark = f"{one.path}#{one.index}"
        norm = kernel = None
        if isinstance(one.layer, BATCH_NORMS):
            norm = norm_of(one)
            x = jnp.asarray(norm.x)
            y = evaluated(norm._replace(x=dataflow.mark(x, f"in {mark}")))
            norm = norm.without_arrays()
        else:
            x = jnp.asarray(one.args[0] if one.args else one.kwargs["inputs"])
            marked = dataflow.mark(x, f"in {mark}")
            y = one.proceed(marked, *one.args[1:], **{n: v for n, v in one.kwargs.items() if n != "inputs"})
            # Passes beside the output through one operation, which shows where the kernel comes from.
            y, kernel = jax.lax.optimization_barrier((y, kernel_of(one.layer)))
        # Of an nnx model, the module itself: the one that is called here holds tracers.
        layer = one.layer.copy(parent=None) if isinstance(one.layer, flax.linen.Module) else layers[one.path]
        calls.append(LayerCall(one.path, one.index, layer, norm, *shapes((kernel, x, y))))
        return dataflow.mark(y, f"out {mark}"), None

    evaluate = evaluation(model, call, handle, (*BATCH_NORMS, *LINEAR))
    return calls, dataflow.trace(evaluate, model.arrays, sample)


class Finder:
    """Finds out which layer can take a batch norm in."""

    def __init__(self, model: Model, sample: Any, call: Callable):
        self.arrays = arrays_of(model)
        self.calls, self._graph = trace_layers(model, sample, call)
        self._marked = self._graph.marked()
        self._by_mark = {one.mark: one for one in self.calls}
        self._sharing = sharing(model)

    def norms(self) -> dict[str, Norm]:
        """Returns what the batch norms have, by path, as their first calls show it."""
        norms = {}
        for one in self.calls:
            if one.norm is not None:
                norms.setdefault(one.path, one.norm)
        return norms

    def pairs(self, path: str) -> list[Pair] | str:
        """Returns the layers that take in each call of a batch norm, or why there are none."""
        found = []
        for one in (one for one in self.calls if one.path == path):
            if one.norm is None or one.norm.stats.mean.shape != self.arrays[path]["mean"].shape:
                return "it runs in a loop or under vmap, with arrays for each turn"
            axis = one.options["axis"]
            if checks.feature_axes(one.x.shape, axis) != (len(one.x.shape) - 1,):
                return f"its features are on axis {axis}, those of a linear layer on the last one"
            before = self._before(one)
            if isinstance(before, LayerCall):
                found.append(Pair(one, before, before=True))
                continue
            after = self._after(one)
            if not isinstance(after, LayerCall):
                return f"before it, {before}; after it, {after}"
            found.append(Pair(one, after, before=False))
        if len({pair.linear.path for pair in found}) < len(found):
            return "it is called more than once beside the same layer"
        return found

    def _before(self, norm):
        """Returns the layer whose output only this batch norm reads, or why there is none."""
        if f"in {norm.mark}" not in self._marked:
            return "a loop or a branch keeps its input"
        value = self._marked[f"in {norm.mark}"].inputs[0]
        while True:
            operation, shared = self._graph.maker(value), len(self._graph.readers(value)) > 1
            if operation is None:
                return "its input is the model's input, with no layer before it"
            if dataflow.hands_on(operation) and not shared:
                value = operation.inputs[0]
                continue
            linear = self._linear(operation.mark, "out ")
            if linear is None and operation.mark is not None:
                return f"it follows another batch norm, {operation.mark.removeprefix('out ').rpartition('#')[0]}"
            if linear is None:
                nearest = self._nearest(operation)
                return f"{operation.name} stands between it and {nearest}" if nearest else f"{operation.name} makes it"
            if shared:
                return f"the output of {linear.path} is also used elsewhere"
            return self._usable(linear)

    def _after(self, norm):
        """Returns the layer that is the only reader of this batch norm, or why there is none."""
        if f"out {norm.mark}" not in self._marked:
            return "a loop or a branch keeps its output"
        value = self._marked[f"out {norm.mark}"].outputs[0]
        while True:
            operation, *others = self._graph.readers(value)
            if others:
                return "its output is used more than once"
            if operation is None:
                return "its output is the model's"
            if dataflow.hands_on(operation):
                value = operation.outputs[0]
                continue
            linear = self._linear(operation.mark, "in ")
            if linear is None and operation.mark is not None:
                return "another batch norm follows"
            return f"{operation.name} follows" if linear is None else self._usable(linear)

    def _linear(self, mark, side):
        """Returns the call of a linear layer whose value an operation marks."""
        found = self._by_mark.get(mark.removeprefix(side)) if mark and mark.startswith(side) else None
        return found if found is not None and found.norm is None else None

    def _usable(self, linear):
        """Returns the layer if its kernel may change, or why not."""
        calls = sum(one.path == linear.path for one in self.calls)
        if calls > 1:
            return f"{linear.path} is shared: it is called {calls} times"
        if linear.path in self._sharing:
            return f"{linear.path} shares its arrays with {self._sharing[linear.path]}"
        if getattr(linear.layer, "batch_dims", None) or getattr(linear.layer, "batch_axis", None):
            return f"{linear.path} has a kernel for each entry of an axis"
        if linear.kernel.shape != self.arrays[linear.path]["kernel"].shape:
            return f"{linear.path} runs in a loop or under vmap, with a kernel for each turn"
        return linear if self._is_used_as_stored(linear) else f"{linear.path} does not use its kernel as it is stored"

    def _is_used_as_stored(self, linear):
        """Says whether the kernel is an argument of the program, which nothing reads but the layer, once."""
        beside = self._graph.maker(self._marked[f"out {linear.mark}"].inputs[0])
        if beside is None:
            return False
        _, value = beside.inputs
        while (operation := self._graph.maker(value)) is not None and dataflow.hands_on(operation):
            value = operation.inputs[0]
        readers = self._graph.readers(value)
        return operation is None and len(readers) == 2

    def _nearest(self, operation):
        """Returns the path of the layer that an operation gets its first input from, over others perhaps."""
        while operation is not None:
            if operation.mark and operation.mark.startswith("out "):
                return self._by_mark[operation.mark.removeprefix("out ")].path
            operation = next(filter(None, map(self._graph.maker, operation.inputs)), None)
        return None


def fold(
    stored: Mapping[str, dict[str, Any]], pairs: list[Pair], changed: Mapping[str, tuple[np.ndarray, np.ndarray]]
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


def affine_of(arrays: Mapping[str, Any], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scale a and the shift s that a batch norm is in evaluation, in float64, shape [C]."""
    arrays = {name: in_float64(value) for name, value in arrays.items()}
    a = arrays.get("scale", 1.0) / np.sqrt(arrays["var"] + epsilon)
    return a, arrays.get("bias", 0.0) - arrays["mean"] * a


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
