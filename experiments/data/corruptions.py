"""Corrupted images: noise, blur, low contrast and brightness at five strengths, those of CIFAR-10-C.

Convention: every function takes images, uint8 [n, height, width, channels], a strength from 1 to 5 and a seed, and
returns images of the same shape and dtype; the same arguments give the same images. Only noise needs the seed. Images
without colour, of one channel, are corrupted as grey ones.

Differs from CIFAR-10-C in:
  1. Noise and blur have the published sizes on images of any size. On 16x16 images both are thus about twice as strong
     as on 32x32 ones that are halved afterwards: means over blocks of 2x2 halve the noise and the width of a blur.
  2. Gaussian blur is one of its extra corruptions, not of the 15 that its mean is taken over.
  3. Values are rounded, not truncated, to whole numbers.

References:
  Hendrycks and Dietterich 2019, arXiv:1903.12261; the constants for 32x32 images are in the code that goes with it.
"""

import numpy as np
from scipy import ndimage  # which JAX depends on

STRENGTHS = (1, 2, 3, 4, 5)
# One constant for each strength.
NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation, of 1 between black and white
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation of the kernel, in pixels
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # what is left of it
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)  # what is added to the largest colour, of 1 between black and white


def noise(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Returns the images with normal noise added to every value."""
    # RandomState, because NumPy promises never to change its stream.
    added = np.random.RandomState(seed).standard_normal(images.shape)
    return _to_uint8(_to_unit(images) + _constant(NOISE, strength) * added)


def blur(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Returns the images convolved with a Gaussian; beyond an edge, the edge is repeated."""
    del seed
    width = _constant(BLUR, strength)
    return _to_uint8(ndimage.gaussian_filter(_to_unit(images), (0, width, width, 0), mode="nearest"))


def contrast(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Returns the images moved towards their mean, in each channel."""
    del seed
    x = _to_unit(images)
    mean = x.mean((1, 2), keepdims=True)
    return _to_uint8(mean + _constant(CONTRAST, strength) * (x - mean))


def brightness(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Returns the images with a larger value in the sense of hue, saturation and value; the first two stay."""
    del seed
    x = _to_unit(images)
    value = x.max(-1, keepdims=True)  # the others are in proportion to it, and black has no hue
    brighter = np.minimum(value + _constant(BRIGHTNESS, strength), 1)
    return _to_uint8(np.where(value > 0, x / np.where(value > 0, value, 1), 1) * brighter)


CORRUPTIONS = {"noise": noise, "blur": blur, "contrast": contrast, "brightness": brightness}


def _constant(constants, strength):
    if strength not in STRENGTHS:
        raise ValueError(f"strength={strength}; corruptions come in strengths 1 to 5; choose one of these.")
    return constants[strength - 1]


def _to_unit(images):
    return images.astype(np.float32) / 255


def _to_uint8(x):
    return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)
