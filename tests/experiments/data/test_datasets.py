"""Data sets have the promised images in a fixed order; augmentation equals a slow reference."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import augmentation, datasets

augment = jax.jit(augmentation.augment, static_argnames="flip")
affine_resample = jax.jit(augmentation.affine_resample)


@pytest.fixture(scope="module")
def digits():
    return datasets.load("digits", image_size=8)


# Loading --------------------------------------------------------------------------------------------------------------


def test_digits_are_1400_for_training_and_397_for_testing(digits):
    assert digits.train_images.shape == (1400, 8, 8, 1)
    assert digits.test_images.shape == (397, 8, 8, 1)
    assert digits.train_images.dtype == digits.test_images.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert (len(digits.train_labels), len(digits.test_labels)) == (1400, 397)


def test_digits_use_the_whole_range_of_uint8(digits):
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)


def test_digits_for_training_and_testing_hold_every_class(digits):
    for labels in (digits.train_labels, digits.test_labels):
        assert set(labels) == set(range(10)) == set(map(int, digits.class_names))


def test_loading_twice_gives_the_same_images_in_the_same_order(digits):
    again = datasets.load("digits", image_size=8)
    np.testing.assert_array_equal(again.train_images, digits.train_images)
    np.testing.assert_array_equal(again.train_labels, digits.train_labels)


def test_fewer_training_images_are_the_first_of_all(digits):
    fewer = datasets.load("digits", image_size=8, train_images=100)
    np.testing.assert_array_equal(fewer.train_images, digits.train_images[:100])
    np.testing.assert_array_equal(fewer.train_labels, digits.train_labels[:100])


def test_the_number_of_training_images_does_not_change_the_test_images(digits):
    fewer = datasets.load("digits", image_size=8, train_images=100)
    np.testing.assert_array_equal(fewer.test_images, digits.test_images)


def test_enlarged_images_repeat_the_pixels(digits):
    larger = datasets.load("digits", image_size=16, train_images=10).train_images
    for rows in (0, 1):
        for columns in (0, 1):
            np.testing.assert_array_equal(larger[:, rows::2, columns::2], digits.train_images[:10])


def test_reduced_images_are_the_rounded_means_of_blocks():
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 2)).astype(np.uint8)
    exact = images.reshape(3, 4, 2, 4, 2, 2).mean((2, 4))
    np.testing.assert_array_equal(datasets._resize(images, 4), np.floor(exact + 0.5))


def test_a_size_that_would_cut_pixels_is_refused(digits):
    with pytest.raises(
        ValueError, match="image_size must divide 8, .* or be a multiple of it, got 12. Choose 8, 16 or 32"
    ):
        datasets.load("digits", image_size=12)


@pytest.mark.parametrize("number", [0, 1401])
def test_more_training_images_than_there_are_is_refused(number):
    with pytest.raises(ValueError, match=f"train_images must be from 1 to 1400, .* got {number}"):
        datasets.load("digits", image_size=8, train_images=number)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="data must be 'cifar10' or 'digits', got 'mnist'"):
        datasets.load("mnist", image_size=8)


@pytest.mark.skipif(not os.environ.get("CIFAR10_DIR"), reason="CIFAR10_DIR names no folder with CIFAR-10")
def test_cifar10_has_60000_images_of_ten_equally_frequent_classes():
    cifar10 = datasets.load("cifar10", image_size=16, download=False)
    assert cifar10.train_images.shape == (50_000, 16, 16, 3)
    assert cifar10.test_images.shape == (10_000, 16, 16, 3)
    assert np.bincount(cifar10.train_labels).tolist() == [5_000] * 10
    assert np.bincount(cifar10.test_labels).tolist() == [1_000] * 10
    assert cifar10.class_names[0] == "airplane"
    # Known means of red, green and blue: a channel or an axis out of place would move them.
    np.testing.assert_allclose(cifar10.train_images.mean((0, 1, 2)) / 255, [0.4914, 0.4822, 0.4465], atol=0.002)


def test_balanced_data_has_as_many_images_of_each_class_in_their_order(blobs):
    labels = np.array([0, 1, 1, 2, 3, 0, 1, 2, 2, 3], np.int32)
    images = np.arange(10, dtype=np.uint8)[:, None, None, None]
    balanced = datasets.balance(blobs._replace(train_images=images, train_labels=labels))
    assert balanced.train_labels.tolist() == [0, 1, 1, 2, 3, 0, 2, 3]
    assert balanced.train_images.ravel().tolist() == [0, 1, 2, 3, 4, 5, 7, 9]


# Augmentation ---------------------------------------------------------------------------------------------------------


def reference_resample(image, mirrored, shear, zoom):
    """Moves one image as Keras does: pixel by pixel, in float64, with matrices on (row, column)."""
    height, width, _ = image.shape
    shear_matrix = np.array([[1, -math.sin(shear)], [0, math.cos(shear)]])
    matrix = shear_matrix @ np.diag(zoom)
    center = np.array([(height - 1) / 2, (width - 1) / 2])
    result = np.zeros_like(image, dtype=np.float64)
    for r in range(height):
        for c in range(width):
            row, column = matrix @ (np.array([r, c]) - center) + center
            for i in (math.floor(row), math.floor(row) + 1):
                for j in (math.floor(column), math.floor(column) + 1):
                    weight = (1 - abs(row - i)) * (1 - abs(column - j))
                    result[r, c] += weight * image[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
    return result[:, ::-1] if mirrored else result


SHAPE = (1000, 32, 32, 2)  # one shape for all tests, which compile once


@functools.cache
def random_images():
    return jax.random.uniform(jax.random.key(7), SHAPE)


def resample(images, **changes):
    """Moves the images only as far as the changes say."""
    still = dict(mirrored=jnp.zeros(SHAPE[0], bool), shear=jnp.zeros(SHAPE[0]), zoom=jnp.ones((SHAPE[0], 2)))
    return affine_resample(images, **(still | changes))


@pytest.mark.slow
@pytest.mark.parametrize("height", [8, 5])
@pytest.mark.parametrize("largest_shear", [0.2, 20.0])
def test_resampling_equals_the_reference_pixel_by_pixel(largest_shear, height):
    images = jax.random.uniform(jax.random.key(7), (8, height, 8, 3))  # odd and even, and not square
    rng = np.random.RandomState(0)
    mirrored = np.arange(8) % 2 == 0
    shear = np.deg2rad(rng.uniform(-largest_shear, largest_shear, 8))
    zoom = rng.uniform(0.8, 1.2, (8, 2))
    result = affine_resample(images, jnp.array(mirrored), jnp.array(shear), jnp.array(zoom))
    expected = [reference_resample(*values) for values in zip(np.array(images), mirrored, shear, zoom, strict=True)]
    np.testing.assert_allclose(result, np.stack(expected), atol=1e-5)


def test_no_shear_no_zoom_and_no_mirror_give_the_same_bits():
    np.testing.assert_array_equal(resample(random_images()), random_images())


def test_mirroring_alone_reverses_the_columns_bit_by_bit():
    result = resample(random_images(), mirrored=jnp.ones(SHAPE[0], bool))
    np.testing.assert_array_equal(result, random_images()[:, :, ::-1])


def test_a_zoom_above_one_repeats_the_border():
    images = random_images()
    result = resample(images, zoom=jnp.full((SHAPE[0], 2), 3.0))
    np.testing.assert_array_equal(result[:, 0, 0], images[:, 0, 0])
    np.testing.assert_array_equal(result[:, 1, 1], images[:, 0, 0])


def test_augmented_values_stay_in_the_range_of_the_originals():
    images = random_images()
    result = augment(jax.random.key(0), images)
    assert images.min() <= result.min()
    assert result.max() <= images.max() + 1e-6  # the weights of a mean may add up to one and a rounding error


def test_a_constant_image_stays_as_it_is():
    images = np.full(SHAPE, 0.3, np.float32)
    np.testing.assert_allclose(augment(jax.random.key(0), images), images, rtol=1e-6)


@functools.cache
def augmented_ramps(flip):
    """Ramps that rise from 0 to 1 tell how an image was moved: along the columns in channel 0, along the rows in 1."""
    ramp = np.broadcast_to(np.linspace(0, 1, 32, dtype=np.float32), (32, 32))
    ramps = np.broadcast_to(np.stack([ramp, ramp.T], axis=-1), SHAPE)
    return np.array(augment(jax.random.key(0), ramps, flip=flip))


def zooms(images):
    """The zooms of rows and of columns, from the steepness of the ramps."""
    rows = images[:, 19, 16, 1] - images[:, 12, 16, 1]
    columns = images[:, 16, 19, 0] - images[:, 16, 12, 0]
    return rows * 31 / 7, columns * 31 / 7


def test_half_of_the_images_are_mirrored():
    _, columns = zooms(augmented_ramps(flip=True))
    assert 0.45 < (columns < 0).mean() < 0.55


def test_nothing_is_mirrored_without_flip():
    _, columns = zooms(augmented_ramps(flip=False))
    assert (columns > 0).all()


def test_zooms_are_uniform_between_0_8_and_1_2():
    for zoom in zooms(augmented_ramps(flip=False)):
        np.testing.assert_allclose([zoom.min(), zoom.mean(), zoom.max()], [0.8, 1.0, 1.2], atol=0.01)


def test_rows_and_columns_are_zoomed_independently():
    rows, columns = zooms(augmented_ramps(flip=False))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.1


def test_every_image_is_moved_differently():
    assert len(np.unique(augmented_ramps(flip=False), axis=0)) == SHAPE[0]


def test_augmentation_depends_on_the_key_alone():
    first, again, different = (augment(jax.random.key(seed), random_images()) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != different).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_augmentation_keeps_shape_and_dtype(dtype):
    images = jnp.zeros((50, 8, 12, 3), dtype)
    result = augment(jax.random.key(0), images)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="images must be floats, got uint8. Divide uint8 images by 255"):
        augment(jax.random.key(0), jnp.zeros((1, 8, 8, 3), jnp.uint8))
