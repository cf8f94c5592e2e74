"""Checkpoints of the nnx layer, Flax's transformations of it, and what inspection shows."""

import copy
import functools
import pickle

import chex
import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxbn
import jaxbn.linen
from jaxbn.nnx import BatchNorm
from tests.layers.nnx_layers import CLOSE, Net, X, call, layer_of, values

# Checkpoints and copies


def test_a_state_from_flaxs_layer_loads():
    written = layer_of(nnx.BatchNorm)
    loaded = BatchNorm(3, rngs=nnx.Rngs(0))
    nnx.update(loaded, nnx.state(written))
    chex.assert_trees_all_equal(values(loaded), values(written))


def test_a_state_of_flaxs_model_merges_into_ours():
    written = Net(nnx.BatchNorm, nnx.Rngs(1))
    written(X)
    graph, _ = nnx.split(Net(BatchNorm, nnx.Rngs(0)))
    loaded = nnx.merge(graph, nnx.state(written))
    chex.assert_trees_all_equal(values(loaded), values(written))


def test_a_loaded_model_evaluates_as_in_flax():
    written, loaded = Net(nnx.BatchNorm, nnx.Rngs(1)), Net(BatchNorm, nnx.Rngs(0))
    call(written, X)
    nnx.update(loaded, nnx.state(written))
    written.eval()
    loaded.eval()
    chex.assert_trees_all_close(call(loaded, X), call(written, X), **CLOSE)


def test_a_deep_copy_has_its_own_statistics():
    layer = layer_of()
    before = values(layer)
    copy.deepcopy(layer)(X)
    chex.assert_trees_all_equal(values(layer), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, nnx.clone])
def test_a_copy_evaluates_alike(copied):
    layer = layer_of(use_running_average=True)
    chex.assert_trees_all_equal(call(copied(layer), X), call(layer, X))


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_pickling_keeps_the_layer(pickler):
    layer = layer_of(method=functools.partial(jaxbn.ghost_normalize, group_size=4), frozen=True)
    loaded = pickler.loads(pickler.dumps(layer))
    chex.assert_trees_all_equal(values(loaded), values(layer))
    chex.assert_trees_all_equal(call(loaded, X), call(layer, X))


# Transformations


def test_a_jitted_step_updates_the_layer_outside():
    layer, expected = layer_of(), layer_of()
    call(layer, X)
    expected(X)
    chex.assert_trees_all_close(values(layer), values(expected), **CLOSE)


def test_value_and_grad_updates_the_statistics_too():
    layer, expected = layer_of(), layer_of()

    @nnx.jit
    def step(layer, x):
        return nnx.value_and_grad(lambda layer: (layer(x) ** 2).mean())(layer)

    loss, gradients = step(layer, X)
    y = call(expected, X)
    np.testing.assert_allclose(loss, (y**2).mean(), **CLOSE)
    assert set(gradients) == {"scale", "bias"}
    chex.assert_trees_all_close(values(layer), values(expected), **CLOSE)


@nnx.split_rngs(splits=2)
@nnx.vmap(in_axes=(0,))
def stacked(rngs):
    return BatchNorm(3, momentum=0.9, scale_init=nnx.initializers.uniform(2.0), rngs=rngs)


def unstack(layers, i):
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[i], state))


def test_scan_over_layers_gives_the_layers_in_turn():
    layers = stacked(nnx.Rngs(0))
    alone = [unstack(layers, i) for i in range(2)]

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def apply(layer, x):
        return x + layer(x)

    y, expected = apply(layers, X), X
    for layer in alone:
        expected = expected + call(layer, expected)
    chex.assert_trees_all_close(y, expected, **CLOSE)
    chex.assert_trees_all_close([values(unstack(layers, i)) for i in range(2)], [*map(values, alone)], **CLOSE)


def test_vmap_over_models_gives_each_model():
    layers, batches = stacked(nnx.Rngs(0)), jnp.stack([X, 2 * X - 1])
    alone = [unstack(layers, i) for i in range(2)]
    y = nnx.jit(nnx.vmap(lambda layer, x: layer(x)))(layers, batches)
    expected = jnp.stack([call(layer, x) for layer, x in zip(alone, batches, strict=True)])
    chex.assert_trees_all_close(y, expected, **CLOSE)
    chex.assert_trees_all_close([values(unstack(layers, i)) for i in range(2)], [*map(values, alone)], **CLOSE)


def test_remat_changes_neither_gradients_nor_statistics():
    def gradients(layer, wrap):
        @nnx.jit
        def of(layer):
            return nnx.grad(lambda layer: (wrap(lambda layer, x: layer(x))(layer, X) ** 2 * X[::-1]).sum())(layer)

        return nnx.to_pure_dict(nnx.state(of(layer)))

    rematted, plain = layer_of(), layer_of()
    found, expected = gradients(rematted, nnx.remat), gradients(plain, lambda f: f)
    chex.assert_trees_all_close(found, expected, rtol=0, atol=32 * CLOSE["atol"])
    chex.assert_trees_all_close(values(rematted), values(plain), **CLOSE)


def test_a_linen_layer_behind_the_bridge_gives_the_nnx_layers_bits():
    layer = BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))
    bridged = bridge.ToNNX(jaxbn.linen.BatchNorm(momentum=0.9), rngs=nnx.Rngs(0))
    bridged.lazy_init(X, use_running_average=False)
    y = bridged(X, use_running_average=False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(y, layer(X))
    chex.assert_trees_all_equal(bridged.mean[...], layer.mean[...])


# Inspection and sharding


def test_tabulate_shows_the_layer_and_both_kinds_of_variable():
    table = nnx.tabulate(Net(BatchNorm, nnx.Rngs(0)), X, console_kwargs={"width": 200, "force_terminal": False})
    assert "BatchNorm" in table and "BatchStat" in table and "Param" in table


@pytest.mark.parametrize("show", [repr, str])
def test_the_text_of_a_layer_shows_its_options(show):
    text = show(BatchNorm(3, frozen=True, rngs=nnx.Rngs(0)))
    assert text.startswith("BatchNorm(") and "frozen=True" in text and "momentum=0.99" in text


def test_metadata_of_parameters_is_kept():
    layer = BatchNorm(3, scale_metadata={"of": "scale"}, bias_metadata={"of": "bias"}, rngs=nnx.Rngs(0))
    assert (layer.scale.of, layer.bias.of) == ("scale", "bias")


def test_partitioning_of_initializers_is_flaxs():
    options = {
        "scale_init": nnx.with_partitioning(nnx.initializers.ones_init(), ("model",)),
        "bias_init": nnx.with_partitioning(nnx.initializers.zeros_init(), ("model",)),
    }

    def specs(cls):
        with jax.set_mesh(jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))):
            return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(cls(3, **options, rngs=nnx.Rngs(0)))))

    found = specs(BatchNorm)
    assert found == specs(nnx.BatchNorm)
    assert found["scale"] == jax.sharding.PartitionSpec("model")


def test_a_subclass_may_have_statistics_of_its_own():
    class Counting(BatchNorm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls = nnx.BatchStat(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            return super().__call__(x)

    layer = Counting(X.shape[-1], rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(layer(X), BatchNorm(X.shape[-1], rngs=nnx.Rngs(0))(X))
    assert layer.calls[...] == 1
