"""A linen or nnx model in two parts, a definition and its arrays, and the arrays of its layers by path.

A layer's path is its place in the model, as in "Block_0/BatchNorm_0".  The definition is a linen module, or the
GraphDef of an nnx module; the arrays are the variables, or the State.  So whatever is computed with a model is a pure
function of arrays.
"""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from flax.core import unfreeze
from flax.core.meta import unbox
from flax.traverse_util import flatten_dict

import jaxbn.linen
import jaxbn.nnx
from jaxbn._core.stats import BatchStats

# A subclass that overrides __call__ is another layer: see is_one_of.
BATCH_NORMS = (flax.linen.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm)
CONVOLUTIONS = (flax.linen.Conv, flax.linen.ConvTranspose, nnx.Conv, nnx.ConvTranspose)
DENSE = (flax.linen.Dense, flax.linen.DenseGeneral, nnx.Linear, nnx.LinearGeneral)
LINEAR = (*CONVOLUTIONS, *DENSE)


class Model(NamedTuple):
    """A model in two parts: ``definition`` is static and hashable, ``arrays`` is a pytree."""

    definition: Any
    arrays: Any


def split(model: Any, variables: Mapping | None) -> Model:
    """Takes a linen module with its variables, or an nnx module with None, apart."""
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise ValueError(
                "variables are given beside an nnx model, which holds its own; pass None in their place, "
                "or nnx.update(model, ...) first."
            )
        return Model(*nnx.split(model))
    if not isinstance(model, flax.linen.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"the model is {given}; accepted are a flax.linen.Module and an nnx.Module; "
            "pass the module itself, not its class, and not its apply function."
        )
    if not isinstance(variables, Mapping) or "batch_stats" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"variables of a linen model with batch norm have the collection 'batch_stats', but {given} was given; "
            "pass what model.init returns, or {'params': params, 'batch_stats': batch_stats}; "
            "for a model without batch norm there is nothing to do."
        )
    return Model(model, unfreeze({**variables}))


def join(model: Model) -> tuple[Any, Any]:
    """Undoes :func:`split`: the linen module and its variables, or an nnx module and None."""
    if isinstance(model.definition, flax.linen.Module):
        return model.definition, model.arrays
    return merged(model), None


def merged(model: Model) -> nnx.Module:
    """Returns an nnx module with variables of its own: those of the one that was split stay as they are."""
    return nnx.merge(*model, copy=True)


def with_stats(model: Model, stats: Mapping[str, BatchStats]) -> Model:
    """Returns the model with other running statistics in the layers at these paths."""
    if isinstance(model.definition, flax.linen.Module):
        arrays = jax.tree.map(lambda leaf: leaf, model.arrays)
        for path, new in stats.items():
            _at(arrays["batch_stats"], path).update(new._asdict())
        return Model(model.definition, arrays)
    changed = merged(model)
    for path, layer in modules_in(changed):
        for name, value in stats[path]._asdict().items() if path in stats else ():
            getattr(layer, name).set_value(value)
    return Model(*nnx.split(changed))


def _at(tree, path):
    """Returns what nested dicts hold at a path, or nothing."""
    for step in path.split("/") if path else ():
        tree = tree.get(step, {})
    return tree


def arrays_of(model: Model) -> dict[str, dict[str, Any]]:
    """Returns the parameters and statistics of each layer by name, by its path."""
    arrays = collections.defaultdict(dict)
    if isinstance(model.definition, flax.linen.Module):
        for collection in ("params", "batch_stats"):
            for (*path, name), value in flatten_dict(model.arrays.get(collection, {})).items():
                arrays["/".join(path)][name] = unbox(value)
        return arrays
    for path, layer in modules(model).items():
        arrays[path] = {name: v[...] for name, v in vars(layer).items() if isinstance(v, nnx.Variable)}
    return arrays


def modules(model: Model) -> dict[str, nnx.Module]:
    """Returns the modules in an nnx model by path; none of a linen model, whose modules exist while it is called."""
    return {} if isinstance(model.definition, flax.linen.Module) else dict(modules_in(nnx.merge(*model)))


def modules_in(module: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """Yields the path and the object of an nnx module and of all in it, each once."""
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            yield "/".join(map(str, path)), node


def sharing(model: Model) -> dict[str, str]:
    """Returns the modules of an nnx model that have a variable of another module, with the path of that."""
    owners, shared = {}, {}
    for path, layer in modules(model).items():
        for value in vars(layer).values():
            if isinstance(value, nnx.Variable) and owners.setdefault(id(value), path) != path:
                shared |= {path: owners[id(value)], owners[id(value)]: path}
    return shared


def is_one_of(layer: Any, kinds: tuple[type, ...]) -> bool:
    """Says whether a layer is of one of these classes, and computes what they do."""
    return any(isinstance(layer, kind) and type(layer).__call__ is kind.__call__ for kind in kinds)


def shapes(tree: Any) -> Any:
    """Returns a pytree with shapes and dtypes for its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x, tree)
