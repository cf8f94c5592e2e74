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


def exchange(model: Model, replacements: Mapping[str, NewLayer]) -> Model:
    """Returns the model with new layers at these paths; the given model does not change."""
    if isinstance(model.definition, flax.linen.Module):
        return Model(_edited(model.definition, replacements), _with_arrays(model.arrays, replacements))
    # The copy shares the variables of the original, so they are replaced in it and never written to.
    copy = nnx.merge(*model)
    old_layers = dict(modules_in(copy))
    for path, replacement in replacements.items():
        old = old_layers[path]
        new = replacement.make(old)
        _set_variables(new, old, replacement)
        _become(old, new)
    return Model(*nnx.split(copy))


# nnx


def _set_variables(new: nnx.Module, old: nnx.Module, replacement: NewLayer) -> None:
    """Gives a new nnx layer the arrays of ``replacement``, or the old layer's variables where it has None."""
    old_variables = {name: value for name, value in vars(old).items() if isinstance(value, nnx.Variable)}
    old_stats = {name: value for name, value in old_variables.items() if isinstance(value, nnx.BatchStat)}
    # Parameters are all other variables, whatever their class.
    old_params = {name: value for name, value in old_variables.items() if name not in old_stats}
    for kind, arrays, previous in (
        (nnx.Param, replacement.params, old_params),
        (nnx.BatchStat, replacement.batch_stats, old_stats),
    ):
        variables: dict[str, nnx.Variable]
        if arrays is None:
            variables = {name: variable for name, variable in previous.items() if hasattr(new, name)}
        else:
            variables = {name: kind(array) for name, array in arrays.items()}
            # A variable that the old layer had too keeps its class and its metadata, such as a sharding.
            for name in variables.keys() & previous.keys():
                variables[name] = previous[name].replace(arrays[name])
        for name, variable in variables.items():
            setattr(new, name, variable)


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
#
# An edited model intercepts the calls of its layers.  It may be a part of another edited model, and both may have an
# edit for one path.  Three rules decide which new layer is called:
#
# 1. Every edit in progress sees every call: Flax hands a call to all interceptors, from the outermost to the innermost.
# 2. The innermost edit with an entry for the path answers, as its model was edited first; the others let the call pass.
# 3. The call of its new layer, which has the same path, is intercepted again.  The edit that made the layer, and those
#    inside it, let it pass; so an outer edit can replace the new layer by its own.


class _Edit(NamedTuple):
    """The edits of one model while it is being called.

    Attributes:
      makers: functions that make a new layer, by the path of the old layer.
      made: layers made so far in this call.
    """

    makers: Mapping[str, Callable]
    made: list[flax.linen.Module]


class _InProgress(threading.local):
    """The edits of the models that are being called, each inside the one before.

    One list for each thread, as Flax has its interceptors: other threads may be calling models at the same time.
    """

    def __init__(self):
        self.edits: list[_Edit] = []


_in_progress = _InProgress()


def _next_edit(layer: flax.linen.Module, path: str) -> _Edit | None:
    """Returns the edit that is the next to replace a layer, or None."""
    next_edit = None
    for edit in _in_progress.edits:  # from the outermost model to the innermost, so that the innermost wins: rule 2
        if any(layer is made for made in edit.made):
            break  # this edit has made the layer, so it is done with it, and so are all inside it: rule 3
        if path in edit.makers:
            next_edit = edit
    return next_edit


def _will_be_replaced(layer: flax.linen.Module, path: str) -> bool:
    """Returns whether another layer will be called in place of this one."""
    return _next_edit(layer, path) is not None


# run() must skip calls that an edited model redirects.
intercept.ignore_layers(_will_be_replaced)


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
      edits: pairs of a path and ``make``, where ``make(old, parent=scope)`` returns the layer to call instead of
        ``old``.
    """

    original: NotASubmodule
    edits: tuple[tuple[str, Callable], ...]

    # These three replace Flax's own, so that a method can be named as in `apply(..., method="encode")`: it is a method
    # of the original model, which this class does not have.

    @flax.linen.nowrap
    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the model, or any of its methods, as :meth:`flax.linen.Module.apply`."""
        return self._call_original("apply", *args, **kwargs)

    @flax.linen.nowrap
    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """Calls and initializes the model, as :meth:`flax.linen.Module.init_with_output`."""
        return self._call_original("init_with_output", *args, **kwargs)

    @flax.linen.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """Initializes the model, as :meth:`flax.linen.Module.init`."""
        return self._call_original("init", *args, **kwargs)

    @flax.linen.nowrap
    def _call_original(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the original model, with its layers replaced."""
        with self._replacing_layers(prefix=()):
            return getattr(self.original.module, name)(*args, **kwargs)

    def setup(self) -> None:
        """Binds the original model to the scope of this one, so that both have the same variables."""
        self._bound = NotASubmodule(self.original.module.clone(parent=self.scope))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model when it is bound: as a submodule of another model, or by :meth:`flax.linen.Module.bind`."""
        with self._replacing_layers(prefix=self.path):
            return self._bound.module(*args, **kwargs)

    @flax.linen.nowrap
    @contextlib.contextmanager
    def _replacing_layers(self, prefix: tuple[str, ...]) -> Generator[None]:
        """Replaces the layers of this model that are called in this context; ``prefix`` is the model's own path."""
        makers = {"/".join(filter(None, (*prefix, path))): make for path, make in self.edits}
        edit = _Edit(makers, made=[])

        def call_new_layer(proceed: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            old = context.module
            if context.method_name != "__call__" or not is_one_of(old, (*BATCH_NORMS, *LINEAR)):
                return proceed(*args, **kwargs)
            path = "/".join(old.path)
            if _next_edit(old, path) is not edit:  # rules 1 and 2
                return proceed(*args, **kwargs)
            new = edit.makers[path](old, parent=old.scope)
            edit.made.append(new)
            return new(*args, **kwargs)  # rule 3

        _in_progress.edits.append(edit)
        try:
            with flax.linen.intercept_methods(call_new_layer):
                yield
        finally:
            _in_progress.edits.pop()


def _edited(model: flax.linen.Module, replacements: Mapping[str, NewLayer]) -> Edited:
    """Returns an edited model; a second operation on one adds to its edits, and does not wrap it again."""
    original, makers = model, {}
    if isinstance(model, Edited):
        original, makers = model.original.module, dict(model.edits)
    for path, replacement in replacements.items():
        first = makers.get(path)
        make = replacement.make
        makers[path] = make if first is None else functools.partial(_make_twice, first, make)
    return Edited(NotASubmodule(original), tuple(makers.items()))


def _make_twice(first: Callable, second: Callable, old: flax.linen.Module, **parent: Any) -> flax.linen.Module:
    """Makes the layer of a second operation from that of the first."""
    return second(first(old, **parent), **parent)


def _with_arrays(variables: Mapping[str, Any], replacements: Mapping[str, NewLayer]) -> dict[str, Any]:
    """Returns the variables of a linen model with those of new layers in place of the old layers'."""
    variables = dict(variables)
    for collection in ("params", "batch_stats"):
        flat = flatten_dict(variables.pop(collection, {}))
        for path, replacement in replacements.items():
            arrays = getattr(replacement, collection)
            if arrays is None:
                continue
            scopes = tuple(path.split("/")) if path else ()
            old = {key: flat.pop(key) for key in [*flat] if key[:-1] == scopes}
            for name, array in arrays.items():
                key = (*scopes, name)
                # Flax may keep an array in a box with its sharding (nn.Partitioned): the new array gets the same box.
                flat[key] = replace_boxed(old[key], array) if key in old else array
        if flat:
            variables[collection] = unflatten_dict(flat)
    return variables
