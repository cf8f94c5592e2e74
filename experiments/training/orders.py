"""Orders of the training images in an epoch, which decide what images share a batch.

Conventions: every order has the signature of `shuffled`, depends only on labels, key and epoch, and contains each image
once.
"""

import jax
import jax.numpy as jnp


def shuffled(
    labels: jax.Array, key: jax.Array, epoch: int | jax.Array, *, num_classes: int = 0, batch_size: int = 0
) -> jax.Array:
    """Returns a random permutation of the images, int32 [n].

    Args:
      labels: int32 [n].
      key: random key.
      epoch: counted from 0.
      num_classes: unused.
      batch_size: unused.
    """
    del num_classes, batch_size
    return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(len(labels), dtype=jnp.int32))


def one_class(
    labels: jax.Array, key: jax.Array, epoch: int | jax.Array, *, num_classes: int, batch_size: int
) -> jax.Array:
    """Returns an order, int32 [n], in which each batch holds images of one class.

    If a class does not fill its last batch, the images of the next class complete it.

    Args:
      labels: int32 [n].
      key: random key.
      epoch: counted from 0.
      num_classes: unused.
      batch_size: images per batch; images that do not fill a batch come last.
    """
    del num_classes
    # Sort by class, in random order within each class. Then shuffle the batches.
    order = shuffled(labels, key, epoch)
    by_class = order[jnp.argsort(labels[order], stable=True)]
    batches = len(by_class) // batch_size
    whole, rest = by_class[: batches * batch_size], by_class[batches * batch_size :]
    batch_key = jax.random.fold_in(jax.random.fold_in(key, epoch), 1)
    shuffled_batches = whole.reshape(batches, batch_size)[jax.random.permutation(batch_key, batches)]
    return jnp.concatenate([shuffled_batches.ravel(), rest])


def half_the_classes(
    labels: jax.Array, key: jax.Array, epoch: int | jax.Array, *, num_classes: int, batch_size: int
) -> jax.Array:
    """Returns an order, int32 [n], in which each batch holds a random half of the classes.

    All of these classes have equally many images in the batch. When the smallest class runs out of images, the
    remaining images of the others follow.

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
            "Batches of half the classes need an even number of classes, and a batch_size that is a multiple of half "
            f"that number, got {num_classes} classes and batch_size={batch_size}."
        )
    share = batch_size // half  # images of a class in a batch
    order = shuffled(labels, key, epoch)
    classes = labels[order]
    members = jax.nn.one_hot(classes, num_classes, dtype=jnp.int32)
    rank = (members * (members.cumsum(0) - 1)).sum(1)  # of each image among those of its class
    # In each round every class contributes `share` images, and a random permutation of the classes lines them up. The
    # first half of the line fills one batch, the second half the next one.
    rounds = jnp.arange(-(-len(labels) // share))
    round_key = jax.random.fold_in(jax.random.fold_in(key, epoch), 1)
    keys = jax.vmap(lambda i: jax.random.fold_in(round_key, i))(rounds)
    class_positions = jax.vmap(lambda key: jax.random.permutation(key, num_classes))(keys)
    round_of_image, rank_in_round = rank // share, rank % share
    group = round_of_image * num_classes + class_positions[round_of_image, classes]
    position = group * share + rank_in_round
    # There are as many rounds as the smallest class fills. All other images come last.
    in_round = rank < members.sum(0).min() // share * share
    return order[jnp.argsort(jnp.where(in_round, position, len(labels) + rank), stable=True)]


ORDERS = {"shuffled": shuffled, "one_class": one_class, "half_the_classes": half_the_classes}
