"""Layers under lifted transformations are calibrated with what each of them sees, in NumPy and float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn import calibrate, surgery
from tests import reference
from tests.calibrate.models import (
    BATCHES,
    CHAIN,
    CHAIN_VARIABLES,
    FEATURES,
    Chain,
    X,
    assert_close,
    expected_of_chain,
    layer_variables,
    random_variables,
    randomized,
    stats_of,
)

ONE_PASS, BY_LAYER = calibrate.one_pass, calibrate.layer_by_layer
each_way = pytest.mark.parametrize("function", [ONE_PASS, BY_LAYER])


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(True, name="norm")(nn.Dense(FEATURES, name="dense")(x)), None


def in_turn(x, layers):
    """Returns mean and variance of the inputs of each norm, when dense layers and norms come one after another."""
    found = []
    for dense, norm in layers:
        x = x @ np.asarray(dense["kernel"], np.float64) + dense["bias"]
        found.append(reference.moments(x)[:2])
        x = reference.batch_norm(x, np.asarray(norm["scale"]), np.asarray(norm["bias"]))[0]
    return found


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("axis", [0, 1])
def test_each_layer_of_a_scan_gets_its_own_statistics(function, axis):
    options = {"variable_axes": {"params": axis, "batch_stats": axis}, "split_rngs": {"params": True}, "length": 3}
    model = nn.scan(Step, **options)()
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), X, None))
    batches = [X] if function is ONE_PASS else BATCHES
    stats = function(model, variables, batches, call=lambda model, x: model(x, None)[0])["batch_stats"]["norm"]
    params = [jax.tree.map(lambda leaf, i=i: jnp.take(leaf, i, axis), variables["params"]) for i in range(3)]
    for i, (mean, var) in enumerate(in_turn(X, [(layer["dense"], layer["norm"]) for layer in params])):
        of_layer = [jnp.take(stats[name], i, axis) for name in ("mean", "var")]
        assert_close({"": of_layer}, {"": (mean, var)})


@pytest.mark.slow
@each_way
def test_a_layer_that_a_scan_shares_gets_the_statistics_of_all_its_turns(function):
    shared = ["params", "batch_stats"]
    model = nn.scan(Step, variable_broadcast=shared, split_rngs={"params": False}, length=3)()
    variables = randomized(jax.eval_shape(model.init, jax.random.key(0), X, None))
    stats = function(model, variables, [X], call=lambda model, x: model(x, None)[0])["batch_stats"]["norm"]
    layer = variables["params"]["dense"], variables["params"]["norm"]
    means, variances = zip(*in_turn(X, [layer] * 3), strict=True)
    expected = np.mean(means, 0), np.mean(variances, 0) + np.var(means, 0)
    assert_close({"": (stats["mean"], stats["var"])}, {"": expected})


@pytest.mark.slow
@each_way
@pytest.mark.parametrize("front_end", ["linen", "nnx", "vmap"])
def test_each_model_of_an_ensemble_gets_its_own_statistics(function, front_end):
    ensemble = [randomized(CHAIN_VARIABLES, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ensemble)
    expected = [function(CHAIN, variables, [X])["batch_stats"] for variables in ensemble]
    if front_end == "vmap":
        of_all = jax.vmap(lambda variables: function(CHAIN, variables, [X]))(stacked)["batch_stats"]
    elif front_end == "linen":
        axes = {"params": 0, "batch_stats": 0}
        model = nn.vmap(Chain, variable_axes=axes, split_rngs={"params": True}, in_axes=None, axis_size=2)()
        of_all = function(model, stacked, [X])["batch_stats"]
    else:
        norms = nnx.vmap(lambda _: nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)))(jnp.arange(2))
        call = nnx.vmap(lambda norm, x: norm(x), in_axes=(0, None))
        result = function(norms, None, [X], call=call)
        for i in range(2):
            assert_close({"": (result.mean[i], result.var[i])}, {"": reference.moments(X)[:2]})
        return
    for i, of_model in enumerate(expected):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            jax.tree.map(lambda a, i=i: a[i], of_all),
            of_model,
        )


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.BatchNorm(True)
        return layer(x) if self.is_initializing() else jax.vmap(layer)(x.reshape(2, -1, FEATURES))


@pytest.mark.slow
@each_way
def test_a_layer_under_a_bare_vmap_gets_the_statistics_of_all_rows(function):
    variables = {collection: {"BatchNorm_0": arrays} for collection, arrays in layer_variables().items()}
    (stats,) = function(Mapped(), variables, BATCHES)["batch_stats"].values()
    assert_close({"": (stats["mean"], stats["var"])}, {"": reference.moments(X)[:2]})


def test_calibration_may_be_traced():
    traced = jax.jit(lambda variables, batch: calibrate.one_pass(CHAIN, variables, [batch]))(CHAIN_VARIABLES, X)
    assert_close(stats_of(traced), expected_of_chain())


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [nn.remat, nn.jit])
def test_the_class_of_the_model_may_be_lifted(wrap):
    assert_close(stats_of(calibrate.one_pass(wrap(Chain)(), CHAIN_VARIABLES, [X])), expected_of_chain())


class WithActivation(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return nn.relu(super().__call__(x))


class NnxWithActivation(nnx.BatchNorm):
    def __call__(self, x):
        return nnx.relu(super().__call__(x))


class Slash(nn.Module):
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        return self.norm(True, name="stem/bn")(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm, WithActivation])
def test_a_name_may_contain_a_slash_and_a_subclass_may_add_to_its_parents_call(norm):
    model = Slash(norm)
    stats = calibrate.one_pass(model, random_variables(model), [X])["batch_stats"]["stem/bn"]
    assert_close({"": (stats["mean"], stats["var"])}, {"": reference.moments(X)[:2]})


def test_a_subclass_may_add_to_its_parents_call_in_nnx():
    layer = calibrate.one_pass(NnxWithActivation(FEATURES, rngs=nnx.Rngs(0)), None, [X])
    assert_close({"": (layer.mean[...], layer.var[...])}, {"": reference.moments(X)[:2]})


@pytest.mark.slow
def test_models_of_one_framework_in_the_other_are_calibrated():
    linen_in_nnx = nnx.bridge.ToNNX(CHAIN, rngs=nnx.Rngs(0)).lazy_init(X)
    result = calibrate.one_pass(linen_in_nnx, None, [X])
    dense = linen_in_nnx.first["Dense_0"]
    kernel, bias = (np.asarray(dense[name][...], np.float64) for name in ("kernel", "bias"))
    norm = result.first["norm"]
    assert_close({"": (norm["mean"][...], norm["var"][...])}, {"": reference.moments(X @ kernel + bias)[:2]})
    nnx_in_linen = nnx.bridge.ToLinen(nnx.BatchNorm, args=(FEATURES,))
    variables = nnx_in_linen.init(jax.random.key(0), X)
    stats = jax.tree.leaves(calibrate.one_pass(nnx_in_linen, variables, [X])["batch_stats"])
    assert_close({"": stats}, {"": reference.moments(X)[:2]})


class Registered(nn.Module):
    eps: float = 1e-3

    @nn.compact
    def __call__(self, x):
        mean, var = (self.variable("batch_stats", name, jnp.ones, x.shape[-1:]).value for name in ("m", "v"))
        return (x - mean) / jnp.sqrt(var + self.eps)


@pytest.mark.slow
def test_a_registered_class_is_calibrated_like_batch_norm():
    surgery.register_batch_norm(Registered, mean="m", var="v", epsilon="eps", axis=-1)
    model = nn.Sequential([Registered(), nn.BatchNorm(True)])
    stats = ONE_PASS(model, model.init(jax.random.key(0), X), [X])["batch_stats"]
    mean, var = reference.moments(X)[:2]
    assert_close({"": (stats["layers_0"]["m"], stats["layers_0"]["v"])}, {"": (mean, var)})
    np.testing.assert_allclose(stats["layers_1"]["var"], var / (var + 1e-3), rtol=1e-5)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        norms = [nn.BatchNorm(True, name=name) for name in ("below", "above")]
        if self.is_initializing():
            return [norm(x) for norm in norms]
        return jax.lax.cond(x.mean() > 4, lambda x: norms[1](x), lambda x: norms[0](x), x)


@pytest.mark.slow
def test_a_layer_in_a_branch_gets_the_statistics_of_the_batches_that_take_it():
    variables = random_variables(Branches())
    stats = ONE_PASS(Branches(), variables, [X, X + 10, X + 20])["batch_stats"]
    for name, x in (("below", X), ("above", np.concatenate([X + 10, X + 20]))):
        assert_close({"": (stats[name]["mean"], stats[name]["var"])}, {"": reference.moments(x)[:2]})
