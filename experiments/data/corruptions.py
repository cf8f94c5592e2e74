"""Corrupts images as CIFAR-10-C does: noise, blur, low contrast and brightness, at five strengths.

Convention: every function takes images, uint8 [n, height, width, channels], a strength from 1 to 5 and a seed, and
returns images of the same shape and dtype; the same arguments give the same images. Only noise uses the seed. Images of
one channel are gray.

Differs from CIFAR-10-C in:
  1. Noise and blur have the published sizes on images of any size. On 16x16 images, both are about twice as strong as
     on 32x32 images that are reduced afterward: averaging blocks of 2x2 pixels halves the noise and the blur's width.
  2. Gaussian blur is one of its extra corruptions, not among the 15 in its mean.
  3. Values are rounded to integers, not truncated.

References:
  Hendrycks and Dietterich 2019, arXiv:1903.12261; the constants for 32x32 images are in its code.
"""

import numpy as np
from scipy import ndimage  # JAX depends on SciPy

STRENGTHS = (1, 2, 3, 4, 5)
# One constant for each strength.
NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation, where black is 0 and white is 1
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation of the kernel, in pixels
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # the fraction that is left
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)  # added to the value of HSV, where white is 1


def noise(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Adds Gaussian noise to every value."""
    std = _constant(NOISE, strength)
    # NumPy guarantees that the stream of RandomState, unlike that of default_rng, never changes.
    added = np.random.RandomState(seed).standard_normal(images.shape)
    return _to_uint8(_to_unit(images) + std * added)


def blur(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Convolves each channel with a Gaussian; beyond an edge, the edge is repeated."""
    del seed
    std = _constant(BLUR, strength)
    blurred = ndimage.gaussian_filter(_to_unit(images), (0, std, std, 0), mode="nearest")
    return _to_uint8(blurred)


def contrast(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Shrinks each channel of each image toward its mean."""
    del seed
    factor = _constant(CONTRAST, strength)
    x = _to_unit(images)
    mean = x.mean((1, 2), keepdims=True)
    return _to_uint8(mean + factor * (x - mean))


def brightness(images: np.ndarray, strength: int, *, seed: int = 0) -> np.ndarray:
    """Increases the value in the sense of HSV; hue and saturation stay the same."""
    del seed
    added = _constant(BRIGHTNESS, strength)
    x = _to_unit(images)
    # The value of HSV is the largest channel; hue and saturation depend only on the ratios of the channels to it.
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    divisor = np.where(value > 0, value, 1)
    ratios = np.where(value > 0, x / divisor, 1)  # black has no hue and becomes gray
    return _to_uint8(ratios * brighter)


CORRUPTIONS = {"noise": noise, "blur": blur, "contrast": contrast, "brightness": brightness}


def _constant(constants: tuple[float, ...], strength: int) -> float:
    if strength not in STRENGTHS:
        raise ValueError(f"strength must be 1, 2, 3, 4 or 5, got {strength}.")
    return constants[strength - 1]


def _to_unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255


def _to_uint8(x: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(x, 0, 1)).astype(np.uint8)
