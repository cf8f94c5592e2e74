"""Corruptions have the known effect on simple images, are pure functions, and grow with the strength."""

import colorsys

import numpy as np
import pytest

from experiments.data import corruptions
from experiments.data.corruptions import CORRUPTIONS, STRENGTHS, blur, brightness, contrast, noise

IMAGES = np.random.RandomState(0).randint(0, 256, (5, 16, 16, 3)).astype(np.uint8)
every_corruption = pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)


def flat(*color):
    return np.full((1, 16, 16, len(color)), color, np.uint8)


@every_corruption
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_and_dtype_stay(corrupt, channels):
    images = IMAGES[..., :channels]
    corrupted = corrupt(images, 3)
    assert corrupted.shape == images.shape and corrupted.dtype == np.uint8


@every_corruption
def test_the_same_arguments_give_the_same_images_and_leave_the_given_ones(corrupt):
    before = IMAGES.copy()
    np.testing.assert_array_equal(corrupt(IMAGES, 5), corrupt(IMAGES, 5))
    np.testing.assert_array_equal(IMAGES, before)


@every_corruption
def test_a_larger_strength_changes_images_more(corrupt):
    images = (IMAGES // 2 + 32).astype(np.uint8)  # leaves room for all
    distances = [np.abs(corrupt(images, s).astype(int) - images).mean() for s in STRENGTHS]
    assert 0 < distances[0] and all(np.diff(distances) > 0)


@every_corruption
@pytest.mark.parametrize("strength", [0, 6, 2.5])
def test_unknown_strength_is_refused(corrupt, strength):
    with pytest.raises(ValueError, match=f"strength must be 1, 2, 3, 4 or 5, got {strength}"):
        corrupt(IMAGES, strength)


def test_noise_has_its_standard_deviation_and_another_seed_gives_another():
    gray = np.full((50, 16, 16, 3), 128, np.uint8)
    for strength, std in zip(STRENGTHS, corruptions.NOISE, strict=True):
        assert (noise(gray, strength) / 255).std() == pytest.approx(std, rel=0.02)
    assert not np.array_equal(noise(gray, 1), noise(gray, 1, seed=1))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur_spreads_a_point_as_a_gaussian(strength):
    point = np.zeros((2, 15, 15, 1), np.uint8)
    point[0, 7, 7] = 255
    width = corruptions.BLUR[strength - 1]
    steps = np.arange(-7, 8)
    kernel = np.exp(-0.5 * (steps / width) ** 2)
    kernel[abs(steps) > int(4 * width + 0.5)] = 0
    kernel /= kernel.sum()
    np.testing.assert_allclose(blur(point, strength)[0, ..., 0], 255 * np.outer(kernel, kernel), atol=0.51)
    assert not blur(point, strength)[1].any()


def test_blur_leaves_a_flat_image():
    np.testing.assert_array_equal(blur(flat(10, 200, 30), 5), flat(10, 200, 30))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_contrast_shrinks_deviations_and_keeps_the_mean(strength):
    x, corrupted = IMAGES.astype(float), contrast(IMAGES, strength).astype(float)
    np.testing.assert_allclose(corrupted.mean((1, 2)), x.mean((1, 2)), atol=0.5)
    np.testing.assert_allclose(
        corrupted.std((1, 2)), corruptions.CONTRAST[strength - 1] * x.std((1, 2)), atol=0.2, rtol=0.01
    )


@pytest.mark.parametrize("color", [(200, 100, 50), (3, 2, 1), (0, 0, 0), (90, 90, 90), (250, 0, 7), (255, 255, 255)])
def test_brightness_adds_to_the_value_and_keeps_hue_and_saturation(color):
    hue, saturation, value = colorsys.rgb_to_hsv(*np.array(color) / 255)
    for strength, added in zip(STRENGTHS, corruptions.BRIGHTNESS, strict=True):
        expected = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1)))
        np.testing.assert_allclose(brightness(flat(*color), strength)[0, 0, 0], expected, atol=0.51)


def test_brightness_of_gray_images_is_a_sum():
    assert brightness(flat(100), 2)[0, 0, 0, 0] == round(100 + 0.1 * 255)
