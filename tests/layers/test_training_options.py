"""What a model asks of a layer while it trains: isinstance, statistics left alone, schedules, and lost counts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = jnp.asarray(np.random.default_rng(0).normal([0.0, 5.0, -3.0], [0.2, 3.0, 1.0], (16, 3)), jnp.float32)
KEY = jax.random.key(0)


def test_our_layers_are_flaxs():
    assert issubclass(jaxbn.linen.BatchNorm, nn.BatchNorm)
    assert isinstance(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm)


class Asking(nnx.Module):
    """Passes the flag to batch norms only, as many models do."""

    def __init__(self, batch_norm, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), batch_norm(4, momentum=0.9, rngs=rngs), nnx.relu])

    def __call__(self, x, training):
        for layer in self.layers:
            x = layer(x, use_running_average=not training) if isinstance(layer, nnx.BatchNorm) else layer(x)
        return x


def test_a_model_that_asks_for_flaxs_class_trains_and_evaluates_with_ours():
    ours, flaxs = (Asking(cls, nnx.Rngs(0)) for cls in (jaxbn.nnx.BatchNorm, nnx.BatchNorm))
    np.testing.assert_allclose(ours(X, training=True), flaxs(X, training=True), atol=1e-5)
    before = jax.tree.map(jnp.copy, nnx.state(ours))
    chex.assert_trees_all_close(ours(X[:1], training=False), ours(X, training=False)[:1], atol=1e-6)
    np.testing.assert_allclose(ours(X, training=False), flaxs(X, training=False), atol=1e-5)
    chex.assert_trees_all_equal(nnx.state(ours), before)


# Statistics left alone


@pytest.mark.parametrize("where", ["constructor", "call"])
def test_linen_normalizes_with_the_batch_and_needs_nothing_mutable(where):
    trained = jaxbn.linen.BatchNorm(use_running_average=False)
    variables = trained.init(KEY, X)
    expected, _ = trained.apply(variables, X, mutable=["batch_stats"])
    layer = trained.clone(update_stats=False) if where == "constructor" else trained
    options = {} if where == "constructor" else {"update_stats": False}
    np.testing.assert_array_equal(layer.apply(variables, X, **options), expected)
    _, updates = layer.apply(variables, X, mutable=["batch_stats"], **options)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


def test_the_call_goes_before_the_constructor():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, update_stats=False)
    variables = layer.init(KEY, X)
    _, updates = layer.apply(variables, X, update_stats=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.01 * X.mean(0), rtol=1e-4)


def test_nnx_leaves_the_statistics_alone_in_a_view():
    layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    still = nnx.view(layer, update_stats=False)
    np.testing.assert_array_equal(still(X), jaxbn.batch_normalize(X, jnp.ones(3), jnp.zeros(3))[0])
    np.testing.assert_array_equal(layer.mean[...], 0)  # the view shares its variables
    still(X, update_stats=True)
    np.testing.assert_allclose(layer.mean[...], 0.01 * X.mean(0), rtol=1e-4)


def test_a_closed_over_nnx_layer_trains_inside_of_vmap():
    layer = jaxbn.nnx.BatchNorm(3, update_stats=False, rngs=nnx.Rngs(0))
    y = jax.jit(jax.vmap(layer))(X.reshape(2, 8, 3))  # as in the inner loop of MAML
    np.testing.assert_allclose(y[1], layer(X[8:]), atol=1e-6)


# Schedules


def method_with_schedules():
    return functools.partial(
        jaxbn.batch_renormalize,
        r_max=lambda step: jnp.where(step < 2, 1.0, 3.0),
        d_max=lambda step: jnp.where(step < 2, 0.0, 5.0),
    )


def expected_of_renorm(steps):
    """The outputs of batch norm twice, and then of batch renorm, with statistics averaged as without a count."""
    stats, outputs = jaxbn.init_stats(3), []
    for t in range(steps):
        method = jaxbn.batch_normalize if t < 2 else jaxbn.batch_renormalize
        y, stats = jaxbn.batch_norm(X, stats, use_running_average=False, momentum=0.9, method=method)
        outputs.append(y)
    return jnp.stack(outputs), stats


def test_linen_counts_its_steps_for_a_schedule_and_compiles_once():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.9, method=method_with_schedules())
    variables = layer.init(KEY, X)
    traced = []

    @jax.jit
    def step(variables):
        traced.append(None)
        y, updates = layer.apply(variables, X, mutable=["batch_stats"])
        return y, variables | updates

    outputs = []
    for _ in range(4):
        y, variables = step(variables)
        outputs.append(y)
    expected, stats = expected_of_renorm(4)
    chex.assert_trees_all_close(jnp.stack(outputs), expected, atol=1e-5)
    chex.assert_trees_all_close(variables["batch_stats"], {**stats._asdict(), "steps": jnp.full(3, 4)}, rtol=1e-6)
    assert len(traced) == 1


def test_nnx_counts_its_steps_for_a_schedule_and_compiles_once():
    layer = jaxbn.nnx.BatchNorm(3, momentum=0.9, method=method_with_schedules(), rngs=nnx.Rngs(0))
    traced = []

    @nnx.jit
    def step(layer):
        traced.append(None)
        return layer(X)

    outputs = jnp.stack([step(layer) for _ in range(4)])
    chex.assert_trees_all_close(outputs, expected_of_renorm(4)[0], atol=1e-5)
    np.testing.assert_array_equal(layer.steps[...], 4)
    assert len(traced) == 1


@pytest.mark.parametrize("momentum", [0.5, lambda step: jnp.where(step < 1, 0.0, 0.9)], ids=["number", "schedule"])
def test_momentum_is_a_schedule_or_set_in_a_view(momentum):
    layer = jaxbn.nnx.BatchNorm(3, momentum=momentum, rngs=nnx.Rngs(0))
    viewed = nnx.view(layer, momentum=0.25)
    viewed(X)
    np.testing.assert_allclose(layer.mean[...], 0.75 * X.mean(0), rtol=1e-5)
    layer(X)
    expected = (0.5 if momentum == 0.5 else 0.9) * 0.75 + (0.5 if momentum == 0.5 else 0.1)
    np.testing.assert_allclose(layer.mean[...], expected * X.mean(0), rtol=1e-5)


# Counts that were not loaded


def old_state():
    old = nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    for _ in range(100):
        old(X)
    return nnx.state(old)


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}])
def test_nnx_refuses_to_train_on_with_an_average_without_its_count(options):
    layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    nnx.update(layer, old_state())
    mean = jnp.copy(layer.mean[...])
    layer(X, use_running_average=True)  # evaluation needs no count
    with pytest.raises(ValueError, match="must include 'steps', the number of batches that they average"):
        layer(X - 30)
    np.testing.assert_array_equal(layer.mean[...], mean)
    layer.steps.set_value(jnp.full(3, 100))
    layer(X - 30)
    assert abs(layer.mean[...] - mean).max() < 31 * 0.11


def test_compiled_training_does_not_lose_an_average_without_its_count():
    layer = jaxbn.nnx.BatchNorm(3, momentum=0.9, debias=True, rngs=nnx.Rngs(0))
    nnx.update(layer, old_state())
    mean = jnp.copy(layer.mean[...])
    nnx.jit(lambda layer: layer(X - 30))(layer)
    np.testing.assert_allclose(layer.mean[...], 0.9 * mean + 0.1 * (X - 30).mean(0), rtol=1e-5)


# Flags


@pytest.mark.parametrize("flag", [1, "no", [True]])
def test_flags_are_booleans(flag):
    layer = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average must be True or False, got"):
        layer(X, use_running_average=flag)
    with pytest.raises(ValueError, match="update_stats must be True or False, got"):
        layer(X, update_stats=flag)


def test_a_traced_flag_is_named_with_the_remedy():
    layer = jaxbn.linen.BatchNorm()
    message = 'use_running_average must be True or False, got a traced array.*static_argnames="use_running_average"'
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda flag: layer.init(KEY, X, flag))(True)


@pytest.mark.parametrize("mask", [np.ones((16, 1), bool), jnp.ones((16, 1), bool)])
def test_a_mask_in_the_second_place_is_named(mask):
    with pytest.raises(ValueError, match="If it is a mask, pass it by name: mask="):
        jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(X, mask)
    with pytest.raises(ValueError, match="If it is a mask, pass it by name: mask="):
        jaxbn.linen.BatchNorm().init(KEY, X, mask)
