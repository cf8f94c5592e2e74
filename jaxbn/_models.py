"""Any linen or nnx model, run with its layers intercepted, or with some of them exchanged for others.

A layer's path is its place in the model, as in "Block_0/BatchNorm_0".  A model is split into its definition (a linen
module, or the GraphDef of an nnx module) and its arrays (the variables, or the State), so that whatever is computed
with it is a pure function of arrays.  Batch norms are Flax's or ours; a subclass that computes something else is none.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from flax.core import unfreeze

import jaxbn.linen
import jaxbn.nnx
from jaxbn.stats import BatchStats

BATCH_NORMS = (flax.linen.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm)
_RUN = itertools.count()  # numbers the runs
_under_way = []  # (edits, layers put in) of each Edited that is being called


class Model(NamedTuple):
    """A model in two parts: ``definition`` is static and hashable, ``arrays`` is a pytree."""

    definition: Any
    arrays: Any


class Call(NamedTuple):
    """One call of a layer, as it is intercepted.

    Attributes:
      path: of the layer.
      index: number of this call among those of the same layer.
      layer: the bound linen module or the nnx module.
      args: positional arguments.
      kwargs: keyword arguments.
      proceed: makes the call as it is.
    """

    path: str
    index: int
    layer: Any
    args: tuple
    kwargs: dict
    proceed: Callable[[], Any]


class Norm(NamedTuple):
    """What a call gives to a batch norm, and what the layer has.

    Attributes:
      x: inputs, shape [..., C].
      mask: booleans that broadcast to ``x``, or None.
      use_running_average: whether this call evaluates; None where nobody says.
      stats: running statistics, shape [C].
      scale: shape [C], or None.
      bias: shape [C], or None.
      options: arguments with which our layer of the same framework does what this one does.
    """

    x: jax.Array
    mask: jax.Array | None
    use_running_average: bool | None
    stats: BatchStats
    scale: jax.Array | None
    bias: jax.Array | None
    options: dict[str, Any]


class NewLayer(NamedTuple):
    """A layer to put in the place of another.

    Attributes:
      make: returns it; a linen module is made with ``parent=``, an nnx module without arguments.
      params: its parameters by name.
      batch_stats: its statistics by name.
    """

    make: Callable[..., Any]
    params: dict[str, jax.Array]
    batch_stats: dict[str, jax.Array]


Handler = Callable[[Call], tuple[Any, Any]]  # returns the output of a call, and what to record of it or None


def call_model(model: Any, batch: Any) -> Any:
    """Returns ``model(batch)``: how a model is called if nothing else is said."""
    return model(batch)


def split(model: Any, variables: Mapping | None) -> Model:
    """Takes a linen module with its variables, or an nnx module with None, apart."""
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise ValueError(
                "variables are given beside an nnx model, which holds its own; pass None in their place, "
                "or nnx.update(model, ...) first."
            )
        return Model(*nnx.split(model))
    if not isinstance(model, flax.linen.Module):
        raise ValueError(
            f"the model is a {type(model).__name__}; accepted are a flax.linen.Module and an nnx.Module; "
            "pass the module itself, not its apply function."
        )
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"variables of a linen model with batch norm have the collection 'batch_stats', but {given} was given; "
            "pass what model.init returns, or {'params': params, 'batch_stats': batch_stats}."
        )
    return Model(model, unfreeze({**variables}))


def join(model: Model) -> tuple[Any, Any]:
    """Undoes :func:`split`: the linen module and its variables, or an nnx module and None."""
    if isinstance(model.definition, flax.linen.Module):
        return model.definition, model.arrays
    return nnx.merge(*model), None


def run(model: Model, batch: Any, call: Callable, handle: Handler, kinds: tuple[type, ...]) -> tuple[Any, dict]:
    """Calls a model, and lets ``handle`` make the calls of its layers of these kinds.

    Records leave transformed blocks (remat, jit) as variables; a loop (scan, vmap) would need to know of them.

    Args:
      model: the model.
      batch: passed on to ``call``.
      call: ``call(module, batch)`` returns the output.
      handle: makes the calls.
      kinds: classes of layers; subclasses that override ``__call__`` are other layers.

    Returns:
      The output, and the records of each layer's calls, a tuple by path.

    Raises:
      ValueError: for a layer inside of a loop.
    """
    numbers = {}

    def handled(path, layer, args, kwargs, proceed):
        number = numbers.setdefault(path, itertools.count())
        return handle(Call(path, next(number), layer, args, kwargs, proceed))

    if isinstance(model.definition, flax.linen.Module):
        return _run_linen(model, batch, call, handled, kinds)
    return _run_nnx(model, batch, call, handled, kinds)


def norm_of(call: Call) -> Norm:
    """Returns the inputs, arrays and settings of a batch norm that is called."""

    def given(x, use_running_average=None, *, mask=None):
        return x, use_running_average, mask

    layer = call.layer
    x, use_running_average, mask = given(*call.args, **call.kwargs)
    if isinstance(layer, flax.linen.Module):
        mode = layer.use_running_average if use_running_average is None else use_running_average
        stats = (layer.get_variable("batch_stats", name) for name in BatchStats._fields)
        scale, bias = (layer.get_variable("params", name) for name in ("scale", "bias"))
        names = [field.name for field in dataclasses.fields(jaxbn.linen.BatchNorm)]
    else:
        mode = layer.use_running_average if use_running_average is None else use_running_average
        stats = (getattr(layer, name)[...] for name in BatchStats._fields)
        scale, bias = (None if v is None else v[...] for v in (layer.scale, layer.bias))
        names = list(vars(layer))
    frozen = getattr(layer, "frozen", False)
    unset = ("parent", "name", "use_running_average", *BatchStats._fields, "scale", "bias", "steps")
    options = {n: getattr(layer, n) for n in names if n not in unset and n[0] != "_" and hasattr(layer, n)}
    return Norm(x, mask, frozen or mode, BatchStats(*stats), scale, bias, options)


def exchange(model: Model, layers: Mapping[str, NewLayer]) -> Model:
    """Returns the model with other layers at these paths; the one that was given stays as it is."""
    if isinstance(model.definition, flax.linen.Module):
        definition, before = model.definition, {}
        if isinstance(definition, Edited):
            definition, before = definition.model, dict(definition.edits)
        edits = before | {path: layer.make for path, layer in layers.items()}
        return Model(_edited_class(type(definition))(definition, tuple(edits.items())), _with_arrays(model, layers))
    edited = nnx.merge(*model)  # of arrays that are the model's own: replaced in it, never written to
    for path, layer in _modules(edited):
        if path in layers:
            new = layers[path].make()
            for kind, values in ((nnx.Param, layers[path].params), (nnx.BatchStat, layers[path].batch_stats)):
                for name, value in values.items():
                    setattr(new, name, kind(value))
            # The object itself changes, so that all that refer to it see the new layer, wherever they keep it.
            layer.__dict__.clear()
            layer.__dict__.update(vars(new))
            layer.__class__ = type(new)
    return Model(*nnx.split(edited))


def with_stats(model: Model, stats: Mapping[str, BatchStats]) -> Model:
    """Returns the model with other running statistics in the layers at these paths."""
    if isinstance(model.definition, flax.linen.Module):
        arrays = jax.tree.map(lambda leaf: leaf, model.arrays)
        for path, new in stats.items():
            _at(arrays["batch_stats"], path).update(new._asdict())
        return Model(model.definition, arrays)
    changed = nnx.merge(*model)
    for path, layer in _modules(changed):
        for name, value in stats[path]._asdict().items() if path in stats else ():
            getattr(layer, name).set_value(value)
    return Model(*nnx.split(changed))


class Edited(flax.linen.Module):
    """A linen model with other layers at some paths, and the variable tree of the model.

    Attributes:
      model: the model as it was.
      edits: pairs of a path and a function that makes the layer there, given ``parent``.
    """

    model: flax.linen.Module
    edits: tuple[tuple[str, Callable], ...]

    def setup(self):
        """Gives the model's variables no further level."""
        flax.linen.share_scope(self, self.model)

    def __call__(self, *args, **kwargs):
        """Calls the model."""
        return self._through("__call__", *args, **kwargs)

    def _through(self, method, *args, **kwargs):
        edits = {"/".join((*self.path, path)).strip("/"): make for path, make in self.edits}
        put_in = []

        def intercept(proceed, args, kwargs, context):
            make = edits.get("/".join(context.module.path))
            if make is None or context.method_name != "__call__" or any(context.module is new for new in put_in):
                return proceed(*args, **kwargs)
            new = make(parent=context.module.scope)
            put_in.append(new)
            return new(*args, **kwargs)

        _under_way.append((edits, put_in))
        try:
            with flax.linen.intercept_methods(intercept):
                return getattr(self.model, method)(*args, **kwargs)
        finally:
            _under_way.pop()


@functools.cache
def _edited_class(cls):
    """Returns Edited with the other public methods of a model's class, for ``apply(..., method="encode")``."""

    def through(name):
        return lambda self, *args, **kwargs: self._through(name, *args, **kwargs)

    names = [name for name in dir(cls) if name[0] != "_" and not hasattr(flax.linen.Module, name)]
    methods = {name: through(name) for name in names if callable(getattr(cls, name)) and name != "setup"}
    return type(f"Edited{cls.__name__}", (Edited,), {**methods, "__doc__": Edited.__doc__})


def _run_linen(model, batch, call, handled, kinds):
    # Blocks under nn.jit are not traced again, and so not intercepted, if nothing about the call has changed.
    collection = f"intercepted_{next(_RUN)}"

    def intercept(proceed, args, kwargs, context):
        layer, path = context.module, "/".join(context.module.path)
        # An edited model exchanges the layer next, and what it puts in comes by here again.
        exchanged = any(path in edits and all(layer is not new for new in put_in) for edits, put_in in _under_way)
        if context.method_name != "__call__" or exchanged or not _is_one_of(layer, kinds):
            return proceed(*args, **kwargs)
        y, record = handled(path, layer, args, kwargs, functools.partial(proceed, *args, **kwargs))
        if record is not None and not layer.sow(collection, "calls", record):
            raise _in_a_loop(path)
        return y

    with flax.linen.intercept_methods(intercept):
        y, recorded = model.definition.apply(model.arrays, batch, method=call, mutable=[collection])
    return y, dict(_leaves(recorded.get(collection, {}), "calls"))


def _run_nnx(model, batch, call, handled, kinds):
    module = nnx.merge(*model)
    layers = [(path, layer) for path, layer in _modules(module) if _is_one_of(layer, kinds)]
    for path, layer in layers:
        layer.__class__ = _intercepted_class(type(layer), path, handled)
    y = call(module, batch)
    return y, {path: layer.calls.get_value() for path, layer in layers if hasattr(layer, "calls")}


def _intercepted_class(cls, path, handled):
    """Returns a class that is ``cls`` but for its call; nnx offers no interceptors."""

    def __call__(self, *args, **kwargs):
        proceed = functools.partial(cls.__call__, self, *args, **kwargs)
        y, record = handled(path, self, args, kwargs, proceed)
        if record is not None:
            earlier = self.calls.get_value() if hasattr(self, "calls") else ()
            self.calls = nnx.Intermediate((*earlier, record))
        return y

    return type(cls.__name__, (cls,), {"__call__": __call__})


def _modules(module):
    """Yields the path and the object of an nnx module and of all in it, each once."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            yield "/".join(map(str, path)), node


def _is_one_of(layer, kinds):
    return any(isinstance(layer, kind) and type(layer).__call__ is kind.__call__ for kind in kinds)


def _in_a_loop(path):
    return ValueError(
        f"{path} is called inside of nn.scan, nn.vmap or another transformation that does not let new variables out; "
        "accepted are layers called outside of loops, under remat and jit; unroll the loop over layers."
    )


def _with_arrays(model, layers):
    """Returns the variables of a linen model with those of new layers in place of the old."""
    variables = jax.tree.map(lambda leaf: leaf, model.arrays)
    for path, layer in layers.items():
        for collection, values in (("params", layer.params), ("batch_stats", layer.batch_stats)):
            *above, name = path.split("/") if path else [""]
            parent = variables.setdefault(collection, {})
            for step in above:
                parent = parent.setdefault(step, {})
            if not path:
                variables[collection] = dict(values)
            elif values:
                parent[name] = dict(values)
            else:
                parent.pop(name, None)
    return {collection: _pruned(tree) for collection, tree in variables.items()}


def _pruned(tree):
    """Returns nested dicts without empty ones, as ``init`` makes them."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: below for name, value in tree.items() if (below := _pruned(value)) != {} or value is None}


def _at(tree, path):
    for step in path.split("/") if path else ():
        tree = tree[step]
    return tree


def _leaves(tree, name, path=()):
    """Yields the path and the value of everything called ``name`` in nested dicts."""
    for key, value in tree.items():
        if key == name and not isinstance(value, Mapping):
            yield "/".join(path), value
        elif isinstance(value, Mapping):
            yield from _leaves(value, name, (*path, key))
