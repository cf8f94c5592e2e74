"""Masks keep an optimizer from the parameters of norms: from all updates, or from weight decay."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

from jaxbn import surgery
from tests.surgery.nets import X, linen_net, nnx_net


@pytest.mark.slow
@pytest.mark.parametrize("scale_and_bias", [True, False])
def test_masked_leaves_are_neither_updated_nor_decayed(scale_and_bias):
    net, variables = linen_net()
    done = surgery.freeze(net, variables, X, layers="first")
    mask = surgery.frozen_mask(done.variables, done.layers, scale_and_bias=scale_and_bias)
    optimizer = optax.transforms.selective_transform(optax.adamw(0.1, weight_decay=0.1), freeze_mask=mask)

    def loss(variables):
        return jnp.square(done.model.apply(variables, X, False) - 1).sum()

    updates, _ = optimizer.update(jax.grad(loss)(done.variables), optimizer.init(done.variables), done.variables)
    moved = jax.tree.map(lambda update: bool((update != 0).any()), updates)
    assert not any(jax.tree.leaves(moved["batch_stats"]))
    assert moved["params"].pop("first") == {"scale": not scale_and_bias, "bias": not scale_and_bias}
    assert all(jax.tree.leaves(moved["params"]["conv"])) and all(jax.tree.leaves(moved["params"]["second"]))


@pytest.mark.slow
def test_the_mask_fits_an_nnx_optimizer():
    net, _ = nnx_net()
    done = surgery.freeze(net, None, X, layers="again/first")
    kinds = nnx.Any(nnx.Param, nnx.BatchStat)
    mask = surgery.frozen_mask(nnx.state(done.model, kinds), done.layers)
    transformation = optax.transforms.selective_transform(optax.adamw(0.1, weight_decay=0.1), freeze_mask=mask)
    optimizer = nnx.Optimizer(done.model, transformation, wrt=kinds)
    before = jax.tree.map(np.array, nnx.state(done.model))

    def loss(model):
        return jnp.square(model(X) - 1).sum()

    done.model.eval()
    gradients = nnx.grad(loss, argnums=nnx.DiffState(0, kinds))(done.model)
    optimizer.update(done.model, gradients)
    after = nnx.state(done.model)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), before, after)
    assert all(jax.tree.leaves(same["again"]))
    assert not any(jax.tree.leaves(same["conv"]))
    norm = same["rest"]["layers"][1]
    assert [norm[name].get_value() for name in ("mean", "var", "scale", "bias")] == [True, True, False, False]


def test_a_mask_of_paths_that_the_tree_does_not_have_is_refused():
    with pytest.raises(ValueError, match="the tree has no leaves at 'b'; it has some at 'a'; pass paths such as"):
        surgery.frozen_mask({"params": {"a": {"scale": X}}}, ["b"])


def test_each_path_must_be_in_the_tree():
    tree = {"params": {"a": {"scale": X}}}
    with pytest.raises(ValueError, match="the tree has no leaves at 'typo'; it has some at 'a'"):
        surgery.frozen_mask(tree, ["a", "typo"])


def test_a_box_with_a_sharding_is_masked_as_its_array():
    params = {"norm": {"scale": nn.Partitioned(X, ("model",)), "bias": X}}
    for mask in (surgery.frozen_mask(params, "norm"), surgery.decay_mask(params)):
        assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert jax.tree.leaves(surgery.frozen_mask(params, "norm")) == [True, True]
    assert jax.tree.leaves(surgery.decay_mask(params)) == [False, False]


DENSE = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
NORMS = {
    "batch": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
    "rms": {"scale": jnp.ones(2)},
    "no_scale": {"bias": jnp.ones(2)},
}


def decayed_by_one_half(params, mask):
    """Returns which leaves weight decay of 0.5 halves; checks that the others stay."""
    optimizer = optax.chain(optax.add_decayed_weights(0.5, mask), optax.scale(-1.0))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert all(np.all((a == 1) | (a == 0.5)) for a in jax.tree.leaves(after))
    return jax.tree.map(lambda a: bool(np.all(a == 0.5)), after)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("kind", [dict, freeze])
def test_weight_decay_leaves_out_all_norms_by_themselves(kind, biases):
    params = kind({"block": {"dense": DENSE, **NORMS}, "head": DENSE})
    moved = decayed_by_one_half(params, lambda params: surgery.decay_mask(params, biases=biases))
    dense = {"kernel": True, "bias": biases}
    assert moved == kind({"block": {"dense": dense, **jax.tree.map(lambda _: False, NORMS)}, "head": dense})


def test_weight_decay_of_variables_leaves_out_their_statistics():
    params, batch_stats = {"dense": DENSE, "batch": NORMS["batch"]}, {"batch": {"mean": X, "var": X}}
    mask = surgery.decay_mask({"params": params, "batch_stats": batch_stats})
    assert mask["params"] == surgery.decay_mask(params) and not any(jax.tree.leaves(mask["batch_stats"]))
    # A scope that has statistics is a norm, even with a parameter that Flax's norms do not have.
    params = {"own": NORMS["batch"] | {"power": X}}
    assert all(jax.tree.leaves(surgery.decay_mask(params)))
    mask = surgery.decay_mask({"params": params, "batch_stats": {"own": {"mean": X, "var": X}}})
    assert mask["params"]["own"] == {"scale": False, "bias": False, "power": True}


def test_weight_decay_of_an_nnx_model_leaves_out_its_norms():
    net, _ = nnx_net()
    nnx.update(net, jax.tree.map(jnp.ones_like, nnx.state(net, nnx.Param)))
    optimizer = nnx.Optimizer(net, optax.add_decayed_weights(-0.5, surgery.decay_mask), wrt=nnx.Param)
    optimizer.update(net, jax.tree.map(jnp.zeros_like, nnx.state(net, nnx.Param)))
    norm, dense = net.rest.layers[1], net.rest.layers[0]
    assert all(np.all(variable[...] == 1) for variable in (net.first.scale, net.first.bias, norm.scale, norm.bias))
    assert all(np.all(variable[...] == 0.5) for variable in (net.conv.kernel, dense.kernel, dense.bias))
