"""The spread of batch statistics, against groups whose moments are known."""

import math

import jax
import numpy as np
import pytest

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.probes import spread
from experiments.probes.spread import ImageMoments, group_spread, image_moments, log_slope, sizes_for


@pytest.fixture
def values():
    """Two features of 60 images of 5 positions, float64 [images, positions, features]."""
    return np.random.default_rng(0).normal([3, -1], [2, 0.5], (60, 5, 2))


def moments_of(values):
    return ImageMoments(values.mean(1), values.var(1))


def test_spread_is_that_of_the_groups_moments_in_units_of_the_feature(values):
    groups = values.reshape(15, 20, 2)  # of 4 images
    whole = values.std((0, 1))
    expected = ((each.std(0, ddof=1) / whole).mean() for each in (groups.mean(1), groups.std(1)))
    np.testing.assert_allclose(group_spread([moments_of(values)], 4), tuple(expected), rtol=1e-12)


def test_layers_count_equally_for_any_number_of_features(values):
    wide, narrow = moments_of(values), moments_of(values[..., :1])
    by_layer = [group_spread([layer], 4) for layer in (wide, narrow)]
    np.testing.assert_allclose(group_spread([wide, narrow], 4), np.mean(by_layer, axis=0))


def test_images_after_the_last_whole_group_do_not_count(values):
    whole = values[:56].reshape(8, 35, 2)
    found = group_spread([moments_of(values)], 7)
    assert found.mean == pytest.approx((whole.mean(1).std(0, ddof=1) / values.std((0, 1))).mean())


def test_spread_of_the_means_falls_with_the_square_root_of_the_group_size():
    values = np.random.default_rng(1).normal(size=(64 * 64, 1, 200))
    sizes = (1, 4, 16, 64)
    slope = log_slope(sizes, [group_spread([moments_of(values)], size).mean for size in sizes])
    assert slope == pytest.approx(-0.5, abs=0.02)


def test_scale_and_shift_of_a_feature_do_not_matter(values):
    np.testing.assert_allclose(
        group_spread([moments_of(5 + 7 * values)], 4), group_spread([moments_of(values)], 4), rtol=1e-9
    )


def test_features_that_do_not_vary_are_left_out(values):
    with_dead = np.concatenate([values, np.full((60, 5, 1), 0.1)], axis=2)
    np.testing.assert_allclose(group_spread([moments_of(with_dead)], 4), group_spread([moments_of(values)], 4))


@pytest.mark.parametrize("value", [0.0, 0.1, np.nan])
def test_a_net_without_varying_features_has_no_spread(value):
    assert all(map(math.isnan, group_spread([moments_of(np.full((20, 5, 2), value))], 4)))


def test_group_sizes_are_powers_of_two_of_which_there_are_enough_groups():
    assert sizes_for(2560) == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert sizes_for(20) == [2, 4] and sizes_for(9) == []


def test_power_law_has_its_exponent_as_slope():
    assert log_slope((1, 2, 8), (3, 12, 192)) == pytest.approx(2)


@pytest.mark.parametrize("y", [(1.0,), (1.0, math.nan), (1.0, 0.0)])
def test_no_slope_without_two_positive_points(y):
    assert math.isnan(log_slope(range(1, 1 + len(y)), y))


@pytest.mark.slow
def test_moments_of_images_are_those_of_what_enters_each_batch_norm(monkeypatch):
    monkeypatch.setattr(spread, "IMAGES_AT_ONCE", 4)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    net = linen_nets.build(Config(net="cnn7", width=0.25), 4)
    variables = net.init(jax.random.key(0), images[:1] / 255, train=False)
    found = image_moments(net, variables, images)
    kernel = variables["params"]["ConvNorm_0"]["Conv_0"]["kernel"]
    dimensions = ("NHWC", "HWIO", "NHWC")
    first = jax.lax.conv_general_dilated(images / 255.0, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    assert [layer.mean.shape for layer in found] == [(6, features) for features in (4, 4, 8, 8, 16, 16)]
    np.testing.assert_allclose(found[0].mean, first.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found[0].var, first.var((1, 2)), atol=1e-5)
