"""The spread of batch statistics over batches: the noise that the random choice of images adds to a network.

Conventions: the network is in evaluation mode. The statistics of a layer then differ from batch to batch only because
different images enter the network, and not because the layers before it normalized them by other statistics. The
moments of each image are thus well defined, and those of any group of images follow from them. Moments are float64
[images, features], over the positions of an image.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.training import evaluation
from jaxbn import calibrate

IMAGES_AT_ONCE = 256
NEGLIGIBLE = 1e-6  # a standard deviation below this fraction of a feature's root mean square is rounding
MIN_GROUPS = 5  # fewer groups say little about their spread


class ImageMoments(NamedTuple):
    """Mean and biased variance of the inputs of a batch norm, image by image: both [images, features]."""

    mean: np.ndarray
    var: np.ndarray


class GroupSpread(NamedTuple):
    """Standard deviations over groups of images, in units of the feature's standard deviation over all images.

    Attributes:
      mean: standard deviation of the groups' means.
      std: standard deviation of the groups' standard deviations.
    """

    mean: float
    std: float


def image_moments(net: nn.Module, variables: dict, images: np.ndarray) -> list[ImageMoments]:
    """Measures the moments of the inputs of each batch norm, image by image.

    Args:
      net: as `nets.linen.build` returns it.
      variables: its `params` and `batch_stats`.
      images: uint8 [n, height, width, channels].
    """
    batches = evaluation.split(images, IMAGES_AT_ONCE)
    parts = [jax.device_get(_moments_by_image(net, variables, jnp.asarray(batch))) for batch in batches]
    layers = jax.tree.map(lambda *arrays: np.concatenate(arrays, dtype=float), *parts)
    return [ImageMoments(moments.mean, moments.var) for moments in layers.values()]


@functools.partial(jax.jit, static_argnums=0)
def _moments_by_image(net: nn.Module, variables: dict, images: jax.Array) -> Any:
    def of_image(image: jax.Array) -> Any:
        return calibrate.measure(net, variables, image[None], call=evaluation.call)

    return jax.vmap(of_image)(images)


def group_spread(layers: Iterable[ImageMoments], group_size: int) -> GroupSpread:
    """Computes the spread over groups of `group_size` consecutive images, averaged over features, then over layers.

    For images drawn at random, that of the means is proportional to 1 / sqrt(group_size). Features that do not vary are
    left out, and so are the images after the last whole group. If no feature varies, the spread is NaN.
    """
    by_feature = [_spread_of_layer(moments, group_size) for moments in layers]
    by_layer = [spreads.mean(1) for spreads in by_feature if spreads.size] or [(np.nan, np.nan)]
    return GroupSpread(*np.mean(by_layer, axis=0).tolist())


def _spread_of_layer(moments: ImageMoments, group_size: int) -> np.ndarray:
    """Computes the spread of means and standard deviations, shape [2, features that vary]."""
    mean = moments.mean
    square = moments.var + mean**2  # E[x²] of each image; means of these, unlike variances, are those of larger groups
    std = np.sqrt(np.maximum(square.mean(0) - mean.mean(0) ** 2, 0))  # over all images
    varies = std > NEGLIGIBLE * np.sqrt(square.mean(0))  # false where anything is NaN
    count = len(mean) // group_size

    def over_groups(values: np.ndarray) -> np.ndarray:
        groups = values[: count * group_size, varies].reshape(count, group_size, varies.sum())
        return groups.mean(1)

    group_means = over_groups(mean)
    group_stds = np.sqrt(np.maximum(over_groups(square) - group_means**2, 0))
    return np.stack([group_means, group_stds]).std(1, ddof=1) / std[varies]


def sizes_for(images: int) -> list[int]:
    """Lists the group sizes 2, 4, 8, ... of which this many images make at least `MIN_GROUPS` groups."""
    return [2**k for k in range(1, images.bit_length()) if images >= MIN_GROUPS * 2**k]


def log_slope(x: Iterable[float], y: Iterable[float]) -> float:
    """Fits the power law y ~ x^p; returns p, the slope of log y against log x.

    It is NaN if there are fewer than two points, or if a value of y is not positive and finite.
    """
    x, y = np.array(list(x), float), np.array(list(y), float)
    if len(x) < 2 or not np.all(np.isfinite(y) & (y > 0)):
        return float("nan")
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
