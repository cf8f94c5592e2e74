"""One record for linen and nnx models, and their layers' arrays by path.

A model is split into a definition, which is static, and a pytree of arrays, so that everything computed with a model is
a pure function of arrays.

A layer's path is its place in the model, as in "Block_0/BatchNorm_0".  In linen it is the path of the layer's scope,
which is the same in all collections of variables, and for all calls of a layer that is shared; in nnx, the attributes
that lead to the layer.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from flax.core import FrozenDict, unfreeze
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict

import jaxbn.linen
import jaxbn.nnx

BATCH_NORMS = (flax.linen.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm)
CONVOLUTIONS = (flax.linen.Conv, flax.linen.ConvTranspose, nnx.Conv, nnx.ConvTranspose)
DENSE = (flax.linen.Dense, flax.linen.DenseGeneral, nnx.Linear, nnx.LinearGeneral)
LINEAR = (*CONVOLUTIONS, *DENSE)


class Model(NamedTuple):
    """A linen or nnx model in two parts.

    Attributes:
      definition: the linen module, or the GraphDef of the nnx module; static, and hashable unless it holds arrays.
      arrays: the variables of the linen module, as nested dicts, or the State of the nnx module; a pytree.
    """

    definition: Any
    arrays: Any


def split(model: Any, variables: Mapping | None) -> Model:
    """Splits a linen module with its variables, or an nnx module with None, into definition and arrays."""
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise ValueError(
                "variables must be None for an nnx model, which holds its own; pass None, or nnx.update(model, ...) "
                "first."
            )
        return Model(*nnx.split(model))
    if not isinstance(model, flax.linen.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"the model must be a flax.linen.Module or an nnx.Module, got {got}; pass the module itself, not its "
            "class, and not its apply function."
        )
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"variables must have the collection 'batch_stats', as those of a linen model with batch norm do, got "
            f"{got}; pass the result of model.init, or {{'params': params, 'batch_stats': batch_stats}}; a model "
            "without batch norm needs no change."
        )
    # Copies all dicts, so that nothing here can change the caller's; takes FrozenDicts and other mappings too.
    return Model(model, unfreeze({**variables}))


def join(model: Model) -> tuple[Any, Any]:
    """Undoes :func:`split`: returns the linen module and its variables, or an nnx module and None."""
    if isinstance(model.definition, flax.linen.Module):
        return model.definition, model.arrays
    return merged(model), None


def like(new: Any, given: Any) -> Any:
    """Returns nested dicts with FrozenDicts and OrderedDicts where ``given`` has them, so that the trees are alike.

    Older TrainStates hold FrozenDicts, and the carry of a scan must keep its structure.
    """
    if not isinstance(new, Mapping) or not isinstance(given, Mapping):
        return new
    # First in the order of the given ones, which matters in an OrderedDict.
    names = [*(name for name in given if name in new), *(name for name in new if name not in given)]
    copy = {name: like(new[name], given.get(name)) for name in names}
    kind = next((kind for kind in (FrozenDict, collections.OrderedDict) if isinstance(given, kind)), dict)
    return kind(copy)


def merged(model: Model) -> nnx.Module:
    """Rebuilds an nnx module, with copies of the variables."""
    # nnx.split and nnx.merge pass on the Variable objects themselves: without a copy, the user's module would see every
    # update of this one.
    return nnx.merge(*model, copy=True)


def arrays_of(model: Model) -> dict[str, dict[str, Any]]:
    """Collects the parameters and statistics of each layer, by path and then by name."""
    arrays = collections.defaultdict(dict)
    if isinstance(model.definition, flax.linen.Module):
        for collection in ("params", "batch_stats"):
            for (*path, name), value in flatten_dict(model.arrays.get(collection, {})).items():
                # Initializers under nn.with_partitioning put their arrays in boxes that carry the axis names.
                arrays["/".join(path)][name] = unbox(value)
        return arrays
    for path, layer in modules(model).items():
        arrays[path] = {name: v[...] for name, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    return arrays


def modules(model: Model) -> dict[str, nnx.Module]:
    """Returns the modules of an nnx model by path; none of a linen model, whose submodules exist only in a call."""
    if isinstance(model.definition, flax.linen.Module):
        return {}
    return dict(modules_in(nnx.merge(*model)))  # without copies: only to be read


def modules_in(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields the path and the object of an nnx module and of each module in it.

    An nnx model is a graph: a module that is reachable on several paths is one object, and comes once, with the first.
    """
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            yield "/".join(map(str, path)), node


def sharing(model: Model) -> dict[str, str]:
    """Finds modules of an nnx model that hold the same Variable, such as tied weights: path to the other's path."""
    owners, shared = {}, {}
    for path, layer in modules(model).items():
        for variable in vars(layer).values():
            if isinstance(variable, nnx.Variable):
                owner = owners.setdefault(id(variable), path)  # modules may differ, and share a Variable only
                if owner != path:
                    shared |= {path: owner, owner: path}
    return shared


def shapes(tree: Any) -> Any:
    """Replaces the arrays of a pytree with their shapes and dtypes."""

    def shape(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(shape, tree)
