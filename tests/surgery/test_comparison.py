"""The outputs before and after an operation are compared as the model computes them, at the price of one program."""

import functools
import math
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import jaxbn.nnx
from jaxbn import surgery
from tests.surgery.nets import NETS, OPERATIONS, X, linen_net, variables_of


@pytest.fixture(scope="module")
def compilations():
    """Returns a function that counts the programs compiled by another one, apart from those of single operations."""
    names = []

    def listen(event, duration, fun_name="", **kwargs):
        del duration, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    def count(function):
        before = len(names)
        result = function()
        return result, names[before:]

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("framework", NETS)
def test_the_check_compiles_one_program_and_can_be_left_out(framework, compilations):
    net, variables = NETS[framework]()
    for check, number in ((True, 1), (False, 0)):
        done, names = compilations(lambda check=check: surgery.freeze(net, variables, X, check=check))
        assert len(names) == number, names
        assert len(done.layers) == 2 and (done.difference == 0) == check
        assert math.isnan(done.scale) != check


class TwoOutputs(nn.Module):
    """The second output is NaN for the sample; so is the third, of another dtype."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        return x, jnp.log(x - 1e6), x.astype(jnp.bfloat16)


@pytest.mark.parametrize("order", [lambda y: y, lambda y: y[::-1]])
def test_a_nan_in_any_output_is_a_nan_in_the_difference(order):
    variables = variables_of(TwoOutputs(), X)
    done = surgery.replace(TwoOutputs(), variables, X, call=lambda module, x: order(module(x)))
    assert math.isnan(done.difference) and math.isnan(done.scale)
    done = surgery.replace(TwoOutputs(), variables, X, call=lambda module, x: module(x)[::2])
    assert done.difference <= 1e-5 * done.scale


class Asks(nnx.Module):
    """Tells Flax's layer to evaluate, and this library's to train."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x, use_running_average=not isinstance(self.norm, jaxbn.nnx.BatchNorm))


def test_a_layer_that_trains_only_after_the_exchange_shows_in_the_difference():
    done = surgery.replace(Asks(), None, X)
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    expected = X / np.sqrt(1 + 1e-5) - (X - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(done.difference, abs(expected).max(), rtol=1e-4)


def test_a_layer_that_trains_before_the_exchange_evaluates_in_both():
    net = nn.BatchNorm(use_running_average=False)
    variables = variables_of(net, X)
    done = surgery.replace(net, variables, X)
    expected = nn.BatchNorm(use_running_average=True).apply(variables, X)
    assert done.difference <= 1e-5 * done.scale
    np.testing.assert_allclose(done.scale, abs(expected).max(), rtol=1e-5)


KINDS = {
    "FrozenDict": freeze,
    "FrozenDicts in a dict": lambda variables: {name: freeze(tree) for name, tree in variables.items()},
    "OrderedDict": lambda variables: OrderedDict(reversed(variables.items())),
}


@pytest.mark.parametrize("operation", ["replace", "to_affine", "fold"])
@pytest.mark.parametrize("kind", KINDS)
def test_variables_come_back_in_the_containers_that_they_came_in(kind, operation):
    net, variables = linen_net()
    run = functools.partial(OPERATIONS[operation], check=False)
    as_dicts = run(net, variables, X).variables
    done = run(net, KINDS[kind](variables), X)
    assert jax.tree.structure(done.variables) == jax.tree.structure(KINDS[kind](as_dicts))
    if operation == "replace":
        assert jax.tree.structure(done.variables) == jax.tree.structure(KINDS[kind](variables))
