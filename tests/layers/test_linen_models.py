"""Checkpoints of the linen layer, Flax's transformations of it, and what inspection shows."""

import functools
import pickle

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import serialization
from jax.sharding import PartitionSpec

import jaxbn
from jaxbn.linen import BatchNorm
from tests.layers.linen_layers import CLOSE, KEY, Net, X, evaluate, flaxs, ours, train, variables_of

# Checkpoints and copies


def test_a_checkpoint_in_bytes_from_flaxs_layer_loads():
    written = variables_of(Net(nn.BatchNorm))
    target = Net().init(KEY, X)
    loaded = serialization.from_bytes(target, serialization.to_bytes(written))
    chex.assert_trees_all_equal(loaded, written)


def test_a_state_dict_from_flaxs_layer_loads():
    written = variables_of(Net(nn.BatchNorm))
    target = Net().init(KEY, X)
    loaded = serialization.from_state_dict(target, serialization.to_state_dict(written))
    chex.assert_trees_all_equal(loaded, written)


def test_a_loaded_checkpoint_evaluates_as_in_flax():
    written = variables_of(Net(nn.BatchNorm))
    loaded = serialization.from_bytes(Net().init(KEY, X), serialization.to_bytes(written))
    chex.assert_trees_all_close(evaluate(Net(), loaded), evaluate(Net(nn.BatchNorm), written), **CLOSE)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_pickling_keeps_the_module(pickler):
    layer = ours(method=functools.partial(jaxbn.ghost_normalize, group_size=4), frozen=True)
    copy = pickler.loads(pickler.dumps(layer))
    assert repr(copy) == repr(layer)
    chex.assert_trees_all_equal(evaluate(copy, variables_of(layer)), evaluate(layer, variables_of(layer)))


# Flax's transformations


class Block(nn.Module):
    """A residual batch norm, of the form that nn.scan takes."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + BatchNorm(use_running_average=False, momentum=0.9)(x), None


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_scan_over_layers_gives_the_layers_in_turn():
    stack = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)()
    variables = jax.jit(stack.init)(KEY, X)
    (y, _), updates = jax.jit(functools.partial(stack.apply, mutable=["batch_stats"]))(variables, X)
    alone, expected = jax.jit(functools.partial(Block().apply, mutable=["batch_stats"])), X
    for i in range(2):
        (expected, _), updated = alone(at(variables, i), expected)
        chex.assert_trees_all_close(at(updates, i), updated, **CLOSE)
    chex.assert_trees_all_close(y, expected, **CLOSE)


def test_vmap_over_models_gives_each_model():
    batches = jnp.stack([X, 2 * X - 1])
    models = nn.vmap(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})()
    variables = jax.jit(models.init)(KEY, batches)
    found = jax.jit(functools.partial(models.apply, mutable=["batch_stats"]))(variables, batches)
    alone = jax.jit(functools.partial(Block().apply, mutable=["batch_stats"]))
    for i in range(2):
        chex.assert_trees_all_close(at(found, i), alone(at(variables, i), batches[i]), **CLOSE)


def test_vmap_with_an_axis_name_normalizes_the_whole_batch():
    # One model, its batch spread over a named axis: parameters and statistics are shared.
    layer = nn.vmap(
        BatchNorm,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
        axis_name="parts",
    )(use_running_average=False, axis_name="parts")
    variables = BatchNorm().init(KEY, X, use_running_average=True)
    y, _ = jax.jit(functools.partial(layer.apply, mutable=["batch_stats"]))(variables, X.reshape(4, 2, 4, 3))
    expected, _ = train(BatchNorm(), variables)
    chex.assert_trees_all_close(y.reshape(X.shape), expected, **CLOSE)


@pytest.mark.parametrize("lift", [nn.remat, pytest.param(nn.jit, marks=pytest.mark.slow)])
def test_remat_and_jit_change_neither_gradients_nor_statistics(lift):
    variables = Block().init(KEY, X)

    def loss(block):
        def of(params, x):
            (y, _), updates = block.apply(variables | {"params": params}, x, mutable=["batch_stats"])
            return (y**2 * X[::-1]).mean(), updates

        return jax.jit(jax.grad(of, (0, 1), has_aux=True))(variables["params"], X)

    chex.assert_trees_all_close(loss(lift(Block)()), loss(Block()), **CLOSE)


def test_gradients_are_close_to_flaxs():
    variables = variables_of(ours())

    def gradients(layer):
        def loss(params, x):
            y, _ = train(layer, variables | {"params": params}, x)
            return jnp.vdot(y, X[::-1])

        return jax.jit(jax.grad(loss, (0, 1)))(variables["params"], X)

    # The gradient of the scale sums 32 products of up to 10 * 10.
    chex.assert_trees_all_close(gradients(ours()), gradients(flaxs()), rtol=0, atol=32 * CLOSE["atol"])


# Inspection and sharding


def test_tabulate_shows_both_collections():
    table = Net().tabulate(KEY, X, console_kwargs={"width": 200, "force_terminal": False})
    assert "BatchNorm_0" in table and "batch_stats" in table and "scale: float32[3]" in table


def test_tabulate_shows_one_row_per_layer():
    # A second method of the module would be one more row of the table, and one more captured intermediate.
    options = {"compute_flops": False, "console_kwargs": {"width": 200, "force_terminal": False}}
    ours, flaxs = (layer(use_running_average=False).tabulate(KEY, X, **options) for layer in (BatchNorm, nn.BatchNorm))
    assert len(ours.splitlines()) == len(flaxs.splitlines())


def test_partitioning_metadata_of_parameters_is_kept():
    layer = BatchNorm(
        use_running_average=False,
        scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
    )
    variables = layer.init(KEY, X)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs == {"scale": PartitionSpec("model"), "bias": PartitionSpec("model")}
    y, _ = layer.apply(variables, X, mutable=["batch_stats"])
    assert y.shape == X.shape
