"""Gradients over devices: those of one device with the whole batch, or an error that names the right function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn.nnx
from jaxbn.parallel import psum_of_value_and_grad, value_and_grad_of_psum

DEVICES = 8
RNG = np.random.default_rng(0)
X, TARGET = RNG.normal(1, 2, (16, 3)).astype(np.float32), RNG.normal(size=16).astype(np.float32)
SPLIT = X.reshape(DEVICES, -1, 3), TARGET.reshape(DEVICES, -1)
W = RNG.normal(size=3).astype(np.float32)
MESH = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
SPECS = {"mesh": MESH, "in_specs": (P(), P("d"), P("d")), "out_specs": P()}
VMAP = {"axis_name": "d", "in_axes": (None, 0, 0), "out_axes": None}


def share(w, x, target):
    return ((x @ w - target) ** 2).sum() / lax.psum(len(x), "d")


def both(w, x, target):
    """The share with the number of examples, which is the same everywhere."""
    return share(w, x, target), lax.psum(len(x), "d")


# float64: d/dw mean((x w - t)^2) = 2/n x^T (x w - t)
RESIDUAL = X.astype(np.float64) @ W - TARGET
LOSS, GRADIENT = (RESIDUAL**2).mean(), 2 / len(X) * X.T @ RESIDUAL
CLOSE = {"rtol": 64 * np.finfo(np.float32).eps, "atol": 64 * np.finfo(np.float32).eps}


@pytest.mark.parametrize("api", ["shard_map", "shard_map, unchecked", "vmap"])
def test_loss_and_gradient_are_those_of_the_whole_batch_in_float64(api):
    recipe = value_and_grad_of_psum if api == "shard_map" else psum_of_value_and_grad
    step, auxiliary = recipe(share, "d"), recipe(both, "d", argnums=(0,), has_aux=True)

    def part(*arguments):
        return step(*arguments), auxiliary(*arguments)

    if api == "vmap":
        (loss, gradient), ((again, count), (first,)) = jax.vmap(part, **VMAP)(W, *SPLIT)
    else:
        mapped = jax.shard_map(part, **SPECS, check_vma=api == "shard_map")
        (loss, gradient), ((again, count), (first,)) = jax.jit(mapped)(W, X, TARGET)
    np.testing.assert_allclose(loss, LOSS, **CLOSE)
    np.testing.assert_allclose(gradient, GRADIENT, **CLOSE)
    assert (again, count) == (loss, len(X))
    np.testing.assert_array_equal(first, gradient)


def test_the_wrong_function_is_refused_and_the_right_one_named():
    with pytest.raises(ValueError, match=r"psum_of_value_and_grad needs .* got 'd', .* Use value_and_grad_of_psum"):
        jax.shard_map(psum_of_value_and_grad(share, "d"), **SPECS)(W, X, TARGET)
    wrong = value_and_grad_of_psum(share, "d")
    for mapped, batch in (
        (jax.shard_map(wrong, **SPECS, check_vma=False), (X, TARGET)),
        (jax.vmap(wrong, **VMAP), SPLIT),
    ):
        with pytest.raises(ValueError, match=r"value_and_grad_of_psum needs .* got 'd', .* Use psum_of_value_and_grad"):
            mapped(W, *batch)
    with pytest.raises(ValueError, match="axis_name must be an axis of an enclosing"):
        value_and_grad_of_psum(share, "d")(W, X, TARGET)


class Net(nnx.Module):
    """Linear, batch norm, and a sum over the features."""

    def __init__(self, axis_name=None):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = jaxbn.nnx.BatchNorm(3, axis_name=axis_name, momentum=0.9, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x))).sum(-1)


def nnx_share(model, x, target):
    return ((model(x) - target) ** 2).sum() / len(X)


def trained(value_and_grad, state, x, target, graph):
    """A step of SGD on this device: the loss, and the state of model and optimizer after it."""
    model, optimizer = nnx.merge(graph, state)
    loss, grads = value_and_grad(model, x, target)
    optimizer.update(model, grads)
    return loss, nnx.state((model, optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_step_of_an_nnx_model_and_its_optimizer_is_that_of_one_device(check_vma):
    def step_of(value_and_grad, axis_name=None):
        model = Net(axis_name)
        graph, state = nnx.split((model, nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)))
        return functools.partial(trained, value_and_grad, graph=graph), state

    alone, state = step_of(nnx.value_and_grad(nnx_share))
    expected_loss, expected = jax.jit(alone)(state, X, TARGET)
    recipe = value_and_grad_of_psum if check_vma else psum_of_value_and_grad
    part, state = step_of(recipe(nnx_share, "d", transform=nnx.value_and_grad), "d")
    loss, got = jax.jit(jax.shard_map(part, **SPECS, check_vma=check_vma))(state, X, TARGET)
    np.testing.assert_allclose(loss, expected_loss, **CLOSE)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    moved = [bool(jnp.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (got, state)), strict=True)]
    assert sum(moved) >= 7  # weights, scale, bias, statistics, momenta
