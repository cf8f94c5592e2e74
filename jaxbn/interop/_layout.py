"""Defines layouts, and the order of features around a flattening, which several layouts share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn.interop._weights import Arrays, Variables


class Layout(NamedTuple):
    """How to convert one kind of layer: functions between its variables in Flax and its weights in PyTorch and Keras.

    They only move values, so converting back gives the same bits.  Each raises a ValueError for arrays that such a
    layer does not have.

    >>> import numpy as np
    >>> from jaxbn import interop
    >>> layout = interop.conv_layout()
    >>> variables = layout.from_torch({'weight': np.ones((8, 2, 3, 5))})
    >>> variables['params']['kernel'].shape, layout.to_torch(variables)['weight'].shape
    ((3, 5, 2, 8), (8, 2, 3, 5))

    Attributes:
      from_torch: from the layer's entries of a ``state_dict``, by their last names, to its variables, such as
        ``{"params": {"kernel": ..., "bias": ...}}``, without variables and collections that the layer lacks.
      to_torch: from variables to entries.
      from_keras: from ``layer.weights``, from arrays by their names, or from the list of ``layer.get_weights()``, to
        variables.  The list has no names that could be checked.
      to_keras: from variables to the list for ``layer.set_weights``.
    """

    from_torch: Callable[[Mapping[str, Any]], Variables]
    to_torch: Callable[[Mapping[str, Any]], Arrays]
    from_keras: Callable[[Sequence[Any] | Mapping[str, Any]], Variables]
    to_keras: Callable[[Mapping[str, Any]], list[np.ndarray]]


def to_flax_order(array: np.ndarray, shape: Sequence[int] | None, option: str, *, axis: int = 0) -> np.ndarray:
    """Moves flattened features from PyTorch's order, that of ``[C, *k]``, to Flax's and Keras's, ``[*k, C]``.

    Args:
      array: with the features on one axis.
      shape: ``[C, *k]``, or None if the features were not flattened.
      option: the name of the argument that ``shape`` is, for an error.
      axis: of the features.

    Returns:
      The array with its features in the new order.
    """
    if shape is None:
        return array
    return np.take(array, _torch_places(array, shape, option, axis), axis)


def to_torch_order(array: np.ndarray, shape: Sequence[int] | None, option: str, *, axis: int = 0) -> np.ndarray:
    """Undoes :func:`to_flax_order`."""
    if shape is None:
        return array
    inverse = np.argsort(_torch_places(array, shape, option, axis))
    return np.take(array, inverse, axis)


def _torch_places(array: np.ndarray, shape: Sequence[int], option: str, axis: int) -> np.ndarray:
    """Returns the places of the features in PyTorch's order, listed in Flax's order."""
    features = array.shape[axis]
    if math.prod(shape) != features:
        raise ValueError(
            f"{option}={tuple(shape)} makes {math.prod(shape)} features, but this layer has {features}; "
            "pass the shape [C, *k] of one example in PyTorch where it is not flat."
        )
    return np.moveaxis(np.arange(features).reshape(shape), 0, -1).ravel()
