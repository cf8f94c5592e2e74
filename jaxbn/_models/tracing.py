"""Traces a linen or nnx model to a program in which the calls of its batch norms are marked.

Calls are intercepted only here, while the model is traced.  ``call(module, batch)`` says how the model is called, as in
:mod:`jaxbn.calibrate`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr

from jaxbn._models.batch_norms import kernel_of, kinds, read_norm
from jaxbn._models.intercept import is_ignored, is_in, mention_call, traced_again, without_randomness
from jaxbn._models.marks import Site, mark_norm, mark_value
from jaxbn._models.model import LINEAR, Model, merged

Path = tuple[Any, ...]


class Leaf(NamedTuple):
    """An array of a model.

    Attributes:
      path: of the layer that has it.
      name: of the variable.
      is_stat: whether it is in ``batch_stats``, or a ``BatchStat``.
    """

    path: Path
    name: str
    is_stat: bool


class Traced(NamedTuple):
    """A traced evaluation of a model.

    Attributes:
      jaxpr: the program; its first arguments are the model's arrays, its others those of the batch.
      leaves: the model's arrays, in the order of the arguments.
      structure: of what the model returns.
      classes: name of the class of each layer that was seen, by path.
      was_called: whether the model that ``call`` got, or a part of it, was seen to be called.
    """

    jaxpr: ClosedJaxpr
    leaves: list[Leaf]
    structure: jax.tree_util.PyTreeDef
    classes: dict[Path, str]
    was_called: bool


def text(path: Path) -> str:
    """Returns a path as users see it; inside, it is a tuple, since a name may contain a slash."""
    return "/".join(map(str, path))


def trace_model(model: Model, batch: Any, call: Callable, *, linear: bool = False) -> Traced:
    """Traces a model as ``call`` runs it; marks its linear layers too, if asked."""
    seen = _Seen({}, [], [])
    is_linen = isinstance(model.definition, flax.linen.Module)

    def call_module(module, batch):
        seen.models.append(module)
        try:
            return without_randomness(call, module, batch)
        except (TypeError, LookupError, AttributeError) as error:  # the model may have got a tuple, say, for an array
            mention_call(error, batch)
            raise

    def evaluate(arrays, batch):
        # Interceptors nest: this one comes first, so it sees all calls, before an edited model answers any of them.
        with flax.linen.intercept_methods(_interceptor(seen, linear)):
            if not is_linen:
                module = merged(model._replace(arrays=arrays))
                _mark_layers(module, seen, linear)
                return call_module(module, batch)
            y, _ = model.definition.apply(arrays, batch, method=call_module, mutable=traced_again())
            return y

    jaxpr, result = jax.make_jaxpr(evaluate, return_shape=True)(model.arrays, batch)
    return Traced(jaxpr, leaves_of(model), jax.tree.structure(result), seen.classes, not is_linen or bool(seen.called))


def called_another(model: Model) -> ValueError:
    """Returns the error for a call that has not read any array of the model."""
    return ValueError(
        f"call did not call the {type(model.definition).__name__} that it was given; pass a function of that module "
        "and a batch that does not call model.apply itself, such as lambda module, batch: module(batch, train=False)."
    )


def leaves_of(model: Model) -> list[Leaf]:
    """Lists the arrays of a model, in the order of its pytree."""
    leaves, structure = jax.tree.flatten(model.arrays)
    if isinstance(model.definition, flax.linen.Module):
        found = []
        for steps, _ in jax.tree.leaves_with_path(model.arrays):
            # Behind the name may come a box with a sharding (nn.Partitioned).
            collection, *path, name = [step.key for step in steps if isinstance(step, jax.tree_util.DictKey)]
            found.append(Leaf(tuple(path), name, collection == "batch_stats"))
        return found
    by_number = {}
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    for (*path, name), variable in nnx.to_flat_state(numbered):
        is_stat = isinstance(variable, nnx.BatchStat)
        by_number |= dict.fromkeys(jax.tree.leaves(variable), Leaf(tuple(path), str(name), is_stat))
    return [by_number[number] for number in range(len(leaves))]


class _Seen(NamedTuple):
    """What the trace has seen: classes of layers by path, the module that ``call`` got, and whether it was called."""

    classes: dict[Path, str]
    models: list[Any]
    called: list[bool]


def _interceptor(seen: _Seen, linear: bool) -> Callable:
    """Returns an interceptor of linen methods that marks the calls of batch norms."""
    # The functions behind the methods, as Flax hands them to interceptors: a subclass's call of super().__call__ is a
    # call of its parent's function.
    norms = {_function(kind): kind for kind in kinds() if issubclass(kind, flax.linen.Module)}
    linears = {_function(kind) for kind in LINEAR if issubclass(kind, flax.linen.Module)} if linear else set()

    def intercept(proceed, args, kwargs, context):
        layer, function = context.module, context.orig_method.func
        if layer.scope is None:
            return proceed(*args, **kwargs)
        path = tuple(layer.path)
        seen.classes.setdefault(path, type(layer).__name__)
        if not seen.called and any(is_in(layer, model) for model in seen.models):
            seen.called.append(True)
        if isinstance(layer, nnx.bridge.ToLinen) and context.method_name == "__call__":
            return proceed(*args, **kwargs | {"nnx_method": _marked_method(kwargs.get("nnx_method"), path, seen)})
        kind = norms.get(function)
        if is_ignored(layer, text(path)) or (kind is None and function not in linears):
            return proceed(*args, **kwargs)
        unbound = layer.copy(parent=None)
        if kind is not None:
            return mark_norm(read_norm(layer, kind, args, kwargs, text(path)), path, unbound)
        return _mark_linear(path, unbound, layer, proceed, args, kwargs)

    return intercept


def _function(kind: type) -> Callable:
    """Returns the function behind the ``__call__`` of a class of linen modules."""
    return vars(kind.__call__)["__wrapped__"]


def _marked_method(method: Any, path: Path, seen: _Seen) -> Callable:
    """Returns a method of an nnx module inside of ToLinen that first marks the module's layers."""

    def call_marked(module, *args, **kwargs):
        _mark_layers(module, seen, linear=False, prefix=path)
        function = getattr(type(module), method or "__call__") if method is None or isinstance(method, str) else method
        return function(module, *args, **kwargs)

    return call_marked


def _mark_layers(model: nnx.Module, seen: _Seen, linear: bool, prefix: Path = ()) -> None:
    """Gives the layers of an nnx model classes whose calls are marked, since nnx has no interceptors."""
    marked = (*kinds(), *(LINEAR if linear else ()))
    for path, layer in [*nnx.iter_graph(model)]:
        if not isinstance(layer, nnx.Module):
            continue
        path = (*prefix, *path)
        seen.classes.setdefault(path, type(layer).__name__)
        kind = next((cls for cls in type(layer).__mro__ if cls in marked), None)
        if kind is not None:
            layer.__class__ = _marking(type(layer), kind, path)


def _marking(cls: type, kind: type, path: Path) -> type:
    """Returns a class of layers like ``cls`` that marks calls of ``kind.__call__``, also those by super().__call__."""

    def __call__(self, *args, **kwargs):
        if kind in LINEAR:
            return _mark_linear(path, cls, self, functools.partial(kind.__call__, self), args, kwargs)
        return mark_norm(read_norm(self, kind, args, kwargs, text(path)), path, cls)

    # New classes for each trace, so that nnx.jit traces its blocks again.
    marking = type(kind.__name__, (kind,), {"__call__": __call__})
    # Right before the kind in the order of method resolution.
    return marking if cls is kind else type(cls.__name__, (cls, marking), {})


def _mark_linear(path: Path, definition: Any, layer: Any, proceed: Callable, args: tuple, kwargs: dict) -> jax.Array:
    """Calls a linear layer with its input and its output marked."""
    if args:
        x, *rest = args
    else:
        x, rest, kwargs = kwargs["inputs"], [], {name: value for name, value in kwargs.items() if name != "inputs"}
    x = mark_value(Site("into", path, definition, ("x",)), jnp.asarray(x))
    y = proceed(x, *rest, **kwargs)
    # The kernel is an operand, so that the program shows where it comes from.
    return mark_value(Site("out of", path, definition, ("y", "kernel")), y, kernel_of(layer))
