"""Frozen batch norms stay as they are in training, and a mask keeps an optimizer from their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbn import surgery
from tests.surgery.nets import NETS, PATHS, X, assert_equal, linen_net, nnx_net, operated, output


@pytest.mark.parametrize("framework", NETS)
def test_frozen_statistics_stay_in_training_and_others_move(framework):
    net, variables = NETS[framework]()
    before = nnx.state(net, nnx.BatchStat) if variables is None else variables["batch_stats"]
    done = surgery.freeze(net, variables, X, layers=PATHS[framework][0])

    def stays(net, variables):
        _, after = output(net, variables, train=True)
        return [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]

    assert stays(net, variables) == [False, False, False, False]
    assert stays(done.model, done.variables) == [True, True, False, False]


@pytest.mark.parametrize("framework", NETS)
def test_a_frozen_model_computes_the_same_in_training_and_evaluation(framework):
    *_, frozen = operated(framework, "freeze")
    training, evaluation = (output(frozen.model, frozen.variables, train)[0] for train in (True, False))
    np.testing.assert_array_equal(training, evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("framework", NETS)
def test_freezing_is_undone(framework):
    net, variables = NETS[framework]()
    frozen = surgery.freeze(net, variables, X)
    free = surgery.replace(frozen.model, frozen.variables, X, frozen=False)
    ours = surgery.replace(net, variables, X)
    for train in (True, False):
        assert_equal(output(free.model, free.variables, train), output(ours.model, ours.variables, train))


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
