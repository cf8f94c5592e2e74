"""A trained net tested in other ways than `fit` does: on other images, with the statistics of its batches.

Convention: images are uint8 [n, height, width, channels]. They go through the net in the order given, the last batch
perhaps smaller.
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
    """How well a net does: the mean cross-entropy in nats, and the part of the images that it recognises."""

    loss: float
    accuracy: float


def score(logits: np.ndarray, labels: np.ndarray) -> Score:
    """Returns how well logits [n, classes] tell the labels [n]."""
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
    """Returns the logits of images, float32 [n, classes].

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      images: what to look at.
      statistics: those with which batch norm normalizes: the running ones, or those of each batch. The latter wants a
        net of plain batch norm (`plain`), since it does what the net does in training.
      batch_size: images that share their statistics, where these are the batch's.
    """
    forward = _with_running if statistics == "running" else _with_batch
    batches = split(images, batch_size)
    return np.concatenate([jax.device_get(forward(net, variables, jnp.asarray(batch))) for batch in batches])


def score_all(net: nn.Module, variables: dict, dataset: Dataset) -> list[dict]:
    """Returns the scores of a net on all "training" and all "test" `images`, as a study has them in `measured`."""
    sets = {
        "training": (dataset.train_images, dataset.train_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    return [
        {"images": name, **score(predict(net, variables, images), labels)._asdict()}
        for name, (images, labels) in sets.items()
    ]


def plain(config: Config) -> Config:
    """Returns the run with plain batch norm in the place of its variants, and without noise and dropout.

    The variables of the one fit the net of the other.

    Raises:
      ValueError: the run has no batch norm whose statistics could be those of a batch.
    """
    if config.norm in ("none", "group") or config.tuning != "trained" or config.noise == "matched":
        raise ValueError(
            f"norm={config.norm!r}, tuning={config.tuning!r}, noise={config.noise!r}; accepted are nets that normalize "
            "with statistics of a batch; test this one with its running statistics."
        )
    return config.replace(norm="batch", group_size=None, noise="none", dropout=0.0)


def split(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns the images in batches, the last one perhaps smaller."""
    return [images[first : first + batch_size] for first in range(0, len(images), batch_size)]


def evaluate(net: Any, images: jax.Array) -> jax.Array:
    """Returns the logits of a linen or nnx net in evaluation, of images that are floats in [0, 1]."""
    return net(images, train=False)


def call(net: nn.Module, images: jax.Array) -> jax.Array:
    """Evaluates a batch of images with the running statistics: what `jaxbn.calibrate` wants to be told."""
    return evaluate(net, images.astype(jnp.float32) / 255)


@functools.partial(jax.jit, static_argnums=0)
def _with_running(net, variables, images):
    return net.apply(variables, images, method=call)


@functools.partial(jax.jit, static_argnums=0)
def _with_batch(net, variables, images):
    """What the net does in training, noise included; its running statistics stay."""
    x = images.astype(jnp.float32) / 255
    keys = {"noise": jax.random.key(0)}
    return net.apply(variables, x, train=True, mutable=["batch_stats"], rngs=keys)[0]
