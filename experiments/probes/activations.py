"""What a net's layers compute in training: how large it is, and what it owes to the size of their weights.

Conventions: the layers of a net are its convolutions and its dense layers, in the order of their calls, which stands
for depth. Every pass is one of training: batch norm takes the statistics of the batch, noise is added, and no variable
changes. Images are float32 [n, height, width, channels] in [0, 1], and labels int32 [n]. The key is that of the noise;
the same key gives the same noise.
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
IMAGES = 500  # in a batch to measure on: enough for the statistics, and a second's work


def first_images(dataset: Dataset, n: int = IMAGES) -> tuple[jax.Array, jax.Array]:
    """Returns the first n training images, or all where there are fewer, and their labels; without augmentation."""
    return jnp.asarray(dataset.train_images[:n], jnp.float32) / 255, jnp.asarray(dataset.train_labels[:n])


class Order(NamedTuple):
    """In which order a net calls its modules.

    Attributes:
      layers: the path of each layer.
      depth: the path of each module -> the number of layers called so far, itself included.
    """

    layers: list[tuple[str, ...]]
    depth: dict[tuple[str, ...], int]


@functools.lru_cache
def order_of(net: nn.Module, image_shape: tuple[int, ...]) -> Order:
    """Returns the order of calls in a net for images of a shape [height, width, channels]; it computes nothing."""
    order = Order([], {})

    def listen(call, arguments, options, context):
        if context.method_name == "__call__":
            if isinstance(context.module, LAYERS):
                order.layers.append(context.module.path)
            order.depth[context.module.path] = len(order.layers)
        return call(*arguments, **options)

    with nn.intercept_methods(listen):
        images = jnp.zeros((1, *image_shape))
        jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), images)
    return order


class Activations(NamedTuple):
    """What a pass shows of each layer.

    Attributes:
      inputs: what enters the layer.
      outputs: what leaves it, before norm and activation.
      normalized: that after the batch norm that follows; None where none does.
    """

    inputs: list[jax.Array]
    outputs: list[jax.Array]
    normalized: list[jax.Array | None]


def forward(
    net: nn.Module, variables: dict, images: jax.Array, key: jax.Array, added: Sequence[jax.Array] | None = None
) -> tuple[jax.Array, Activations]:
    """Returns the logits of a pass, and what it shows of each layer.

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      images: see the module.
      key: see the module.
      added: to each layer's input; the derivative with respect to it is that with respect to the input.
    """
    found = Activations([], [], [])

    def listen(call, arguments, options, context):
        if context.method_name != "__call__" or not isinstance(context.module, (*LAYERS, BatchNorm)):
            return call(*arguments, **options)
        x, *rest = arguments
        if isinstance(context.module, BatchNorm):
            found.normalized[-1] = call(x, *rest, **options)
            return found.normalized[-1]
        x = x if added is None else x + added[len(found.inputs)]
        y = call(x, *rest, **options)
        for values, value in zip(found, (x, y, None), strict=True):
            values.append(value)
        return y

    with nn.intercept_methods(listen):
        logits, _ = net.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"noise": key})
    return logits, found


class Sizes(NamedTuple):
    """Root mean squares of what a pass computes.

    Attributes:
      layers: of each layer's output, before norm and activation.
      logits: of the net's output, after a norm that it may end with.
    """

    layers: list[float]
    logits: float


def sizes(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array) -> Sizes:
    """Returns how large the outputs of the layers are."""
    return jax.tree.map(float, jax.device_get(_sizes(net, variables, images, key)))


@functools.partial(jax.jit, static_argnums=0)
def _sizes(net, variables, images, key):
    def size(x):
        largest = jnp.abs(x).max()
        unit = jnp.where(largest > 0, largest, 1)  # the square of 1e-20 is 0 in float32
        return unit * jnp.sqrt(jnp.square(x / unit).mean())

    logits, found = forward(net, variables, images, key)
    return Sizes([size(y) for y in found.outputs], size(logits))


class Rescaling(NamedTuple):
    """What changes when weights are multiplied: the largest difference, as a part of the largest value before.

    Attributes:
      output: of the batch norm that follows the layer.
      input_gradient: of a fixed linear function of that output, with respect to the layer's input.
      weight_gradient: the same with respect to the weights, times the factor, which is what it should be divided by.
    """

    output: float
    input_gradient: float
    weight_gradient: float


def rescaling(
    net: nn.Module, variables: dict, images: jax.Array, key: jax.Array, factors: Iterable[float]
) -> dict[float, Rescaling]:
    """Returns what changes when the weights of a layer before a batch norm are multiplied by a factor.

    One layer at a time; the largest changes over all of them. Without epsilon there would be none but rounding, that of
    float32: products of lower precision, which some devices choose, are ruled out.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3.
    """
    paths = [(*path, "kernel") for path in order_of(net, images.shape[1:]).layers]
    params = flatten_dict(variables["params"])
    found = {factor: [] for factor in factors}
    for layer, path in enumerate(paths):
        chosen = np.arange(len(paths)) == layer
        before = _precisely(net, variables, images, key, chosen)
        if before[0][layer] is None:
            continue
        for factor, changes in found.items():
            scaled = unflatten_dict(params | {path: params[path] * factor})
            after = _precisely(net, variables | {"params": scaled}, images, key, chosen)
            ours, theirs = ((a[layer], b[layer], flatten_dict(c)[path]) for a, b, c in (before, after))
            changes.append([_change(a, b * by) for a, b, by in zip(ours, theirs, (1, 1, factor), strict=True)])
    return {factor: Rescaling(*np.max(changes, axis=0).tolist()) for factor, changes in found.items()}


def _precisely(net, *arguments):
    """`_gradients` with products in full float32: those of TF32 round by a thousandth."""
    with jax.default_matmul_precision("highest"):
        return _gradients(net, *arguments)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(net, variables, images, key, chosen):
    """The normalized outputs, and for the chosen layer's the gradients with respect to inputs and params.

    They are those of a random linear function of it. Those of the loss would see the activations behind it as well,
    whose slopes jump where an output changes its sign.
    """

    def value_of(params, added):
        _, found = forward(net, variables | {"params": params}, images, key, added)
        values = [
            jnp.vdot(jax.random.normal(jax.random.fold_in(key, i), y.shape), y) * chosen[i]
            for i, y in enumerate(found.normalized)
            if y is not None
        ]
        return sum(values), found.normalized

    shapes = jax.eval_shape(functools.partial(forward, net), variables, images, key)[1].inputs
    nothing = [jnp.zeros(x.shape) for x in shapes]
    gradients, normalized = jax.grad(value_of, argnums=(0, 1), has_aux=True)(variables["params"], nothing)
    return normalized, gradients[1], gradients[0]


def _change(before, after):
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())
