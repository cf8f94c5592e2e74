"""Weights of whole models, layer by layer, and the settings that are not in them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn.interop._conversion import entry, fill, refuse_others, take
from jaxbn.interop._layouts import (
    Layout,
)
from jaxbn.interop._weights import Arrays, Variables


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

    Raises:
      ValueError: for a momentum outside [0, 1].
    """
    return {"momentum": _complement(momentum), "epsilon": eps, "unbiased": True}


def batch_norm_options_to_torch(
    *, momentum: float | None = 0.99, epsilon: float = 1e-5, unbiased: bool = True
) -> dict[str, Any]:
    """Returns the options of PyTorch's batch norm for those of ours.

    >>> jaxbn.interop.batch_norm_options_to_torch(momentum=0.99, epsilon=1e-3)
    {'momentum': 0.01, 'eps': 0.001}

    Args:
      momentum: weight of the old value; None averages all batches alike.
      epsilon: added to the variance.
      unbiased: True, as PyTorch's running variance always is.

    Returns:
      ``momentum`` and ``eps``.

    Raises:
      ValueError: for a momentum outside [0, 1], and for ``unbiased=False``.
    """
    if not unbiased:
        raise ValueError(
            "unbiased=False: PyTorch's running variance is always unbiased; multiply that of the weights by m/(m - 1), "
            "with m values per feature and batch, and leave unbiased out."
        )
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
        two axes have :func:`dense_layout`, of more :func:`conv_layout`.  Here must be transposed convolutions, and
        dense layers and norms whose features come from a flattening or go to an unflattening: read as the others, they
        may fit by chance.  Compare one output after converting.

    Returns:
      The variables, as nested dicts of arrays with the shapes and dtypes of ``variables``.

    Raises:
      ValueError: if entries or variables are missing, left over or of wrong shapes, or if values would become infinite
        or lose an imaginary part; the message lists all of them.
    """
    refuse_others(state_dict=(state_dict, "model.state_dict()"))
    entries = defaultdict(dict)
    for key, value in state_dict.items():
        if isinstance(value, Mapping):
            raise ValueError(f"state_dict[{key!r}] is itself a mapping; of a checkpoint, pass the state_dict in it.")
        prefix, _, name = key.rpartition(".")
        entries[prefix][name] = value
    return fill(variables, entries, names, layouts or {}, lambda layout: layout.from_torch)


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
    layers = take(variables, names, layouts or {}, lambda layout: layout.to_torch)
    return {entry(prefix, name): array for prefix, layer in layers.items() for name, array in layer.items()}


def from_keras(
    weights: Mapping[str, Sequence[Any] | Mapping[str, Any]],
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> Variables:
    """Returns the variables of a Flax model with the weights of a Keras model.

    >>> import numpy as np
    >>> weights = {'dense': {'kernel': np.ones((3, 2)), 'bias': np.zeros(2)}}
    >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    >>> variables = jaxbn.interop.from_keras(weights, variables, {'dense': ''})

    Args:
      weights: ``{layer.name: layer.weights for layer in model.layers if layer.weights}``, whose names are checked, or
        arrays by such names.  ``layer.get_weights()`` does too, but has no names: a gamma without beta
        (``center=False``) is then read as the beta of a Flax layer with ``use_scale=False``.
      variables: as in :func:`from_torch`.
      names: from each layer in ``weights`` to its path in ``variables``.
      layouts: as in :func:`from_torch`, with depthwise convolutions; dense layers need none.

    Returns:
      The variables, as nested dicts of arrays with the shapes and dtypes of ``variables``.

    Raises:
      ValueError: if weights or variables are missing, left over or of wrong shapes, or if values would become infinite
        or lose an imaginary part; the message lists all of them.
    """
    refuse_others(weights=(weights, "{layer.name: layer.weights for layer in model.layers if layer.weights}"))
    return fill(variables, weights, names, layouts or {}, lambda layout: layout.from_keras)


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
    return take(variables, names, layouts or {}, lambda layout: layout.to_keras)


def _complement(momentum):
    """Returns 1 - momentum, of as many digits as people write: 0.1 of 0.9, not 0.09999999999999998."""
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum={momentum} is outside [0, 1]; it is the weight of a value in an average; pass such, or None."
        )
    return None if momentum is None else round(1 - momentum, 15)
