"""The JAX layers under comparison: jaxbn, Flax, Haiku and Equinox, called the way their users call them.

Conventions: functions take a state and return a new one. Parameters and statistics are float32 for inputs of any dtype;
outputs have the dtype of the inputs. All layers have scale and bias, and 0.9 as the weight of the old running
statistics.

`experiments.scoreboard.peers` adapts the same libraries for the laws, with masks, axis names and access to the
statistics. The adapters here add nothing that would be timed with a layer.
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
      features_axis: axis of the features in the inputs.
    """

    init: Callable
    train: Callable
    evaluate: Callable
    features_axis: int = -1


def linen(layer: Callable[..., nn.Module]) -> Arm:
    """Adapts a linen layer and sets the dtype of its outputs."""

    def apply(params: dict, batch_stats: dict, x: jax.Array, **options: Any) -> Any:
        module = layer(momentum=MOMENTUM, dtype=x.dtype)
        return module.apply({"params": params, "batch_stats": batch_stats}, x, **options)

    def init(x: jax.Array) -> tuple[dict, dict]:
        variables = layer(momentum=MOMENTUM).init(jax.random.key(0), x, use_running_average=True)
        return variables["params"], variables["batch_stats"]

    def train(params: dict, batch_stats: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        y, updated = apply(params, batch_stats, x, use_running_average=False, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return Arm(init, train, functools.partial(apply, use_running_average=True))


def haiku() -> Arm:
    """Adapts Haiku's layer, which computes in float32 for inputs of any dtype, as Haiku recommends.

    Raises:
      ImportError: Haiku is not installed.
    """
    import haiku as hk
    import jmp

    net = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, MOMENTUM)(x, train))

    def run(params: dict, state: dict, x: jax.Array, train: bool) -> tuple[jax.Array, dict]:
        policy = jmp.Policy(param_dtype=jnp.float32, compute_dtype=jnp.float32, output_dtype=x.dtype)
        with hk.mixed_precision.push_policy(hk.BatchNorm, policy):
            return net.apply(params, state, None, x, train)

    return Arm(
        lambda x: net.init(None, x, True),
        functools.partial(run, train=True),
        lambda params, state, x: run(params, state, x, train=False)[0],
    )


def equinox() -> Arm:
    """Adapts Equinox's layer, which takes a single example, features first, under vmap.

    Raises:
      ImportError: Equinox is not installed.
    """
    import equinox as eqx

    def make(features: int) -> tuple[Any, Any, Any]:
        """Returns the arrays of a new layer, the rest of it, and its state."""
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            features, axis_name="batch", mode="batch", momentum=MOMENTUM
        )
        return *eqx.partition(layer, eqx.is_array), state

    def init(x: jax.Array) -> tuple[Any, Any]:
        params, _, state = make(x.shape[1])
        return params, state

    def run(params: Any, state: Any, x: jax.Array, inference: bool) -> tuple[jax.Array, Any]:
        layer = eqx.combine(params, make(x.shape[1])[1])
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
    """Draws inputs with mean 0.5 and standard deviation 2, and cotangents of the outputs."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return (0.5 + 2 * x).astype(jnp.dtype(dtype)), dy.astype(jnp.dtype(dtype))


def compiled(arm: Arm, name: str, activation: str, x: np.ndarray, dy: np.ndarray) -> Callable[[], list[jax.Array]]:
    """Compiles a pass and returns a call of it.

    Args:
      arm: the layer.
      name: one of `PASSES`.
      activation: key of `ACTIVATIONS`.
      x: inputs, features last.
      dy: cotangents of the outputs.

    Returns:
      The call. It returns the outputs; in training also the new state; with a backward pass also the gradients with
      respect to parameters and inputs.
    """
    x, dy = (jnp.array(np.moveaxis(array, -1, arm.features_axis)) for array in (x, dy))
    params, state = arm.init(x)
    arguments, structure = jax.tree.flatten((params, state, x, dy))
    run = functools.partial(run_pass, arm, name, ACTIVATIONS[activation])

    # The arguments are flat, since flattening trees in each call would take longer for some layers than for others.
    def flat(*arguments: jax.Array) -> list[jax.Array]:
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
    """Computes a pass; to be compiled.

    Args:
      arm: a layer, or several with the interface of one.
      name: one of `PASSES`.
      activate: activation after the layer.
      params: the parameters.
      state: the running statistics.
      x: inputs.
      dy: cotangents of the outputs; used only by the backward pass.
    """
    if name == "eval":
        return activate(arm.evaluate(params, state, x))

    def forward(params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        y, new_state = arm.train(params, state, x)
        return activate(y), new_state

    if name == "forward":
        return forward(params, x)
    y, vjp, new_state = jax.vjp(forward, params, x, has_aux=True)
    # In a network, dy is known only after y. Without this barrier XLA could fuse both passes and read x once for both.
    y, dy = lax.optimization_barrier((y, dy))
    return y, new_state, vjp(dy)
