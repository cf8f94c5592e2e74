"""An edited linen model is a linen module: applied, initialized, pickled, part of another model, edited again."""

import copy
import functools
import pickle
import threading

import cloudpickle
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest

from jaxbn import surgery
from tests.surgery.nets import (
    OPERATIONS,
    PATHS,
    LinenNet,
    X,
    assert_equal,
    linen_net,
    operated,
    output,
    refused,
    variables_of,
)


def test_an_edited_linen_model_has_the_variables_and_methods_of_the_model():
    net, variables, *_, done = operated("linen", "replace")
    ours, original = jax.jit(lambda key: (done.model.init(key, X), net.init(key, X)))(jax.random.key(0))
    assert_equal(ours, original)
    y = jnp.ones((2, 4, 4, 6))
    np.testing.assert_array_equal(done.model.apply(variables, y, method="head"), y.mean((1, 2)))


def test_an_edited_linen_model_is_applied_as_the_model():
    net, variables = linen_net()
    done = surgery.replace(net, variables, X, call=lambda module, x: module.second(module.dense(module.conv(x)), True))
    assert done.layers == ("second",)
    for method in (LinenNet.head, lambda module, x: module.head(x)):
        np.testing.assert_array_equal(done.model.apply(variables, X, method=method), X.mean((1, 2)))


def test_an_edited_linen_model_is_one_of_the_class_of_the_model():
    net, _ = linen_net()
    *_, done = operated("linen", "to_affine")
    assert isinstance(done.model, LinenNet) and repr(done.model) == repr(net)
    expected = done.model.apply(done.variables, X, True)
    for model in (done.model.copy(), done.model.clone(), done.model.copy(name="other"), copy.deepcopy(done.model)):
        assert isinstance(model, LinenNet)
        np.testing.assert_array_equal(model.apply(done.variables, X, True), expected)
    bound = done.model.bind(done.variables)
    np.testing.assert_array_equal(bound(X, True), expected)
    np.testing.assert_array_equal(bound.head(X), X.mean((1, 2)))
    np.testing.assert_array_equal(LinenNet.__call__(bound, X, True), expected)


@pytest.mark.parametrize("operation", ["freeze", "to_affine", "fold"])
@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_an_edited_linen_model_can_be_pickled(pickler, operation):
    *_, done = operated("linen", operation)
    model, variables = pickler.loads(pickler.dumps((done.model, done.variables)))
    again = pickler.loads(pickler.dumps(model))
    for unpickled in (model, again):
        np.testing.assert_array_equal(unpickled.apply(variables, X, False), done.model.apply(done.variables, X, False))


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["freeze", "to_affine", "fold"])
def test_variables_of_an_edited_model_are_saved_with_orbax_and_loaded_into_a_model_made_again(operation, tmp_path):
    net, variables, *_, done = operated("linen", operation)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", done.variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved", jax.tree.map(jnp.zeros_like, done.variables))
    assert_equal(restored, done.variables)
    fresh = jax.jit(net.init)(jax.random.key(0), X)
    again = OPERATIONS[operation](net, fresh, X, layers=done.layers, check=False)
    assert jax.tree.structure(again.variables) == jax.tree.structure(restored)
    np.testing.assert_array_equal(output(again.model, restored)[0], output(done.model, done.variables)[0])


def test_an_edited_model_of_a_local_class_can_be_pickled_by_value():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))

    done = surgery.fold(Net(), variables_of(Net(), X), X, check=False)
    unpickled = cloudpickle.loads(cloudpickle.dumps(done.model))
    np.testing.assert_array_equal(unpickled.apply(done.variables, X), done.model.apply(done.variables, X))


def test_intermediates_of_a_new_layer_are_captured_once():
    net, variables = linen_net()
    *_, done = operated("linen", "freeze")
    captured = [
        model.apply(variables, X, False, capture_intermediates=True, mutable=["intermediates"])[1]
        for model in (net, done.model)
    ]
    shapes, expected = (jax.tree.map(jnp.shape, each) for each in captured[::-1])
    assert shapes == expected and len(shapes["intermediates"]["first"]["__call__"]) == 1


class InABlock(nn.Module):
    """A model as part of a block that is transformed."""

    net: nn.Module

    @nn.compact
    def __call__(self, x, _=None):
        return x + self.net(x, False).mean(), None


LIFTED = {
    "remat": nn.remat(InABlock),
    "jit": nn.jit(InABlock),
    "scan": nn.scan(InABlock, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2),
}


@pytest.mark.parametrize("lifted", LIFTED)
def test_an_edited_linen_model_is_a_part_of_a_block_that_is_transformed(lifted):
    net, variables = linen_net()
    *_, done = operated("linen", "fold")
    both = []
    for model, arrays in ((net, variables), (done.model, done.variables)):
        if lifted == "scan":
            arrays = jax.tree.map(lambda array: jnp.stack([array, array]), arrays)
        nested = {collection: {"net": tree} for collection, tree in arrays.items()}
        both.append(jax.jit(functools.partial(LIFTED[lifted](model).apply, nested))(X, None)[0])
    np.testing.assert_allclose(*both, rtol=0, atol=1e-5 * abs(both[0]).max())


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_the_class_of_an_edited_linen_model_can_be_transformed(lift):
    *_, done = operated("linen", "fold")
    lifted = lift(type(done.model), static_argnums=(2,))()
    np.testing.assert_allclose(
        lifted.apply(done.variables, X, False), done.model.apply(done.variables, X, False), rtol=0, atol=1e-5
    )


class Twice(nn.Module):
    """Calls a net twice, with the same variables."""

    net: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return self.net(x, train) - self.net(2 * x, train)


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(name, marks=() if name == "freeze" else pytest.mark.slow)
        for name in OPERATIONS
        if name not in ("fold", "group norm")
    ],
)
def test_an_edited_linen_model_is_a_part_of_another_that_is_operated_on(operation):
    net, variables, *_, frozen = operated("linen", "freeze")
    nested = {collection: {"net": tree} for collection, tree in frozen.variables.items()}
    done = OPERATIONS[operation](Twice(frozen.model), nested, X)
    assert done.layers == ("net/first", "net/second")
    original = {collection: {"net": tree} for collection, tree in variables.items()}
    expected, _ = output(Twice(net), original)
    for model, arrays in ((Twice(frozen.model), nested), (done.model, done.variables)):
        y, _ = output(model, arrays)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_the_outer_of_two_edits_of_a_layer_comes_last():
    *_, frozen = operated("linen", "freeze")
    nested = {collection: {"net": tree} for collection, tree in frozen.variables.items()}
    thawed = surgery.replace(Twice(frozen.model), nested, X, frozen=False)
    _, after = output(thawed.model, thawed.variables, train=True)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), after, nested["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_another_thread_sees_nothing_of_an_edited_model_that_is_called():
    net, variables, *_, frozen = operated("linen", "freeze")
    inside, finish = threading.Event(), threading.Event()

    def wait(module, x):
        del module
        inside.set()
        finish.wait(60)
        return x

    def serve():
        frozen.model.apply(frozen.variables, X, method=wait)

    thread = threading.Thread(target=serve)
    thread.start()
    inside.wait(60)
    try:
        assert surgery.replace(net, variables, X).layers == PATHS["linen"]
    finally:
        finish.set()
        thread.join()


def test_a_block_that_nn_jit_has_compiled_is_refused():
    jitted = nn.jit(LinenNet)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jitted()(x)

    variables = variables_of(Net(), X)
    message = r"JitLinenNet_0\S* is called inside of nn.jit, which keeps what it traced before, .*; remove nn.jit from"
    refused(message, surgery.freeze, Net(), variables)
