"""Any linen or nnx model, run with the calls of its layers intercepted.

``call(module, batch)`` says how the model is called, as in :mod:`jaxbn.calibrate`.  Edited linen models
(:mod:`jaxbn.surgery._exchange`) intercept calls too, and what is under way here keeps the two apart.
"""

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.errors
import flax.linen
import jax
import numpy as np
from flax import nnx
from flax.core import DenyList
from flax.traverse_util import flatten_dict

from jaxbn._models.model import Model, is_one_of, merged, modules_in

_RUN = itertools.count()  # numbers the runs


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


Handler = Callable[[Call], tuple[Any, Any]]  # returns the output of a call, and what to record of it or None


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


def call_model(model: Any, batch: Any) -> Any:
    """Returns ``model(batch)``: how a model is called if nothing else is said."""
    if not callable(model):
        raise ValueError(
            f"{type(model).__name__} has no __call__; say with call= which method evaluates a batch, as in "
            "call=lambda module, batch: module.forward(batch)."
        )
    try:
        inspect.signature(model).bind(batch)
    except TypeError as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called as model(batch): {error}; say with call= how it evaluates a "
            "batch, as in call=lambda module, batch: module(batch, train=False)."
        ) from None
    return model(batch)


def evaluating(call: Callable) -> Callable:
    """Returns ``call``, with an nnx module evaluating; of a linen module, ``call`` itself says that it should."""

    def evaluate(module, batch):
        if isinstance(module, nnx.Module):
            module.eval()
        return call(module, batch)

    return evaluate


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
      ValueError: for a layer inside of a loop, or a linen model that ``call`` does not call.
    """
    numbers = {}

    def handled(path, *rest):
        number = numbers.setdefault(path, itertools.count())
        return handle(Call(path, next(number), *rest))

    run_either = _run_linen if isinstance(model.definition, flax.linen.Module) else _run_nnx
    try:
        return run_either(model, batch, call, handled, kinds)
    except (TypeError, LookupError, AttributeError) as error:
        if not isinstance(batch, jax.Array | np.ndarray):
            part = f"batch[{next(iter(batch), 0)!r}]" if isinstance(batch, Mapping) else "batch[0]"
            error.add_note(
                f"A batch is a {type(batch).__name__} here, and not an array. Where the model takes a part of it, "
                f"call= says which, as in call=lambda module, batch: module({part})."
            )
        raise


def evaluation(model: Model, call: Callable, handle: Handler, kinds: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    """Returns a function of the arrays of a model and a batch: its output in evaluation, as ``handle`` makes it."""

    def run_once(arrays, batch):
        return run(model._replace(arrays=arrays), batch, evaluating(call), handle, kinds)[0]

    return run_once


def _run_linen(model, batch, call, handled, kinds):
    # Blocks under nn.jit are not traced again, and so not intercepted, if nothing about the call has changed.  Two of
    # one kind share their trace even within a run: what is recorded must be a function of the layer's arrays.
    collection = f"intercepted_{next(_RUN)}"
    # Whatever else a model writes in evaluation it may; some tell from batch_stats whether to train.
    mutable = DenyList(("batch_stats", f"not_{collection}"))
    given, was_called = None, False

    def call_given(module, batch):
        nonlocal given
        given = module
        return call(module, batch)

    def intercept(proceed, args, kwargs, context):
        nonlocal was_called
        layer = context.module
        was_called = was_called or _is_in(layer, given)
        if context.method_name != "__call__" or not is_one_of(layer, kinds):
            return proceed(*args, **kwargs)
        path = "/".join(layer.path)
        if exchanging(layer, path):
            return proceed(*args, **kwargs)
        y, record = handled(path, layer.get_variable(collection, "calls", ()), layer, args, kwargs, proceed)
        if record is not None and not layer.sow(collection, "calls", record):
            raise _in_a_loop(path) if was_called else _called_another(given)
        return y

    with flax.linen.intercept_methods(intercept):
        y, recorded = model.definition.apply(model.arrays, batch, method=call_given, mutable=mutable)
    if not was_called:
        raise _called_another(given)
    calls = flatten_dict(recorded.get(collection, {}))
    return y, {"/".join(path): records for (*path, _), records in calls.items()}


def _run_nnx(model, batch, call, handled, kinds):
    module = merged(model)
    layers = [(path, layer) for path, layer in modules_in(module) if is_one_of(layer, kinds)]
    for path, layer in layers:
        layer.__class__ = _intercepted_class(type(layer), path, handled)
    y = call(module, batch)
    return y, {path: layer.calls.get_value() for path, layer in layers if hasattr(layer, "calls")}


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


def _is_in(layer, model):
    """Says whether a bound linen module is another one, or a part of it."""
    while isinstance(layer, flax.linen.Module):
        if layer is model:
            return True
        layer = layer.parent
    return False


def _called_another(model):
    return ValueError(
        f"call did not call the {type(model).__name__} that it was given; accepted is a function of that module and a "
        "batch, as in call=lambda module, batch: module(batch, train=False), not one that calls model.apply itself."
    )


def _in_a_loop(path):
    return ValueError(
        f"{path} is called inside of nn.scan, nn.vmap or another transformation that does not let new variables out; "
        "accepted are layers called outside of loops, under remat and jit; unroll the loop over layers."
    )
