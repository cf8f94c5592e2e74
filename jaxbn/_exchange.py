"""A linen or nnx model with some of its layers exchanged for others, and the layers that come in question.

An nnx model is copied and changed.  A linen model makes its layers while it is called, so it is wrapped in one that
intercepts them; its methods and its variable tree stay.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxbn.linen
import jaxbn.nnx
from jaxbn import _models
from jaxbn._models import Model


class NewLayer(NamedTuple):
    """A layer to put in the place of another.

    Attributes:
      make: ``make(old)`` returns it, for a linen module with ``parent=`` besides; what the old one says at that moment
        counts, since a linen layer is made anew, with other settings perhaps, whenever the model is called.
      params: its parameters by name; None for those that are there.
      batch_stats: its statistics by name; None for those that are there.
    """

    make: Callable[..., Any]
    params: dict[str, Any] | None = None
    batch_stats: dict[str, Any] | None = None


def exchange(model: Model, layers: Mapping[str, NewLayer]) -> Model:
    """Returns the model with other layers at these paths; the one that was given stays as it is."""
    if isinstance(model.definition, flax.linen.Module):
        definition, before = model.definition, {}
        if isinstance(definition, Edited):
            definition, before = definition.original.model, dict(definition.edits)
        after = before | {path: _after(before.get(path), layer.make) for path, layer in layers.items()}
        edited = _edited_class(type(definition))(Original(definition), tuple(after.items()))
        return Model(edited, _with_arrays(model, layers))
    edited = nnx.merge(*model)  # of arrays that are the model's own: replaced in it, never written to
    for path, layer in _models.modules_in(edited):
        if path in layers:
            new = layers[path].make(layer)
            for kind, values in ((nnx.Param, layers[path].params), (nnx.BatchStat, layers[path].batch_stats)):
                if values is None:  # the old variables, with what else they know of themselves
                    values = {n: v for n, v in vars(layer).items() if isinstance(v, kind) and hasattr(new, n)}
                for name, value in values.items():
                    setattr(new, name, value if isinstance(value, nnx.Variable) else kind(value))
            # The object itself changes, so that all that refer to it see the new layer, wherever they keep it.
            layer.__dict__.clear()
            layer.__dict__.update(vars(new))
            layer.__class__ = type(new)
    return Model(*nnx.split(edited))


@dataclasses.dataclass(frozen=True)
class Original:
    """A linen model that is not to become a submodule of the module that holds it."""

    model: flax.linen.Module


class Edited(flax.linen.Module):
    """A linen model with other layers at some paths, and the variable tree of the model.

    Attributes:
      original: the model as it was.
      edits: pairs of a path and a function that makes the layer there, as in NewLayer.
    """

    original: Original
    edits: tuple[tuple[str, Callable], ...]

    def __call__(self, *args, **kwargs):
        """Calls the model."""
        return self._through("__call__", *args, **kwargs)

    def _bound(self):
        """Returns the model in the scope of this module, so that its variables get no further level."""
        if "_model" not in vars(self):
            object.__setattr__(self, "_model", self.original.model.clone(parent=self.scope))
        return vars(self)["_model"]

    def _through(self, method, *args, **kwargs):
        edits = {"/".join((*self.path, path)).strip("/"): make for path, make in self.edits}
        put_in = []

        def intercept(proceed, args, kwargs, context):
            old = context.module
            make = edits.get("/".join(old.path))
            if make is None or context.method_name != "__call__" or any(old is new for new in put_in):
                return proceed(*args, **kwargs)
            new = make(old, parent=old.scope)
            put_in.append(new)
            return new(*args, **kwargs)

        _models.edits_under_way.append((edits, put_in))
        try:
            with flax.linen.intercept_methods(intercept):
                return getattr(self._bound(), method)(*args, **kwargs)
        finally:
            _models.edits_under_way.pop()


@functools.cache
def _edited_class(cls):
    """Returns Edited with the other public methods of a model's class, for ``apply(..., method="encode")``."""

    def through(name):
        return lambda self, *args, **kwargs: self._through(name, *args, **kwargs)

    names = [name for name in dir(cls) if name[0] != "_" and not hasattr(flax.linen.Module, name)]
    methods = {name: through(name) for name in names if callable(getattr(cls, name))}
    return type(f"Edited{cls.__name__}", (Edited,), {**methods, "__doc__": Edited.__doc__})


def _after(first, second):
    """Returns what makes the layer of a second exchange from that of the first, if there was one."""
    return second if first is None else functools.partial(_make_twice, first, second)


def _make_twice(first, second, old, **place):
    return second(first(old, **place), **place)


def _with_arrays(model, layers):
    """Returns the variables of a linen model with those of new layers in place of the old."""
    variables = dict(model.arrays)
    for collection in ("params", "batch_stats"):
        flat = flatten_dict(variables.pop(collection, {}))
        for path, layer in layers.items():
            values = getattr(layer, collection)
            if values is not None:
                steps = tuple(path.split("/")) if path else ()
                flat = {key: value for key, value in flat.items() if key[: len(steps)] != steps}
                flat |= {(*steps, name): value for name, value in values.items()}
        if flat:
            variables[collection] = unflatten_dict(flat)
    return variables


def make_batch_norm(options: dict[str, Any], old: Any, **place: Any) -> Any:
    """Returns our batch norm with the settings of an old one, but for these options."""
    settings = _models.settings(old) | options
    return jaxbn.linen.BatchNorm(**settings, **place) if place else jaxbn.nnx.BatchNorm(**settings, rngs=nnx.Rngs(0))


def make_affine(options: dict[str, Any], old: Any, **place: Any) -> Any:
    """Returns an affine layer on the features of a batch norm, with these options."""
    settings = {name: getattr(old, name) for name in ("axis", "param_dtype")} | options
    return jaxbn.linen.Affine(**settings, **place) if place else jaxbn.nnx.Affine(old.num_features, **settings)


def make_group_norm(num_groups: int, old: Any, **place: Any) -> Any:
    """Returns a group norm with the settings of a batch norm."""
    names = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale")
    settings = {name: getattr(old, name) for name in names} | {"num_groups": num_groups}
    if place:
        return _LinenGroupNorm(**settings, **place)
    return _NnxGroupNorm(old.num_features, **settings, rngs=nnx.Rngs(0))


def make_with(options: dict[str, Any], old: Any, **place: Any) -> Any:
    """Returns a layer like the old one, but for these settings."""
    if isinstance(old, flax.linen.Module):
        return old.copy(parent=place.get("parent"), name=None, **options)
    copy = nnx.clone(old)
    for name, value in options.items():
        setattr(copy, name, value)
    return copy


class _LinenGroupNorm(flax.linen.GroupNorm):
    """Group norm that is called as batch norm is."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalises each group of features of each example."""
        del use_running_average
        return super().__call__(x, mask=mask)


class _NnxGroupNorm(nnx.GroupNorm):
    """Group norm that is called as batch norm is."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalises each group of features of each example."""
        del use_running_average
        return super().__call__(x, mask=mask)
