"""The order of an epoch: every image once, reproducible from its key, in batches of the right classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training import orders

LABELS = jnp.asarray(np.random.RandomState(0).permutation(np.arange(120) % 6), jnp.int32)
every_order = pytest.mark.parametrize("name", orders.ORDERS)


def order(name, seed=0, epoch=3, labels=LABELS, batch_size=6):
    return compiled(name, batch_size)(labels, jax.random.key(seed), epoch)


@functools.cache
def compiled(name, batch_size):
    order_of = functools.partial(orders.ORDERS[name], num_classes=6, batch_size=batch_size)
    return jax.jit(order_of, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster


@pytest.mark.slow
@every_order
def test_an_epoch_holds_every_image_once(name):
    made = order(name, labels=LABELS[:113])
    assert made.dtype == jnp.int32
    assert sorted(made.tolist()) == list(range(113))


@pytest.mark.slow
@every_order
def test_the_order_depends_on_the_key_and_the_epoch_alone(name):
    assert order(name).tolist() == order(name).tolist()
    assert order(name).tolist() != order(name, epoch=2).tolist()
    assert order(name).tolist() != order(name, seed=1).tolist()


def test_every_batch_is_of_one_class():
    batches = LABELS[order("one_class", batch_size=5)].reshape(-1, 5)
    assert all(len(set(batch.tolist())) == 1 for batch in batches)
    assert len({int(batch[0]) for batch in batches[:8]}) > 2  # and the classes do not come one after another


@pytest.mark.parametrize(("batch_size", "each"), [(6, 2), (12, 4)])
def test_every_batch_has_as_many_images_of_each_class_in_a_half_of_them(batch_size, each):
    batches = LABELS[order("half_the_classes", batch_size=batch_size)].reshape(-1, batch_size)
    for batch in batches:
        classes, counts = np.unique(batch, return_counts=True)
        assert len(classes) == 3 and set(counts) == {each}
    assert len({tuple(np.unique(batch)) for batch in batches}) > 3


@pytest.mark.slow
def test_classes_of_other_sizes_keep_the_batches_pure_until_the_smallest_ends():
    labels = jnp.asarray(
        np.random.RandomState(1).permutation(np.repeat(np.arange(6), [20, 31, 40, 26, 22, 23])), jnp.int32
    )
    made = order("half_the_classes", labels=labels)
    assert sorted(made.tolist()) == list(range(len(labels)))
    batches = labels[made][:120].reshape(-1, 6)  # twenty of each class
    assert all(sorted(np.unique(batch, return_counts=True)[1]) == [2, 2, 2] for batch in batches)


@pytest.mark.parametrize("batch_size", [4, 7])
def test_batches_that_no_half_of_the_classes_fills_are_refused(batch_size):
    with pytest.raises(ValueError, match=f"multiple of half that number, got 6 classes and batch_size={batch_size}"):
        order("half_the_classes", batch_size=batch_size)
