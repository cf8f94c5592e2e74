"""Calibrated statistics are those of the whole data, computed by a NumPy model in float64, however they are split."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import calibrate
from tests import reference
from tests.calibrate.models import (
    BATCHES,
    CHAIN,
    CHAIN_VARIABLES,
    FEATURES,
    HALVES,
    LAYER,
    NET,
    ROUNDING,
    VARIABLES,
    Block,
    Chain,
    Net,
    NnxNet,
    X,
    assert_close,
    expected,
    expected_of_chain,
    layer_variables,
    random_variables,
    randomized,
    stats_of,
)


def test_layer_by_layer_is_a_forward_pass_of_all_data():
    assert_close(stats_of(calibrate.layer_by_layer(NET, VARIABLES, BATCHES)), expected())


def test_layer_by_layer_does_not_depend_on_the_split():
    uneven = [X[:64], X[64:80], X[80:96], X[96:112], X[112:]]
    assert_close(stats_of(calibrate.layer_by_layer(CHAIN, CHAIN_VARIABLES, uneven)), expected_of_chain())


def test_one_pass_normalizes_each_batch_with_its_own_moments():
    result = calibrate.one_pass(CHAIN, CHAIN_VARIABLES, iter(BATCHES))
    assert_close(stats_of(result), expected_of_chain(HALVES))


def test_one_pass_with_running_averages_does_not_depend_on_the_split():
    interleaved = [X[::2], X[1::2]]
    in_order, mixed = (
        stats_of(calibrate.one_pass(CHAIN, CHAIN_VARIABLES, data, use_running_average=True))
        for data in (BATCHES, interleaved)
    )
    assert_close(mixed, in_order)
    assert_close({"first": mixed["first"]}, {"first": expected()["first"]})


def test_rounding_does_not_grow_with_the_number_of_batches():
    x = np.random.default_rng(2).normal(1, 1, (1000, 1, FEATURES)).astype(np.float32)
    result = calibrate.one_pass(LAYER, layer_variables(), list(x), use_running_average=True)
    assert_close(stats_of(result), {"": reference.moments(x[:, 0])[:2]}, 10 * np.finfo(np.float32).eps)


LINEN = {
    "under jit": Net(wrap=nn.jit),
    "of jaxbn, under remat": Net(jaxbn.linen.BatchNorm, nn.remat),
    "in training mode, with an axis name": Chain(
        lambda use_running_average, name: nn.BatchNorm(False, axis_name="devices", name=name)
    ),
}
NNX = {
    "of flax": {},
    "of jaxbn, under jit": {"norm": jaxbn.nnx.BatchNorm, "wrap": nnx.jit},
    "under remat": {"wrap": nnx.remat},
}


@pytest.mark.parametrize("model", LINEN.values(), ids=LINEN)
def test_any_linen_batch_norm_is_calibrated(model):
    is_chain = isinstance(model, Chain)
    result = calibrate.layer_by_layer(model, CHAIN_VARIABLES if is_chain else VARIABLES, [X])
    assert_close(stats_of(result), expected_of_chain() if is_chain else expected())


@pytest.mark.parametrize("options", NNX.values(), ids=NNX)
def test_any_nnx_batch_norm_is_calibrated_without_dropout(options):
    assert_close(stats_of(calibrate.layer_by_layer(NnxNet(**options), None, [X])), expected())


def test_images_are_averaged_over_positions():
    x = np.moveaxis(X.reshape(8, 4, 4, FEATURES), -1, 1)
    result = calibrate.layer_by_layer(nn.BatchNorm(True, axis=1), layer_variables(), [x[:4], x[4:]])
    assert_close(stats_of(result), {"": reference.moments(X)[:2]})


def test_half_precision_models_keep_their_dtypes_and_are_measured_in_float32():
    half, x = jnp.bfloat16, (1 + X / 100).astype(jnp.bfloat16)
    variables = layer_variables(half)
    model = nn.BatchNorm(True, dtype=half, force_float32_reductions=False, param_dtype=half)
    measured = jax.jit(functools.partial(calibrate.measure, model))(variables, x)[""]
    assert_close({"": measured[:2]}, {"": reference.moments(np.asarray(x, np.float64))[:2]})
    assert measured.mean.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(calibrate.layer_by_layer(model, variables, [x]), variables)


def test_a_batch_is_normalized_as_in_training_by_a_variant_too():
    method = functools.partial(jaxbn.ghost_normalize, group_size=16)
    norm = functools.partial(jaxbn.linen.BatchNorm, method=method, momentum=0.0)
    training = Chain(lambda use_running_average, name: norm(False, name=name))
    _, updated = jax.jit(functools.partial(training.apply, mutable=["batch_stats"]))(CHAIN_VARIABLES, X)
    measure = jax.jit(functools.partial(calibrate.measure, Chain(norm), use_running_average=False))
    measured = measure(CHAIN_VARIABLES, X)
    assert_close({path.removesuffix("/norm"): moments[:2] for path, moments in measured.items()}, stats_of(updated))


def test_layers_that_want_it_get_an_unbiased_variance():
    model = jaxbn.linen.BatchNorm(True, unbiased=True)
    result = calibrate.layer_by_layer(model, layer_variables(), [X[:4], X[4:8]])
    np.testing.assert_allclose(result["batch_stats"]["var"], reference.moments(X[:8])[1] * 8 / 7, rtol=ROUNDING)


def test_averaged_weights_get_their_own_statistics():
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, VARIABLES["params"], randomized(VARIABLES, seed=2)["params"])
    result = calibrate.layer_by_layer(NET, VARIABLES | {"params": averaged}, BATCHES)
    assert_close(stats_of(result), expected(params=averaged))


def test_earlier_statistics_do_not_matter():
    wrecked = VARIABLES | {"batch_stats": jax.tree.map(lambda a: 1e3 * a - 30, VARIABLES["batch_stats"])}
    results = [calibrate.layer_by_layer(NET, variables, BATCHES) for variables in (VARIABLES, wrecked)]
    chex.assert_trees_all_equal(*results)


# What does not change.


def test_frozen_layers_keep_their_statistics_and_normalize_with_them():
    class HalfFrozen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Block(functools.partial(jaxbn.linen.BatchNorm, frozen=True), name="first")(x)
            return Block(nn.BatchNorm, name="left")(x)

    result = calibrate.layer_by_layer(HalfFrozen(), CHAIN_VARIABLES, BATCHES)
    chex.assert_trees_all_equal(result["batch_stats"]["first"], VARIABLES["batch_stats"]["first"])
    first, left = (jax.tree.map(np.asarray, VARIABLES["params"][name]) for name in ("first", "left"))
    x = reference.normalize(
        X @ first["Dense_0"]["kernel"] + first["Dense_0"]["bias"], *stats_of(VARIABLES)["first"], **first["norm"]
    )
    x = np.maximum(x, 0) @ left["Dense_0"]["kernel"] + left["Dense_0"]["bias"]
    assert_close({"left": stats_of(result)["left"]}, {"left": reference.moments(x)[:2]})


def test_nothing_but_mean_and_variance_changes():
    model = Chain(functools.partial(jaxbn.linen.BatchNorm, debias=True))
    variables = random_variables(model) | {"cache": {"left": {"steps": jnp.ones(2)}}}
    before = jax.tree.map(np.array, variables)
    result = calibrate.layer_by_layer(model, variables, BATCHES)
    chex.assert_trees_all_equal(variables, before)
    assert jax.tree.structure(result) == jax.tree.structure(variables)
    for name in ("first", "left"):
        old, new = before["batch_stats"][name]["norm"], result["batch_stats"][name]["norm"]
        assert not np.allclose(new.pop("mean"), old.pop("mean"))
        assert not np.allclose(new.pop("var"), old.pop("var"))
    chex.assert_trees_all_equal(result, before)


def test_the_nnx_model_passed_in_stays_as_it_is():
    model = NnxNet()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    result = calibrate.layer_by_layer(model, None, [X])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))), before)
    assert result is not model and result.first.norm.mean is not model.first.norm.mean
    assert not result.first.norm.use_running_average and not result.dropout.deterministic
