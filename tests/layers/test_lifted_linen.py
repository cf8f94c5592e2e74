"""Flax's lifted transformations of a linen model: outputs, statistics and gradients are those with Flax's own layer.

Each model is written for a class of layers, and both get the same call.  Flax's layer takes the variance from centered
values here, so that both are accurate to float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxbn.linen import BatchNorm
from tests.layers.linen_layers import KEY, X

FLAXS = functools.partial(nn.BatchNorm, use_fast_variance=False)
WEIGHTS = jnp.asarray(np.cos(np.arange(X.size)).reshape(X.shape), jnp.float32)
SIGN = float(np.sign(X.sum()))
# Rounding errors of a few layers in a row, in units of the largest value of an array.
CLOSE = 16 * np.finfo(np.float32).eps
STACKED = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}


def close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for value, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(value, other, rtol=0, atol=CLOSE * (1 + np.abs(other).max(initial=0)))


def random_variables(model, *args):
    shapes = jax.eval_shape(model.init, KEY, *args)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype), shapes)


def apply(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])


def differentiate(model, variables, x):
    """Returns the outputs, the new statistics, and the gradients with respect to parameters and inputs."""

    def loss(params, x):
        y, updates = apply(model, {**variables, "params": params}, x)
        return (y * WEIGHTS).mean(), (y, updates)

    return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)


def require_flaxs(model_of, run):
    """Compares what ``run(model, variables, x)`` returns for the model with our layers and with Flax's."""
    variables = random_variables(model_of(FLAXS), X)
    ours, flaxs = (jax.jit(functools.partial(run, model_of(norm)))(variables, X) for norm in (BatchNorm, FLAXS))
    close(ours, flaxs)


# Control flow.  The variables exist before the loop or the branches, which Flax requires.


class Branches(nn.Module):
    """Chooses one of two batch norms, or none, by a number that is computed."""

    norm: type
    branch: int

    def setup(self):
        self.norms = [self.norm(use_running_average=False, momentum=momentum) for momentum in (0.9, 0.8)]

    def __call__(self, x):
        if self.is_initializing():
            return [norm(x) for norm in self.norms][0]
        branches = [lambda module, x, i=i: module.norms[i](x) for i in range(2)]
        # XLA cannot know the number.
        index = self.branch + jnp.int32(SIGN * x.sum() < 0)
        return nn.switch(index, [*branches, lambda module, x: 2 * x], self, x)


class Optional(nn.Module):
    norm: type
    sign: float

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=False, momentum=0.9)
        x = norm(x)
        return nn.cond(self.sign * x[0, 0, 0] > 0, lambda module, x: norm(x**3), lambda module, x: 2 * x, self, x)


class Repeated(nn.Module):
    """One batch norm in a loop that carries the statistics."""

    norm: type

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=False, momentum=0.9)
        if self.is_initializing():
            return norm(x)

        def body(module, carry):
            i, x = carry
            return i + 1, x + jnp.tanh(norm(x))

        return nn.while_loop(lambda _, carry: carry[0] < 3, body, self, (0, x), carry_variables="batch_stats")[1]


class Cell(nn.Module):
    """A recurrent cell with a batch norm in it."""

    norm: type

    @nn.compact
    def __call__(self, carry, x):
        x = nn.Dense(3)(x) + carry
        carry = jnp.tanh(self.norm(use_running_average=False, momentum=0.9)(x))
        return carry, carry


class Recurrent(nn.Module):
    """A scan over time: the statistics are carried from step to step, or there is one set for each step."""

    norm: type
    carried: bool

    @nn.compact
    def __call__(self, x):
        cell, start = Cell(self.norm), jnp.zeros((len(x), 3))
        if self.is_initializing() and self.carried:
            return cell(start, x[:, 0])[1]
        statistics = {"variable_carry": "batch_stats"} if self.carried else {"variable_axes": {"batch_stats": 0}}
        options = {"variable_broadcast": "params", "split_rngs": {"params": False}, "in_axes": 1, "out_axes": 1}
        return nn.scan(Cell.__call__, **options, **statistics)(cell, start, x)[1]


@pytest.mark.slow
@pytest.mark.parametrize("branch", range(3))
def test_switch_updates_the_chosen_layer(branch):
    require_flaxs(lambda norm: Branches(norm, branch), differentiate)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond_updates_the_layer_of_the_branch_that_is_taken(sign):
    require_flaxs(lambda norm: Optional(norm, sign), differentiate)


def test_a_while_loop_carries_the_statistics():
    require_flaxs(Repeated, apply)


@pytest.mark.slow
@pytest.mark.parametrize("carried", [True, False], ids=["carried", "one for each step"])
def test_a_scan_over_time(carried):
    require_flaxs(lambda norm: Recurrent(norm, carried), differentiate)


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_scan_of_the_cells_class_carries_statistics_that_exist(pretrained):
    # As nn.RNN does it.  Without the statistics, Flax's layer fails too.
    carried = {"variable_broadcast": "params", "variable_carry": "batch_stats", "split_rngs": {"params": False}}
    start = jnp.zeros((len(X), 3))

    def run(norm):
        variables = random_variables(Cell(norm), start, X[:, 0])
        if not pretrained:
            variables = {"params": variables["params"]}
        scan = nn.scan(Cell, **carried, in_axes=1, out_axes=1)(norm)
        return jax.jit(functools.partial(scan.apply, mutable=["batch_stats"]))(variables, start, X)

    if pretrained:
        close(run(BatchNorm), run(FLAXS))
        return
    for norm in (BatchNorm, FLAXS):
        with pytest.raises(TypeError, match="same pytree structure"):
            run(norm)


# Derivatives inside of the model


class Derivative(nn.Module):
    """Applies ``transform`` to the sum of the cubes of a layer's outputs, with the layer itself or with a closure."""

    norm: type
    transform: str
    nested: bool

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=False, momentum=0.9)
        if self.is_initializing():
            return norm(x)

        def function(module, x):
            return module(x) if not self.nested else norm(x)

        def cubes(module, x):
            return (function(module, x) ** 3).sum()

        module = self if self.nested else norm
        match self.transform:
            case "grad":
                return nn.grad(cubes, module, x)
            case "value_and_grad":
                return nn.value_and_grad(cubes, module, x)
            case "vjp":
                y, pullback = nn.vjp(function, module, x)
                return y, pullback(jnp.sin(y))
            case "jvp":
                tangents = {"params": jax.tree.map(jnp.ones_like, module.variables["params"])}
                return nn.jvp(function, module, (x,), (jnp.sin(x),), tangents)


@pytest.mark.slow
@pytest.mark.parametrize("nested", [False, True], ids=["the layer", "a module around it"])
@pytest.mark.parametrize("transform", ["grad", "value_and_grad", "vjp", "jvp"])
def test_derivatives_inside_of_a_model(transform, nested):
    require_flaxs(lambda norm: Derivative(norm, transform, nested), apply)


class WithOwnGradient(nn.Module):
    """Takes the sign of the gradients of scale and bias."""

    norm: type
    use_running_average: bool

    @nn.compact
    def __call__(self, x):
        norm = self.norm(use_running_average=self.use_running_average)

        def forward(module, x):
            return nn.vjp(lambda module, x: module(x), module, x)

        def backward(pullback, gradient):
            params, *inputs = pullback(gradient)
            return jax.tree.map(jnp.sign, params), *inputs

        if self.is_initializing():
            return norm(x)
        return nn.custom_vjp(lambda module, x: module(x), forward, backward)(norm, x)


@pytest.mark.slow
@pytest.mark.parametrize("use_running_average", [False, True])
def test_custom_vjp(use_running_average):
    require_flaxs(lambda norm: WithOwnGradient(norm, use_running_average), differentiate)


# Classes of blocks


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        return x + self.norm(use_running_average=False, momentum=0.9)(nn.Dense(3)(x))


class Sharing(nn.Module):
    """Applies a norm in its own scope, so that the variables have no name of a submodule."""

    norm: type

    def setup(self):
        self.inner = self.norm(use_running_average=False)
        nn.share_scope(self, self.inner)

    def __call__(self, x):
        return self.inner(x)


def double(variables):
    return jax.tree.map(lambda leaf: 2 * leaf, variables)


def halve(variables):
    return jax.tree.map(lambda leaf: leaf / 2, variables)


def mapped(collection):
    options = {"trans_in_fn": double, "trans_out_fn": halve, "mutable": True}
    return lambda norm: nn.map_variables(Block, collection, **options)(norm)


CLASSES = {
    "remat_scan": lambda norm: nn.remat_scan(Block, lengths=(2, 2), variable_axes=STACKED["variable_axes"])(norm),
    "checkpoint with a policy": lambda norm: nn.checkpoint(
        Block, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    )(norm),
    "vmap": lambda norm: nn.vmap(Block, **STACKED)(norm),
    "map_variables of parameters": mapped("params"),
    "map_variables of statistics": mapped("batch_stats"),
    "share_scope": Sharing,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_lifted_class(name):
    require_flaxs(CLASSES[name], differentiate)
