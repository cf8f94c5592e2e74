"""Every algorithm for the moments of a batch, on a CPU: those for TPUs and GPUs are as exact as the CPU's own.

The shapes are large enough for the algorithm for GPUs to sample its pivot; it reads smaller batches twice.
"""

import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.benchmarks.numerics import errors, ours, sample
from jaxbn._core.devices import Devices
from jaxbn._core.measure import measure
from jaxbn._core.moment_algorithms import CANCELLATION, SAMPLES, SMALLEST_SAMPLED, _median_of_three, sample_positions
from tests import reference
from tests.core.exactness import (
    POSITIONS,
    SHAPE,
    STATISTICS_SAMPLED,
    require_gradient,
    require_gradients,
    require_moments,
    require_output,
    require_step,
    step,
)
from tests.core.test_numerics import GRADIENT_ERROR, OUTPUT_ERROR, ROUNDING

normalize = jax.jit(jaxbn.batch_normalize)


# Precision


@pytest.mark.parametrize("mean", [0, 1.9, 2.1, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_output_and_gradients_are_exact_to_float32_at_any_mean(platform, mean):
    output_error, gradient_error = errors(ours, *sample(SHAPE, mean))
    assert output_error <= OUTPUT_ERROR
    assert gradient_error <= GRADIENT_ERROR


@pytest.mark.parametrize("mean", [0, 1.9, 2.1, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6])
def test_statistics_are_exact_to_float32_at_any_mean(platform, mean):
    x, *rest = sample(SHAPE, mean)
    _, _, moments = ours(x, *rest)
    exact_mean, exact_var, count = reference.moments(x)
    require_moments(moments, exact_mean, exact_var)
    assert (moments.count == count).all()


@pytest.mark.parametrize("mean", [0, 1.9, 2.1, 10, 1e2, 1e3])
def test_bfloat16_inputs_have_statistics_exact_to_float32(platform, mean):
    x, *rest = sample(SHAPE, mean, jnp.bfloat16)
    _, _, moments = ours(x, *rest)
    chex.assert_type([moments.mean, moments.var], jnp.float32)
    require_moments(moments, *reference.moments(x)[:2])


@pytest.mark.parametrize("mean", [0, 1.9, 2.1, 10])
def test_bfloat16_inputs_with_float32_parameters_have_exact_outputs_and_parameter_gradients(platform, mean):
    x, scale, bias, dy = sample(SHAPE, mean, jnp.bfloat16)
    y, (dx, *parameters), _ = ours(x, scale, bias, dy)
    exact, *exact_parameters = reference.gradients(x, scale, bias, dy)
    assert abs(y - reference.batch_norm(x, scale, bias)[0]).max() <= OUTPUT_ERROR
    for gradient, expected in zip(parameters, exact_parameters, strict=True):
        require_gradient(gradient, expected)
    # The gradient of x comes directly and by the moments; both parts and their sum are rounded to the dtype of x.
    direct = dy * scale / np.sqrt(reference.moments(x)[1] + 1e-5)
    roundings = float(jnp.finfo(jnp.bfloat16).eps) / 2 * (abs(direct) + abs(exact - direct) + abs(exact))
    assert (abs(np.float64(dx) - exact) <= roundings + GRADIENT_ERROR * abs(exact).max()).all()


@pytest.mark.slow  # tests/core/test_numerics.py has the same for the CPU
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e8])
def test_float64_inputs_are_exact_to_float64(platform, mean):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(mean, 1, (SMALLEST_SAMPLED, 2)), rng.normal(size=(SMALLEST_SAMPLED, 2))
    with jax.enable_x64(True):
        y, (dx, *_), moments = ours(x, None, None, dy)
        chex.assert_type([y, dx, *moments], jnp.float64)
    rounding, near = np.finfo(np.float64).eps, x - mean  # exact, where the sums of the oracle would not be
    exact_mean, exact_var, _ = reference.moments(near)
    np.testing.assert_allclose(moments.mean, mean + exact_mean, rtol=8 * rounding, atol=8 * rounding)
    np.testing.assert_allclose(moments.var, exact_var, rtol=8 * (1 + CANCELLATION) * rounding)
    np.testing.assert_allclose(y, reference.batch_norm(near)[0], atol=64 * rounding)
    np.testing.assert_allclose(dx, reference.gradients(near, None, None, dy)[0], atol=64 * rounding)


@pytest.mark.parametrize("mean", [0, 2.1, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_is_exact_beyond_float32_as_two_floats(platform, masked, mean):
    # A compiler that divided by a count where the mean is used, and fused that, would use two different means.
    x = sample(SHAPE, mean)[0]
    mask = np.random.default_rng(1).random((*SHAPE[:-1], 1)) < 0.7 if masked else None
    measured = measured_in_one_piece(x, mask)
    whole = np.float64(measured.pivot) + np.float64(measured.offset)
    assert abs(whole - reference.moments(x, mask=mask)[0]).max() <= 8 * ROUNDING


@jax.jit
def measured_in_one_piece(x, mask):
    return measure(x, mask, (0, 1, 2), Devices(), negligible=1e-5)


@pytest.fixture(scope="module")
def program_for_any_size(platform):
    """A step that is exported for any number of examples, its results in a list."""
    (n,) = jax.export.symbolic_shape("n")
    batch, features = jax.ShapeDtypeStruct((n, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)
    flat = jax.jit(lambda *arguments: jax.tree.leaves(step(*arguments)))
    return jax.jit(jax.export.export(flat)(batch, features, features, batch).call)


@pytest.mark.parametrize("mean", [0, 10, 1e4])
def test_a_program_for_batches_of_any_size_is_exact_too(program_for_any_size, mean):
    x, *rest = sample((64, 4), mean)
    y, *others = program_for_any_size(x, *rest)
    require_step((y, others[:3], jaxbn.Moments(*others[3:])), x, *rest)


# Batches that a sample could mistake


def with_zeros_at(*index):
    def spoil(x):
        x = x.copy()
        x[index] = 0
        return x

    return spoil


def with_every_kth_position_zero(k):
    def spoil(x):
        x = x.copy()
        x.reshape(POSITIONS, -1)[::k] = 0
        return x

    return spoil


def with_an_outlier_at(position):
    def spoil(x):
        x = x.copy()
        x.reshape(POSITIONS, -1)[position] += 1e4
        return x

    return spoil


def with_a_border_of_zeros(x):
    return np.pad(x[:, 1:-1, 1:-1], ((0, 0), (1, 1), (1, 1), (0, 0)))


def shifted(part):
    """Adds 100 standard deviations in about that part of the positions."""
    return lambda x: x + np.float32(100) * (np.random.default_rng(1).random(x.shape) < part)


def with_heavy_tails(x):
    return x + np.clip(np.random.default_rng(1).standard_cauchy(x.shape), -1e3, 1e3).astype(np.float32)


def sparse(x):
    return x * (np.random.default_rng(1).random(x.shape) < 1e-3)


HARD = {
    "as drawn": lambda x: x,
    "first example zero": with_zeros_at(0),
    "a border of zeros": with_a_border_of_zeros,
    "half zero": with_zeros_at(slice(SHAPE[0] // 2)),
    "one feature constant": with_zeros_at(..., 2),
    "one outlier": with_an_outlier_at(1234),
    "one outlier, at a sampled position": with_an_outlier_at(sample_positions(POSITIONS)[0]),
    "sorted by example": lambda x: np.sort(x, 0),
    "sorted by row": lambda x: np.sort(x, 1),
    "sorted by column": lambda x: np.sort(x, 2),
    "sorted": lambda x: np.sort(x.reshape(POSITIONS, -1), 0).reshape(SHAPE),
    "two equal clusters": shifted(1 / 2),
    "two unequal clusters": shifted(1 / 10),
    "few far values": shifted(1 / 500),
    "last examples shifted": lambda x: np.concatenate([x[:28], x[28:] + np.float32(100)]),
    "heavy tails": with_heavy_tails,
    "sparse": sparse,
}
for _k in (2, 3, 7, 16):
    HARD |= {
        f"every {_k}th example zero": with_zeros_at(slice(None, None, _k)),
        f"every {_k}th row zero": with_zeros_at(slice(None), slice(None, None, _k)),
        f"every {_k}th column zero": with_zeros_at(slice(None), slice(None), slice(None, None, _k)),
        f"every {_k}th position zero": with_every_kth_position_zero(_k),
    }


@pytest.mark.parametrize("mean", [0, pytest.param(10, marks=pytest.mark.slow), 1e4])
@pytest.mark.parametrize("name", HARD)
def test_hard_batches_have_exact_outputs_gradients_and_statistics(platform, name, mean):
    x, scale, bias, dy = sample(SHAPE, mean)
    x = HARD[name](x)
    y, gradients, moments = ours(x, scale, bias, dy)
    exact, exact_mean, exact_var, _ = reference.batch_norm(x, scale, bias)
    require_output(y, exact)
    require_gradients(gradients, reference.gradients(x, scale, bias, dy))
    require_moments(moments, exact_mean, exact_var, STATISTICS_SAMPLED)


@pytest.mark.parametrize("mean", [0, 1e4])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_feature_that_is_not_finite_leaves_the_others_exact(platform, value, mean):
    x, scale, bias, dy = sample(SHAPE, mean)
    x[3, 5, 7, 2] = value
    y, (dx, *parameters), moments = ours(x, scale, bias, dy)
    others = [0, 1, 3]
    found = (
        y[..., others],
        (dx[..., others], *(p[..., others] for p in parameters)),
        jax.tree.map(pick(others), moments),
    )
    require_step(found, *map(pick(others), (x, scale, bias, dy)))
    assert not np.isfinite(moments.var[2])


def pick(features):
    return lambda values: values[..., features]


def test_a_sample_that_misses_the_batch_costs_no_more_digits_than_raw_sums(platform):
    # The limit of the algorithm for GPUs: every sampled value is 0, and the others lie t standard deviations from it.
    # Of a real batch that is as unlikely as 27 such draws in 27, and nothing but the sampled positions can cause it.
    positions = 2**17
    x, scale, bias, _ = sample((positions, 2), 1e3)
    x[sample_positions(positions)] = 0
    exact, mean, var, _ = reference.batch_norm(x, scale, bias)
    t = (abs(mean) / np.sqrt(var)).max()
    y, moments = normalize(x, scale, bias)
    of_variance = 8 * (1 + t**2) * ROUNDING
    np.testing.assert_allclose(moments.var, var, rtol=of_variance)
    of_output = abs(exact - bias) * of_variance + 4 * t * ROUNDING + OUTPUT_ERROR
    assert (abs(y - exact) <= of_output).all()


# The sample


def far_after_the_tree(p):
    """Returns how likely a tree of medians of three returns a far value, of a sample where each is one with p."""
    for _ in range(round(math.log(SAMPLES, 3))):
        p = 3 * p**2 - 2 * p**3
    return p


@pytest.mark.parametrize(("t_squared", "likelihood"), [(8, 1e-4), (16, 5e-7), (64, 1e-11)])
def test_a_pivot_far_from_the_mean_is_as_unlikely_as_documented(t_squared, likelihood):
    assert far_after_the_tree(1 / t_squared) < likelihood


@pytest.mark.parametrize("p", [1 / 4, 1 / 3, 1 / 2])  # so likely that some are drawn
def test_a_tree_of_medians_returns_far_values_as_often_as_the_recursion_says(p):
    draws = 100_000
    values = (np.random.default_rng(0).random((SAMPLES, draws)) < p).astype(np.float32)
    while len(values) > 1:
        values = np.asarray(_median_of_three(*values.reshape(3, -1, draws)))
    expected = far_after_the_tree(p)
    assert abs(values.mean() - expected) <= 5 * math.sqrt(expected * (1 - expected) / draws)


def test_the_median_of_three_is_that_of_numpy():
    triples = np.random.default_rng(0).integers(0, 3, (3, 1000)).astype(np.float32)  # with many equal ones
    np.testing.assert_array_equal(_median_of_three(*triples), np.median(triples, 0))


@pytest.mark.parametrize("total", [SMALLEST_SAMPLED, SMALLEST_SAMPLED + 1, 10**6, 2**31 + 5])
def test_one_position_is_sampled_in_each_equal_part_of_the_batch(total):
    positions, parts = np.sort(sample_positions(total)), np.linspace(0, total, SAMPLES + 1)
    assert (np.floor(parts[:-1]) <= positions).all() and (positions < parts[1:]).all()
