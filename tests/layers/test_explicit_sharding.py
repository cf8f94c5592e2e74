"""The linen layer on a mesh with explicit axes, where parameters, statistics and features are sharded differently.

Values are those of Flax's layer with the same call, which takes the variance from centered values here.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from jaxbn.linen import BatchNorm

FLAXS = functools.partial(nn.BatchNorm, use_fast_variance=False)
X = (np.random.default_rng(0).normal(size=(8, 6)) + np.arange(6)).astype(np.float32)
CLOSE = {"rtol": 0, "atol": 1e-5}
SPECS = [P("data", "model"), P("data"), P(None, "model")]


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def step_and_evaluate(norm, variables, x):
    def loss(params, x):
        y, updates = norm(use_running_average=False).apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return (y**3).mean(), (y, updates)

    gradients, (y, updates) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
    return y, updates, gradients, norm(use_running_average=True).apply({**variables, **updates}, x)


def run(mesh, function, *args):
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(function)(*args))


@pytest.mark.slow
@pytest.mark.parametrize("features", SPECS, ids=str)
@pytest.mark.parametrize("params", [P("model"), P()], ids=str)
@pytest.mark.parametrize("stats", [P("model"), P()], ids=str)
def test_shardings_of_features_parameters_and_statistics_may_differ(mesh, features, params, stats):
    variables = BatchNorm(use_running_average=False).init(jax.random.key(0), X)
    specs = {"params": params, "batch_stats": stats}
    placed = {
        name: jax.tree.map(lambda leaf, spec=specs[name]: jax.device_put(leaf, NamedSharding(mesh, spec)), collection)
        for name, collection in variables.items()
    }
    x = jax.device_put(X, NamedSharding(mesh, features))
    ours, flaxs = (run(mesh, functools.partial(step_and_evaluate, norm), placed, x) for norm in (BatchNorm, FLAXS))
    chex.assert_trees_all_close(ours, flaxs, **CLOSE)


def sharded(init):
    return nn.with_partitioning(lambda *args: reshard(init(*args), P("model")), ("model",))


@pytest.mark.slow
@pytest.mark.parametrize("features", SPECS, ids=str)
def test_partitioned_parameters_of_initializers_that_shard(mesh, features):
    options = {"scale_init": sharded(nn.initializers.ones), "bias_init": sharded(nn.initializers.zeros)}
    x = jax.device_put(X, NamedSharding(mesh, features))

    def init_and_step(norm):
        def of(x):
            norm_of = functools.partial(norm, **options)
            variables = norm_of(use_running_average=False).init(jax.random.key(0), x)
            return nn.unbox(step_and_evaluate(norm_of, variables, x))

        return of

    ours, flaxs = (run(mesh, init_and_step(norm), x) for norm in (BatchNorm, FLAXS))
    chex.assert_trees_all_close(ours, flaxs, **CLOSE)


@pytest.mark.slow
def test_init_with_out_shardings_shards_the_parameters(mesh):
    layer = BatchNorm(
        use_running_average=False,
        scale_init=sharded(nn.initializers.ones),
        bias_init=sharded(nn.initializers.zeros),
    )
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        shardings = nn.get_sharding(jax.eval_shape(layer.init, jax.random.key(0), x), mesh)
        variables = nn.unbox(jax.jit(layer.init, out_shardings=shardings)(jax.random.key(0), x))
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(variables["params"])} == {P("model")}
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, variables["params"]),
        {"scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)},
    )


def test_partitioned_parameters_of_other_initializers_are_refused_by_flax(mesh):
    # By `nn.Partitioned` itself, before the layer sees the array.
    for norm in (BatchNorm, FLAXS):
        layer = norm(use_running_average=False, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
        with jax.set_mesh(mesh), pytest.raises(AssertionError, match="acts as an assert"):
            jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((8, 6)))
