"""Padding for the last, ragged batch of an epoch: every example counts once, and one program serves all batches.

Pass the mask of a padded batch to the batch norm layers, which leave the padding out of their moments, and to the mean
of the loss.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._core import checks

Batch = TypeVar("Batch")


def pad_batch(batch: Batch, size: int) -> tuple[Batch, np.ndarray]:
    """Pads a batch with zeros up to ``size`` examples, and returns a mask of the real ones.

    >>> batch = {'image': jnp.ones((2, 4, 4, 3)), 'label': jnp.array([7, 9])}
    >>> padded, mask = jaxbn.pad_batch(batch, 4)
    >>> padded['label'], mask
    (Array([7, 9, 0, 0], dtype=int32), array([ True,  True, False, False]))

    The mask that a layer takes has the axes of its input, ``mask[:, None, None, None]`` for images, and the loss
    becomes ``jnp.mean(losses, where=mask)``.  A padded batch can also be split evenly over devices; each device then
    counts its real examples only.

    Args:
      batch: tree of arrays of shape [n, ...], with the same n, at most ``size``.
      size: number of examples after padding.

    Returns:
      The batch with arrays of shape [size, ...], NumPy arrays for NumPy arrays and JAX arrays otherwise; and the mask,
      booleans of shape [size].

    Raises:
      ValueError: for arrays without a common first axis, more than ``size`` examples, or a ``size`` that is not an
        integer.
    """
    size = checks.whole("size", size, least=0)
    shapes = [np.shape(array) for array in jax.tree.leaves(batch)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"batch must hold arrays with a common first axis, the examples, got shapes {shapes}. "
            "Leave out arrays that are not per example."
        )
    n = shapes[0][0]
    if n > size:
        raise ValueError(f"size must be at least the {n} examples of the batch, got {size}. Pass the full batch size.")

    def pad(array: ArrayLike) -> Any:
        library = jnp if isinstance(array, jax.Array) else np
        return library.pad(array, [(0, size - n)] + [(0, 0)] * (np.ndim(array) - 1))

    return jax.tree.map(pad, batch), np.arange(size) < n
