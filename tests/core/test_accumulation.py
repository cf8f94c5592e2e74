"""Gradient accumulation: one update of the running statistics for each optimizer step, as for one big batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import reference

PARTS = 4
RNG = np.random.default_rng(0)
# Parts of different means: the variance of all exceeds the mean of their variances.
X = (RNG.normal(size=(2, PARTS, 8, 3)) * 3 + 5 * np.arange(PARTS)[:, None, None]).astype(np.float32)
MASK = RNG.random((2, PARTS, 8, 1)) < 0.7
CLOSE = {"rtol": 1e-6}


def expected_after(steps, *, momentum=0.9, unbiased=True):
    """Returns the oracle's running statistics after steps whose batch is all parts together."""
    mean, var = np.zeros(3), np.ones(3)
    for x, mask in list(zip(X, MASK, strict=True))[:steps]:
        batch = reference.moments(x.reshape(-1, 3), mask=mask.reshape(-1, 1))
        mean, var = reference.update(mean, var, *batch, momentum=momentum, unbiased=unbiased)
    return mean, var


@functools.partial(jax.jit, static_argnames="momentum")
def train(stats, x, mask, momentum=0.9):
    """Trains on one part after the other; returns the statistics, and the mean after every part."""

    def step(stats, part):
        x, mask = part
        _, stats = jaxbn.batch_norm(x, stats, use_running_average=False, momentum=momentum, unbiased=True, mask=mask)
        return stats, stats.mean

    return jax.lax.scan(step, stats, (x, mask))


def test_statistics_after_the_parts_are_those_of_one_big_batch():
    stats, _ = train(jaxbn.init_stats(3, accumulate=PARTS), X.reshape(-1, 8, 3), MASK.reshape(-1, 8, 1))
    chex.assert_trees_all_close(tuple(stats.running), expected_after(2), **CLOSE)


def test_statistics_stay_until_the_last_part_of_a_step():
    _, means = train(jaxbn.init_stats(3, accumulate=PARTS), X.reshape(-1, 8, 3), MASK.reshape(-1, 8, 1))
    first, _ = expected_after(1)
    np.testing.assert_array_equal(means[: PARTS - 1], np.zeros((PARTS - 1, 3)))
    np.testing.assert_allclose(means[PARTS - 1 : 2 * PARTS - 1], np.broadcast_to(first, (PARTS, 3)), **CLOSE)


def test_nothing_is_pending_after_a_whole_step():
    stats, _ = train(jaxbn.init_stats(3, accumulate=PARTS), X[0], MASK[0])
    chex.assert_trees_all_equal(stats.pending, jax.tree.map(jnp.zeros_like, stats.pending))
    assert stats.batches == 0


@pytest.mark.parametrize("momentum", [0.9, pytest.param(None, marks=pytest.mark.slow)])
def test_counted_statistics_count_steps_and_not_parts(momentum):
    given = jaxbn.init_stats(3, counted=True, accumulate=PARTS)
    stats, _ = train(given, X.reshape(-1, 8, 3), MASK.reshape(-1, 8, 1), momentum)
    whole, _ = train(jaxbn.init_stats(3, counted=True), X.reshape(2, -1, 3), MASK.reshape(2, -1, 1), momentum)
    chex.assert_trees_all_close(stats.running, whole, rtol=1e-5)
    assert stats.running.steps.tolist() == [2, 2, 2]


def test_a_part_that_is_not_finite_is_left_out_for_its_feature_alone():
    x = X[0].copy()
    x[1, 0, 0] = np.nan
    stats, _ = train(jaxbn.init_stats(3, accumulate=PARTS), x, MASK[0] | (np.arange(8) == 0)[:, None])
    mask = np.broadcast_to(MASK[0] | (np.arange(8) == 0)[:, None], x.shape).copy()
    mask[1, :, 0] = False
    batch = reference.moments(x.reshape(-1, 3), mask=mask.reshape(-1, 3))
    expected = reference.update(np.zeros(3), np.ones(3), *batch, momentum=0.9, unbiased=True)
    chex.assert_trees_all_close(tuple(stats.running), expected, **CLOSE)


def test_a_step_of_empty_parts_leaves_the_statistics():
    stats, _ = train(jaxbn.init_stats(3, accumulate=PARTS), X[0], np.zeros_like(MASK[0]))
    chex.assert_trees_all_equal(stats.running, jaxbn.init_stats(3))


def test_evaluation_uses_the_statistics_of_the_last_whole_step():
    stats, _ = train(jaxbn.init_stats(3, accumulate=PARTS - 1), X[0], MASK[0])  # a whole step, and a part of the next
    batch = reference.moments(X[0, :-1].reshape(-1, 3), mask=MASK[0, :-1].reshape(-1, 1))
    expected = reference.update(np.zeros(3), np.ones(3), *batch, momentum=0.9, unbiased=True)
    y, after = jaxbn.batch_norm(X[0, 0], stats, use_running_average=True)
    np.testing.assert_allclose(y, reference.normalize(X[0, 0], *expected), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(after, stats)


@pytest.mark.slow
def test_half_precision_statistics_are_accumulated_in_float32():
    initial = jaxbn.init_stats(3, accumulate=PARTS)
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16) if v.dtype == jnp.float32 else v, initial)
    # The first update, which widens them, cannot be in the loop over steps.
    stats, _ = train(jaxbn.update_stats(half, jaxbn.moments(X[0, 0]), momentum=0.9), X[0], MASK[0])
    chex.assert_trees_all_equal_dtypes(stats, initial)


class Net(nn.Module):
    accumulate: int = 1

    @nn.compact
    def __call__(self, x, mask):
        x = jaxbn.linen.BatchNorm(
            use_running_average=False, momentum=0.9, unbiased=True, accumulate=self.accumulate, debias=True
        )(x, mask=mask)
        return nn.Dense(1)(x)


@pytest.mark.slow
def test_linen_layer_with_optax_multisteps_updates_parameters_and_statistics_together():
    net, x, mask = Net(accumulate=PARTS), X.reshape(-1, 8, 3), MASK.reshape(-1, 8, 1)
    variables = net.init(jax.random.key(0), x[0], mask[0])
    params, batch_stats = variables["params"], variables["batch_stats"]
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=PARTS)
    state = optimizer.init(params)

    @jax.jit
    def step(params, batch_stats, state, x, mask):
        def loss(params):
            y, updates = net.apply({"params": params, "batch_stats": batch_stats}, x, mask, mutable=["batch_stats"])
            return jnp.square(y).mean(), updates["batch_stats"]

        gradients, batch_stats_new = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), batch_stats_new, state

    moved = []
    for part, part_mask in zip(x, mask, strict=True):
        before = params, batch_stats["BatchNorm_0"]["mean"]
        params, batch_stats, state = step(params, batch_stats, state, part, part_mask)
        moved.append(
            (
                bool(jnp.any(params["Dense_0"]["kernel"] != before[0]["Dense_0"]["kernel"])),
                bool(jnp.any(batch_stats["BatchNorm_0"]["mean"] != before[1])),
            )
        )
    assert moved == ([(False, False)] * (PARTS - 1) + [(True, True)]) * 2
    whole, _ = train(jaxbn.init_stats(3, counted=True), X.reshape(2, -1, 3), MASK.reshape(2, -1, 1))
    found = batch_stats["BatchNorm_0"]
    chex.assert_trees_all_close((found["mean"], found["var"]), (whole.mean, whole.var), rtol=1e-5)


def test_nnx_layer_under_jit_moves_once_a_step():
    layer = jaxbn.nnx.BatchNorm(3, momentum=0.9, unbiased=True, accumulate=PARTS, rngs=nnx.Rngs(0))
    step = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    for part, mask in zip(X.reshape(-1, 8, 3), MASK.reshape(-1, 8, 1), strict=True):
        step(layer, part, mask)
    chex.assert_trees_all_close((layer.mean[...], layer.var[...]), expected_after(2), **CLOSE)


@pytest.mark.slow
def test_parts_that_are_spread_over_devices_count_whole():
    stats = jaxbn.init_stats(3, accumulate=PARTS)

    def on_a_device(stats, x, mask):
        return jaxbn.batch_norm(
            x, stats, use_running_average=False, momentum=0.9, unbiased=True, mask=mask, axis_name="d"
        )

    step = jax.jit(jax.vmap(on_a_device, in_axes=(None, 0, 0), out_axes=(0, None), axis_name="d"))
    for x, mask in zip(X.reshape(-1, 8, 3), MASK.reshape(-1, 8, 1), strict=True):
        _, stats = step(stats, x.reshape(4, 2, 3), mask.reshape(4, 2, 1))
    chex.assert_trees_all_close(tuple(stats.running), expected_after(2), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"frozen": True}])
def test_a_model_that_accumulates_evaluates_a_checkpoint_of_one_that_does_not(options):
    variables = jaxbn.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), X[0, 0])
    layer = jaxbn.linen.BatchNorm(use_running_average=True, accumulate=PARTS, **options)
    expected = jaxbn.linen.BatchNorm(use_running_average=True).apply(variables, X[0, 0])
    np.testing.assert_array_equal(layer.apply(variables, X[0, 0]), expected)


def test_layers_that_do_not_accumulate_have_no_variables_for_it():
    variables = jaxbn.linen.BatchNorm(use_running_average=False).init(jax.random.key(0), X[0, 0])
    assert set(variables["batch_stats"]) == {"mean", "var"}


@pytest.mark.parametrize("accumulate", [0, -1])
def test_accumulating_over_no_batches_is_refused(accumulate):
    with pytest.raises(ValueError, match=f"accumulate must be at least 1, got {accumulate}"):
        jaxbn.init_stats(3, accumulate=accumulate)
