"""Reads the weights of one layer from tensors, variables, lists and dicts: NumPy arrays by name, or an error."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Variables = dict[str, Any]


def flat(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Flattens nested mappings to leaves by path, such as ``params/kernel``, and takes them out of Flax's boxes."""
    leaves = {}
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            leaves |= flat(value, here)
        else:
            # The value of a box such as nn.Partitioned.  Not its unbox(), which shards and so fails for mere shapes.
            leaves["/".join(here)] = value.value if hasattr(value, "unbox") else value
    return leaves


def nested(leaves: Mapping[str, Any]) -> Variables:
    """Returns the variables of one layer from its leaves by path: the inverse of :func:`flat`."""
    variables = {}
    for key, leaf in leaves.items():
        collection, _, name = key.partition("/")
        variables.setdefault(collection, {})[name] = leaf
    return variables


def read(what: str, weights: Mapping[str, Any], needed: Iterable[str], optional: Iterable[str]) -> Arrays:
    """Returns the arrays of a layer by name; refuses missing and unknown names."""
    needed = [*needed]
    names = list(dict.fromkeys([*needed, *optional]))
    if not weights or not {*needed} <= {*weights} <= {*names}:
        raise ValueError(
            f"{_parts(what, needed, names)}, got {', '.join(weights) or 'nothing'}; pass only what belongs to this "
            "layer, by these names."
        )
    return {name: _array(name, weights[name]) for name in names if name in weights}


def read_keras(what: str, weights: Any, needed: list[str], names: list[str]) -> Arrays:
    """Returns the arrays of a Keras layer by name: their own names, or else ``names``, in this order."""
    if isinstance(weights, Mapping):
        return read(what, weights, needed, names)
    own_names = [getattr(weight, "name", None) for weight in weights]
    if any(isinstance(name, str) for name in own_names):
        # Keras 3 names a weight "gamma", Keras 2 "norm/gamma:0".
        own_names = [str(name).rpartition("/")[2].partition(":")[0] for name in own_names]
        if len({*own_names}) == len(own_names):  # two equal names are those of two layers
            return read(what, dict(zip(own_names, weights, strict=True)), needed, names)
    elif len(needed) <= len(weights) <= len(names):
        return read(what, dict(zip(names, weights, strict=False)), needed, names)
    raise ValueError(
        f"{_parts(what, needed, names)}, got {len(weights)} arrays; pass only the weights of this layer, and give the "
        "layout the options of the layer."
    )


def one_size(arrays: Arrays) -> int:
    """Returns the number of features of a norm's arrays; refuses arrays of different shapes or several axes."""
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({*shapes.values()}) != 1:
        raise ValueError(f"the arrays of a norm must have the same shape, got {shapes}; pass those of one layer.")
    if any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(
            f"the arrays of a norm must have one axis, the features, got {shapes}; the order of several axes differs "
            "between frameworks: move them yourself, in your own Layout."
        )
    return next(iter(arrays.values())).size


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the array in another dtype; refuses to lose more than precision."""
    if array.dtype.kind == "c" and np.dtype(dtype).kind != "c":
        raise ValueError(f"{name} is complex, but {np.dtype(dtype)} in Flax; pass variables of a complex dtype.")
    with np.errstate(over="ignore", invalid="ignore"):
        new = array.astype(dtype)
    if lost := np.count_nonzero(np.isfinite(array) & ~np.isfinite(new)):
        raise ValueError(
            f"{lost} values of {name}, at most {np.max(np.abs(array))}, would be infinite in {np.dtype(dtype)}; "
            "pass variables of a wider dtype, such as float32."
        )
    return new


def copies(arrays: Mapping[str, Any]) -> Arrays:
    """Copies arrays, without those that are None.

    A copy, because PyTorch trains in place, and JAX may use the memory of a NumPy array without copying it.
    """
    return {name: np.array(array, order="C") for name, array in arrays.items() if array is not None}


def _array(name: str, value: Any) -> np.ndarray:
    """Returns a NumPy array, in float32 if NumPy lacks the dtype."""
    # A tensor on PyTorch's device "meta", or a jax.ShapeDtypeStruct.
    is_empty = getattr(value, "is_meta", False) or (hasattr(value, "shape") and not hasattr(value, "__array__"))
    if hasattr(value, "detach") and not is_empty:  # a tensor of PyTorch
        value = value.detach().cpu()
        if str(value.dtype).startswith(("torch.bfloat16", "torch.float8")):
            value = value.float()
    array = None if is_empty else np.asarray(value)
    # Kinds of numbers, and "V" for those that ml_dtypes adds to NumPy, such as bfloat16.
    if array is None or array.dtype.kind not in "biufcV":
        raise ValueError(f"{name} is a {type(value).__name__} without numbers; pass values, not shapes.")
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _parts(what: str, needed: list[str], names: list[str]) -> str:
    """Lists what a layer must have, and what it may have."""
    optional = [name for name in names if name not in needed]
    clauses = []
    if needed:
        clauses.append(f"must have {', '.join(needed)}")
    if optional:
        clauses.append(f"may have {', '.join(optional)}")
    return f"{what} {' and '.join(clauses)}"
