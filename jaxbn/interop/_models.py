"""Converts whole models, and the settings that are not in their weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn.interop._conversion import check_mappings, entries_by_layer, entry, from_flax, to_flax
from jaxbn.interop._layout import Layout
from jaxbn.interop._matching import match
from jaxbn.interop._weights import Arrays, Variables


def batch_norm_options_from_torch(*, momentum: float | None = 0.1, eps: float = 1e-5) -> dict[str, Any]:
    """Converts the options of PyTorch's batch norm to those of jaxbn's, linen or nnx.

    >>> layer = jaxbn.linen.BatchNorm(**jaxbn.interop.batch_norm_options_from_torch(momentum=0.1))
    >>> layer.momentum, layer.epsilon, layer.unbiased
    (0.9, 1e-05, True)

    Args:
      momentum: weight of the NEW value; None gives all batches the same weight, there and here.
      eps: added to the variance.

    Returns:
      ``momentum``, ``epsilon`` and ``unbiased``.

    Raises:
      ValueError: for a momentum outside [0, 1].
    """
    return {"momentum": _complement(momentum), "epsilon": eps, "unbiased": True}


def batch_norm_options_to_torch(
    *, momentum: float | None = 0.99, epsilon: float = 1e-5, unbiased: bool = True
) -> dict[str, Any]:
    """Converts the options of jaxbn's batch norm to those of PyTorch's.

    >>> jaxbn.interop.batch_norm_options_to_torch(momentum=0.99, epsilon=1e-3)
    {'momentum': 0.01, 'eps': 0.001}

    Args:
      momentum: weight of the old value; None gives all batches the same weight.
      epsilon: added to the variance.
      unbiased: must be True, because PyTorch's running variance always is unbiased.

    Returns:
      ``momentum`` and ``eps``.

    Raises:
      ValueError: for a momentum outside [0, 1], and for ``unbiased=False``.
    """
    if not unbiased:
        raise ValueError(
            "unbiased must be True, because PyTorch's running variance always is, got False; multiply the variance in "
            "the weights by m/(m - 1), with m values per feature and batch, and leave unbiased out."
        )
    return {"momentum": _complement(momentum), "eps": epsilon}


def from_torch(
    state_dict: Mapping[str, Any],
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> Variables:
    """Converts the ``state_dict`` of a PyTorch model to variables of a Flax model.

    All entries and all variables must be used; to leave a layer out, remove it from both.

    >>> import numpy as np
    >>> state_dict = {'fc.weight': np.ones((2, 3)), 'fc.bias': np.zeros(2)}
    >>> shapes = jax.eval_shape(nn.Dense(2).init, jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = jaxbn.interop.from_torch(state_dict, shapes, {'fc': ''})
    >>> y = nn.Dense(2).apply(variables, jnp.ones((1, 3)))

    The variables of an nnx model are its states:

    >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    >>> states = {'params': nnx.state(model, nnx.Param), 'batch_stats': nnx.state(model, nnx.BatchStat)}
    >>> state_dict = {'weight': np.ones(2), 'bias': np.ones(2), 'running_mean': np.ones(2), 'running_var': np.ones(2)}
    >>> nnx.update(model, *jaxbn.interop.from_torch(state_dict, states, {'': ''}).values())

    The momentum of SGD converts in the same way, to the ``trace`` of ``optax.sgd``.  The ``state_dict`` is then
    ``{name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}``, and ``variables`` has
    only ``params``.

    Args:
      state_dict: arrays or tensors by the name of a layer, a dot and their own name.
      variables: of the Flax model, ``{"params": {...}, "batch_stats": {...}}``, for their shapes and dtypes; those of
        ``jax.eval_shape`` will do.
      names: from each layer in ``state_dict`` to its path in ``variables``: ``{"layer1.0.conv1": "Block_0/Conv_0"}``;
        None finds them, or refuses, as :func:`match_torch`, which shows them in a table.
      layouts: layouts of some layers, by their names in ``state_dict``.  The default for a kernel with two axes is
        :func:`dense_layout`, with more :func:`conv_layout`.  Transposed convolutions need a layout here, and so do
        dense layers and norms whose features come from a flattening or go to an unflattening: with the default they
        may fit by chance.  Compare one output after converting.

    Returns:
      The variables, as nested dicts of arrays with the shapes and dtypes of ``variables``.

    Raises:
      ValueError: if entries or variables are missing, left over or of the wrong shape, or if values would become
        infinite or lose an imaginary part; the message lists all of them.
    """
    entries = entries_by_layer(state_dict)
    if names is None:
        names = match(entries, variables, {}, layouts or {}, lambda layout: layout.from_torch).names
    return to_flax(variables, entries, names, layouts or {}, lambda layout: layout.from_torch)


def to_torch(
    variables: Mapping[str, Any], names: Mapping[str, str], *, layouts: Mapping[str, Layout] | None = None
) -> Arrays:
    """Converts variables of a Flax model to the ``state_dict`` of a PyTorch model: the inverse of :func:`from_torch`.

    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> {name: array.shape for name, array in jaxbn.interop.to_torch(variables, {'fc': ''}).items()}
    {'fc.weight': (2, 3), 'fc.bias': (2,)}

    Load it with ``model.load_state_dict({name: torch.from_numpy(array) for name, array in entries.items()})``.

    Args:
      variables: as in :func:`from_torch`, with values.
      names: as in :func:`from_torch`.
      layouts: as in :func:`from_torch`.

    Returns:
      Arrays by the names of ``state_dict``.

    Raises:
      ValueError: if a layer is missing, left over or does not have its layout; the message lists all of them.
    """
    layers = from_flax(variables, names, layouts or {}, lambda layout: layout.to_torch)
    return {entry(prefix, name): array for prefix, layer in layers.items() for name, array in layer.items()}


def from_keras(
    weights: Mapping[str, Sequence[Any] | Mapping[str, Any]],
    variables: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> Variables:
    """Converts the weights of a Keras model to variables of a Flax model.

    >>> import numpy as np
    >>> weights = {'dense': {'kernel': np.ones((3, 2)), 'bias': np.zeros(2)}}
    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = jaxbn.interop.from_keras(weights, variables, {'dense': ''})

    Args:
      weights: ``{layer.name: layer.weights for layer in model.layers if layer.weights}``, or arrays by the names of
        weights.  ``layer.get_weights()`` works too, but has no names to check: a gamma without beta (``center=False``)
        is then taken for the beta of a Flax layer with ``use_scale=False``.
      variables: as in :func:`from_torch`.
      names: from each layer in ``weights`` to its path in ``variables``; None finds them as :func:`match_keras`.
      layouts: as in :func:`from_torch`, and also for depthwise convolutions; dense layers need none.

    Returns:
      The variables, as nested dicts of arrays with the shapes and dtypes of ``variables``.

    Raises:
      ValueError: if weights or variables are missing, left over or of the wrong shape, or if values would become
        infinite or lose an imaginary part; the message lists all of them.
    """
    check_mappings(weights=(weights, "{layer.name: layer.weights for layer in model.layers if layer.weights}"))
    if names is None:
        names = match(weights, variables, {}, layouts or {}, lambda layout: layout.from_keras).names
    return to_flax(variables, weights, names, layouts or {}, lambda layout: layout.from_keras)


def to_keras(
    variables: Mapping[str, Any], names: Mapping[str, str], *, layouts: Mapping[str, Layout] | None = None
) -> dict[str, list[np.ndarray]]:
    """Converts variables of a Flax model to the weights of a Keras model: the inverse of :func:`from_keras`.

    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> [array.shape for array in jaxbn.interop.to_keras(variables, {'dense': ''})['dense']]
    [(3, 2), (2,)]

    Args:
      variables: as in :func:`from_torch`, with values.
      names: as in :func:`from_keras`.
      layouts: as in :func:`from_keras`.

    Returns:
      The list for ``layer.set_weights`` of each layer, by its name.

    Raises:
      ValueError: if a layer is missing, left over or does not have its layout; the message lists all of them.
    """
    return from_flax(variables, names, layouts or {}, lambda layout: layout.to_keras)


def _complement(momentum: float | None) -> float | None:
    """Returns 1 - momentum with the digits that people write: 0.1 for 0.9, not 0.09999999999999998."""
    if momentum is None:
        return None
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum must be from 0 to 1, or None, got {momentum}; it is the weight of a value in an average."
        )
    return round(1 - momentum, 15)
