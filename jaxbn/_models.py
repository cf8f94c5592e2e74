"""Any linen or nnx model, run with its layers intercepted.

A layer's path is its place in the model, as in "Block_0/BatchNorm_0".  A model is split into its definition (a linen
module, or the GraphDef of an nnx module) and its arrays (the variables, or the State), so that whatever is computed
with it is a pure function of arrays.  Batch norms are Flax's or ours; a subclass that computes something else is none.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import flax.errors
import flax.linen
import jax
from flax import nnx
from flax.core import unfreeze
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict

import jaxbn.linen
import jaxbn.nnx
from jaxbn.functional import batch_norm
from jaxbn.stats import BatchStats

BATCH_NORMS = (flax.linen.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm)
_RUN = itertools.count()  # numbers the runs
edits_under_way = []  # (edits by path, layers put in) of each edited linen model that is being called


class Model(NamedTuple):
    """A model in two parts: ``definition`` is static and hashable, ``arrays`` is a pytree."""

    definition: Any
    arrays: Any


class Call(NamedTuple):
    """One call of a layer, as it is intercepted.

    Attributes:
      path: of the layer.
      index: number of this call among those of the same layer.
      earlier: records of earlier calls of the same layer.
      layer: the bound linen module or the nnx module.
      args: positional arguments.
      kwargs: keyword arguments.
      proceed: makes the call, with these or other arguments.
    """

    path: str
    index: int
    earlier: tuple
    layer: Any
    args: tuple
    kwargs: dict
    proceed: Callable[..., Any]


class Norm(NamedTuple):
    """What a call gives to a batch norm, and what the layer has.

    Attributes:
      x: inputs, shape [..., C].
      mask: booleans that broadcast to ``x``, or None.
      use_running_average: whether this call evaluates; None where nobody says.
      stats: running statistics, shape [C].
      scale: shape [C], or None.
      bias: shape [C], or None.
      options: as :func:`settings` returns them.
    """

    x: jax.Array
    mask: jax.Array | None
    use_running_average: bool | None
    stats: BatchStats
    scale: jax.Array | None
    bias: jax.Array | None
    options: dict[str, Any]

    def without_arrays(self) -> Self:
        """Returns it with shapes and dtypes for its arrays, which are tracers."""
        return shapes(self._replace(options={}))._replace(options=self.options)


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
    return _merged(model), None


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

    def handled(path, *rest):
        number = numbers.setdefault(path, itertools.count())
        return handle(Call(path, next(number), *rest))

    if isinstance(model.definition, flax.linen.Module):
        return _run_linen(model, batch, call, handled, kinds)
    return _run_nnx(model, batch, call, handled, kinds)


def norm_of(call: Call) -> Norm:
    """Returns the inputs, arrays and settings of a batch norm that is called."""

    def given(x, use_running_average=None, *, mask=None):
        return x, use_running_average, mask

    layer = call.layer
    x, use_running_average, mask = given(*call.args, **call.kwargs)
    mode = layer.use_running_average if use_running_average is None else use_running_average
    if isinstance(layer, flax.linen.Module):
        mean, var = (unbox(layer.get_variable("batch_stats", name)) for name in BatchStats._fields)
        scale, bias = (unbox(layer.get_variable("params", name)) for name in ("scale", "bias"))
    else:
        mean, var = (getattr(layer, name)[...] for name in BatchStats._fields)
        scale, bias = (None if v is None else v[...] for v in (layer.scale, layer.bias))
    frozen = getattr(layer, "frozen", False)
    return Norm(x, mask, frozen or mode, BatchStats(mean, var), scale, bias, settings(layer))


def settings(layer: Any) -> dict[str, Any]:
    """Returns the arguments with which our batch norm of the same framework does what this one does."""
    ours = jaxbn.linen.BatchNorm if isinstance(layer, flax.linen.Module) else jaxbn.nnx.BatchNorm
    names = [name for name in inspect.signature(ours.__init__).parameters if name not in ("parent", "name")]
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def evaluate(call: Call) -> jax.Array:
    """Returns what a batch norm would in evaluation, whatever its mode."""
    return evaluated(norm_of(call))


def evaluated(norm: Norm) -> jax.Array:
    """Returns the inputs of a batch norm, normalised with its running statistics."""
    y, _ = batch_norm(
        norm.x,
        norm.stats,
        norm.scale,
        norm.bias,
        use_running_average=True,
        epsilon=norm.options["epsilon"],
        axis=norm.options["axis"],
        mask=norm.mask,
    )
    return y if norm.options["dtype"] is None else y.astype(norm.options["dtype"])


def shapes(tree: Any) -> Any:
    """Returns a pytree with shapes and dtypes for its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, tree)


def with_stats(model: Model, stats: Mapping[str, BatchStats]) -> Model:
    """Returns the model with other running statistics in the layers at these paths."""
    if isinstance(model.definition, flax.linen.Module):
        arrays = jax.tree.map(lambda leaf: leaf, model.arrays)
        for path, new in stats.items():
            _at(arrays["batch_stats"], path).update(new._asdict())
        return Model(model.definition, arrays)
    changed = _merged(model)
    for path, layer in modules_in(changed):
        for name, value in stats[path]._asdict().items() if path in stats else ():
            getattr(layer, name).set_value(value)
    return Model(*nnx.split(changed))


def arrays_of(model: Model, path: str) -> dict[str, Any]:
    """Returns the parameters and statistics of one layer by name; None for what it does without."""
    if isinstance(model.definition, flax.linen.Module):
        trees = [_at(model.arrays.get(collection, {}), path) for collection in ("params", "batch_stats")]
        return {name: unbox(value) for tree in trees for name, value in tree.items()}
    variables = vars(modules(model)[path]).items()
    return {name: value[...] for name, value in variables if isinstance(value, nnx.Variable)}


def modules(model: Model) -> dict[str, nnx.Module]:
    """Returns the modules in an nnx model by path; none of a linen model, whose modules exist while it is called."""
    return {} if isinstance(model.definition, flax.linen.Module) else dict(modules_in(nnx.merge(*model)))


def sharing(model: Model) -> dict[str, str]:
    """Returns the modules of an nnx model that have a variable of another module, with the path of that."""
    owners, shared = {}, {}
    for path, layer in modules(model).items():
        for value in vars(layer).values():
            if isinstance(value, nnx.Variable) and owners.setdefault(id(value), path) != path:
                shared |= {path: owners[id(value)], owners[id(value)]: path}
    return shared


def _run_linen(model, batch, call, handled, kinds):
    # Blocks under nn.jit are not traced again, and so not intercepted, if nothing about the call has changed.  Two of
    # one kind share their trace even within a run: what is recorded must be a function of the layer's arrays.
    collection = f"intercepted_{next(_RUN)}"

    def intercept(proceed, args, kwargs, context):
        layer, path = context.module, "/".join(context.module.path)
        # An edited model exchanges the layer next, and what it puts in comes by here again.
        exchanged = any(path in edits and all(layer is not new for new in put_in) for edits, put_in in edits_under_way)
        if context.method_name != "__call__" or exchanged or not _is_one_of(layer, kinds):
            return proceed(*args, **kwargs)
        y, record = handled(path, layer.get_variable(collection, "calls", ()), layer, args, kwargs, proceed)
        if record is not None and not layer.sow(collection, "calls", record):
            raise _in_a_loop(path)
        return y

    with flax.linen.intercept_methods(intercept):
        y, recorded = model.definition.apply(model.arrays, batch, method=call, mutable=[collection])
    calls = flatten_dict(recorded.get(collection, {}))
    return y, {"/".join(path): records for (*path, _), records in calls.items()}


def _run_nnx(model, batch, call, handled, kinds):
    module = _merged(model)
    layers = [(path, layer) for path, layer in modules_in(module) if _is_one_of(layer, kinds)]
    for path, layer in layers:
        layer.__class__ = _intercepted_class(type(layer), path, handled)
    y = call(module, batch)
    return y, {path: layer.calls.get_value() for path, layer in layers if hasattr(layer, "calls")}


def _merged(model):
    """Returns an nnx module with variables of its own: those of the one that was split stay as they are."""
    return nnx.merge(*model, copy=True)


def _intercepted_class(cls, path, handled):
    """Returns a class that is ``cls`` but for its call; nnx offers no interceptors."""

    def __call__(self, *args, **kwargs):
        earlier = self.calls.get_value() if hasattr(self, "calls") else ()
        y, record = handled(path, earlier, self, args, kwargs, functools.partial(cls.__call__, self))
        if record is not None:
            try:
                self.calls = nnx.Intermediate((*earlier, record))
            except flax.errors.TraceContextError:
                raise _in_a_loop(path) from None
        return y

    return type(cls.__name__, (cls,), {"__call__": __call__})


def modules_in(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
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


def _at(tree, path):
    """Returns what nested dicts hold at a path, or nothing."""
    for step in path.split("/") if path else ():
        tree = tree.get(step, {})
    return tree
