"""Evaluates trained networks on any images, with running statistics or with those of each batch.

Conventions: images are uint8 [n, height, width, channels]. Batches follow the order of the images, and the last one may
be smaller.
"""

import functools
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import Config
from experiments.data.datasets import Dataset

Statistics = Literal["running", "batch"]


class Score(NamedTuple):
    """The mean cross-entropy in nats, and the fraction of correctly classified images."""

    loss: float
    accuracy: float


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Scores logits [n, classes] against labels [n]."""
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels))
    return Score(float(losses.mean()), float(np.mean(logits.argmax(-1) == labels)))


def predict(
    net: nn.Module,
    variables: dict,
    images: np.ndarray,
    *,
    statistics: Statistics = "running",
    batch_size: int = 500,
) -> np.ndarray:
    """Computes the logits of images, float32 [n, classes].

    Args:
      net: from `nets.linen.build`.
      variables: its `params` and `batch_stats`.
      images: the images.
      statistics: statistics of batch norm: the running ones, or those of each batch. The latter runs the network in
        training mode, so it needs a network with plain batch norm (`plain`).
      batch_size: number of images that share their statistics, with those of each batch.
    """
    forward = _with_running if statistics == "running" else _with_batch
    batches = split(images, batch_size)
    return np.concatenate([jax.device_get(forward(net, variables, jnp.asarray(batch))) for batch in batches])


def score_all(net: nn.Module, variables: dict, dataset: Dataset) -> list[dict]:
    """Scores a network on all training and all test images; returns entries of `measured`."""
    sets = {
        "training": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    return [
        {"images": name, **score(predict(net, variables, images), labels)._asdict()}
        for name, (images, labels) in sets.items()
    ]


def plain(config: Config) -> Config:
    """Returns this run with plain batch norm instead of its variants, and without noise and dropout.

    Both networks have the same variables.

    Raises:
      ValueError: the run's network has no batch norm that uses statistics of a batch.
    """
    if config.norm in ("none", "group") or config.tuning != "trained" or config.noise == "matched":
        raise ValueError(
            f"norm={config.norm!r}, tuning={config.tuning!r}, noise={config.noise!r}: this network does not normalize "
            "with statistics of a batch; evaluate it with its running statistics."
        )
    return config.replace(norm="batch", group_size=None, noise="none", dropout=0.0)


def split(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Splits images into batches; the last one may be smaller."""
    return [images[first : first + batch_size] for first in range(0, len(images), batch_size)]


def evaluate(net: Any, images: jax.Array) -> jax.Array:
    """Computes the logits of a linen or nnx network in evaluation mode, for images as floats in [0, 1]."""
    return net(images, train=False)


def call(net: nn.Module, images: jax.Array) -> jax.Array:
    """Evaluates uint8 images; the `call` of `jaxbn.calibrate`."""
    return evaluate(net, images.astype(jnp.float32) / 255)


@functools.partial(jax.jit, static_argnums=0)
def _with_running(net: nn.Module, variables: dict, images: jax.Array) -> jax.Array:
    return net.apply(variables, images, method=call)


@functools.partial(jax.jit, static_argnums=0)
def _with_batch(net: nn.Module, variables: dict, images: jax.Array) -> jax.Array:
    """Runs the network in training mode, including its noise, and discards the updated running statistics."""
    x = images.astype(jnp.float32) / 255
    keys = {"noise": jax.random.key(0)}
    return net.apply(variables, x, train=True, mutable=["batch_stats"], rngs=keys)[0]
