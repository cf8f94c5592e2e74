"""Replaces layers of a linen or nnx model.

The layers of an nnx model are objects in it, and are replaced in a copy.  A linen model creates its layers again in
every call, so there is nothing to replace in it: :class:`Edited` wraps the model and intercepts the calls of the
layers.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import flax.linen
from flax import nnx
from flax.core.meta import replace_boxed
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn._models import intercept
from jaxbn._models.model import BATCH_NORMS, LINEAR, Model, is_one_of, modules_in
from jaxbn.surgery._new_layers import NewLayer


def exchange(model: Model, layers: Mapping[str, NewLayer]) -> Model:
    """Returns the model with new layers at these paths; the given model does not change."""
    if isinstance(model.definition, flax.linen.Module):
        return Model(_edited(model.definition, layers), _with_arrays(model.arrays, layers))
    # The copy shares the variables of the original, so they are replaced in it and never written to.
    copy = nnx.merge(*model)
    old_layers = dict(modules_in(copy))
    for path, layer in layers.items():
        old = old_layers[path]
        new = layer.make(old)
        _set_variables(new, old, layer)
        _become(old, new)
    return Model(*nnx.split(copy))


# nnx


def _set_variables(new: nnx.Module, old: nnx.Module, layer: NewLayer) -> None:
    """Gives a new nnx layer the arrays of ``layer``, or the old layer's variables where ``layer`` has None."""
    for kind, arrays in ((nnx.Param, layer.params), (nnx.BatchStat, layer.batch_stats)):
        old_variables = _variables(old, statistics=kind is nnx.BatchStat)
        if arrays is None:
            variables = {name: variable for name, variable in old_variables.items() if hasattr(new, name)}
        else:
            variables: dict[str, nnx.Variable] = {name: kind(array) for name, array in arrays.items()}
            # A variable that the old layer had too keeps its class and its metadata, such as a sharding.
            for name in variables.keys() & old_variables.keys():
                variables[name] = old_variables[name].replace(arrays[name])
        for name, variable in variables.items():
            setattr(new, name, variable)


def _variables(layer: nnx.Module, *, statistics: bool) -> dict[str, nnx.Variable]:
    """Returns the statistics of an nnx layer by name, or all its other variables."""
    variables = {name: value for name, value in vars(layer).items() if isinstance(value, nnx.Variable)}
    return {name: value for name, value in variables.items() if isinstance(value, nnx.BatchStat) == statistics}


def _become(old: nnx.Module, new: nnx.Module) -> None:
    """Turns the object ``old`` into the layer ``new``.

    A model may refer to one layer from any number of attributes, lists and dicts, and nnx keeps no record of these
    references.  So they stay, and the object behind them changes.  (``nnx.recursive_map`` would build a model of new
    objects, but it refuses modules that refer to each other in a cycle.)
    """
    old.__dict__.clear()
    old.__dict__.update(vars(new))
    old.__class__ = type(new)


# linen


@dataclasses.dataclass(frozen=True)
class NotASubmodule:
    """Holds a linen module where Flax does not see it.

    Flax makes a submodule of each module that is an attribute of another, and the submodule's variables go one level
    deeper, under the attribute's name.  The variables of an edited model stay where they were.
    """

    module: flax.linen.Module


class Edited(flax.linen.Module):
    """A linen model with new layers at some paths; its other layers, methods and variables are those of the model.

    Attributes:
      original: the model as it was.
      edits: pairs of a path and a function that makes the layer there, as in NewLayer.
    """

    original: NotASubmodule
    edits: tuple[tuple[str, Callable], ...]

    # These three replace Flax's own, so that a method can be named as in `apply(..., method="encode")`: it is a method
    # of the original model, which this class does not have.

    @flax.linen.nowrap
    def apply(self, *args, **kwargs):
        """Applies the model, or any of its methods, as :meth:`flax.linen.Module.apply`."""
        with self._replacing_layers(prefix=()):
            return self.original.module.apply(*args, **kwargs)

    @flax.linen.nowrap
    def init_with_output(self, *args, **kwargs):
        """Calls and initializes the model, as :meth:`flax.linen.Module.init_with_output`."""
        with self._replacing_layers(prefix=()):
            return self.original.module.init_with_output(*args, **kwargs)

    @flax.linen.nowrap
    def init(self, *args, **kwargs):
        """Initializes the model, as :meth:`flax.linen.Module.init`."""
        with self._replacing_layers(prefix=()):
            return self.original.module.init(*args, **kwargs)

    def setup(self):
        """Binds the original model to the scope of this one, so that both have the same variables."""
        self._bound = NotASubmodule(self.original.module.clone(parent=self.scope))

    def __call__(self, *args, **kwargs):
        """Calls the model when it is bound: as a submodule of another model, or by :meth:`flax.linen.Module.bind`."""
        with self._replacing_layers(prefix=self.path):
            return self._bound.module(*args, **kwargs)

    @flax.linen.nowrap
    @contextlib.contextmanager
    def _replacing_layers(self, prefix: tuple[str, ...]) -> Generator[None]:
        """Replaces the layers of this model that are called in this context; ``prefix`` is the model's own path."""
        makers = {"/".join(filter(None, (*prefix, path))): make for path, make in self.edits}
        edit = _Edit(makers, new_layers=[])

        def call_new_layer(proceed, args, kwargs, context):
            old = context.module
            if context.method_name != "__call__" or not is_one_of(old, (*BATCH_NORMS, *LINEAR)):
                return proceed(*args, **kwargs)
            path = "/".join(old.path)
            if _next_edit(old, path) is not edit:  # all edits in progress see this call
                return proceed(*args, **kwargs)
            new = edit.makers[path](old, parent=old.scope)
            edit.new_layers.append(new)
            return new(*args, **kwargs)  # which all edits in progress see too

        _in_progress.edits.append(edit)
        try:
            with flax.linen.intercept_methods(call_new_layer):
                yield
        finally:
            _in_progress.edits.pop()


class _Edit(NamedTuple):
    """The edits of one model while it is being called.

    Attributes:
      makers: functions that make a new layer, by the path of the old layer.
      new_layers: those made so far in this call.
    """

    makers: Mapping[str, Callable]
    new_layers: list[flax.linen.Module]


class _InProgress(threading.local):
    """The edits of the models that are being called, each inside the one before.

    One list for each thread, as Flax has its interceptors: other threads may be calling models at the same time.
    """

    def __init__(self):
        self.edits: list[_Edit] = []


_in_progress = _InProgress()


def _next_edit(layer: flax.linen.Module, path: str) -> _Edit | None:
    """Returns the edit that is the next to replace a layer, or None.

    An edited model may be part of another, and both may have an edit for a path.  The inner one comes first, as it was
    made first; its new layer, at the same path, is what the outer one then replaces.
    """
    next_edit = None
    for edit in _in_progress.edits:  # from the outermost model to the innermost, so that the innermost wins
        if any(layer is new for new in edit.new_layers):
            break  # this edit has made the layer: it is done with it, and so are all inside it
        if path in edit.makers:
            next_edit = edit
    return next_edit


@intercept.ignore_layers
def _will_be_replaced(layer: flax.linen.Module, path: str) -> bool:
    """Returns whether another layer will be called in place of this one."""
    return _next_edit(layer, path) is not None


def _edited(model: flax.linen.Module, layers: Mapping[str, NewLayer]) -> Edited:
    """Returns an edited model; a second operation on one adds to its edits, and does not wrap it again."""
    original, makers = model, {}
    if isinstance(model, Edited):
        original, makers = model.original.module, dict(model.edits)
    for path, layer in layers.items():
        first = makers.get(path)
        makers[path] = layer.make if first is None else functools.partial(_make_twice, first, layer.make)
    return Edited(NotASubmodule(original), tuple(makers.items()))


def _make_twice(first: Callable, second: Callable, old: flax.linen.Module, **parent: Any) -> flax.linen.Module:
    """Makes the layer of a second operation from that of the first."""
    return second(first(old, **parent), **parent)


def _with_arrays(variables: Mapping[str, Any], layers: Mapping[str, NewLayer]) -> dict[str, Any]:
    """Returns the variables of a linen model with those of new layers in place of the old layers'."""
    variables = dict(variables)
    for collection in ("params", "batch_stats"):
        flat = flatten_dict(variables.pop(collection, {}))
        for path, layer in layers.items():
            arrays = getattr(layer, collection)
            if arrays is None:
                continue
            steps = tuple(path.split("/")) if path else ()
            old = {key: flat.pop(key) for key in [*flat] if key[:-1] == steps}
            for name, array in arrays.items():
                key = (*steps, name)
                # Flax may keep an array in a box with its sharding (nn.Partitioned): the new array gets the same box.
                flat[key] = replace_boxed(old[key], array) if key in old else array
        if flat:
            variables[collection] = unflatten_dict(flat)
    return variables
