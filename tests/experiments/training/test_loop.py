"""The training loop: rows, schedule, metrics, and the number of devices."""

import functools
import math
import time

import jax
import numpy as np
import optax
import pytest

from experiments.data import augmentation
from experiments.nets import linen as linen_nets
from experiments.processes import distributed
from experiments.training import loop, orders, programs
from experiments.training.loop import fit
from tests.experiments.conftest import mesh_of
from tests.experiments.training.conftest import Stop, assert_same_bits, assert_same_curve


def test_learning_rate_follows_the_published_schedule(tiny):
    config = tiny.replace(learning_rate=0.01, lr_decay_epochs=10, epochs=30)
    rates = [loop.learning_rate(config, epoch) for epoch in range(30)]
    np.testing.assert_allclose(rates, [0.01] * 9 + [1e-3] * 10 + [1e-4] * 10 + [1e-5], rtol=1e-12)


def test_update_scaled_by_the_rate_is_that_of_sgd_at_the_rate():
    rates = (0.1, 0.1, 0.01, 0.01)
    gradients = jax.random.normal(jax.random.key(0), (len(rates), 5))
    ours, theirs = programs.optimizer(), optax.sgd(lambda step: np.take(rates, step), 0.9)
    x = y = np.ones(5, np.float32)
    our_state, their_state = ours.init(x), theirs.init(y)
    for rate, gradient in zip(rates, gradients, strict=True):
        update, our_state = ours.update(gradient, our_state)
        x = x + rate * update
        update, their_state = theirs.update(gradient, their_state)
        y = y + update
    np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.slow
def test_training_is_sgd_at_the_scheduled_rate_over_the_order_of_each_epoch(tiny, blobs, small_net):
    config = tiny.replace(augment=False, lr_decay_epochs=2, batch_size=18)
    net, n = linen_nets.build(config, 4), config.batch_size
    init_key, order_key, _ = jax.random.split(jax.random.key(config.seed), 3)
    quickly = functools.partial(jax.jit, compiler_options=programs.INIT_OPTIONS)
    variables = quickly(functools.partial(net.init, train=False))(init_key, blobs.train_images[:1] / np.float32(255))
    params, batch_stats = variables["params"], variables["batch_stats"]
    sgd = optax.sgd(optax.piecewise_constant_schedule(0.05, {4: 0.1}), 0.9)
    optimizer = sgd.init(params)

    @quickly
    def step(params, batch_stats, optimizer, x, labels):
        def loss_of(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        gradients, batch_stats_new = jax.grad(loss_of, has_aux=True)(params)
        updates, optimizer = sgd.update(gradients, optimizer)
        return optax.apply_updates(params, updates), batch_stats_new, optimizer

    for epoch in range(2):
        order = np.array(orders.shuffled(blobs.train_labels, order_key, epoch))
        for batch in np.split(order, range(n, len(order), n)):  # the last one is smaller
            x, labels = blobs.train_images[batch] / np.float32(255), blobs.train_labels[batch]
            params, batch_stats, optimizer = step(params, batch_stats, optimizer, x, labels)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, fit(config, blobs).variables, {"params": params, "batch_stats": batch_stats})


@pytest.mark.parametrize(("name", "flip"), [("cifar10", True), ("digits", False)])
def test_images_are_mirrored_in_training_where_that_keeps_their_class(tiny, monkeypatch, name, flip):
    flips = []

    def augment(key, images, *, flip):
        flips.append(flip)
        raise Stop

    monkeypatch.setattr(augmentation, "augment", augment)
    with pytest.raises(Stop):
        programs.compile_programs(tiny.replace(data=name), 4, (71, 8, 8, 1), (9, 8, 8, 1), distributed.mesh())
    assert flips == [flip]


@pytest.mark.slow
def test_there_is_a_row_at_every_evaluation(tiny, blobs, small_net):
    rows = fit(tiny.replace(evaluations=2), blobs).rows
    assert [(row["step"], row["epoch"]) for row in rows] == [(2, 0.5), (4, 1.0), (6, 1.5), (8, 2.0)]


def test_training_learns(tiny, blobs, small_net):
    rows = fit(tiny.replace(epochs=6), blobs).rows
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] / 2


@pytest.mark.slow
def test_every_test_image_counts_once(tiny, blobs):
    trained = fit(tiny, blobs)
    logits = linen_nets.build(tiny, 4).apply(trained.variables, blobs.test_images / np.float32(255), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, blobs.test_labels)
    correct = np.sum(logits.argmax(-1) == blobs.test_labels)
    measured = trained.rows[-1]["test_loss"], trained.rows[-1]["test_accuracy"]
    np.testing.assert_allclose(measured, (losses.mean(), correct / len(blobs.test_labels)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "images"), [(16, [16, 16, 16, 16]), (18, [18, 18, 18, 10])])
def test_training_metrics_are_means_over_the_images_since_the_last_row(tiny, blobs, small_net, batch_size, images):
    coarse, fine = (fit(tiny.replace(batch_size=batch_size, evaluations=n), blobs).rows for n in (1, 4))
    for name in ("train_loss", "train_accuracy"):
        means = np.average(np.reshape([row[name] for row in fine], (2, 4)), axis=1, weights=images)
        np.testing.assert_allclose([row[name] for row in coarse], means, rtol=1e-6)


@pytest.mark.slow
def test_every_training_image_counts_once_per_epoch(tiny, blobs, small_net, monkeypatch):
    monkeypatch.setattr(loop, "learning_rate", lambda *_: 0.0)
    config = tiny.replace(norm="none", augment=False, batch_size=18, epochs=1)
    (row,), variables = fit(config, blobs)[:2]
    logits = linen_nets.build(config, 4).apply(variables, blobs.train_images / np.float32(255), train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, blobs.train_labels)
    expected = losses.mean(), np.mean(logits.argmax(-1) == blobs.train_labels)
    np.testing.assert_allclose((row["train_loss"], row["train_accuracy"]), expected, rtol=1e-5)


def test_evaluating_more_often_does_not_change_the_training(tiny, blobs, small_net):
    assert_same_bits(fit(tiny, blobs).variables, fit(tiny.replace(evaluations=4), blobs).variables)


def test_same_seed_gives_same_bits(tiny, blobs, small_net):
    assert_same_bits(fit(tiny, blobs).variables, fit(tiny, blobs).variables)


def test_other_seed_gives_another_run(tiny, blobs, small_net):
    assert fit(tiny, blobs).rows[-1]["train_loss"] != fit(tiny.replace(seed=1), blobs).rows[-1]["train_loss"]


def test_runs_with_other_rates_and_seeds_share_their_programs(tiny, small_net):
    shapes = (4, (64, 8, 8, 1), (620, 8, 8, 1), distributed.mesh())
    first = programs.compile_programs(tiny, *shapes)
    assert programs.compile_programs(tiny.replace(seed=3, learning_rate=1.0, epochs=9), *shapes) is first


@pytest.mark.slow
def test_number_of_devices_does_not_change_the_learning_curve(tiny, blobs, small_net):
    config = tiny.replace(batch_size=18)  # 8 divides neither 18, nor the 10 of the last batch, nor 500
    one, eight = (fit(config, blobs, mesh=mesh_of(n)) for n in (1, 8))
    assert_same_curve(eight.rows, one.rows)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, eight.variables, one.variables)


@pytest.mark.slow
def test_batch_is_split_over_the_devices_and_all_else_is_whole(tiny, blobs, small_net):
    trained = fit(tiny.replace(epochs=1), blobs, mesh=mesh_of(8))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(trained.variables))
    shapes = (4, blobs.train_images.shape, blobs.test_images.shape, mesh_of(8))
    text = programs.compile_programs(tiny, *shapes).train.as_text()
    assert "f32[2,8,8,1]" in text and "f32[16,8,8,1]" not in text
    assert "all-reduce(" in text and "all-gather(" not in text


def test_divergence_ends_the_run_with_a_row_that_says_so(tiny, blobs, small_net):
    rows = fit(tiny.replace(learning_rate=1e38, epochs=4), blobs).rows
    assert [row["diverged"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert rows[-1]["epoch"] < 4


def test_test_loss_that_is_not_finite_ends_the_run_too(tiny, blobs, monkeypatch, small_net):
    monkeypatch.setattr(loop, "evaluate", lambda *_: (math.inf, 0.25))
    (row,) = fit(tiny, blobs).rows
    assert row["diverged"] and math.isfinite(row["train_loss"])


def test_only_the_first_row_holds_compilation(tiny, blobs, small_net):
    first, second = fit(tiny, blobs).rows
    assert first["compile_seconds"] > 0 and second["compile_seconds"] == 0


def test_batch_larger_than_the_data_set_is_refused(tiny, blobs, small_net):
    with pytest.raises(ValueError, match="batch_size=65 is larger than the 64 training images of blobs.*lower it"):
        fit(tiny.replace(batch_size=65), blobs)


def test_more_evaluations_than_steps_are_refused(tiny, blobs, small_net):
    with pytest.raises(ValueError, match="evaluations=5 per epoch, but an epoch has only 4 steps"):
        fit(tiny.replace(evaluations=5), blobs)


def test_last_batch_that_groups_do_not_divide_is_refused(tiny, blobs, small_net):
    config = tiny.replace(norm="ghost", group_size=8, batch_size=24)
    fewer = blobs._replace(train_images=blobs.train_images[:60], train_labels=blobs.train_labels[:60])
    with pytest.raises(ValueError, match="group_size=8 does not divide the last batch .* 12 images.* to 48"):
        fit(config, fewer)


def test_noise_on_devices_that_do_not_divide_the_batch_is_refused(tiny, blobs, small_net):
    with pytest.raises(ValueError, match=r"dropout=0.5 with batches of 16 .* on 3 devices, which do not divide"):
        fit(tiny.replace(dropout=0.5), blobs, mesh=mesh_of(3))


def test_measuring_is_added_to_the_seconds_of_a_run():
    run = loop.Trained([], {"params": {"w": jax.numpy.ones(3)}}, seconds=10.0)
    measured = run.measure(lambda variables: time.sleep(0.01) or [{"sum": variables["params"]["w"].sum()}])
    assert measured.measured == [{"sum": 3.0}]
    assert 10.01 <= measured.seconds < 11
