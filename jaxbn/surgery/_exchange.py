"""A linen or nnx model with some of its layers exchanged for others, and the layers that come in question.

An nnx model is copied and changed.  A linen model makes its layers while it is called, so it is wrapped in one that
intercepts them; its methods and its variable tree stay.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from flax.core.meta import replace_boxed
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxbn.linen
import jaxbn.nnx
from jaxbn._models.batch_norms import settings_of
from jaxbn._models.intercept import Level, exchanging, under_way
from jaxbn._models.model import BATCH_NORMS, LINEAR, Model, is_one_of, modules_in


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
        return Model(Edited(Original(definition), tuple(after.items())), _with_arrays(model, layers))
    edited = nnx.merge(*model)  # its variables are the model's own: replaced in it, never written to
    for path, old in modules_in(edited):
        if path in layers:
            new = layers[path].make(old)
            for name, value in _variables(old, new, layers[path]).items():
                setattr(new, name, value)
            # The object itself changes, so that all that refer to it see the new layer, wherever they keep it.
            old.__dict__.clear()
            old.__dict__.update(vars(new))
            old.__class__ = type(new)
    return Model(*nnx.split(edited))


def _variables(old, new, layer):
    """Returns the variables of a new nnx layer; where they have the name of an old one, with its kind and metadata."""
    variables = {}
    for kind, values in ((nnx.Param, layer.params), (nnx.BatchStat, layer.batch_stats)):
        before = {
            name: variable
            for name, variable in vars(old).items()
            if isinstance(variable, nnx.Variable) and isinstance(variable, nnx.BatchStat) == (kind is nnx.BatchStat)
        }
        if values is None:
            variables |= {name: variable for name, variable in before.items() if hasattr(new, name)}
        else:
            variables |= {n: before[n].replace(value) if n in before else kind(value) for n, value in values.items()}
    return variables


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

    @flax.linen.nowrap
    def apply(self, *args, **kwargs):
        """Applies the model, or any of its methods, as :meth:`flax.linen.Module.apply`."""
        with self._exchanging(()):
            return self.original.model.apply(*args, **kwargs)

    @flax.linen.nowrap
    def init_with_output(self, *args, **kwargs):
        """Calls and initializes the model, as :meth:`flax.linen.Module.init_with_output`."""
        with self._exchanging(()):
            return self.original.model.init_with_output(*args, **kwargs)

    @flax.linen.nowrap
    def init(self, *args, **kwargs):
        """Initializes the model, as :meth:`flax.linen.Module.init`."""
        with self._exchanging(()):
            return self.original.model.init(*args, **kwargs)

    def __call__(self, *args, **kwargs):
        """Calls the model as a part of another, or bound to its variables."""
        if "_model" not in vars(self):  # in the scope of this module, so that its variables get no further level
            object.__setattr__(self, "_model", self.original.model.clone(parent=self.scope))
        with self._exchanging(self.path):
            return vars(self)["_model"](*args, **kwargs)

    @flax.linen.nowrap
    @contextlib.contextmanager
    def _exchanging(self, above):
        """Exchanges the layers of what is called meanwhile; ``above`` is the path of the model in that."""
        level = Level({"/".join((*above, path)).strip("/"): make for path, make in self.edits}, [])
        number = len(under_way.levels)

        def intercept(proceed, args, kwargs, context):
            old, kinds = context.module, (*BATCH_NORMS, *LINEAR)
            if context.method_name != "__call__" or not is_one_of(old, kinds):
                return proceed(*args, **kwargs)
            path = "/".join(old.path)
            if exchanging(old, path)[-1:] != [number]:
                return proceed(*args, **kwargs)
            new = level.edits[path](old, parent=old.scope)
            level.put_in.append(new)
            return new(*args, **kwargs)

        under_way.levels.append(level)
        try:
            with flax.linen.intercept_methods(intercept):
                yield
        finally:
            under_way.levels.pop()


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
                before = {key: value for key, value in flat.items() if key[:-1] == steps}
                after = {(*steps, name): value for name, value in values.items()}
                flat = {key: value for key, value in flat.items() if key not in before}
                # What is known of a variable besides its value, such as its sharding, stays.
                flat |= {k: replace_boxed(before[k], value) if k in before else value for k, value in after.items()}
        if flat:
            variables[collection] = unflatten_dict(flat)
    return variables


def make_batch_norm(options: dict[str, Any], old: Any, **place: Any) -> Any:
    """Returns our batch norm with the settings of an old one, but for these options."""
    settings = settings_of(old) | options
    return jaxbn.linen.BatchNorm(**settings, **place) if place else jaxbn.nnx.BatchNorm(**settings, rngs=nnx.Rngs(0))


def make_affine(options: dict[str, Any], old: Any, **place: Any) -> Any:
    """Returns an affine layer on the features of a batch norm, with these options."""
    settings = {name: getattr(old, name) for name in ("axis", "param_dtype")} | options
    return jaxbn.linen.Affine(**settings, **place) if place else jaxbn.nnx.Affine(old.num_features, **settings)


def make_group_norm(num_groups: int, old: Any, **place: Any) -> Any:
    """Returns a group norm with the settings of a batch norm."""
    names = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale")
    settings: dict[str, Any] = {name: getattr(old, name) for name in names} | {"num_groups": num_groups}
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
