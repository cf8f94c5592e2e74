"""Runs any linen or nnx model, and hands the calls of its layers to a function.

``call(module, batch)`` says how the model is called, as in :mod:`jaxbn.calibrate`.
"""

import collections
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.errors
import flax.linen
import jax
import numpy as np
from flax import nnx
from flax.core import DenyList
from flax.traverse_util import flatten_dict

from jaxbn._models.model import Model, merged, modules_in

_RECORDS = "jaxbn_records"  # the collection of what a run records in a linen model
_run_numbers = itertools.count()


class Call(NamedTuple):
    """An intercepted call of a layer.

    Attributes:
      path: of the layer.
      index: number of this call among those of the layer.
      earlier: records of the layer's earlier calls.
      layer: the bound linen module, or the nnx module.
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


# Answers a call: returns its output, and a record of it or None.
Handler = Callable[[Call], tuple[Any, Any]]

# Predicates of a linen layer and its path.  One that is True says that another layer is about to be called in place of
# this one, and so it is the other layer's call that counts.
_ignored: list[Callable[[Any, str], bool]] = []


def ignore_layers(predicate: Callable[[Any, str], bool]) -> Callable[[Any, str], bool]:
    """Makes :func:`run` ignore the linen layers for which ``predicate(layer, path)`` is True; a decorator.

    :mod:`jaxbn.surgery` registers a predicate, since its edited models intercept the calls of layers too.
    """
    _ignored.append(predicate)
    return predicate


def is_ignored(layer: Any, path: str) -> bool:
    """Tests whether another layer is about to be called in place of this linen layer."""
    return any(predicate(layer, path) for predicate in _ignored)


def call_model(model: Any, batch: Any) -> Any:
    """Returns ``model(batch)``: the default of ``call``."""
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
    """Returns ``call`` for evaluation: switches an nnx module to it; with a linen module, ``call`` itself says so."""

    def evaluate(module, batch):
        if isinstance(module, nnx.Module):
            module.eval()
        return without_randomness(call, module, batch)

    return evaluate


def without_randomness(call: Callable, module: Any, batch: Any) -> Any:
    """Returns ``call(module, batch)``; refuses a linen model that draws random numbers, for which no key is given."""
    try:
        return call(module, batch)
    except flax.errors.InvalidRngError as error:
        raise ValueError(
            f"the model draws random numbers in evaluation: {str(error).partition(' (http')[0]}; let call switch that "
            "off, as in call=lambda module, batch: module(batch, deterministic=True)."
        ) from None


def mention_call(error: Exception, batch: Any) -> None:
    """Adds a note to an error of the model on a batch that is not an array."""
    if not isinstance(batch, jax.Array | np.ndarray):
        part = f"batch[{next(iter(batch), 0)!r}]" if isinstance(batch, Mapping) else "batch[0]"
        error.add_note(
            f"The batch is a {type(batch).__name__}, not an array. If the model takes a part of it, say which with "
            f"call=, as in call=lambda module, batch: module({part})."
        )


def run(model: Model, batch: Any, call: Callable, handle: Handler, kinds: tuple[type, ...]) -> tuple[Any, dict]:
    """Calls a model, and lets ``handle`` answer the calls of its layers of these kinds.

    Records are stored as variables of their layers, because only variables can leave transformed blocks such as remat
    and jit.  They cannot leave loops (scan, vmap), which must be told of all variables beforehand.

    Args:
      model: the model.
      batch: passed on to ``call``.
      call: ``call(module, batch)`` returns the output.
      handle: answers the calls.
      kinds: classes of layers; of subclasses that override ``__call__``, their call of ``super().__call__``.

    Returns:
      The output, and a tuple of records for each layer, by path.

    Raises:
      ValueError: if a layer is in a loop, or ``call`` does not call the linen model.
    """
    counters = collections.defaultdict(itertools.count)

    def handle_next(path, *rest):
        return handle(Call(path, next(counters[path]), *rest))

    run_either = _run_linen if isinstance(model.definition, flax.linen.Module) else _run_nnx
    try:
        return run_either(model, batch, call, handle_next, kinds)
    except (TypeError, LookupError, AttributeError) as error:  # the model may have got a tuple, say, for an array
        mention_call(error, batch)
        raise


def evaluation(model: Model, call: Callable, handle: Handler, kinds: tuple[type, ...]) -> Callable[[Any, Any], Any]:
    """Returns a function of a model's arrays and a batch: the output in evaluation, with calls that ``handle`` answers.

    Pure, so that it can be traced and compiled.
    """

    def run_once(arrays, batch):
        return run(model._replace(arrays=arrays), batch, evaluating(call), handle, kinds)[0]

    return run_once


def _run_linen(
    model: Model, batch: Any, call: Callable, handle_next: Callable, kinds: tuple[type, ...]
) -> tuple[Any, dict]:
    # Flax hands interceptors the functions behind the methods.  A subclass's super().__call__(x) is a call of one too.
    functions = {inspect.unwrap(kind.__call__) for kind in kinds if issubclass(kind, flax.linen.Module)}
    bound, was_called = None, False  # the bound model that `call` gets, and whether it or a part of it has been called

    def call_bound(module, batch):
        nonlocal bound
        bound = module
        return call(module, batch)

    def intercept(proceed, args, kwargs, context):
        nonlocal was_called
        layer = context.module
        was_called = was_called or is_in(layer, bound) or _is_lifted(layer, bound)
        if context.orig_method.func not in functions or layer.scope is None:
            return proceed(*args, **kwargs)
        path = "/".join(layer.path)
        if is_ignored(layer, path):
            return proceed(*args, **kwargs)
        earlier = layer.get_variable(_RECORDS, "calls", ())
        y, record = handle_next(path, earlier, layer, args, kwargs, proceed)
        if record is not None and not layer.sow(_RECORDS, "calls", record):
            raise _in_a_loop(path) if was_called else _called_another(bound)
        return y

    # Interceptors nest: this one comes first, so it sees all calls, before an edited model answers any of them.
    with flax.linen.intercept_methods(intercept):
        y, variables = model.definition.apply(model.arrays, batch, method=call_bound, mutable=traced_again())
    if not was_called:
        raise _called_another(bound)
    calls = flatten_dict(variables.get(_RECORDS, {}))
    return y, {"/".join(path): records for (*path, _), records in calls.items()}


def traced_again() -> DenyList:
    """Returns a filter of the collections that a run may write, which makes nn.jit trace its blocks again.

    Calls can be intercepted only while a block is traced, and nn.jit keeps a trace for each "fingerprint": the fields
    of the module and this filter (see flax.core.lift.jit).  So each run denies a collection that no model has, with a
    name that no other run has, which changes the fingerprint and nothing else.

    Within a run, equal blocks still share a fingerprint, and a trace.  Therefore a record may depend on nothing but the
    arrays of its layer and the inputs of its call.
    """
    never_written = f"jaxbn_run_{next(_run_numbers)}"
    # batch_stats is denied because some models take it for a sign of training that they may write there.
    return DenyList(("batch_stats", never_written))


def _run_nnx(
    model: Model, batch: Any, call: Callable, handle_next: Callable, kinds: tuple[type, ...]
) -> tuple[Any, dict]:
    # nnx has no interceptors, so the layers of a copy get classes whose calls are intercepted.
    module = merged(model)
    layers = [(path, layer) for path, layer in modules_in(module) if isinstance(layer, kinds)]
    for path, layer in layers:
        kind = next(cls for cls in type(layer).__mro__ if cls in kinds)
        layer.__class__ = _intercepted(type(layer), kind, path, handle_next)
    y = call(module, batch)
    return y, {path: layer.calls.get_value() for path, layer in layers if hasattr(layer, "calls")}


def _intercepted(cls: type, kind: type, path: str, handle_next: Callable) -> type:
    """Returns a class like ``cls`` whose calls of ``kind.__call__`` are answered by ``handle_next``."""

    def __call__(self, *args, **kwargs):
        earlier = self.calls.get_value() if hasattr(self, "calls") else ()
        y, record = handle_next(path, earlier, self, args, kwargs, functools.partial(kind.__call__, self))
        if record is not None:
            try:
                self.calls = nnx.Intermediate((*earlier, record))
            except flax.errors.TraceContextError:  # a layer from outside of a loop cannot change in it
                raise _in_a_loop(path) from None
        return y

    intercepted = type(kind.__name__, (kind,), {"__call__": __call__})
    # Right before the kind in the order of method resolution, so that a subclass's super().__call__(x) is intercepted.
    return intercepted if cls is kind else type(cls.__name__, (cls, intercepted), {})


def is_in(layer: Any, model: flax.linen.Module | None) -> bool:
    """Tests whether a bound linen module is a model or a part of it."""
    while isinstance(layer, flax.linen.Module):
        if layer is model:
            return True
        layer = layer.parent
    return False


def _is_lifted(layer: Any, model: flax.linen.Module | None) -> bool:
    """Tests whether a module runs in place of a model whose own class is transformed, as nn.remat(Net) is.

    The model is one of a subclass of Net, and hands its scope to a Net.
    """
    lifted = type(layer) is not type(model) and isinstance(model, type(layer))
    return lifted and layer.scope is not None and layer.path == model.path


def _called_another(model: Any) -> ValueError:
    return ValueError(
        f"call did not call the {type(model).__name__} that it was given; pass a function of that module and a batch "
        "that does not call model.apply itself, as in call=lambda module, batch: module(batch, train=False)."
    )


def _in_a_loop(path: str) -> ValueError:
    return ValueError(
        f"{path} is called inside of nn.scan, nn.vmap or another transformation that does not let new variables out; "
        "layers may be called under remat and jit, but not in loops: unroll the loop over layers."
    )
