"""How the inputs of a net's layers shift while it trains, and how the loss bends along its gradient.

Conventions: those of `activations.py`. Where a function compares two points, both see the same batch and the same
noise.
"""

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.probes.activations import forward, order_of

CONSTANT = 1e-10  # a variance below this part of the squared mean is what rounding leaves of a feature that is constant

Batch = tuple[jax.Array, jax.Array]  # images and labels


def input_moments(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array) -> list[list[list[float]]]:
    """Returns means and variances of the features that enter each layer but the first, whose inputs are the images.

    Returns:
      For each layer, the pair [means, variances]: plain lists, fit for a row.
    """
    moments = jax.device_get(_input_moments(net, variables, images, key))
    return [[mean.tolist(), var.tolist()] for mean, var in moments]


@functools.partial(jax.jit, static_argnums=0)
def _input_moments(net, variables, images, key):
    _, found = forward(net, variables, images, key)
    inputs = [x.reshape(-1, x.shape[-1]) for x in found.inputs[1:]]
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
        logits, _ = forward(net, variables | {"params": params}, images, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.value_and_grad(loss_of)(variables["params"])


class GradientShift(NamedTuple):
    """How the gradient of a layer's weights changes when the layers below move, averaged over the layers.

    Attributes:
      distance: between the two gradients, relative to the length of the first.
      cosine: of the angle between them.
    """

    distance: float
    cosine: float


def gradient_shift(net: nn.Module, variables: dict, batch: Batch, key: jax.Array, step: float) -> GradientShift:
    """Returns the internal covariate shift of Santurkar et al., for each layer from the second, averaged.

    G_i is the gradient with respect to the weights of layer i; G'_i the same once all that comes before layer i (norms
    as well) has moved by -step times its gradient on the same batch. Layers without a gradient do not count.

    Differs from the definition in:
      1. The distance is relative to the length of G_i, so that nets whose gradients differ in size can be compared.

    References:
      Santurkar, Tsipras, Ilyas, Madry 2018, arXiv:1805.11604, definition 2.1.
    """
    order = order_of(net, batch[0].shape[1:])
    params = flatten_dict(variables["params"])
    gradients = flatten_dict(gradient(net, variables, batch, key)[1])
    stepped = {path: value - step * gradients[path] for path, value in params.items()}
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
    length = optax.tree.norm(g)
    losses, changes, betas = [loss], [], []
    for step in steps:
        moved = jax.tree.map(lambda value, slope, step=step: value - step * slope, params, g)
        loss, there = gradient(net, variables | {"params": moved}, batch, key)
        change = optax.tree.norm(jax.tree.map(jnp.subtract, there, g))
        losses.append(loss)
        changes.append(change / length)
        betas.append(change / (step * length))
    losses, changes, betas = (np.asarray(jax.device_get(values)) for values in (losses, changes, betas))
    return Smoothness(float(np.ptp(losses)), float(changes.max()), float(betas.max()))


def _mean_of_finite(values):
    """The mean of those values that are finite; NaN where none is."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
