"""Accuracy in float32 and bfloat16 against the float64 oracle, from mean 0 to a million standard deviations.

The inputs are rounded to float32 (or bfloat16) first, and the oracle sees the rounded values: what is measured is what
the arithmetic adds.  The limits are a few dozen roundings of float32, 6e-8: the output of a batch of std 1 reaches 4.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.benchmarks.numerics import SHAPES, errors, ours, sample
from experiments.benchmarks.numerics import measure as measure_errors
from jaxbn._core.moment_algorithms import CANCELLATION
from tests import reference

OUTPUT_ERROR = 5e-6  # largest, absolute
GRADIENT_ERROR = 1e-6  # largest, over the largest entry
ROUNDING = float(jnp.finfo(jnp.float32).eps)

THRESHOLD = CANCELLATION**0.5
RATIOS = (0, 0.5, 1, 3, 3.9, 3.99, 4.01, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6)
RATIOS += tuple(THRESHOLD * near for near in (0.9, 0.95, 0.995, 0.9999, 1.0001, 1.005, 1.05))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}-D")
def test_output_and_gradients_are_exact_to_float32_at_any_mean(shape, ratio):
    output_error, gradient_error = errors(ours, *sample(shape, ratio))
    assert output_error <= OUTPUT_ERROR
    assert gradient_error <= GRADIENT_ERROR


@pytest.mark.parametrize("ratio", RATIOS)
def test_statistics_are_exact_to_float32_at_any_mean(ratio):
    x, *rest = sample(SHAPES[1], ratio)
    _, _, moments = ours(x, *rest)
    mean, var, count = reference.moments(x)
    # Below the threshold the variance is a difference of sums CANCELLATION times as large; 8 roundings each.
    np.testing.assert_allclose(moments.var, var, rtol=8 * (1 + CANCELLATION) * ROUNDING)
    np.testing.assert_allclose(moments.mean, mean, rtol=4 * ROUNDING, atol=4 * ROUNDING)
    assert (moments.count == count).all()


@pytest.mark.parametrize("std", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("ratio", [0, 1.99, 2.01, 1e3])
def test_moments_are_exact_at_any_scale(ratio, std):
    x = np.float32(std) * sample(SHAPES[1], ratio)[0]
    mean, var, _ = reference.moments(x)
    measured = measure(x)
    np.testing.assert_allclose(measured.var, var, rtol=8 * (1 + CANCELLATION) * ROUNDING)
    np.testing.assert_allclose(measured.mean, mean, rtol=4 * ROUNDING, atol=4 * ROUNDING * std)


measure = jax.jit(jaxbn.moments)


def test_one_feature_with_a_large_mean_leaves_its_neighbors_exact():
    x, scale, bias, dy = sample(SHAPES[0], 0)
    x = x + np.array([0, 1, 1e4, -1e2, 0.1, 1.9], np.float32)
    output_error, gradient_error = errors(ours, x, scale, bias, dy)
    assert output_error <= OUTPUT_ERROR
    assert gradient_error <= GRADIENT_ERROR


def test_features_of_very_different_scales_are_each_normalized_exactly():
    x, scale, bias, dy = sample(SHAPES[0], 0)
    x = x * np.array([1e-1, 1, 1e1, 1e2, 1e4, 1e8], np.float32)
    y, (dx, *_), _ = ours(x, scale, bias, dy)
    assert abs(y - reference.batch_norm(x, scale, bias)[0]).max() <= OUTPUT_ERROR
    exact = reference.gradients(x, scale, bias, dy)[0]
    assert (abs(dx - exact).max(0) / abs(exact).max(0)).max() <= GRADIENT_ERROR


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e3, 1e6, 1e-3])
def test_a_constant_feature_becomes_its_bias_and_has_a_finite_gradient(value):
    x, scale, bias, dy = sample(SHAPES[0], 0)
    x[:, 2] = value
    y, (dx, *_), moments = ours(x, scale, bias, dy)
    assert abs(y[:, 2] - bias[2]).max() <= OUTPUT_ERROR
    assert np.isfinite(dx).all()
    # The variance that rounding leaves: below the square of one rounding of the mean.
    assert 0 <= moments.var[2] <= max((ROUNDING * value) ** 2, 4 * CANCELLATION * ROUNDING * 1e-5)


@pytest.mark.parametrize("mean", [0, 3e-3, 1, 1.99, 2.01, 1e2, 1e4, 1e6])
def test_the_variance_is_never_negative_however_small_it_is_compared_to_the_mean(mean):
    noise = sample(SHAPES[1], 0)[0]
    stds = np.array([0, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2], np.float32)
    # Several means, for the rounding of each falls to one side; at 3e-3 epsilon hides that the sums cancel.
    x = np.float32(mean) * np.linspace(0.8, 1.2, 6, dtype=np.float32) + noise * stds
    stats = jaxbn.BatchStats(jnp.zeros(6), jnp.zeros(6))
    _, stats = train(x, stats)
    assert (stats.var >= 0).all()
    assert (measure(x).var >= 0).all()


def test_the_variance_of_constant_features_is_never_negative():
    x = np.broadcast_to(np.geomspace(1e-3, 1e6, 200, dtype=np.float32), (100, 200))
    assert (measure(x).var >= 0).all()


@jax.jit
def train(x, stats):
    return jaxbn.batch_norm(x, stats, use_running_average=False, momentum=0.0)


@pytest.mark.parametrize("ratio", [0, 1.9, 2.1, 1e2, 1e3])
def test_bfloat16_inputs_have_statistics_exact_to_float32(ratio):
    x, *rest = sample(SHAPES[1], ratio, jnp.bfloat16)
    _, _, moments = ours(x, *rest)
    mean, var, _ = reference.moments(x)
    chex.assert_type(moments.mean, jnp.float32)
    np.testing.assert_allclose(moments.mean, mean, rtol=4 * ROUNDING, atol=4 * ROUNDING)
    np.testing.assert_allclose(moments.var, var, rtol=8 * (1 + CANCELLATION) * ROUNDING)


@pytest.mark.parametrize("ratio", [0, 1.9, 2.1, 10])
def test_bfloat16_inputs_with_float32_parameters_have_exact_outputs_and_parameter_gradients(ratio):
    x, scale, bias, dy = sample(SHAPES[1], ratio, jnp.bfloat16)
    y, (dx, *parameters), _ = ours(x, scale, bias, dy)
    exact, *exact_parameters = reference.gradients(x, scale, bias, dy)
    chex.assert_type([y, *parameters], jnp.float32)
    assert abs(y - reference.batch_norm(x, scale, bias)[0]).max() <= OUTPUT_ERROR
    for gradient, expected in zip(parameters, exact_parameters, strict=True):
        assert abs(gradient - expected).max() <= GRADIENT_ERROR * abs(expected).max()
    # The gradient of x comes directly and by the moments; both parts and their sum are rounded to the dtype of x.
    direct = dy * scale / np.sqrt(reference.moments(x)[1] + 1e-5)
    roundings = float(jnp.finfo(jnp.bfloat16).eps) / 2 * (abs(direct) + abs(exact - direct) + abs(exact))
    assert (abs(np.float64(dx) - exact) <= roundings + GRADIENT_ERROR * abs(exact).max()).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_outputs_are_rounded_once(dtype):
    x = sample(SHAPES[1], 5, dtype)[0]
    y, _ = jax.jit(jaxbn.batch_normalize)(x)
    chex.assert_type(y, dtype)
    exact = reference.batch_norm(x)[0]
    half = float(jnp.finfo(dtype).eps) / 2
    assert (abs(np.float64(y) - exact) <= half * abs(exact) + OUTPUT_ERROR).all()


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e8])
def test_float64_inputs_are_exact_to_float64(mean):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(mean, 1, (64, 4)), rng.normal(size=(64, 4))
    with jax.enable_x64(True):
        y, (dx, *_), moments = ours(x, None, None, dy)
        chex.assert_type([y, dx, *moments], jnp.float64)
    rounding = np.finfo(np.float64).eps
    exact_mean, exact_var, _ = reference.moments(x)
    np.testing.assert_allclose(moments.mean, exact_mean, rtol=4 * rounding, atol=4 * rounding)
    np.testing.assert_allclose(moments.var, exact_var, rtol=8 * (1 + CANCELLATION) * rounding)
    scale = max(1.0, mean)  # the oracle's own mean has one rounding, which shifts its output by eps * mean
    np.testing.assert_allclose(y, reference.batch_norm(x)[0], atol=64 * rounding * scale)
    np.testing.assert_allclose(dx, reference.gradients(x, None, None, dy)[0], atol=64 * rounding * scale)


@pytest.mark.parametrize("ratio", [0, 2.01, 1e3, 1e5])
def test_outputs_that_are_reduced_at_once_are_exact_at_any_mean(ratio):
    # The output is never written out: the compiler fuses the arithmetic of the mean into its consumer.
    x, scale, bias, dy = sample((12, 5, 3), ratio)
    terms = dy * reference.batch_norm(x, scale, bias)[0]
    assert abs(reduce_at_once(x, scale, bias, dy) - terms.sum()) <= 8 * ROUNDING * abs(terms).sum()


@jax.jit
def reduce_at_once(x, scale, bias, dy):
    return jnp.vdot(jaxbn.batch_normalize(x, scale, bias)[0], dy)


def test_evaluation_is_exact_at_a_large_mean():
    x, scale, bias, _ = sample(SHAPES[1], 1e5)
    mean, var = np.full(6, 1e5, np.float32), np.full(6, 1.5, np.float32)
    y = jax.jit(jaxbn.normalize)(x, mean, var, scale, bias)
    assert abs(y - reference.normalize(x, mean, var, scale, bias)).max() <= OUTPUT_ERROR


@pytest.mark.slow
def test_at_mean_1000_both_of_flaxs_variances_lose_digits_that_ours_keeps():
    first, *others = measure_errors([1e3])
    assert first["implementation"] == "jaxbn"
    for other in others:
        assert first["output"] < other["output"] / 10
        assert first["gradient"] < other["gradient"] / 10
