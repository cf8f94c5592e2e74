"""PyTorch and Keras weights to and from Flax variables: batch norm, and the convolution and dense layers beside it.

``from_torch``, ``to_torch``, ``from_keras`` and ``to_keras`` convert models; a :class:`Layout` converts one layer:

=========================  ======================  ============================  ==========================
layout                     Flax                    PyTorch                       Keras
=========================  ======================  ============================  ==========================
``batch_norm_layout``      scale, bias,            weight, bias, running_mean,   gamma, beta, moving_mean,
                           mean, var, steps        running_var,                  moving_variance
                                                   num_batches_tracked
``conv_layout``            [*k, in/groups, out]    [out, in/groups, *k]          [*k, in/groups, out]
``depthwise_conv_layout``  [*k, 1, in*multiplier]  [in*multiplier, 1, *k]        [*k, in, multiplier]
``conv_transpose_layout``  [*k, in, out]           [in, out, *k], k reversed     [*k, out, in], k reversed
``dense_layout``           [in, out]               [out, in]                     [in, out]
=========================  ======================  ============================  ==========================

Values are moved, not computed, so gradients and momenta of parameters convert as the parameters do.  Results are new
NumPy arrays; bfloat16, which NumPy lacks, becomes float32.  Settings are not in the weights, and they differ:

=======================  =====================  =========================================  =====================
setting                  Flax                   PyTorch                                    Keras 3
=======================  =====================  =========================================  =====================
momentum                 0.99 of the old value  0.1 of the NEW value                       0.99 of the old value
epsilon                  1e-5                   1e-5                                       1e-3
running variance         biased                 unbiased                                   biased
padding where strided    "SAME", ``padding=1``  ``padding=1`` is Flax's, and not "SAME"    "same" is Flax's "SAME"
=======================  =====================  =========================================  =====================

TensorFlow 2's fused kernel, for images, kept the unbiased variance (github.com/tensorflow/tensorflow/issues/55545).
Where every batch has m values per feature, an average of biased variances times m/(m - 1) is that of unbiased ones.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._layouts import (
    Arrays,
    Layout,
    Variables,
    batch_norm_layout,
    conv_layout,
    conv_transpose_layout,
    dense_layout,
    depthwise_conv_layout,
    flat,
    layout_of,
    nested,
)

__all__ = [
    "Layout",
    "batch_norm_layout",
    "batch_norm_options_from_torch",
    "batch_norm_options_to_torch",
    "conv_layout",
    "conv_transpose_layout",
    "dense_layout",
    "depthwise_conv_layout",
    "from_keras",
    "from_torch",
    "to_keras",
    "to_torch",
]


def batch_norm_options_from_torch(*, momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    """Returns the options with which jaxbn's ``BatchNorm``, linen or nnx, does what PyTorch's does.

    >>> layer = jaxbn.linen.BatchNorm(**jaxbn.interop.batch_norm_options_from_torch(momentum=0.1))
    >>> layer.momentum, layer.epsilon, layer.unbiased
    (0.9, 1e-05, True)

    Args:
      momentum: weight of the NEW value; None averages all batches alike, there and here.
      eps: added to the variance.

    Returns:
      ``momentum``, ``epsilon`` and ``unbiased``.
    """
    return {"momentum": _complement(momentum), "epsilon": eps, "unbiased": True}


def batch_norm_options_to_torch(*, momentum: float | None = 0.99, epsilon: float = 1e-5) -> dict[str, Any]:
    """Returns the options of PyTorch's batch norm for those of ours; its running variance is always unbiased.

    >>> jaxbn.interop.batch_norm_options_to_torch(momentum=0.99, epsilon=1e-3)
    {'momentum': 0.01, 'eps': 0.001}

    Args:
      momentum: weight of the old value; None averages all batches alike.
      epsilon: added to the variance.

    Returns:
      ``momentum`` and ``eps``.
    """
    return {"momentum": _complement(momentum), "eps": epsilon}


def from_torch(
    state_dict: Mapping[str, Any],
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> Variables:
    """Returns the variables of a Flax model with the values of a PyTorch model's ``state_dict``.

    Every entry and every variable must be used; to leave a layer out, take it out of both.

    >>> import numpy as np
    >>> state_dict = {'fc.weight': np.ones((2, 3)), 'fc.bias': np.zeros(2)}
    >>> shapes = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = jaxbn.interop.from_torch(state_dict, shapes, {'fc': ''})
    >>> y = nn.Dense(2).apply(variables, jnp.ones((1, 3)))

    An nnx model gives and takes them by its states:

    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> states = {'params': nnx.state(model, nnx.Param), 'batch_stats': nnx.state(model, nnx.BatchStat)}
    >>> state_dict = {'weight': np.ones(2), 'bias': np.ones(2), 'running_mean': np.ones(2), 'running_var': np.ones(2)}
    >>> nnx.update(model, *jaxbn.interop.from_torch(state_dict, states, {'': ''}).values())

    The momentum of SGD goes the same way, to the ``trace`` of ``optax.sgd``: the ``state_dict`` is then
    ``{name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}``, and ``variables`` has
    ``params`` alone.

    Args:
      state_dict: arrays or tensors by the name of a layer, a dot and their own name.
      variables: of the Flax model, ``{"params": {...}, "batch_stats": {...}}``; of the leaves, arrays or those of
        ``jax.eval_shape``, only shape and dtype are read.
      names: from each layer in ``state_dict`` to its path in ``variables``: ``{"layer1.0.conv1": "Block_0/Conv_0"}``.
      layouts: of the layers, by their names in ``state_dict``, whose variables do not show it.  Others with a kernel of
        two axes have :func:`dense_layout`, of more :func:`conv_layout`.  Transposed convolutions and dense layers after
        a flattening must be here: read as the others, their shapes may fit by chance.

    Returns:
      The variables, as nested dicts of arrays with the shapes and dtypes of ``variables``.

    Raises:
      ValueError: if entries or variables are missing, left over or of wrong shapes; the message lists all of them.
    """
    entries = defaultdict(dict)
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        entries[prefix][name] = value
    return _fill(variables, entries, names, layouts or {}, lambda layout: layout.from_torch)


def to_torch(
    variables: Mapping[str, Any], names: Mapping[str, str], *, layouts: Mapping[str, Layout] | None = None
) -> Arrays:
    """Returns the ``state_dict`` of a PyTorch model with the values of a Flax model: the inverse of :func:`from_torch`.

    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> {name: array.shape for name, array in jaxbn.interop.to_torch(variables, {'fc': ''}).items()}
    {'fc.weight': (2, 3), 'fc.bias': (2,)}

    ``model.load_state_dict({name: torch.from_numpy(array) for name, array in entries.items()})`` takes it.

    Args:
      variables: as in :func:`from_torch`, with values.
      names: as in :func:`from_torch`.
      layouts: as in :func:`from_torch`.

    Returns:
      Arrays by the names of ``state_dict``.

    Raises:
      ValueError: if a layer is missing, left over or not of its layout; the message lists all of them.
    """
    layers = _take(variables, names, layouts or {}, lambda layout: layout.to_torch)
    return {f"{prefix}.{name}".lstrip("."): array for prefix, layer in layers.items() for name, array in layer.items()}


def from_keras(
    weights: Mapping[str, Sequence[Any]],
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> Variables:
    """Returns the variables of a Flax model with the weights of a Keras model.

    >>> import numpy as np
    >>> weights = {'dense': [np.ones((3, 2)), np.zeros(2)]}
    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = jaxbn.interop.from_keras(weights, variables, {'dense': ''})

    Args:
      weights: ``{layer.name: layer.get_weights() for layer in model.layers if layer.weights}``.
      variables: as in :func:`from_torch`.
      names: from each layer in ``weights`` to its path in ``variables``.
      layouts: as in :func:`from_torch`, with depthwise convolutions; dense layers need none.

    Returns:
      The variables, as nested dicts of arrays with the shapes and dtypes of ``variables``.

    Raises:
      ValueError: if weights or variables are missing, left over or of wrong shapes; the message lists all of them.
    """
    return _fill(variables, weights, names, layouts or {}, lambda layout: layout.from_keras)


def to_keras(
    variables: Mapping[str, Any], names: Mapping[str, str], *, layouts: Mapping[str, Layout] | None = None
) -> dict[str, list[np.ndarray]]:
    """Returns the weights of a Keras model with the values of a Flax model: the inverse of :func:`from_keras`.

    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> [array.shape for array in jaxbn.interop.to_keras(variables, {'dense': ''})['dense']]
    [(3, 2), (2,)]

    Args:
      variables: as in :func:`from_torch`, with values.
      names: as in :func:`from_keras`.
      layouts: as in :func:`from_keras`.

    Returns:
      By the names of layers, what ``layer.set_weights`` takes.

    Raises:
      ValueError: if a layer is missing, left over or not of its layout; the message lists all of them.
    """
    return _take(variables, names, layouts or {}, lambda layout: layout.to_keras)


def _complement(momentum):
    """Returns 1 - momentum, of as many digits as people write: 0.1 of 0.9, not 0.09999999999999998."""
    return None if momentum is None else round(1 - momentum, 15)


def _fill(variables, weights, names, layouts, direction):
    """Returns the variables with the values of the layers in ``weights``."""

    def convert(layout, name, leaves):
        arrays = flat(direction(layout)(weights[name]))
        made, expected = ({key: np.shape(tree[key]) for key in sorted(tree)} for tree in (arrays, leaves))
        if made != expected:
            raise ValueError(
                f"its weights make {made} in Flax, but the layer there has {expected}; give both layers the same "
                "settings, or pass the layout of this one in layouts."
            )
        return {key: array.astype(leaves[key].dtype) for key, array in arrays.items()}

    values = {}
    for name, arrays in _convert(variables, names, weights, layouts, convert).items():
        for key, array in arrays.items():
            collection, leaf = key.split("/")
            values["/".join(filter(None, (collection, names[name], leaf)))] = array
    return _replace(variables, values)


def _take(variables, names, layouts, direction):
    """Returns the weights of the layers in ``names``."""
    return _convert(variables, names, names, layouts, lambda layout, _, leaves: direction(layout)(nested(leaves)))


def _convert(variables, names, weights, layouts, convert):
    """Returns what ``convert`` makes of each layer; raises one error for all that does not fit."""
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
    paths = list(names.values())
    problems = [f"{name!r}: it is not in names; add it with its path in Flax." for name in weights if name not in names]
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
            converted[name] = convert(layouts.get(name) or layout_of(layers[path]), name, layers[path])
        except ValueError as error:
            problems.append(f"{name!r}: {error}")
    if problems:
        raise ValueError("the models do not fit, so nothing is converted:\n  " + "\n  ".join(problems))
    return converted


def _replace(tree, values, path=()):
    """Returns the nested mappings with other leaves, given by their paths."""
    return {
        key: _replace(value, values, (*path, str(key)))
        if isinstance(value, Mapping)
        else values["/".join((*path, str(key)))]
        for key, value in tree.items()
    }
