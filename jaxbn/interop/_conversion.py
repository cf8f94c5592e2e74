"""Converts the layers of a model, each by its layout; all that does not fit is said in one error."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxbn.interop._layouts import Layout, layout_of
from jaxbn.interop._weights import Variables, cast, flat, nested


def entry(prefix: str, name: str) -> str:
    """Returns the name in a ``state_dict``; a model that is one layer has no prefix."""
    return f"{prefix}.{name}" if prefix else name


def refuse_others(**arguments: tuple[Any, str]) -> None:
    """Refuses what is not a mapping, and says what to pass."""
    for name, (value, accepted) in arguments.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is a {type(value).__name__} and not a mapping; pass {accepted}.")


def fill(
    variables: Mapping[str, Any],
    weights: Mapping[str, Any],
    names: Mapping[str, str],
    layouts: Mapping[str, Layout],
    direction: Callable[[Layout], Callable],
) -> Variables:
    """Returns the variables with the values of the layers in ``weights``."""

    def convert(layout, name, leaves):
        arrays = flat(direction(layout)(weights[name]))
        made, expected = ({key: np.shape(tree[key]) for key in sorted(tree)} for tree in (arrays, leaves))
        if made != expected:
            advice = "give both layers the same settings, or pass the layout of this one in layouts."
            if not any(key.startswith("batch_stats/") for key in made) and "batch_stats/mean" in expected:
                advice = (
                    "these weights have no statistics, as with track_running_stats=False: take those of this layer out "
                    "of variables, and keep the ones of Flax's init."
                )
            raise ValueError(f"its weights make {made} in Flax, but the layer there has {expected}; {advice}")
        return {key: cast(key, array, leaves[key].dtype) for key, array in arrays.items()}

    values = {}
    for name, arrays in _convert(variables, names, weights, layouts, convert).items():
        for key, array in arrays.items():
            collection, leaf = key.split("/")
            values["/".join(filter(None, (collection, names[name], leaf)))] = array
    return _replace(variables, values)


def take(
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    layouts: Mapping[str, Layout],
    direction: Callable[[Layout], Callable],
) -> dict[str, Any]:
    """Returns the weights of the layers in ``names``."""
    return _convert(variables, names, names, layouts, lambda layout, _, leaves: direction(layout)(nested(leaves)))


def _convert(variables, names, weights, layouts, convert):
    """Returns what ``convert`` makes of each layer; raises one error for all that does not fit."""
    refuse_others(
        variables=(variables, "{'params': ..., 'batch_stats': ...}"),
        names=(names, "names and paths, such as {'layer1.0.conv1': 'Block_0/Conv_0'}"),
        layouts=(layouts, "names and layouts, such as {'up': conv_transpose_layout()}"),
    )
    if unknown := {*variables} - {"params", "batch_stats"}:
        raise ValueError(
            f"variables has {sorted(unknown)}, but what is converted are the collections 'params' and 'batch_stats'; "
            "pass {'params': ..., 'batch_stats': ...} without others."
        )
    layers = defaultdict(dict)
    for key, leaf in flat(variables).items():
        collection, _, rest = key.partition("/")
        path, _, name = rest.rpartition("/")
        layers[path][f"{collection}/{name}"] = leaf
    problems = [*_unnamed(weights, names)]
    paths = list(names.values())
    problems += [f"{path!r} in Flax: no name has this path; add it to names." for path in layers if path not in paths]
    twice = [path for i, path in enumerate(paths) if path in paths[:i]]
    problems += [f"{path!r} in Flax: several names have this path; keep one." for path in twice]
    problems += [f"{name!r}: it is in layouts and not in names." for name in layouts if name not in names]
    converted = {}
    for name, path in names.items():
        try:
            if name not in weights:
                raise ValueError("it is in names, but no weights are given for it; take it out, or add them.")
            if path not in layers:
                raise ValueError(f"names has the path {path!r}, but Flax's model has no layer there; correct it.")
            converted[name] = convert(_layout(name, path, layers[path], layouts), name, layers[path])
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise ValueError("the models do not fit, so nothing is converted:\n  " + "\n  ".join(problems))
    return converted


def _unnamed(weights, names):
    """Yields what is wrong with weights that have no name."""
    unnamed = [name for name in weights if name not in names]
    for name in unnamed:
        entries = [entry(name, key) for key in weights[name]] if isinstance(weights[name], Mapping) else []
        yield (
            f"{name!r}{' with ' * bool(entries)}{', '.join(entries)}: it is not in names; "
            "add it with its path in Flax, or take it out of what is converted, as a buffer that Flax's model has not."
        )
    for prefix in ("module.", "_orig_mod."):
        if unnamed and all(f"{name}.".startswith(prefix) for name in unnamed):
            yield f"{prefix!r}: DistributedDataParallel and torch.compile put such a prefix; take it off the entries."


def _layout(name, path, leaves, layouts):
    """Returns the layout of a layer: the given one, or the likely one of its variables."""
    layout = layouts.get(name)
    if layout is None and path.rpartition("/")[2].startswith("ConvTranspose"):
        raise ValueError(
            f"its path {path!r} is that of a transposed convolution, which its weights do not show; "
            f"pass layouts={{{name!r}: conv_transpose_layout()}}."
        )
    if layout is not None and not isinstance(layout, Layout):
        raise ValueError(
            f"layouts has a {type(layout).__name__} for it and not a Layout; call the function, as in dense_layout()."
        )
    return layout or layout_of(leaves)


def _replace(tree, values, path=()):
    """Returns the nested mappings with other leaves, given by their paths."""
    return {
        key: _replace(value, values, (*path, str(key)))
        if isinstance(value, Mapping)
        else values["/".join((*path, str(key)))]
        for key, value in tree.items()
    }
