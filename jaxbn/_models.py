"""Any linen or nnx model, run with its layers intercepted.

A layer's path is its place in the model, as in "Block_0/BatchNorm_0".  A model is split into its definition (a linen
module, or the GraphDef of an nnx module) and its arrays (the variables, or the State), so that whatever is computed
with it is a pure function of arrays.  Batch norms are Flax's or ours; a subclass that computes something else is none.
"""

import collections
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import flax.errors
import flax.linen
import jax
from flax import nnx
from flax.core import DenyList, unfreeze
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict

import jaxbn.linen
import jaxbn.nnx
from jaxbn.functional import batch_norm
from jaxbn.stats import BatchStats

BATCH_NORMS = (flax.linen.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm)
CONVOLUTIONS = (flax.linen.Conv, flax.linen.ConvTranspose, nnx.Conv, nnx.ConvTranspose)
DENSE = (flax.linen.Dense, flax.linen.DenseGeneral, nnx.Linear, nnx.LinearGeneral)
LINEAR = (*CONVOLUTIONS, *DENSE)
WITH_BATCH_NORM = (
    "accepted are models that call flax.linen.BatchNorm, flax.nnx.BatchNorm or those of jaxbn, or subclasses with the "
    "same __call__"
)
_RUN = itertools.count()  # numbers the runs


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


class Level(NamedTuple):
    """An edited linen model that is being called.

    Attributes:
      edits: what makes the new layer, by path of the old.
      put_in: the new layers that were made so far.
    """

    edits: Mapping[str, Callable]
    put_in: list


class _UnderWay(threading.local):
    """The edited models that are being called in this thread, each inside of the one before."""

    def __init__(self):
        self.levels: list[Level] = []


under_way = _UnderWay()


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
    try:
        inspect.signature(model).bind(batch)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called as model(batch): {error}; say with call= how it evaluates a "
            "batch, as in call=lambda module, batch: module(batch, train=False)."
        ) from None
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
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"the model is {given}; accepted are a flax.linen.Module and an nnx.Module; "
            "pass the module itself, not its class, and not its apply function."
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


def evaluation(model: Model, call: Callable, handle: Handler, kinds: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    """Returns a function of the arrays of a model and a batch: its output in evaluation, as ``handle`` makes it."""

    def run_once(arrays, batch):
        return run(model._replace(arrays=arrays), batch, evaluating(call), handle, kinds)[0]

    return run_once


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
    needed = {"mean": mean, "var": var}
    needed |= {"scale": scale} if layer.use_scale else {}
    needed |= {"bias": bias} if layer.use_bias else {}
    if missing := [name for name, value in needed.items() if value is None]:
        raise ValueError(
            f"variables have no {', '.join(map(repr, missing))} of {call.path or 'the model'}; accepted are those of "
            "this model, in 'params' and 'batch_stats'; pass what model.init returns, or what training has made of it."
        )
    frozen = getattr(layer, "frozen", False)
    return Norm(x, mask, frozen or mode, BatchStats(mean, var), scale, bias, settings(layer))


def kernel_of(layer: Any) -> jax.Array:
    """Returns the kernel that a linear layer uses in this call."""
    if isinstance(layer, flax.linen.Module):
        return unbox(layer.get_variable("params", "kernel"))
    return layer.kernel[...]


def evaluating(call: Callable) -> Callable:
    """Returns ``call``, with an nnx module evaluating; of a linen module, ``call`` itself says that it should."""

    def evaluate(module, batch):
        if isinstance(module, nnx.Module):
            module.eval()
        try:
            return call(module, batch)
        except (TypeError, LookupError, AttributeError) as error:
            if not isinstance(batch, jax.Array):
                error.add_note(
                    f"jaxbn called the model on a batch that is a {type(batch).__name__}, not an array; if the model "
                    "takes a part of it, say so with call=, as in call=lambda module, batch: module(batch[0])."
                )
            raise

    return evaluate


def settings(layer: Any) -> dict[str, Any]:
    """Returns the arguments with which our batch norm of the same framework does what this one does."""
    ours = jaxbn.linen.BatchNorm if isinstance(layer, flax.linen.Module) else jaxbn.nnx.BatchNorm
    names = [name for name in inspect.signature(ours.__init__).parameters if name not in ("parent", "name")]
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


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


def arrays_of(model: Model) -> dict[str, dict[str, Any]]:
    """Returns the parameters and statistics of each layer by name, by its path."""
    arrays = collections.defaultdict(dict)
    if isinstance(model.definition, flax.linen.Module):
        for collection in ("params", "batch_stats"):
            for (*path, name), value in flatten_dict(model.arrays.get(collection, {})).items():
                arrays["/".join(path)][name] = unbox(value)
        return arrays
    for path, layer in modules(model).items():
        arrays[path] = {name: v[...] for name, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    return arrays


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


def exchanging(layer: Any, path: str) -> list[int]:
    """Returns the numbers of the edited models under way that will put another layer in the place of this one.

    The innermost comes first, and the outer ones exchange what it puts in; it leaves alone what they put in.
    """
    return [
        number
        for number, level in enumerate(under_way.levels)
        if path in level.edits
        and not any(layer is new for outer in under_way.levels[: number + 1] for new in outer.put_in)
    ]


def _run_linen(model, batch, call, handled, kinds):
    # Blocks under nn.jit are not traced again, and so not intercepted, if nothing about the call has changed.  Two of
    # one kind share their trace even within a run: what is recorded must be a function of the layer's arrays.
    collection = f"intercepted_{next(_RUN)}"
    # Whatever else a model writes in evaluation it may; some tell from batch_stats whether to train.
    mutable = DenyList(("batch_stats", f"not_{collection}"))

    def intercept(proceed, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or not is_one_of(layer, kinds):
            return proceed(*args, **kwargs)
        path = "/".join(layer.path)
        if exchanging(layer, path):
            return proceed(*args, **kwargs)
        y, record = handled(path, layer.get_variable(collection, "calls", ()), layer, args, kwargs, proceed)
        if record is not None and not layer.sow(collection, "calls", record):
            raise _in_a_loop(path)
        return y

    with flax.linen.intercept_methods(intercept):
        y, recorded = model.definition.apply(model.arrays, batch, method=call, mutable=mutable)
    calls = flatten_dict(recorded.get(collection, {}))
    return y, {"/".join(path): records for (*path, _), records in calls.items()}


def _run_nnx(model, batch, call, handled, kinds):
    module = _merged(model)
    layers = [(path, layer) for path, layer in modules_in(module) if is_one_of(layer, kinds)]
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


def is_one_of(layer: Any, kinds: tuple[type, ...]) -> bool:
    """Says whether a layer is of one of these classes, and computes what they do."""
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
