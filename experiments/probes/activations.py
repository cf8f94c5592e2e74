"""Activations of a network in training: their size, and how they depend on the scale of the weights.

Conventions: the layers of a network are its convolutions and dense layers, in the order in which they are called, which
stands for depth. Every forward pass is one of training: batch norm takes the statistics of the batch, and noise is
added, but no variable changes. Images are float32 [n, height, width, channels] in [0, 1], and labels int32 [n]. The key
is that of the noise; the same key gives the same noise.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.data.datasets import Dataset
from jaxbn.linen import BatchNorm

LAYERS = (nn.Conv, nn.Dense)
IMAGES = 500  # per measurement: enough for the statistics, and a second's work


def first_images(dataset: Dataset, n: int = IMAGES) -> tuple[jax.Array, jax.Array]:
    """Returns the first n training images (or all, if there are fewer) and their labels, without augmentation."""
    images = jnp.asarray(dataset.train_images[:n], jnp.float32) / 255
    return images, jnp.asarray(dataset.train_labels[:n])


class Order(NamedTuple):
    """The order in which a network calls its modules.

    Attributes:
      layers: path of each layer.
      depth: path of each module -> number of layers called by then, including itself. A norm is thus as deep as the
        layer that it follows.
    """

    layers: list[tuple[str, ...]]
    depth: dict[tuple[str, ...], int]


@functools.lru_cache
def order_of(net: nn.Module, image_shape: tuple[int, ...]) -> Order:
    """Finds the order of calls for images of shape [height, width, channels], by tracing; nothing is computed."""
    order = Order([], {})

    def record(call, arguments, options, context):
        if context.method_name == "__call__":
            if isinstance(context.module, LAYERS):
                order.layers.append(context.module.path)
            order.depth[context.module.path] = len(order.layers)
        return call(*arguments, **options)

    with nn.intercept_methods(record):
        images = jnp.zeros((1, *image_shape))
        jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), images)
    return order


class Activations(NamedTuple):
    """The activations of each layer in a forward pass.

    Attributes:
      inputs: inputs of the layer.
      outputs: outputs of the layer, before norm and activation.
      normalized: outputs of the batch norm that follows the layer; None if none does.
    """

    inputs: list[jax.Array]
    outputs: list[jax.Array]
    normalized: list[jax.Array | None]


def forward(
    net: nn.Module, variables: dict, images: jax.Array, key: jax.Array, added: Sequence[jax.Array] | None = None
) -> tuple[jax.Array, Activations]:
    """Runs a forward pass; returns the logits and the activations of each layer.

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      images: see the module.
      key: see the module.
      added: one array per layer, added to the layer's input. JAX differentiates with respect to arguments only, and
        the derivative with respect to this one is that with respect to the input.
    """
    recorded = Activations([], [], [])

    def record(call, arguments, options, context):
        if context.method_name != "__call__" or not isinstance(context.module, (*LAYERS, BatchNorm)):
            return call(*arguments, **options)
        x, *rest = arguments
        if isinstance(context.module, BatchNorm):
            y = call(x, *rest, **options)
            recorded.normalized[-1] = y  # belongs to the layer called last
            return y
        if added is not None:
            x = x + added[len(recorded.inputs)]
        y = call(x, *rest, **options)
        recorded.inputs.append(x)
        recorded.outputs.append(y)
        recorded.normalized.append(None)  # until a batch norm follows
        return y

    with nn.intercept_methods(record):
        logits, _ = net.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"noise": key})
    return logits, recorded


class Sizes(NamedTuple):
    """Root mean squares of activations.

    Attributes:
      layers: of each layer's output, before norm and activation.
      logits: of the network's output, after a norm at its end.
    """

    layers: list[float]
    logits: float


def sizes(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array) -> Sizes:
    """Measures how large the outputs of the layers are."""
    return jax.tree.map(float, jax.device_get(_sizes(net, variables, images, key)))


@functools.partial(jax.jit, static_argnums=0)
def _sizes(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array) -> Sizes:
    def root_mean_square(x: jax.Array) -> jax.Array:
        # In units of the largest value: the square of 1e-20 would be 0 in float32.
        largest = jnp.abs(x).max()
        unit = jnp.where(largest > 0, largest, 1)
        return unit * jnp.sqrt(jnp.square(x / unit).mean())

    logits, recorded = forward(net, variables, images, key)
    return Sizes([root_mean_square(y) for y in recorded.outputs], root_mean_square(logits))


class Rescaling(NamedTuple):
    """Largest changes when weights are multiplied by a factor, relative to the largest value before.

    Attributes:
      output: change of the output of the batch norm that follows the layer.
      input_gradient: change of the gradient of a fixed linear function of that output, with respect to the layer's
        input.
      weight_gradient: change of its gradient with respect to the weights, times the factor. The theory divides this
        gradient by the factor, so that nothing should change.
    """

    output: float
    input_gradient: float
    weight_gradient: float


def rescaling(
    net: nn.Module, variables: dict, images: jax.Array, key: jax.Array, factors: Iterable[float]
) -> dict[float, Rescaling]:
    """Measures what changes when the weights of a layer before a batch norm are multiplied by a factor.

    The layers are changed one at a time, and the largest changes over all of them are returned. Without epsilon there
    would be none except rounding. That of float32 is the only one: devices whose default is to multiply in a lower
    precision are asked for the full one.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3.
    """
    paths = [(*path, "kernel") for path in order_of(net, images.shape[1:]).layers]
    params = flatten_dict(variables["params"])
    changes = {factor: [] for factor in factors}
    for layer, path in enumerate(paths):
        is_layer = np.arange(len(paths)) == layer
        before = _precisely(net, variables, images, key, is_layer)
        if before.normalized[layer] is None:  # no batch norm follows
            continue
        for factor in changes:
            scaled = unflatten_dict(params | {path: params[path] * factor})
            after = _precisely(net, variables | {"params": scaled}, images, key, is_layer)
            weight_gradients = [flatten_dict(gradients.params)[path] for gradients in (before, after)]
            changes[factor].append(
                Rescaling(
                    output=_change(before.normalized[layer], after.normalized[layer]),
                    input_gradient=_change(before.inputs[layer], after.inputs[layer]),
                    weight_gradient=_change(weight_gradients[0], weight_gradients[1] * factor),
                )
            )
    return {factor: Rescaling(*np.max(by_layer, axis=0).tolist()) for factor, by_layer in changes.items()}


class _Gradients(NamedTuple):
    """Outputs of the batch norms (None for a layer without one), and gradients of a linear function of one of them."""

    normalized: list[jax.Array | None]
    inputs: list[jax.Array]
    params: dict


def _precisely(net: nn.Module, *arguments) -> _Gradients:
    """Calls `_gradients` with products in full float32; those in TF32 have errors of a thousandth."""
    with jax.default_matmul_precision("highest"):
        return _gradients(net, *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array, is_layer: jax.Array) -> _Gradients:
    """Differentiates a random linear function of one layer's normalized output.

    The gradient of the loss is not suitable: it also depends on the activation functions after the layer, whose slopes
    jump where rounding changes the sign of an output. Which layer it is, is an array, so that a single compiled program
    serves all layers.
    """

    def value_of(params: dict, added: list[jax.Array]) -> tuple[jax.Array, list[jax.Array | None]]:
        _, recorded = forward(net, variables | {"params": params}, images, key, added)
        values = [
            jnp.vdot(jax.random.normal(jax.random.fold_in(key, i), y.shape), y) * is_layer[i]
            for i, y in enumerate(recorded.normalized)
            if y is not None
        ]
        return sum(values), recorded.normalized

    shapes = jax.eval_shape(functools.partial(forward, net), variables, images, key)[1].inputs
    zeros = [jnp.zeros(x.shape) for x in shapes]
    gradient_of = jax.grad(value_of, argnums=(0, 1), has_aux=True)
    (params, inputs), normalized = gradient_of(variables["params"], zeros)
    return _Gradients(normalized, inputs, params)


def _change(before: jax.Array, after: jax.Array) -> float:
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())
