"""The layers that operations put into a model, made from the layers they replace.

Each ``make_...`` function takes its own settings first and the old layer last, so that
``functools.partial(make_affine, options)`` is a function of the old layer, as :class:`NewLayer` needs it.  A linen
layer is made with ``parent=``, the scope that it is to live in; an nnx layer without.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn._models.batch_norms import settings_of


class NewLayer(NamedTuple):
    """A layer to put in the place of another.

    Attributes:
      make: ``make(old)`` returns the nnx layer, ``make(old, parent=scope)`` the linen layer.  A linen layer is made
        again in every call of the model, from the old layer of that call, whose settings may depend on a train flag.
      params: its parameters by name; None keeps those of the old layer.
      batch_stats: its statistics by name; None keeps those of the old layer.
    """

    make: Callable[..., Any]
    params: dict[str, Any] | None = None
    batch_stats: dict[str, Any] | None = None


def make_batch_norm(options: dict[str, Any], old: Any, **parent: Any) -> Any:
    """Returns jaxbn's batch norm with the settings of an old batch norm, except for these options."""
    settings = settings_of(old) | options
    if isinstance(old, flax.linen.Module):
        return jaxbn.linen.BatchNorm(**settings, **parent)
    return jaxbn.nnx.BatchNorm(**settings, rngs=nnx.Rngs(0))


def make_affine(options: dict[str, Any], old: Any, **parent: Any) -> Any:
    """Returns an affine layer on the features of a batch norm, with these options."""
    settings = {"axis": old.axis, "param_dtype": old.param_dtype} | options
    if isinstance(old, flax.linen.Module):
        return jaxbn.linen.Affine(**settings, **parent)
    return jaxbn.nnx.Affine(old.num_features, **settings)


def make_group_norm(num_groups: int, old: Any, **parent: Any) -> Any:
    """Returns a group norm with the settings of a batch norm."""
    names = ("epsilon", "dtype", "param_dtype", "use_bias", "use_scale")
    settings = {name: getattr(old, name) for name in names}
    if isinstance(old, flax.linen.Module):
        return _LinenGroupNorm(num_groups=num_groups, **settings, **parent)
    return _NnxGroupNorm(old.num_features, num_groups=num_groups, **settings, rngs=nnx.Rngs(0))


def make_with(options: dict[str, Any], old: Any, *, parent: Any = None) -> Any:
    """Returns a copy of a layer with some settings changed."""
    if isinstance(old, flax.linen.Module):
        return old.copy(parent=parent, name=None, **options)
    copy = nnx.clone(old)
    for name, value in options.items():
        setattr(copy, name, value)
    return copy


class _LinenGroupNorm(flax.linen.GroupNorm):
    """Group norm that accepts the arguments of batch norm."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalizes each group of features of each example."""
        del use_running_average
        return super().__call__(x, mask=mask)


class _NnxGroupNorm(nnx.GroupNorm):
    """Group norm that accepts the arguments of batch norm."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None):
        """Normalizes each group of features of each example."""
        del use_running_average
        return super().__call__(x, mask=mask)
