"""The weights of one layer, read from whatever holds them: arrays of NumPy by their names, or an error."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Variables = dict[str, Any]


def flat(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns the leaves of nested mappings by their paths, such as ``params/kernel``, out of Flax's boxes."""
    leaves = {}
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            leaves |= flat(value, here)
        else:  # of a box, such as nn.Partitioned; its unbox() would also shard, which shapes do not allow
            leaves["/".join(here)] = value.value if hasattr(value, "unbox") else value
    return leaves


def nested(leaves: Mapping[str, Any]) -> Variables:
    """Returns the variables of one layer out of its leaves by their paths."""
    variables = {}
    for key, leaf in leaves.items():
        collection, _, name = key.partition("/")
        variables.setdefault(collection, {})[name] = leaf
    return variables


def read(what: str, given: Mapping[str, Any], needed: Iterable[str], optional: Iterable[str]) -> Arrays:
    """Returns the arrays of a layer by name; refuses an entry that is missing or unknown."""
    needed = [*needed]
    names = list(dict.fromkeys([*needed, *optional]))
    if not given or not {*needed} <= {*given} <= {*names}:
        raise ValueError(
            f"{_parts(what, needed, names)}, but {', '.join(given) or 'nothing'} is given; "
            "pass what belongs to this layer alone, by these names."
        )
    return {name: _array(name, given[name]) for name in names if name in given}


def read_keras(what: str, weights: Any, needed: list[str], names: list[str]) -> Arrays:
    """Returns the arrays of a layer of Keras by their own names, if they have any, or by their places in ``names``."""
    if isinstance(weights, Mapping):
        return read(what, weights, needed, names)
    own = [getattr(weight, "name", None) for weight in weights]
    if any(isinstance(name, str) for name in own):
        own = [str(name).rpartition("/")[2].partition(":")[0] for name in own]  # Keras 2: norm/gamma:0
        if len({*own}) == len(own):
            return read(what, dict(zip(own, weights, strict=True)), needed, names)
    elif len(needed) <= len(own) <= len(names):
        return read(what, dict(zip(names, weights, strict=False)), needed, names)
    raise ValueError(
        f"{_parts(what, needed, names)}, but {len(own)} arrays are given; "
        "pass the weights of this layer alone, and give the layout the options of the layer."
    )


def one_size(arrays: Arrays) -> int:
    """Returns the number of features of a norm's arrays; refuses different ones, and more than one axis."""
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({*shapes.values()}) != 1:
        raise ValueError(f"the arrays of a norm have one shape, but {shapes} are given; pass those of one layer.")
    if any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(
            f"the arrays of a norm have one axis, the features, but {shapes} are given; the order of several differs "
            "between frameworks: move their axes yourself, in a Layout of your own."
        )
    return next(iter(arrays.values())).size


def cast(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the array in another dtype; refuses to lose more than digits."""
    if array.dtype.kind == "c" and np.dtype(dtype).kind != "c":
        raise ValueError(f"{name} is complex, and {np.dtype(dtype)} in Flax; pass variables of a complex dtype.")
    with np.errstate(over="ignore", invalid="ignore"):
        made = array.astype(dtype)
    if lost := np.count_nonzero(np.isfinite(array) & ~np.isfinite(made)):
        raise ValueError(
            f"{lost} values of {name}, the largest {np.max(np.abs(array))}, are infinite in {np.dtype(dtype)}; "
            "pass variables of a wider dtype, such as float32."
        )
    return made


def copies(arrays: Mapping[str, Any]) -> Arrays:
    """Returns copies of the arrays that there are: PyTorch trains in place, and JAX may keep the memory it is given."""
    return {name: np.array(array, order="C") for name, array in arrays.items() if array is not None}


def _array(name, value):
    """Returns an array of NumPy, in float32 if NumPy lacks its dtype."""
    empty = getattr(value, "is_meta", False) or (hasattr(value, "shape") and not hasattr(value, "__array__"))
    if hasattr(value, "detach") and not empty:  # a tensor of PyTorch, perhaps a parameter, perhaps on another device
        value = value.detach().cpu()
        value = value.float() if str(value.dtype).startswith(("torch.bfloat16", "torch.float8")) else value
    array = None if empty else np.asarray(value)
    if array is None or array.dtype.kind not in "biufcV":
        raise ValueError(f"{name} is a {type(value).__name__}, without numbers in it; pass values, not shapes.")
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _parts(what, needed, names):
    """Says what a layer has, and what it may have."""
    parts = {"has": needed, "may have": [name for name in names if name not in needed]}
    return f"{what} " + " and ".join(f"{verb} {', '.join(part)}" for verb, part in parts.items() if part)
