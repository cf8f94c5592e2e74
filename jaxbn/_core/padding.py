"""Padding of the last, ragged batch of an epoch, so that every example counts once and one program serves all batches.

The mask that comes with a padded batch goes to the batch norm layers, which leave the padding out of their moments, and
to the mean of the loss, which must leave it out too.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core import checks

Batch = TypeVar("Batch")


def pad_batch(batch: Batch, size: int) -> tuple[Batch, np.ndarray]:
    """Fills a batch up to ``size`` examples with zeros, and says which examples are real.

    >>> batch = {'image': jnp.ones((2, 4, 4, 3)), 'label': jnp.array([7, 9])}
    >>> padded, mask = jaxbn.pad_batch(batch, 4)
    >>> padded['label'], mask
    (Array([7, 9, 0, 0], dtype=int32), array([ True,  True, False, False]))

    A layer takes the mask with the axes of its input, ``mask[:, None, None, None]`` for images, and the loss is
    ``jnp.mean(losses, where=mask)``.  Over devices, batches of ``size`` examples can be split evenly where those of the
    last batch cannot; every device then counts its real examples only.

    Args:
      batch: arrays of shape [n, ...] in any tree, with one n in common, at most ``size``.
      size: number of examples afterwards.

    Returns:
      The batch with arrays of shape [size, ...], of NumPy where they were, else of JAX; and the mask, booleans of shape
      [size].

    Raises:
      ValueError: for arrays without a common first axis, more than ``size`` examples, or a ``size`` that is no integer.
    """
    size = checks.whole("size", size, least=0)
    shapes = [np.shape(array) for array in jax.tree.leaves(batch)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"the batch holds arrays of shapes {shapes}; they need a first axis of one size, that of the examples; "
            "leave out what is not per example."
        )
    n = shapes[0][0]
    if n > size:
        raise ValueError(f"size={size} is smaller than the batch of {n}; pass the size of a full batch, at least {n}.")

    def pad(array):
        library = jnp if isinstance(array, jax.Array) else np
        return library.pad(array, [(0, size - n)] + [(0, 0)] * (np.ndim(array) - 1))

    return jax.tree.map(pad, batch), np.arange(size) < n
