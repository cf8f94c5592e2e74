"""Replaces layers of a linen or nnx model.

The layers of an nnx model are objects in it, and are replaced in a copy.  For a linen model, see
:mod:`jaxbn.surgery._edited`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen
from flax import nnx
from flax.core.meta import replace_boxed
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn._core.variables import variable_names
from jaxbn._models.model import BATCH_NORMS, LINEAR, Model, modules_in
from jaxbn.surgery._edited import edited
from jaxbn.surgery._new_layers import NewLayer

# The variables of batch norms and linear layers.
_VARIABLES = {*variable_names(counted=True, accumulate=2), "scale", "bias", "kernel"}


def exchange(model: Model, replacements: Mapping[str, NewLayer]) -> Model:
    """Returns the model with new layers at these paths; the given model does not change."""
    if isinstance(model.definition, flax.linen.Module):
        makers = {path: replacement.make for path, replacement in replacements.items()}
        return Model(edited(model.definition, makers), _with_arrays(model.arrays, replacements))
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
    cls, kind = type(old), next(kind for kind in type(old).__mro__ if kind in (*BATCH_NORMS, *LINEAR))
    if kind is not cls:
        for name, value in vars(old).items():
            if name not in vars(new) and name not in _VARIABLES:
                setattr(new, name, value)
    old.__dict__.clear()
    old.__dict__.update(vars(new))
    old.__class__ = _class_in_place(cls, kind, type(new))


@functools.cache  # one class for each pair, so that the graphs of two such models are equal
def _class_in_place(cls: type, kind: type, new: type) -> type:
    """Returns ``new``, or for a subclass that calls ``super().__call__``, the same with ``new`` behind that call."""
    if cls is kind or issubclass(new, cls):
        return new
    if issubclass(cls, new):
        return cls
    # Comes right before the kind in the order of method resolution.
    behind = new if issubclass(new, kind) else type(new.__name__, (new, kind), {})
    return type(cls.__name__, (cls, behind), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


# linen


def _with_arrays(variables: Mapping[str, Any], replacements: Mapping[str, NewLayer]) -> dict[str, Any]:
    """Returns the variables of a linen model with those of new layers in place of the old layers'."""
    variables = dict(variables)
    # A name may contain the "/" that separates the names of a path.
    scopes = {
        "/".join(scope): scope
        for collection in ("params", "batch_stats")
        for *scope, _ in flatten_dict(variables.get(collection, {}))
    }
    for collection in ("params", "batch_stats"):
        flat = flatten_dict(variables.pop(collection, {}))
        for path, replacement in replacements.items():
            arrays = getattr(replacement, collection)
            if arrays is None:
                continue
            # A subclass of a batch norm may have variables of its own, which stay.
            of_layer = [key for key in flat if "/".join(key[:-1]) == path and key[-1] in _VARIABLES]
            old = {key: flat.pop(key) for key in of_layer}
            for name, array in arrays.items():
                key = (*scopes[path], name)
                # Flax may keep an array in a box with its sharding (nn.Partitioned): the new array gets the same box.
                flat[key] = replace_boxed(old[key], array) if key in old else array
        if flat:
            variables[collection] = unflatten_dict(flat)
    return variables
