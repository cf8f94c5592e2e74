"""Folding: the search for a linear layer that can take in a batch norm, and the new model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp

from jaxbn._core import checks
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import NormCall, evaluated, kernel_of, norm_of
from jaxbn._models.intercept import call_model, evaluation
from jaxbn._models.model import BATCH_NORMS, LINEAR, Model, arrays_of, modules, shapes, sharing, split
from jaxbn.surgery import _kernels
from jaxbn.surgery._exchange import NewLayer, make_affine, make_with
from jaxbn.surgery._kernels import LayerCall, Match
from jaxbn.surgery._operation import Layers, Surgery, must_be_operable, operate, select


def fold(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
) -> Surgery:
    """Puts batch norms into the convolution or dense layer before them, or after them where that is exact.

    Before: K' = a K, b' = a b + s, with a = scale / sqrt(var + epsilon) and s = bias - mean a.  After:
    K' = K a, b' = b + K s, which is exact for dense layers, and for convolutions that do not pad with zeros.  Pairs
    are found from what flows where when the model runs.  The new model can be evaluated only, and costs what it would
    without a norm.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.relu])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.fold(net, net.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jnp.shape, done.variables)
    {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 4)}}}

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them, all of which must fold; None for those that can.

    Returns:
      The new model; ``kept`` lists the batch norms that cannot be folded, with the reason.

    Raises:
      ValueError: if a layer that was asked for, or every layer, cannot be folded; the message says why.
    """
    before = split(model, variables)
    finder = Finder(before, sample, call)
    norms = finder.norms()
    must_be_operable(before, norms, sample, call)
    arrays, new, kept = {}, {}, {}  # arrays of linear layers, which may take in a batch norm on either side
    for path in select(norms, layers):
        pairs = finder.pairs(path)
        folded = pairs if isinstance(pairs, str) else _kernels.take_in(finder.arrays, pairs, arrays)
        if isinstance(pairs, str) or isinstance(folded, str):
            kept[path] = folded
            continue
        arrays |= folded
        options = {"use_scale": False, "use_bias": False, "dtype": pairs[0].norm.y.dtype}
        new[path] = NewLayer(functools.partial(make_affine, options), {}, {})
    if kept and (layers is not None or not new):
        raise ValueError(
            "cannot fold "
            + "; ".join(f"{path or 'the model'}: {reason}" for path, reason in kept.items())
            + ". Nothing was changed; "
            "name layers that can be folded with layers=, or make these affine with to_affine."
        )
    changed = [*new]
    for path, (kernel, bias) in arrays.items():
        dtype = finder.arrays[path]["kernel"].dtype
        values = {"kernel": jnp.asarray(kernel.astype(dtype)), "bias": jnp.asarray(bias.astype(dtype))}
        new[path] = NewLayer(functools.partial(make_with, {"use_bias": True}), values)
    return operate(before, new, changed, kept, sample, call)


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

    def norms(self) -> dict[str, NormCall]:
        """Returns what the batch norms have, by path, as their first calls show it."""
        norms = {}
        for one in self.calls:
            if one.norm is not None:
                norms.setdefault(one.path, one.norm)
        return norms

    def pairs(self, path: str) -> list[Match] | str:
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
                found.append(Match(one, before, before=True))
                continue
            after = self._after(one)
            if not isinstance(after, LayerCall):
                return f"before it, {before}; after it, {after}"
            found.append(Match(one, after, before=False))
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
