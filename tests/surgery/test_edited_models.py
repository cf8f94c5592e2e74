"""An edited linen model is a linen module: applied, initialized, pickled, part of another model, edited again."""

import pickle
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
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
    unpickled = pickle.loads(pickle.dumps(done.model))
    np.testing.assert_array_equal(output(unpickled, variables)[0], output(done.model, done.variables)[0])


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
