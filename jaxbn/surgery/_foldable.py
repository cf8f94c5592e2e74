"""Finds the linear layers that can absorb the batch norms of a model.

A layer absorbs a batch norm that comes right after it, or else one that comes right before it:

    after:   batch norm(layer(x)), where nothing else reads the layer's output;
    before:  layer(batch norm(x)), where nothing else reads the batch norm's output.

"Right" means that nothing but casts, copies and the like is in between.  Moreover

1. both treat the last axis as that of the features, and neither is in a loop (:func:`_check_batch_norm`), and
2. the layer's kernel can change without an effect elsewhere: the layer is called once, shares its arrays with no other,
   and uses the kernel that is stored (:meth:`Finder._check_kernel`).

All this follows from a trace of the model and not from its source, so it does not matter how the model is written.
Whether zero padding rules out a match depends on the values of the arrays: see :mod:`jaxbn.surgery._kernels`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp

from jaxbn._core import checks
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import NormCall, evaluated, kernel_of, norm_of
from jaxbn._models.intercept import evaluation
from jaxbn._models.model import BATCH_NORMS, LINEAR, Model, arrays_of, modules, shapes, sharing


class TracedNorm(NamedTuple):
    """A call of a batch norm in the trace of a model.

    Attributes:
      path: of the layer.
      mark: the call's name in the graph, where its input is marked "in <name>" and its output "out <name>".
      call: inputs, arrays and options, with shapes for arrays.
      y: shape and dtype of the output.
    """

    path: str
    mark: str
    call: NormCall
    y: jax.ShapeDtypeStruct


class TracedLinear(NamedTuple):
    """A call of a convolution or dense layer in the trace of a model.

    Attributes:
      path: of the layer.
      mark: the call's name in the graph, as for a batch norm.
      layer: the linen module, unbound, or the nnx module.
      kernel: shape and dtype of the kernel that the call uses.
      x: shape and dtype of the input.
    """

    path: str
    mark: str
    layer: Any
    kernel: jax.ShapeDtypeStruct
    x: jax.ShapeDtypeStruct


TracedCall = TracedNorm | TracedLinear


class Match(NamedTuple):
    """A call of a batch norm and the linear layer that can absorb it.

    Attributes:
      norm: the call of the batch norm.
      linear: the call of the layer.
      layer_comes_first: whether the batch norm comes after the layer.
    """

    norm: TracedNorm
    linear: TracedLinear
    layer_comes_first: bool


class CannotFold(Exception):
    """The reason why no layer can absorb a batch norm."""


class Finder:
    """Finds the linear layers that can absorb batch norms, in one trace of the model."""

    def __init__(self, model: Model, sample: Any, call: Callable):
        self.arrays = arrays_of(model)
        self.calls, self._graph = trace_layers(model, sample, call)
        self._marked = self._graph.marked()
        self._by_mark = {traced.mark: traced for traced in self.calls}
        self._sharing = sharing(model)

    def norms(self) -> dict[str, NormCall]:
        """Returns the first call of each batch norm, by path."""
        norms = {}
        for traced in self.calls:
            if isinstance(traced, TracedNorm):
                norms.setdefault(traced.path, traced.call)
        return norms

    def matches(self, path: str) -> list[Match]:
        """Returns a match for each call of a batch norm.

        Raises:
          CannotFold: if a call has none.
        """
        calls = [traced for traced in self.calls if traced.path == path]
        # nn.share_scope gives two layers one path.
        if any(isinstance(traced, TracedLinear) for traced in calls):
            raise CannotFold("it has the same path as a linear layer, and so the same arrays")
        matches = [self._match(traced) for traced in calls if isinstance(traced, TracedNorm)]
        # Two calls next to one layer would scale its kernel twice.
        if len({match.linear.path for match in matches}) < len(matches):
            raise CannotFold("it is called more than once next to the same layer")
        return matches

    def _match(self, norm: TracedNorm) -> Match:
        _check_batch_norm(norm, self.arrays[norm.path])
        try:
            linear = self._layer_before(norm)
            self._check_kernel(linear)
            return Match(norm, linear, layer_comes_first=True)
        except CannotFold as error:
            not_before = error
        try:
            linear = self._layer_after(norm)
            self._check_kernel(linear)
            return Match(norm, linear, layer_comes_first=False)
        except CannotFold as not_after:
            raise CannotFold(f"before it, {not_before}; after it, {not_after}") from None

    def _layer_before(self, norm: TracedNorm) -> TracedLinear:
        """Returns the linear layer whose output only this batch norm reads, going up from its input."""
        marked = self._marked.get(f"in {norm.mark}")
        if marked is None:
            raise CannotFold("a loop or a branch keeps its input")
        (value,) = marked.inputs
        while True:
            operation = self._graph.maker(value)
            is_shared = len(self._graph.readers(value)) > 1
            if operation is None:  # an argument of the model, or a constant
                raise CannotFold("its input is the model's input, with no layer before it")
            # Goes past casts and the like, if no one else reads their result.
            if dataflow.hands_on(operation) and not is_shared:
                (value,) = operation.inputs
                continue
            traced = self._call_marked("out", operation)
            if traced is None:
                nearest = self._nearest_layer(operation)
                raise CannotFold(
                    f"{operation.name} stands between it and {nearest}" if nearest else f"{operation.name} makes it"
                )
            if isinstance(traced, TracedNorm):
                raise CannotFold(f"it follows another batch norm, {traced.path}")
            if is_shared:
                raise CannotFold(f"the output of {traced.path} is also used elsewhere")
            return traced

    def _layer_after(self, norm: TracedNorm) -> TracedLinear:
        """Returns the linear layer that alone reads the output of this batch norm, going down from it."""
        marked = self._marked.get(f"out {norm.mark}")
        if marked is None:
            raise CannotFold("a loop or a branch keeps its output")
        (value,) = marked.outputs
        while True:
            operation, *others = self._graph.readers(value)
            if others:
                raise CannotFold("its output is used more than once")
            if operation is None:  # the model returns it
                raise CannotFold("its output is the model's")
            if dataflow.hands_on(operation):
                (value,) = operation.outputs
                continue
            traced = self._call_marked("in", operation)
            if traced is None:
                raise CannotFold(f"{operation.name} follows")
            if isinstance(traced, TracedNorm):
                raise CannotFold("another batch norm follows")
            return traced

    def _call_marked(self, side: str, operation: dataflow.Operation) -> TracedCall | None:
        """Returns the call whose input ("in") or output ("out") this operation marks."""
        if operation.mark is None or not operation.mark.startswith(f"{side} "):
            return None
        return self._by_mark[operation.mark.removeprefix(f"{side} ")]

    def _check_kernel(self, linear: TracedLinear) -> None:
        """Raises CannotFold if a new kernel in this layer would change more than this call."""
        number = sum(traced.path == linear.path for traced in self.calls)
        if number > 1:
            raise CannotFold(f"{linear.path} is shared: it is called {number} times")
        if linear.path in self._sharing:
            raise CannotFold(f"{linear.path} shares its arrays with {self._sharing[linear.path]}")
        if getattr(linear.layer, "batch_dims", None) or getattr(linear.layer, "batch_axis", None):
            raise CannotFold(f"{linear.path} has a kernel for each entry of an axis")
        # In a loop over layers, the stored arrays have one more axis than those of a call.
        if linear.kernel.shape != self.arrays[linear.path]["kernel"].shape:
            raise CannotFold(f"{linear.path} runs in a loop or under vmap, with a kernel for each turn")
        if not self._uses_stored_kernel(linear):
            raise CannotFold(f"{linear.path} does not use its kernel as it is stored")

    def _uses_stored_kernel(self, linear: TracedLinear) -> bool:
        """Tests whether the kernel is an argument of the model's program that only this layer reads.

        nn.WeightNorm, for example, computes the kernel of a layer from the one that is stored.
        """
        barrier = self._graph.maker(self._marked[f"out {linear.mark}"].inputs[0])  # see trace_layers
        if barrier is None:
            return False
        _, kernel = barrier.inputs
        while (operation := self._graph.maker(kernel)) is not None and dataflow.hands_on(operation):
            (kernel,) = operation.inputs
        is_argument = operation is None
        readers = self._graph.readers(kernel)  # the layer and the barrier, if no one else
        return is_argument and len(readers) == 2

    def _nearest_layer(self, operation: dataflow.Operation | None) -> str | None:
        """Returns the path of the nearest layer before an operation, for messages."""
        while operation is not None:
            traced = self._call_marked("out", operation)
            if traced is not None:
                return traced.path
            makers = [self._graph.maker(value) for value in operation.inputs]
            operation = next((maker for maker in makers if maker is not None), None)
        return None


def _check_batch_norm(norm: TracedNorm, arrays: dict[str, Any]) -> None:
    """Raises CannotFold for a batch norm that no linear layer can absorb."""
    if norm.call.stats.mean.shape != arrays["mean"].shape:
        raise CannotFold("it runs in a loop or under vmap, with arrays for each turn")
    shape, axis = norm.call.x.shape, norm.call.options["axis"]
    if checks.feature_axes(shape, axis) != (len(shape) - 1,):
        raise CannotFold(f"its features are on axis {axis}, those of a linear layer on the last one")


def trace_layers(model: Model, sample: Any, call: Callable) -> tuple[list[TracedCall], dataflow.Graph]:
    """Traces a model in evaluation.

    Returns:
      The calls of batch norms and linear layers in the order of execution, and the data flow, in which the inputs and
      outputs of these calls are marked.
    """
    calls: list[TracedCall] = []
    nnx_layers = modules(model)

    def handle_norm(intercepted, mark):
        norm = norm_of(intercepted)
        norm = norm._replace(x=jnp.asarray(norm.x))
        y = evaluated(norm._replace(x=dataflow.mark(norm.x, f"in {mark}")))
        calls.append(TracedNorm(intercepted.path, mark, norm.without_arrays(), shapes(y)))
        return y

    def handle_linear(intercepted, mark):
        layer = intercepted.layer
        x, proceed = _input_of(intercepted)
        y = proceed(dataflow.mark(x, f"in {mark}"))
        # The barrier takes the kernel along as its second input, so that the graph shows where the kernel comes from.
        y, kernel = jax.lax.optimization_barrier((y, kernel_of(layer)))
        # The record outlives the trace.  A bound linen module, and an nnx module that is being traced, hold tracers.
        layer = layer.copy(parent=None) if isinstance(layer, flax.linen.Module) else nnx_layers[intercepted.path]
        calls.append(TracedLinear(intercepted.path, mark, layer, *shapes((kernel, x))))
        return y

    def handle(intercepted):
        mark = f"{intercepted.path}#{intercepted.index}"
        handle_kind = handle_norm if isinstance(intercepted.layer, BATCH_NORMS) else handle_linear
        return dataflow.mark(handle_kind(intercepted, mark), f"out {mark}"), None

    evaluate = evaluation(model, call, handle, (*BATCH_NORMS, *LINEAR))
    return calls, dataflow.trace(evaluate, model.arrays, sample)


def _input_of(intercepted: Any) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns the input of a linear layer, and the layer as a function of it."""
    args, kwargs = intercepted.args, intercepted.kwargs
    if args:
        return jnp.asarray(args[0]), lambda x: intercepted.proceed(x, *args[1:], **kwargs)
    others = {name: value for name, value in kwargs.items() if name != "inputs"}
    return jnp.asarray(kwargs["inputs"]), lambda x: intercepted.proceed(x, **others)
