"""Matches the layers of a model of another framework to those of a Flax model, without their names.

A layer is known by its arrays, converted to Flax by its likely layout; :mod:`jaxbn.interop._readings` decides which of
several layers with the same arrays corresponds to which, or that this cannot be decided.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn.interop._conversion import by_layer, check_layout, check_mappings, check_models, entries_by_layer
from jaxbn.interop._kernel_layouts import conv_layout, dense_layout
from jaxbn.interop._layout import Layout
from jaxbn.interop._norm_layout import batch_norm_layout
from jaxbn.interop._readings import Layer, Model, Reading, natural_key, read
from jaxbn.interop._weights import flat

_NAMES_OF_NORMS = ({"running_mean", "running_var"}, {"moving_mean", "moving_variance"})


class Matched(NamedTuple):
    """A layer in both models.

    Attributes:
      name: in the other framework.
      path: in Flax.
      shapes: of its arrays in Flax, by collection and name, such as "params/kernel".
      how: "given"; "same name"; "only one" with these arrays; "words" in the names; or "order", the place among layers
        with the same arrays.
    """

    name: str
    path: str
    shapes: dict[str, tuple[int, ...]]
    how: str


class Matches(NamedTuple):
    """All layers of two models; ``print`` shows them as a table.

    Attributes:
      layers: in the order of the other framework's model.
    """

    layers: tuple[Matched, ...]

    @property
    def names(self) -> dict[str, str]:
        """From the name of each layer to its path in Flax, as :func:`jaxbn.interop.from_torch` takes them."""
        return {layer.name: layer.path for layer in self.layers}

    def __str__(self) -> str:
        """Formats a line for each layer: its name, its path, how they were matched, and its arrays."""
        rows = [("layer", "path in Flax", "matched by", "arrays")]
        for layer in self.layers:
            arrays = ", ".join(f"{key.partition('/')[2]} {shape}" for key, shape in layer.shapes.items())
            rows.append((layer.name or "(the model)", layer.path or "(the model)", layer.how, arrays))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


def match_torch(
    state_dict: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Matches:
    """Finds which layer of a PyTorch model is which in a Flax model, from names, shapes and order.

    Two layers match if their names are the same but for dots, slashes and underscores; if no others have such arrays;
    if words in their names, such as "shortcut", tell them apart from others with the same arrays; or else by their
    order, if names and order do not contradict each other.  The order of ``variables`` is that of the calls only if
    they come from ``model.init`` itself: ``jax.jit`` and ``jax.eval_shape`` sort them by name.

    >>> import numpy as np
    >>> net = nn.Sequential([nn.Conv(8, (3, 3)), nn.BatchNorm(use_running_average=True)])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    >>> state_dict = {'0.weight': np.ones((8, 3, 3, 3)), '0.bias': np.ones(8)}
    >>> state_dict |= {f'1.{name}': np.ones(8) for name in ('weight', 'bias', 'running_mean', 'running_var')}
    >>> jaxbn.interop.match_torch(state_dict, variables).names
    {'0': 'layers_0', '1': 'layers_1'}

    Args:
      state_dict: as :func:`from_torch` takes it.
      variables: of the Flax model, as :func:`from_torch` takes them.
      names: pairs that are known, from names in ``state_dict`` to paths.
      layouts: layouts of some layers, by their names in ``state_dict``: see :func:`from_torch`.

    Returns:
      The matches; ``names`` of them are what :func:`from_torch` needs.

    Raises:
      ValueError: if a layer has no counterpart, or if several readings remain; the message lists them.
    """
    entries = entries_by_layer(state_dict)
    return match(entries, variables, names or {}, layouts or {}, lambda layout: layout.from_torch)


def match_keras(
    weights: Mapping[str, Any],
    variables: Mapping[str, Any],
    *,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> Matches:
    """Finds which layer of a Keras model is which in a Flax model: :func:`match_torch` for the weights of Keras.

    >>> import numpy as np
    >>> variables = nn.Sequential([nn.Dense(2), nn.Dense(4)]).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> weights = {
    ...     'dense': {'kernel': np.ones((3, 2)), 'bias': np.ones(2)},
    ...     'dense_1': {'kernel': np.ones((2, 4)), 'bias': np.ones(4)},
    ... }
    >>> jaxbn.interop.match_keras(weights, variables).names
    {'dense': 'layers_0', 'dense_1': 'layers_1'}

    Args:
      weights: as :func:`from_keras` takes them.
      variables: of the Flax model, as :func:`from_torch` takes them.
      names: pairs that are known, from names in ``weights`` to paths.
      layouts: layouts of some layers, by their names in ``weights``.

    Returns:
      The matches; ``names`` of them are what :func:`from_keras` needs.

    Raises:
      ValueError: as :func:`match_torch`.
    """
    check_mappings(weights=(weights, "{layer.name: layer.weights for layer in model.layers if layer.weights}"))
    return match(weights, variables, names or {}, layouts or {}, lambda layout: layout.from_keras)


def match(
    weights: Mapping[str, Any],
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    layouts: Mapping[str, Layout],
    converter: Callable[[Layout], Callable],
) -> Matches:
    """Matches the layers of any framework; see :func:`match_torch`.

    Args:
      weights: of each layer, by its name.
      variables: of the Flax model.
      names: pairs that are known.
      layouts: of some layers, by name.
      converter: returns the function of a layout that converts weights to variables.
    """
    check_models(variables, names, layouts)
    # The parameters first: their order is that of the calls even where a model begins with a batch norm, whose
    # statistics are made before all parameters.
    targets = by_layer({name: variables[name] for name in sorted(variables, key="params".__ne__)})
    is_sorted = all(_is_sorted(tree) for tree in variables.values())
    paths = sorted(targets, key=natural_key) if is_sorted else [*targets]
    shapes = {path: {key: np.shape(leaf) for key, leaf in sorted(targets[path].items())} for path in paths}
    target = Model(tuple(Layer(path, _signature(shapes[path])) for path in paths), is_sorted)
    source_layers = []
    for name, arrays in weights.items():
        layout = layouts.get(name)
        try:
            if layout is None:
                layout = _likely_layout(arrays)
            else:
                check_layout(layout)
            signature = name if layout is None else _signature(flat(converter(layout)(arrays)))
        except ValueError as error:
            raise ValueError(f"nothing is matched, because of {name!r}: {error}") from error
        source_layers.append(Layer(name, signature))
    # As in a file of safetensors.  In a state_dict of PyTorch itself, weights come before biases.
    source_sorted = _is_sorted([f"{name}.{key}" for name, arrays in weights.items() for key in _keys(arrays)])
    if source_sorted:
        source_layers.sort(key=lambda layer: natural_key(layer.name))
    source = Model(tuple(source_layers), source_sorted)
    given = _given(names, source, target)
    _check_counterparts(source, target, given)
    reading = read(source, target, given)
    if reading.open:
        raise ValueError(_several_readings(reading, source, target))
    return Matches(
        tuple(Matched(source.layers[s].name, paths[t], shapes[paths[t]], how) for s, t, how in sorted(reading.pairs))
    )


def _is_sorted(tree: Any) -> bool:
    """Whether keys are in the order of the alphabet, at each depth, as in Flax after ``jax.tree.map``.

    Layers with a kernel, or a scale, and a bias show it: they make the bias last.
    """
    keys = [*tree]
    if keys != sorted(keys, key=lambda key: (isinstance(key, str), key)):  # in nnx, numbers are sorted as such
        return False
    return not isinstance(tree, Mapping) or all(_is_sorted(v) for v in tree.values() if isinstance(v, Mapping))


def _keys(arrays: Any) -> list[str]:
    """Returns the names of arrays; those of a list say that its order is the one in which they were made."""
    return [*arrays] if isinstance(arrays, Mapping) else ["kernel", "bias"]


def _likely_layout(arrays: Any) -> Layout | None:
    """Returns the layout that arrays of such names and shapes have in most models; None for other arrays."""
    kinds = {getattr(array, "name", None) or index: array for index, array in enumerate(arrays)}
    named = arrays if isinstance(arrays, Mapping) else kinds
    found = {str(name).rpartition("/")[2].partition(":")[0]: array for name, array in named.items()}
    if any(norm <= {*found} for norm in _NAMES_OF_NORMS):
        return batch_norm_layout(
            use_scale=not {"weight", "gamma"}.isdisjoint(found), use_bias=not {"bias", "beta"}.isdisjoint(found)
        )
    ndim = max((np.ndim(array) for array in found.values()), default=0)
    return None if ndim < 2 else dense_layout() if ndim == 2 else conv_layout()


def _signature(arrays: Mapping[str, Any]) -> frozenset:
    """Returns names and shapes of arrays in Flax; the number of batches may be missing on one side."""
    shapes = {key: value if isinstance(value, tuple) else np.shape(value) for key, value in arrays.items()}
    return frozenset((key, shape) for key, shape in shapes.items() if key != "batch_stats/steps")


def _given(names: Mapping[str, str], source: Model, target: Model) -> dict[int, int]:
    """Returns the known pairs as indices."""
    sources = {layer.name: index for index, layer in enumerate(source.layers)}
    targets = {layer.name: index for index, layer in enumerate(target.layers)}
    for name, path in names.items():
        if name not in sources or path not in targets:
            what, which = (name, "the weights") if name not in sources else (path, "the Flax model")
            raise ValueError(f"names has {name!r}: {path!r}, but {which} have no layer {what!r}; correct it.")
    return {sources[name]: targets[path] for name, path in names.items()}


def _check_counterparts(source: Model, target: Model, given: Mapping[int, int]) -> None:
    """Refuses layers that have no counterpart with the same arrays."""
    left = [layer for index, layer in enumerate(source.layers) if index not in given]
    right = [layer for index, layer in enumerate(target.layers) if index not in {*given.values()}]
    difference = Counter(layer.signature for layer in left)
    difference.subtract(Counter(layer.signature for layer in right))
    lines = []
    for signature, surplus in difference.items():
        layers, where = (left, "the weights") if surplus > 0 else (right, "Flax")
        names = [repr(layer.name) for layer in layers if layer.signature == signature]
        arrays = ", ".join(f"{k} {s}" for k, s in sorted(signature)) if isinstance(signature, frozenset) else "unknown"
        if surplus:
            lines.append(
                f"{abs(surplus)} more in {where} than in the other model, with arrays {arrays}: {', '.join(names)}"
            )
    if lines:
        raise ValueError(
            "the models do not have the same layers, so nothing is matched; remove what only one of them has, such as "
            "buffers, pass layouts= for transposed and depthwise convolutions, or correct the Flax model:\n  "
            + "\n  ".join(lines)
        )


def _several_readings(reading: Reading, source: Model, target: Model) -> str:
    """Returns the message about layers that could correspond in several ways."""
    # A layer with one path left is in doubt only because of others.
    several = [group for group in reading.open if len(group[0]) > 1] or reading.open
    lines = []
    for sources, targets in several:
        of_source = ", ".join(repr(source.layers[index].name) for index in sources)
        lines.append(
            f"{of_source} could each be any of {', '.join(repr(target.layers[index].name) for index in targets)}"
        )
    where = [
        f"{what} are sorted by name, which hides the order of the layers: pass those of {origin} itself"
        for what, origin, model in (("weights", "state_dict()", source), ("variables", "model.init", target))
        if model.is_sorted
    ]
    example = {source.layers[several[0][0][0]].name: target.layers[several[0][1][0]].name}
    return (
        "names, shapes and order leave more than one reading, so nothing is matched; pass the right pairs as names=, "
        f"such as names={example} if this is one:\n  " + "\n  ".join([*lines, *where])
    )
