"""The layers of JAX that are compared: this library's, Flax's, Haiku's and Equinox's, as their users would call them.

Conventions: state goes in and comes out. Parameters and statistics are float32 whatever the inputs are; outputs have
the inputs' dtype. All layers have scale and bias, and 0.9 as the weight of the old running statistics.

`experiments.scoreboard.peers` adapts the same libraries to the laws, which pass masks and axis names and read
statistics; here nothing stands between a timing and a layer.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxbn.linen

PASSES = ("forward", "forward+backward", "eval")
ACTIVATIONS = {"none": lambda y: y, "relu": jax.nn.relu}
MOMENTUM = 0.9


class Arm(NamedTuple):
    """A batch norm layer.

    Attributes:
      init: inputs -> parameters, state.
      train: parameters, state, inputs -> outputs, state.
      evaluate: parameters, state, inputs -> outputs.
      features_axis: of the inputs.
    """

    init: Callable
    train: Callable
    evaluate: Callable
    features_axis: int = -1


def linen(layer: Callable[..., nn.Module]) -> Arm:
    """Returns the arm of a linen layer, which is given the dtype of its outputs."""

    def apply(params, batch_stats, x, **options):
        module = layer(momentum=MOMENTUM, dtype=x.dtype)
        return module.apply({"params": params, "batch_stats": batch_stats}, x, **options)

    def init(x):
        variables = layer(momentum=MOMENTUM).init(jax.random.key(0), x, use_running_average=True)
        return variables["params"], variables["batch_stats"]

    def train(params, batch_stats, x):
        y, updated = apply(params, batch_stats, x, use_running_average=False, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return Arm(init, train, functools.partial(apply, use_running_average=True))


def haiku() -> Arm:
    """Returns the arm of Haiku's layer, computed in float32 whatever the inputs are, as Haiku advises.

    Raises:
      ImportError: Haiku is not installed.
    """
    import haiku as hk
    import jmp

    net = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, MOMENTUM)(x, train))

    def run(params, state, x, train):
        policy = jmp.Policy(param_dtype=jnp.float32, compute_dtype=jnp.float32, output_dtype=x.dtype)
        with hk.mixed_precision.push_policy(hk.BatchNorm, policy):
            return net.apply(params, state, None, x, train)

    return Arm(
        lambda x: net.init(None, x, True),
        functools.partial(run, train=True),
        lambda params, state, x: run(params, state, x, train=False)[0],
    )


def equinox() -> Arm:
    """Returns the arm of Equinox's layer, which takes one example, features first, under vmap.

    Raises:
      ImportError: Equinox is not installed.
    """
    import equinox as eqx

    def made(features):
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            features, axis_name="batch", mode="batch", momentum=MOMENTUM
        )
        return *eqx.partition(layer, eqx.is_array), state

    def init(x):
        params, _, state = made(x.shape[1])
        return params, state

    def run(params, state, x, inference):
        layer = eqx.combine(params, made(x.shape[1])[1])
        layer = functools.partial(layer, inference=inference)
        y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
        return y.astype(x.dtype), state

    return Arm(
        init,
        functools.partial(run, inference=False),
        lambda params, state, x: run(params, state, x, inference=True)[0],
        features_axis=1,
    )


ARMS = {
    "jaxbn": lambda: linen(jaxbn.linen.BatchNorm),
    "Flax": lambda: linen(nn.BatchNorm),
    "Flax, stable": lambda: linen(functools.partial(nn.BatchNorm, use_fast_variance=False)),
    "Haiku": haiku,
    "Equinox": equinox,
}


def inputs(shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs with mean 0.5 and standard deviation 2, and cotangents of the outputs."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return (0.5 + 2 * x).astype(jnp.dtype(dtype)), dy.astype(jnp.dtype(dtype))


def compiled(arm: Arm, name: str, activation: str, x: np.ndarray, dy: np.ndarray) -> Callable[[], list[jax.Array]]:
    """Returns a call of a compiled pass, which gives all that the pass gives.

    Args:
      arm: the layer.
      name: one of `PASSES`.
      activation: one of `ACTIVATIONS`.
      x: inputs, features last.
      dy: cotangents of the outputs.

    Returns:
      The call. It gives the outputs, in training also the new state, and in the backward pass also the gradients with
      respect to parameters and inputs.
    """
    x, dy = (jnp.array(np.moveaxis(array, -1, arm.features_axis)) for array in (x, dy))
    params, state = arm.init(x)
    arguments, structure = jax.tree.flatten((params, state, x, dy))
    run = functools.partial(run_pass, arm, name, ACTIVATIONS[activation])

    # Flat arguments, since taking trees apart in each call would take some layers longer than others.
    def flat(*arguments):
        return jax.tree.leaves(run(*jax.tree.unflatten(structure, arguments)))

    return functools.partial(jax.jit(flat, keep_unused=True).lower(*arguments).compile(), *arguments)


def run_pass(
    arm: Arm,
    name: str,
    activate: Callable,
    params: dict,
    state: dict,
    x: jax.Array,
    dy: jax.Array | None,
) -> Any:
    """Returns what a pass gives, as a function to be compiled.

    Args:
      arm: the layer, or a few layers that are called like one.
      name: one of `PASSES`.
      activate: follows the layer.
      params: the parameters.
      state: the running statistics.
      x: inputs.
      dy: cotangents of the outputs; of use in the backward pass.
    """
    if name == "eval":
        return activate(arm.evaluate(params, state, x))

    def forward(params, x):
        y, new_state = arm.train(params, state, x)
        return activate(y), new_state

    if name == "forward":
        return forward(params, x)
    y, vjp, new_state = jax.vjp(forward, params, x, has_aux=True)
    # As in a net, where dy is known only after y: without the barrier both passes could read x together.
    y, dy = lax.optimization_barrier((y, dy))
    return y, new_state, vjp(dy)
