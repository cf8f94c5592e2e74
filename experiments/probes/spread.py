"""The spread of batch norm's statistics over batches: the noise that their random choice of images adds to a net.

Conventions: the net is in evaluation mode, so that a layer's statistics differ from batch to batch by what enters this
layer alone, and not by what the layers before it made of their batches. Then every image has moments of its own, and
those of any group of images follow from them. Moments are float64 [images, features], over the positions of an image.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.training import evaluation
from jaxbn import calibrate

IMAGES_AT_ONCE = 256
NEGLIGIBLE = 1e-6  # a standard deviation below this part of a feature's size is rounding
MIN_GROUPS = 5  # fewer groups of images say little about their spread


class ImageMoments(NamedTuple):
    """Mean and biased variance of what enters a batch norm, image by image: both [images, features]."""

    mean: np.ndarray
    var: np.ndarray


class GroupSpread(NamedTuple):
    """Standard deviation over groups of images, in units of the feature's standard deviation over all of them.

    Attributes:
      mean: of the groups' means.
      std: of the groups' standard deviations.
    """

    mean: float
    std: float


def image_moments(net: nn.Module, variables: dict, images: np.ndarray) -> list[ImageMoments]:
    """Returns the moments of what enters each batch norm of a linen net.

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      images: uint8 [n, height, width, channels].
    """
    batches = evaluation.split(images, IMAGES_AT_ONCE)
    parts = [jax.device_get(_measure(net, variables, jnp.asarray(batch))) for batch in batches]
    layers = jax.tree.map(lambda *each: np.concatenate(each, dtype=float), *parts)
    return [ImageMoments(moments.mean, moments.var) for moments in layers.values()]


@functools.partial(jax.jit, static_argnums=0)
def _measure(net, variables, images):
    def of_one(image):
        return calibrate.measure(net, variables, image[None], call=evaluation.call)

    return jax.vmap(of_one)(images)


def group_spread(layers: Iterable[ImageMoments], group_size: int) -> GroupSpread:
    """Returns the spread over groups of `group_size` consecutive images: the mean over features, then over layers.

    With images drawn at random, that of the means is proportional to 1 / sqrt(group_size). Features that do not vary
    are left out, and so are the images after the last whole group. Where no feature varies, it is NaN.
    """
    found = [_of_layer(*moments, group_size) for moments in layers]
    by_layer = [spreads.mean(1) for spreads in found if spreads.size] or [(np.nan, np.nan)]
    return GroupSpread(*np.mean(by_layer, axis=0).tolist())


def _of_layer(mean, var, group_size):
    """The spread of means and standard deviations, [2, features that vary]."""
    squares = var + mean**2
    whole = np.sqrt(np.maximum(squares.mean(0) - mean.mean(0) ** 2, 0))
    varies = whole > NEGLIGIBLE * np.sqrt(squares.mean(0))  # not so where anything is NaN
    count = len(mean) // group_size
    groups = np.stack([mean, squares])[:, : count * group_size, varies]
    means, squares = groups.reshape(2, count, group_size, varies.sum()).mean(2)
    stds = np.sqrt(np.maximum(squares - means**2, 0))
    return np.stack([means, stds]).std(1, ddof=1) / whole[varies]


def sizes_for(images: int) -> list[int]:
    """Returns the group sizes 2, 4, 8, ... of which so many images make at least `MIN_GROUPS` groups."""
    return [2**k for k in range(1, images.bit_length()) if images >= MIN_GROUPS * 2**k]


def log_slope(x: Iterable[float], y: Iterable[float]) -> float:
    """Returns the exponent p of the power law y ~ x^p that fits best: the slope of log y against log x.

    It is NaN where there are not two points, or a value is not positive and finite.
    """
    x, y = np.array(list(x), float), np.array(list(y), float)
    if len(x) < 2 or not np.all(np.isfinite(y) & (y > 0)):
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
