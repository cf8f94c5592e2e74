"""Converts the layers of a model, each by its layout, and reports all misfits in one error."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn.interop._kernel_layouts import conv_layout, dense_layout
from jaxbn.interop._layout import Layout
from jaxbn.interop._norm_layout import NORM, batch_norm_layout
from jaxbn.interop._weights import Variables, cast, flat, nested


def to_flax(
    variables: Mapping[str, Any],
    weights: Mapping[str, Any],
    names: Mapping[str, str],
    layouts: Mapping[str, Layout],
    converter: Callable[[Layout], Callable],
) -> Variables:
    """Converts the layers of another framework.

    Args:
      variables: of the Flax model, for their shapes and dtypes.
      weights: of each layer, by its name.
      names: from the name of each layer to its path in Flax.
      layouts: by name, where the variables do not show them.
      converter: returns the function of a layout that converts weights to variables.

    Returns:
      The variables of the Flax model, with the values of the weights.
    """

    def convert(name, layout, leaves):
        arrays = flat(converter(layout)(weights[name]))
        _check_shapes(arrays, leaves)
        return {key: cast(key, array, leaves[key].dtype) for key, array in arrays.items()}

    values = {}
    for name, arrays in _convert_layers(variables, names, weights, layouts, convert).items():
        for key, array in arrays.items():
            collection, variable = key.split("/")
            values[_joined(collection, names[name], variable)] = array
    return _with_leaves(variables, values)


def from_flax(
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    layouts: Mapping[str, Layout],
    converter: Callable[[Layout], Callable],
) -> dict[str, Any]:
    """Converts the layers of a Flax model: the inverse of :func:`to_flax`; returns the weights of each, by its name."""

    def convert(name, layout, leaves):
        del name
        return converter(layout)(nested(leaves))

    return _convert_layers(variables, names, names, layouts, convert)


def entry(prefix: str, name: str) -> str:
    """Returns the key of an array in a ``state_dict``; the prefix is "" if the model is a single layer."""
    return f"{prefix}.{name}" if prefix else name


def entries_by_layer(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups the entries of a ``state_dict`` by layer, in their order."""
    check_mappings(state_dict=(state_dict, "model.state_dict()"))
    entries = defaultdict(dict)
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            raise ValueError(f"state_dict[{key!r}] is itself a mapping; of a checkpoint, pass the state_dict in it.")
        prefix, _, name = key.rpartition(".")
        entries[prefix][name] = value
    return entries


def check_mappings(**arguments: tuple[Any, str]) -> None:
    """Refuses arguments that are not mappings; each comes with what to pass instead."""
    for name, (value, expected) in arguments.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a mapping, got a {type(value).__name__}; pass {expected}.")


def check_models(variables: Any, names: Any, layouts: Any) -> None:
    """Refuses arguments of other kinds, and variables without their collections."""
    check_mappings(
        variables=(variables, "{'params': ..., 'batch_stats': ...}"),
        names=(names, "names and paths, such as {'layer1.0.conv1': 'Block_0/Conv_0'}"),
        layouts=(layouts, "names and layouts, such as {'up': conv_transpose_layout()}"),
    )
    if unknown := {*variables} - {"params", "batch_stats"}:
        raise ValueError(
            f"variables must have only the collections 'params' and 'batch_stats', got {sorted(unknown)} too; pass "
            "{'params': ..., 'batch_stats': ...}."
        )


def _convert_layers(
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    weights: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    convert: Callable[[str, Layout, dict[str, Any]], Any],
) -> dict[str, Any]:
    """Returns ``convert(name, layout, leaves)`` for each layer, by name; raises one error for all that does not fit."""
    check_models(variables, names, layouts)
    layers = by_layer(variables)
    problems = [*_unnamed_weights(weights, names), *_unclear_names(names, layers, layouts)]
    converted = {}
    for name, path in names.items():
        try:
            if name not in weights:
                raise ValueError("it is in names, but has no weights; remove it, or add them.")
            if path not in layers:
                raise ValueError(f"names has the path {path!r}, but the Flax model has no layer there; correct it.")
            converted[name] = convert(name, _layout_of(name, path, layers[path], layouts), layers[path])
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise ValueError("the models do not fit, so nothing is converted:\n  " + "\n  ".join(problems))
    return converted


def by_layer(variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups the leaves of a model by layer: ``{"Block_0/Conv_0": {"params/kernel": ..., "params/bias": ...}}``."""
    layers = defaultdict(dict)
    for key, leaf in flat(variables).items():
        collection, _, rest = key.partition("/")
        path, _, variable = rest.rpartition("/")
        layers[path][f"{collection}/{variable}"] = leaf
    return layers


def _unnamed_weights(weights: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """Yields what is wrong with weights that have no name."""
    unnamed = [name for name in weights if name not in names]
    for name in unnamed:
        subject = repr(name)
        if isinstance(weights[name], Mapping) and weights[name]:  # a prefix, perhaps "", and its entries
            subject += f" with {', '.join(entry(name, key) for key in weights[name])}"
        yield (
            f"{subject}: it is not in names; add it with its path in Flax, or remove it from the weights if it is, for "
            "example, a buffer that the Flax model does not have."
        )
    for prefix in ("module.", "_orig_mod."):
        if unnamed and all(f"{name}.".startswith(prefix) for name in unnamed):
            yield f"{prefix!r}: DistributedDataParallel and torch.compile add this prefix; remove it from the entries."


def _unclear_names(names: Mapping[str, str], layers: Mapping[str, Any], layouts: Mapping[str, Layout]) -> Iterator[str]:
    """Yields what is wrong with names that do not match layers and layouts one to one."""
    count = Counter(names.values())
    for path in layers:
        if path not in count:
            yield f"{path!r} in Flax: no name has this path; add it to names."
    for path, times in count.items():
        if times > 1:
            yield f"{path!r} in Flax: several names have this path; keep one."
    for name in layouts:
        if name not in names:
            yield f"{name!r}: it is in layouts, but not in names."


def _layout_of(name: str, path: str, leaves: Mapping[str, Any], layouts: Mapping[str, Layout]) -> Layout:
    """Returns the layout of a layer: the one in ``layouts``, or else the likely one of such variables."""
    layout = layouts.get(name)
    if layout is not None:
        check_layout(layout)
        return layout
    if path.rpartition("/")[2].startswith("ConvTranspose"):
        raise ValueError(
            f"its path {path!r} is that of a transposed convolution, which its weights do not show; "
            f"pass layouts={{{name!r}: conv_transpose_layout()}}."
        )
    if "params/kernel" in leaves:
        return dense_layout() if np.ndim(leaves["params/kernel"]) == 2 else conv_layout()
    if {*leaves} <= {*NORM}:
        return batch_norm_layout(
            use_scale="params/scale" in leaves,
            use_bias="params/bias" in leaves,
            counted="batch_stats/steps" in leaves,
        )
    raise ValueError(
        f"its variables in Flax, {', '.join(sorted(leaves))}, are not those of a norm, convolution or dense layer; "
        "pass its layout in layouts, or remove it from both models."
    )


def check_layout(layout: Any) -> None:
    """Refuses what is no layout, such as the function that returns one."""
    if not isinstance(layout, Layout):
        raise ValueError(
            f"layouts must have a Layout for it, got a {type(layout).__name__}; call the function, as in "
            "dense_layout()."
        )


def _check_shapes(arrays: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Refuses converted arrays that are not those of the Flax layer."""
    made = {key: np.shape(arrays[key]) for key in sorted(arrays)}
    expected = {key: np.shape(leaves[key]) for key in sorted(leaves)}
    if made == expected:
        return
    advice = "give both layers the same settings, or pass the layout of this one in layouts."
    if "batch_stats/mean" in expected and not any(key.startswith("batch_stats/") for key in made):
        advice = (
            "these weights have no statistics, as with track_running_stats=False: remove those of this layer from "
            "variables, and use the ones of Flax's init."
        )
    raise ValueError(f"its weights are {made} in Flax, but the layer there has {expected}; {advice}")


def _with_leaves(tree: Mapping[str, Any], values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Variables:
    """Returns nested dicts of the same keys, with the values by path for leaves."""
    new = {}
    for key, value in tree.items():
        here = (*path, str(key))
        new[key] = _with_leaves(value, values, here) if isinstance(value, Mapping) else values["/".join(here)]
    return new


def _joined(*parts: str) -> str:
    """Joins parts of a path, some of which may be empty."""
    return "/".join(part for part in parts if part)
