"""What a net does in training: how large its layers' outputs are, how their inputs shift, how the loss bends.

Conventions: the layers of a net are its convolutions and its dense layers, in the order of their calls, which stands
for depth. Every pass is one of training: batch norm takes the statistics of the batch, noise is added, and no variable
changes. A batch is a pair: images, float32 [n, height, width, channels] in [0, 1], and labels, int32 [n]. The key is
that of the noise; the same key gives the same noise.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.data import Dataset
from jaxbn.linen import BatchNorm

LAYERS = (nn.Conv, nn.Dense)
IMAGES = 500  # in a batch to measure on: enough for the statistics, and a second's work
CONSTANT = 1e-10  # a variance below this part of the squared mean is what rounding leaves of a feature that is constant

Batch = tuple[jax.Array, jax.Array]


def first_images(dataset: Dataset, n: int = IMAGES) -> Batch:
    """Returns the first n training images, or all where there are fewer, as they are without augmentation."""
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


class Seen(NamedTuple):
    """What a pass shows of each layer.

    Attributes:
      inputs: what enters the layer.
      outputs: what leaves it, before norm and activation.
      normalized: that after the batch norm that follows; None where none does.
    """

    inputs: list[jax.Array]
    outputs: list[jax.Array]
    normalized: list[jax.Array | None]


def look(
    net: nn.Module, variables: dict, images: jax.Array, key: jax.Array, added: Sequence[jax.Array] | None = None
) -> tuple[jax.Array, Seen]:
    """Returns the logits of a pass, and what it shows of each layer.

    Args:
      net: as `models.build` returns it.
      variables: its `params` and `batch_stats`.
      images: see the module.
      key: see the module.
      added: to each layer's input; the derivative with respect to it is that with respect to the input.
    """
    seen = Seen([], [], [])

    def listen(call, arguments, options, context):
        if context.method_name != "__call__" or not isinstance(context.module, (*LAYERS, BatchNorm)):
            return call(*arguments, **options)
        x, *rest = arguments
        if isinstance(context.module, BatchNorm):
            seen.normalized[-1] = call(x, *rest, **options)
            return seen.normalized[-1]
        x = x if added is None else x + added[len(seen.inputs)]
        y = call(x, *rest, **options)
        for values, value in zip(seen, (x, y, None), strict=True):
            values.append(value)
        return y

    with nn.intercept_methods(listen):
        logits, _ = net.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"noise": key})
    return logits, seen


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

    logits, seen = look(net, variables, images, key)
    return Sizes([size(y) for y in seen.outputs], size(logits))


class Rescaling(NamedTuple):
    """What changes when weights are multiplied: the largest difference, as a part of the largest value before.

    Attributes:
      output: of the batch norm that follows.
      input_gradient: of the loss with respect to the layer's input.
      weight_gradient: the same for the weights, times the factor, which is what it should be divided by.
    """

    output: float
    input_gradient: float
    weight_gradient: float


def rescaling(
    net: nn.Module, variables: dict, batch: Batch, key: jax.Array, factors: Iterable[float]
) -> dict[float, Rescaling]:
    """Returns what changes when the weights of a layer before a batch norm are multiplied by a factor.

    One layer at a time; the largest changes over all of them. Without epsilon there would be none.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.3.
    """
    paths = [(*path, "kernel") for path in order_of(net, batch[0].shape[1:]).layers]
    params = flatten_dict(variables["params"])
    before = _view(net, variables, batch, key)
    changes = {}
    for factor in factors:
        found = []
        for layer, path in enumerate(paths):
            if before[0][layer] is None:
                continue
            scaled = unflatten_dict(params | {path: params[path] * factor})
            after = _view(net, variables | {"params": scaled}, batch, key)
            ours, scaled_ours = ((view[0][layer], view[1][layer], view[2][path]) for view in (before, after))
            found.append([_change(a, b * f) for a, b, f in zip(ours, scaled_ours, (1, 1, factor), strict=True)])
        changes[factor] = Rescaling(*map(max, zip(*found, strict=True)))
    return changes


def _view(net, variables, batch, key):
    """Normalized outputs and gradients with respect to inputs, by layer; gradients with respect to params, by path."""
    normalized, inputs, params = _gradients_everywhere(net, variables, batch, key)
    return normalized, inputs, flatten_dict(params)


@functools.partial(jax.jit, static_argnums=0)
def _gradients_everywhere(net, variables, batch, key):
    images, labels = batch

    def loss_of(params, added):
        logits, seen = look(net, variables | {"params": params}, images, key, added)
        return _cross_entropy(logits, labels), seen.normalized

    shapes = jax.eval_shape(functools.partial(look, net), variables, images, key)[1].inputs
    nothing = [jnp.zeros(x.shape) for x in shapes]
    gradients, normalized = jax.grad(loss_of, argnums=(0, 1), has_aux=True)(variables["params"], nothing)
    return normalized, gradients[1], gradients[0]


def _change(before, after):
    return float(jnp.abs(after - before).max() / jnp.abs(before).max())


def input_moments(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array) -> list[list[list[float]]]:
    """Returns means and variances of the features that enter each layer but the first, whose inputs are the images.

    Returns:
      For each layer, the pair [means, variances]: plain lists, fit for a row.
    """
    moments = jax.device_get(_input_moments(net, variables, images, key))
    return [[mean.tolist(), var.tolist()] for mean, var in moments]


@functools.partial(jax.jit, static_argnums=0)
def _input_moments(net, variables, images, key):
    _, seen = look(net, variables, images, key)
    inputs = [x.reshape(-1, x.shape[-1]) for x in seen.inputs[1:]]
    return [(x.mean(0), x.var(0)) for x in inputs]


class DistributionShift(NamedTuple):
    """How far the inputs of the layers have moved, averaged over the layers.

    Attributes:
      mean: the change of a feature's mean in its standard deviations (of the two variances' mean); root mean square
        over the features.
      var: the logarithm of the ratio of its variances; root mean square over the features.
    """

    mean: float
    var: float


def distribution_shift(before: list, after: list) -> DistributionShift:
    """Returns the shift between two results of `input_moments`. Features that are constant in either do not count."""
    shifts = []
    for first, second in zip(before, after, strict=True):
        (mean, var), (new_mean, new_var) = np.asarray(first), np.asarray(second)
        alive = (var > CONSTANT * mean**2) & (new_var > CONSTANT * new_mean**2)
        mean, var, new_mean, new_var = (values[alive] for values in (mean, var, new_mean, new_var))
        squares = np.square([(new_mean - mean) / np.sqrt((var + new_var) / 2), np.log(new_var / var)])
        shifts.append(np.sqrt(squares.mean(axis=1)) if alive.any() else (math.nan, math.nan))
    return DistributionShift(*map(_mean_of_finite, zip(*shifts, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def gradient(net: nn.Module, variables: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Returns the mean cross-entropy of a batch, and its gradient with respect to `params`."""
    images, labels = batch

    def loss_of(params):
        return _cross_entropy(look(net, variables | {"params": params}, images, key)[0], labels)

    return jax.value_and_grad(loss_of)(variables["params"])


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class GradientShift(NamedTuple):
    """How the gradient of a layer's weights changes when the layers below move, averaged over the layers.

    Attributes:
      distance: between the two gradients, relative to the length of the first.
      cosine: of the angle between them.
    """

    distance: float
    cosine: float


def gradient_shift(
    net: nn.Module, variables: dict, batch: Batch, key: jax.Array, learning_rate: float
) -> GradientShift:
    """Returns the internal covariate shift of Santurkar et al., for each layer from the second, averaged.

    G_i is the gradient with respect to the weights of layer i; G'_i the same once all that comes before layer i (norms
    as well) has taken a step of plain SGD on the same batch. Layers without a gradient do not count.

    References:
      Santurkar, Tsipras, Ilyas, Madry 2018, arXiv:1805.11604, definition 2.1.
    """
    order = order_of(net, batch[0].shape[1:])
    params = flatten_dict(variables["params"])
    gradients = flatten_dict(gradient(net, variables, batch, key)[1])
    stepped = {path: value - learning_rate * gradients[path] for path, value in params.items()}
    distances, cosines = [], []
    for depth, layer in enumerate(order.layers[1:], start=2):
        below = {path: value for path, value in stepped.items() if order.depth[path[:-1]] < depth}
        _, moved = gradient(net, variables | {"params": unflatten_dict(params | below)}, batch, key)
        path = (*layer, "kernel")
        g, shifted = gradients[path], flatten_dict(moved)[path]
        length = jnp.linalg.norm(g.ravel())
        distances.append(jnp.linalg.norm((shifted - g).ravel()) / length)
        cosines.append(jnp.vdot(shifted, g) / (jnp.linalg.norm(shifted.ravel()) * length))
    return GradientShift(_mean_of_finite(distances), _mean_of_finite(cosines))


class Smoothness(NamedTuple):
    """How the loss bends along the negative gradient.

    Attributes:
      loss_range: largest less smallest loss, the start included, in nats.
      gradient_change: the largest change of the gradient, relative to the length of the one at the start.
      beta: the largest change of the gradient per distance moved: the "effective beta-smoothness".
    """

    loss_range: float
    gradient_change: float
    beta: float


def along_gradient(net: nn.Module, variables: dict, batch: Batch, key: jax.Array, steps: Iterable[float]) -> Smoothness:
    """Returns how loss and gradient change over the distances steps[k] * |gradient| along the negative gradient.

    References:
      Santurkar, Tsipras, Ilyas, Madry 2018, arXiv:1805.11604, section 3.1.
    """
    params = variables["params"]
    loss, g = gradient(net, variables, batch, key)
    length = optax.global_norm(g)
    losses, changes, betas = [loss], [], []
    for step in steps:
        moved = jax.tree.map(lambda value, slope, step=step: value - step * slope, params, g)
        loss, there = gradient(net, variables | {"params": moved}, batch, key)
        change = optax.global_norm(jax.tree.map(jnp.subtract, there, g))
        losses.append(loss)
        changes.append(change / length)
        betas.append(change / (step * length))
    losses, changes, betas = (np.asarray(jax.device_get(values)) for values in (losses, changes, betas))
    return Smoothness(float(np.ptp(losses)), float(changes.max()), float(betas.max()))


def _mean_of_finite(values):
    """The mean of those values that are finite; NaN where none is."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
