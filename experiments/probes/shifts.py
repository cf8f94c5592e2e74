"""How the inputs of a network's layers shift during training, and how smooth the loss is along its gradient.

Conventions: those of `activations`. A function that compares two points uses the same batch and the same noise at both.
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

# A feature is constant if its variance is below this fraction of its squared mean: that much is rounding.
CONSTANT = 1e-10

Batch = tuple[jax.Array, jax.Array]  # images and labels


def input_moments(net: nn.Module, variables: dict, images: jax.Array, key: jax.Array) -> list[list[list[float]]]:
    """Measures the mean and variance of each input feature of every layer but the first, whose inputs are the images.

    Returns:
      For each layer, the pair [means, variances]: plain lists, so that a row can hold them.
    """
    moments = jax.device_get(_input_moments(net, variables, images, key))
    return [[mean.tolist(), var.tolist()] for mean, var in moments]


@functools.partial(jax.jit, static_argnums=0)
def _input_moments(
    net: nn.Module, variables: dict, images: jax.Array, key: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    _, recorded = forward(net, variables, images, key)
    inputs = [x.reshape(-1, x.shape[-1]) for x in recorded.inputs[1:]]
    return [(x.mean(0), x.var(0)) for x in inputs]


class DistributionShift(NamedTuple):
    """How far the inputs of the layers have moved, averaged over the layers.

    Attributes:
      mean: change of a feature's mean, in standard deviations (the root of the mean of both variances); root mean
        square over the features.
      var: logarithm of the ratio of a feature's variances; root mean square over the features.
    """

    mean: float
    var: float


def distribution_shift(before: list, after: list) -> DistributionShift:
    """Computes the shift between two results of `input_moments`, without features that are constant in either."""
    mean_shifts, var_shifts = [], []
    for (mean, var), (new_mean, new_var) in zip(_arrays(before), _arrays(after), strict=True):
        varies = (var > CONSTANT * mean**2) & (new_var > CONSTANT * new_mean**2)
        if not varies.any():
            continue
        mean, var, new_mean, new_var = (values[varies] for values in (mean, var, new_mean, new_var))
        in_stds = (new_mean - mean) / np.sqrt((var + new_var) / 2)
        log_ratio = np.log(new_var / var)
        mean_shifts.append(np.sqrt(np.square(in_stds).mean()))
        var_shifts.append(np.sqrt(np.square(log_ratio).mean()))
    return DistributionShift(_mean_of_finite(mean_shifts), _mean_of_finite(var_shifts))


def _arrays(moments: list) -> list[np.ndarray]:
    return [np.asarray(of_layer) for of_layer in moments]


@functools.partial(jax.jit, static_argnums=0)
def gradient(net: nn.Module, variables: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
    """Computes the mean cross-entropy of a batch and its gradient with respect to `params`."""
    images, labels = batch

    def loss_of(params: dict) -> jax.Array:
        logits, _ = forward(net, variables | {"params": params}, images, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.value_and_grad(loss_of)(variables["params"])


class GradientShift(NamedTuple):
    """How the gradient of a layer's weights changes when the layers below take a step, averaged over the layers.

    Attributes:
      distance: between the two gradients, relative to the length of the first.
      cosine: of the angle between them.
    """

    distance: float
    cosine: float


def gradient_shift(net: nn.Module, variables: dict, batch: Batch, key: jax.Array, step: float) -> GradientShift:
    """Measures the internal covariate shift of Santurkar et al. for each layer from the second, and averages it.

    G_i is the gradient with respect to the weights of layer i. G'_i is the same gradient after everything before layer
    i (norms as well) has moved by -step times its gradient on the same batch. Layers without a gradient do not count.

    Differs from the definition in:
      1. The distance is relative to the length of G_i, so that networks with gradients of different size can be
         compared.

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
        _, shifted_gradients = gradient(net, variables | {"params": unflatten_dict(params | below)}, batch, key)
        path = (*layer, "kernel")
        g = gradients[path].ravel()
        shifted = flatten_dict(shifted_gradients)[path].ravel()
        length = jnp.linalg.norm(g)
        distances.append(jnp.linalg.norm(shifted - g) / length)
        cosines.append(jnp.vdot(shifted, g) / (jnp.linalg.norm(shifted) * length))
    return GradientShift(_mean_of_finite(distances), _mean_of_finite(cosines))


class Smoothness(NamedTuple):
    """How smooth the loss is along the negative gradient.

    Attributes:
      loss_range: largest minus smallest loss, including the start, in nats.
      gradient_change: largest change of the gradient, relative to its length at the start.
      beta: largest change of the gradient per distance moved: the "effective beta-smoothness".
    """

    loss_range: float
    gradient_change: float
    beta: float


def along_gradient(net: nn.Module, variables: dict, batch: Batch, key: jax.Array, steps: Iterable[float]) -> Smoothness:
    """Measures how loss and gradient change at the distances steps[k] * |gradient| along the negative gradient.

    References:
      Santurkar, Tsipras, Ilyas, Madry 2018, arXiv:1805.11604, section 3.1.
    """
    params = variables["params"]
    loss, g = gradient(net, variables, batch, key)
    length = optax.tree.norm(g)
    losses, changes, betas = [loss], [], []
    for step in steps:
        moved = jax.tree.map(lambda value, slope, step=step: value - step * slope, params, g)
        loss, g_there = gradient(net, variables | {"params": moved}, batch, key)
        change = optax.tree.norm(jax.tree.map(jnp.subtract, g_there, g))
        losses.append(loss)
        changes.append(change / length)
        betas.append(change / (step * length))
    losses, changes, betas = (np.asarray(jax.device_get(values)) for values in (losses, changes, betas))
    return Smoothness(float(np.ptp(losses)), float(changes.max()), float(betas.max()))


def _mean_of_finite(values: Iterable[jax.Array | float]) -> float:
    """Averages the finite values; NaN if there are none."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan
