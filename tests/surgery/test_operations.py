"""Any operation, on linen and nnx models: what changes, what stays, which layers are found, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxbn import surgery
from tests.surgery.nets import (
    EACH,
    NETS,
    OPERATIONS,
    PATHS,
    ZEROS,
    LayersInALoop,
    LinenNet,
    X,
    arrays,
    assert_equal,
    describe,
    linen_net,
    nnx_net,
    operated,
    output,
    refused,
    variables_of,
)


@pytest.mark.parametrize("operation", EACH)
@pytest.mark.parametrize("framework", NETS)
def test_an_operation_does_not_change_its_arguments(framework, operation):
    net, variables, description, copy, done = operated(framework, operation)
    assert_equal(arrays(net, variables), copy)
    assert describe(net, variables) == description
    assert sorted(done.layers) == sorted(PATHS[framework]) and done.kept == {}


@pytest.mark.parametrize("operation", EACH)
@pytest.mark.parametrize("framework", NETS)
def test_the_difference_is_that_of_the_outputs_in_evaluation(framework, operation):
    net, variables, *_, done = operated(framework, operation)
    before, after = output(net, variables)[0], output(done.model, done.variables)[0]
    assert done.scale == pytest.approx(float(abs(before).max()), rel=1e-5)
    assert done.difference == pytest.approx(float(abs(before - after).max()), abs=1e-5 * done.scale)
    if operation == "group norm":
        assert done.difference > 0.1 * done.scale
    else:
        assert done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("operation", ["replace", "to_affine", "fold"])
def test_class_and_metadata_of_nnx_variables_survive(operation):
    class Fixed(nnx.Param):
        pass

    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Linear(3, 4, kernel_init=ZEROS, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    dense, norm = net.layers
    dense.kernel = Fixed(jnp.ones((3, 4)), note="kept")
    norm.scale = Fixed(jnp.ones(4), note="kept")
    done = OPERATIONS[operation](net, None, X)
    assert done.difference <= 1e-5 * done.scale
    dense, norm = done.model.layers
    variables = [dense.kernel] + ([norm.scale] if operation != "fold" else [])
    assert all(type(v) is Fixed and v.get_metadata()["note"] == "kept" for v in variables)


@pytest.mark.parametrize("operation", ["replace", "to_affine", "fold"])
def test_sharding_of_linen_variables_survives(operation):
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    scale_init = nn.with_partitioning(nn.initializers.ones, ("model",))
    net = nn.Sequential([nn.Dense(4, kernel_init=kernel_init), nn.BatchNorm(True, scale_init=scale_init)])
    variables = jax.jit(net.init)(jax.random.key(0), X)
    done = OPERATIONS[operation](net, variables, X)
    before, after = (nn.get_partition_spec(v["params"]) for v in (variables, done.variables))
    assert after["layers_0"]["kernel"] == before["layers_0"]["kernel"] == jax.P(None, "model")
    assert operation == "fold" or after["layers_1"]["scale"] == jax.P("model")


def test_an_nnx_model_is_traced_in_evaluation_and_stays_in_training():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.dense, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dropout(self.dense(x)))

    net = Net()
    done = surgery.fold(net, None, X)
    assert done.layers == ("norm",) and done.difference <= 1e-5 * done.scale
    assert not net.dropout.deterministic and not net.norm.use_running_average


def test_the_difference_is_that_of_the_layers_themselves():
    net = nnx.BatchNorm(3, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    net.mean[...] = jnp.full(3, 100.3)
    done = surgery.replace(net, None, X + 100)  # Flax's rounds mean and inputs to bfloat16 first
    before, after = (jax.jit(model)(X + 100).astype(jnp.float32) for model in (net, done.model))
    assert done.difference == float(abs(before - after).max()) > 0.1


@pytest.mark.parametrize("framework", NETS)
def test_operations_follow_one_another(framework):
    net, variables, *_, done = operated(framework, "freeze")
    first, second = PATHS[framework]
    done = surgery.to_affine(done.model, done.variables, X, layers=second)
    done = surgery.fold(done.model, done.variables, X)
    assert done.layers == (first,)
    before, after = output(net, variables)[0], output(done.model, done.variables)[0]
    assert abs(before - after).max() <= 1e-5 * abs(before).max()


def test_a_module_that_shares_the_scope_of_its_batch_norm_is_not_taken_for_it():
    class Loud(nn.Module):
        def setup(self):
            self.norm = nn.BatchNorm(use_running_average=True)
            nn.share_scope(self, self.norm)

        def __call__(self, x):
            return 2 * self.norm(x)

    done = surgery.freeze(Loud(), variables_of(Loud(), X), X)
    assert done.layers == ("",) and done.difference == 0


def test_a_model_that_is_a_batch_norm_is_operated_on_again_and_again():
    net = nn.BatchNorm(use_running_average=True)
    done = surgery.freeze(net, variables_of(net, X), X)
    done = surgery.to_affine(done.model, done.variables, X)
    assert done.layers == ("",) and done.difference <= 1e-5 * done.scale


def test_modules_of_nnx_may_refer_to_each_other_in_a_cycle():
    net, _ = nnx_net()
    net.first.owner = net
    done = surgery.fold(net, None, X)
    assert len(done.layers) == 2 and done.difference <= 1e-5 * done.scale


class Identity(nn.Module):
    """A module that Flax does not know of."""

    def __init__(self):
        pass

    def __call__(self, x):
        return x


def test_a_module_without_a_scope_is_called_as_it_is():
    net = nn.Sequential([nn.Dense(3), lambda x: Identity()(x), nn.BatchNorm(use_running_average=True)])
    assert surgery.freeze(net, variables_of(net, X), X).layers == ("layers_2",)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["freeze", "replace", "to_affine"])
def test_layers_in_a_loop_are_exchanged_like_any_other(operation):
    done = OPERATIONS[operation](LayersInALoop(), LayersInALoop().init(jax.random.key(0), X), X)
    assert done.layers == ("blocks/norm",) and done.difference <= 1e-5 * done.scale
    if operation == "freeze":
        _, after = done.model.apply(done.variables, X, mutable=["batch_stats"])
        assert_equal(after["batch_stats"], done.variables["batch_stats"])


# Folding finds layers in its own way, all others in the same.
@pytest.mark.parametrize("operation", ["freeze", "fold", pytest.param("group norm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("framework", NETS)
def test_a_path_that_does_not_exist_is_refused(framework, operation):
    net, variables = NETS[framework]()
    message = f"the model has no batch norm at 'third'; it has {', '.join(map(repr, PATHS[framework]))}; give one"
    refused(message, OPERATIONS[operation], net, variables, layers=["third"])


def test_a_model_without_batch_norm_is_refused():
    net = nn.Sequential([nn.Dense(3)])
    variables = variables_of(net, X) | {"batch_stats": {}}
    refused("no batch norm was called, so there is nothing to change; ", surgery.freeze, net, variables)


def test_variables_without_statistics_are_refused():
    net, variables = linen_net()
    refused("have the collection 'batch_stats'", surgery.freeze, net, {"params": variables["params"]})


def test_variables_beside_an_nnx_model_are_refused():
    with pytest.raises(ValueError, match="an nnx model, which holds its own; pass None"):
        surgery.freeze(nnx_net()[0], {}, X)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(ValueError, match="pass the module itself, not its class, and not its apply"):
        surgery.freeze(LinenNet().apply, {}, X)


def test_variables_that_lack_a_layer_are_refused():
    net, variables = linen_net()
    for collection, names in (("params", "'scale', 'bias'"), ("batch_stats", "'mean', 'var'")):
        lacking = variables | {collection: {n: v for n, v in variables[collection].items() if n != "first"}}
        refused(f"variables have no {names} of first; ", surgery.freeze, net, lacking)
