"""The order of the training images in an epoch, and with it what shares a batch.

Convention: every order has the signature of `shuffled`, and depends on key and epoch alone. Each image comes once.
"""

import jax
import jax.numpy as jnp


def shuffled(
    labels: jax.Array, key: jax.Array, epoch: int | jax.Array, *, num_classes: int = 0, batch_size: int = 0
) -> jax.Array:
    """Returns the order of the images in an epoch, int32 [n]: any permutation.

    Args:
      labels: int32 [n].
      key: random key.
      epoch: counted from 0.
      num_classes: not used here.
      batch_size: not used here.
    """
    del num_classes, batch_size
    return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(len(labels), dtype=jnp.int32))


def one_class(
    labels: jax.Array, key: jax.Array, epoch: int | jax.Array, *, num_classes: int, batch_size: int
) -> jax.Array:
    """Returns an order of the images in an epoch, int32 [n], in which each batch holds images of one class.

    Where the images of a class are not a multiple of the batch, the last of them share one with the next class.

    Args:
      labels: int32 [n].
      key: random key.
      epoch: counted from 0.
      num_classes: not used here.
      batch_size: images per batch; those that fill no batch come last.
    """
    del num_classes
    order = shuffled(labels, key, epoch)
    order = order[jnp.argsort(labels[order], stable=True)]
    batches = len(order) // batch_size
    mixed = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, epoch), 1), batches)
    head = order[: batches * batch_size].reshape(batches, batch_size)[mixed]
    return jnp.concatenate([head.ravel(), order[batches * batch_size :]])


def half_the_classes(
    labels: jax.Array, key: jax.Array, epoch: int | jax.Array, *, num_classes: int, batch_size: int
) -> jax.Array:
    """Returns an order of the images in an epoch, int32 [n], in which a batch holds a random half of the classes.

    Each of these classes has as many images in the batch. That ends with the images of the smallest class; what is left
    of the others comes last.

    Args:
      labels: int32 [n].
      key: random key.
      epoch: counted from 0.
      num_classes: even.
      batch_size: a multiple of half the classes.

    Raises:
      ValueError: such batches do not exist.
    """
    half, odd = divmod(num_classes, 2)
    if odd or not half or batch_size % half:
        raise ValueError(
            f"batch_size={batch_size} with {num_classes} classes; batches of a half of the classes want an even number "
            "of classes, and a multiple of half of it as batch_size; choose such."
        )
    each = batch_size // half  # images of a class in a batch
    order = shuffled(labels, key, epoch)
    classes = labels[order]
    members = jax.nn.one_hot(classes, num_classes, dtype=jnp.int32)
    rank = (members * (members.cumsum(0) - 1)).sum(1)  # of each image among those of its class
    # In each round, two batches share the classes out: a class's place among them says which one it belongs to.
    rounds = jnp.arange(-(-len(labels) // each))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, epoch), 1), i))(rounds)
    places = jax.vmap(lambda key: jax.random.permutation(key, num_classes))(keys)
    place = (rank // each * num_classes + places[rank // each, classes]) * each + rank % each
    complete = rank < members.sum(0).min() // each * each
    return order[jnp.argsort(jnp.where(complete, place, len(labels) + rank), stable=True)]


ORDERS = {"shuffled": shuffled, "one_class": one_class, "half_the_classes": half_the_classes}
