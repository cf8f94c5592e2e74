"""Every algorithm for the moments of a batch, on a CPU: those for TPUs and for GPUs are as exact as the CPU's own.

The shapes are large enough for the algorithm for GPUs to take its pivot from a sample; smaller ones it reads twice.
"""

import functools
import math
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.benchmarks import hlo
from experiments.benchmarks.numerics import errors, ours, sample
from jaxbn._core import platforms
from jaxbn._core.devices import Devices
from jaxbn._core.measure import measure
from jaxbn._core.moment_algorithms import CANCELLATION, SAMPLES, SMALLEST_SAMPLED, _median_of_three, sample_positions
from tests import reference
from tests.core import test_parallel
from tests.core.test_numerics import GRADIENT_ERROR, OUTPUT_ERROR, ROUNDING
from tests.testing import test_testing

SHAPE = 32, 12, 12, 4
POSITIONS = math.prod(SHAPE[:-1])
STATISTICS = 8 * (1 + CANCELLATION) * ROUNDING  # of the variance, relative; see tests/core/test_numerics.py
# The variance about a sampled pivot is a difference of sums up to eight times as large.
STATISTICS_SAMPLED = 8 * (1 + 8) * ROUNDING
MEANS = 0, 1.9, 2.1, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6


@pytest.fixture(scope="module", params=["cpu", "tpu", "cuda"])
def platform(request):
    """The platform whose algorithms are taken; one for the module, since compiled programs are forgotten between."""
    with platforms.assumed(request.param):
        yield request.param


FORCED = pytest.mark.parametrize("platform", ["tpu", "cuda"], indirect=True, scope="module")  # not those of a CPU


@functools.partial(jax.jit, static_argnames=("axis", "method"))
def step(x, scale, bias, dy, mask=None, *, axis=-1, method=jaxbn.batch_normalize):
    """Returns output, gradients and moments."""
    normalize = functools.partial(method, axis=axis, mask=mask)
    y, vjp, moments = jax.vjp(normalize, x, scale, bias, has_aux=True)
    return y, vjp(dy.astype(y.dtype)), moments


def require_step(found, x, scale, bias, dy, **options):
    """Compares what `step` returns with the oracle."""
    y, gradients, moments = found
    exact, mean, var, count = reference.batch_norm(x, scale, bias, **options)
    require_output(y, exact)
    require_gradients(gradients, reference.gradients(x, scale, bias, dy, **options))
    require_moments(moments, mean, var)
    assert (moments.count == count).all()


def require_output(y, exact):
    # An outlier among many values is normalised to more than 5, and rounded there.
    assert (abs(np.asarray(y) - exact) <= OUTPUT_ERROR * np.maximum(1, abs(exact))).all()


def require_gradients(gradients, exact):
    require_gradient(gradients[0], exact[0])
    # Those of scale and bias are sums of as many terms as there are positions, of either sign: about its root, by luck
    # less.
    of_random_terms = math.sqrt(gradients[0].size / exact[1].size)
    for gradient, expected in zip(gradients[1:], exact[1:], strict=True):
        require_gradient(gradient, expected, least=of_random_terms)


def require_gradient(gradient, exact, least=0.0):
    assert abs(np.asarray(gradient) - exact).max() <= GRADIENT_ERROR * max(abs(exact).max(), least)


def require_moments(moments, mean, var, tolerance=STATISTICS):
    spread = np.sqrt(var)
    assert (abs(moments.mean - mean) <= 8 * ROUNDING * np.maximum(abs(mean), spread)).all()
    np.testing.assert_allclose(moments.var, var, rtol=tolerance)


def normal(shape, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


# Precision


@pytest.mark.parametrize("mean", MEANS)
def test_output_and_gradients_are_exact_to_float32_at_any_mean(platform, mean):
    output_error, gradient_error = errors(ours, *sample(SHAPE, mean))
    assert output_error <= OUTPUT_ERROR
    assert gradient_error <= GRADIENT_ERROR


@pytest.mark.parametrize("mean", MEANS)
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


@pytest.mark.parametrize("mean", [0, 10, 1e4])
def test_a_program_for_batches_of_any_size_is_exact_too(platform, mean):
    x, *rest = sample((64, 4), mean)
    (n,) = jax.export.symbolic_shape("n")
    spread, features = jax.ShapeDtypeStruct((n, 4), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.float32)
    flat = jax.jit(lambda *arguments: jax.tree.leaves(step(*arguments)))
    exported = jax.export.export(flat)(spread, features, features, spread)
    y, *others = exported.call(x, *rest)
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


normalize = jax.jit(jaxbn.batch_normalize)


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


# Masks, gaps and layouts


@pytest.mark.parametrize("mean", [0, 10, 1e4])
@pytest.mark.parametrize("of", [(32, 12, 12, 1), (32, 1, 1, 1), SHAPE], ids=["positions", "examples", "features"])
def test_masked_batches_equal_the_oracle(platform, of, mean):
    x, scale, bias, dy = sample(SHAPE, mean)
    mask = np.random.default_rng(1).random(of) < 0.7
    require_step(step(x, scale, bias, dy, mask), x, scale, bias, dy, mask=mask)


def test_what_is_masked_may_be_far_off_or_not_finite(platform):
    x, scale, bias, dy = sample(SHAPE, 10)
    mask = np.random.default_rng(1).random((*SHAPE[:-1], 1)) < 0.7
    spoilt = np.where(mask, x, np.resize(np.float32([np.nan, np.inf, -np.inf]), SHAPE))
    _, (dx, *_), moments = step(spoilt, scale, bias, np.where(mask, dy, 0), mask)
    require_moments(moments, *reference.moments(x, mask=mask)[:2])
    assert np.isfinite(dx).all()


def test_a_batch_that_is_masked_everywhere_becomes_the_bias(platform):
    x, scale, bias, dy = sample(SHAPE, 10)
    y, (dx, *_), moments = step(x, scale, bias, dy, np.zeros((32, 1, 1, 1), bool))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    np.testing.assert_array_equal(dx, 0)
    chex.assert_trees_all_equal(jax.device_get(moments), jaxbn.Moments(*np.zeros((3, 4), np.float32)))


def test_an_empty_batch_has_statistics_of_zero(platform):
    y, moments = normalize(np.zeros((0, 5, 3), np.float32))
    assert y.shape == (0, 5, 3)
    chex.assert_trees_all_equal(jax.device_get(moments), jaxbn.Moments(*np.zeros((3, 3), np.float32)))


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


@pytest.mark.parametrize("mean", [0, 3 - 4j, 1e4 + 1e3j])
def test_complex_batches_equal_the_oracle(platform, mean):
    rng = np.random.default_rng(0)
    x = ((rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE)) / math.sqrt(2) + mean).astype(np.complex64)
    y, moments = normalize(x)
    exact, exact_mean, exact_var, _ = reference.batch_norm(x)
    require_output(y, exact)
    require_moments(moments, exact_mean, exact_var)


@pytest.mark.parametrize("mean", [0, 10, 1e4])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((32, 6, 12, 12), 1), ((6, 32, 12, 12), 0), ((2, 32, 12, 12, 3), (0, -1)), ((32, 2, 12, 3, 12), (1, 3))],
    ids=["features second", "features first", "features at both ends", "features between"],
)
def test_features_on_other_axes_equal_the_oracle(platform, shape, axis, mean):
    features = tuple(shape[i] for i in np.atleast_1d(axis))
    x, dy, scale, bias = normal(shape, mean), normal(shape, seed=1), normal(features, seed=2), normal(features, seed=3)
    require_step(step(x, scale, bias, dy, axis=axis), x, scale, bias, dy, axis=axis)


SPREAD_GROUPS = 32, 24, 24, 2  # 4608 positions in a group of eight examples
GHOST = functools.partial(jaxbn.ghost_normalize, group_size=8)
GROUPS = np.repeat(np.float32([0, 3, -100, 1]), 8)[:, None, None, None]  # their means


@pytest.mark.parametrize("mean", [0, 10, 1e4])
def test_ghost_groups_equal_the_oracle(platform, mean):
    x, scale, bias, dy = sample(SPREAD_GROUPS, mean)
    x = GROUPS + x
    y, (dx, *_), _ = step(x, scale, bias, dy, method=GHOST)
    require_output(y, reference.ghost(x, scale, bias, group_size=8))
    expected = np.concatenate(
        [reference.gradients(x[i : i + 8], scale, bias, dy[i : i + 8])[0] for i in range(0, 32, 8)]
    )
    require_gradient(dx, expected)


def test_ghost_groups_are_combined_to_the_moments_of_the_batch(platform):
    # Not so at large means: those of the groups are rounded to float32 before they are compared.
    x = GROUPS + sample(SPREAD_GROUPS, 0)[0]
    _, moments = jax.jit(GHOST)(x)
    require_moments(moments, *reference.moments(x)[:2])


# Models under vmap


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_models_under_vmap_equal_each_alone(platform, axis):
    x, scale, bias, dy = sample(SHAPE, 0)
    models = np.stack([x, x + np.float32(10), np.sort(x, 0) + np.float32(1e4)], axis)
    found = jax.vmap(step, (axis, None, None, None))(models, scale, bias, dy)
    for i, model in enumerate(np.moveaxis(models, axis, 0)):
        require_step(jax.tree.map(lambda leaf, i=i: leaf[i], found), model, scale, bias, dy)


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)], ids=["both", "mask", "x"])
def test_batches_and_masks_may_be_mapped_each_alone(platform, axes):
    x, scale, bias, dy = sample(SHAPE, 10)
    x = x if axes[0] is None else np.stack([x, x[::-1]])
    mask = np.random.default_rng(1).random((2, *SHAPE[:-1], 1)) < np.reshape([0.7, 0.2], (2, 1, 1, 1, 1))
    mask = mask[0] if axes[1] is None else mask
    found = jax.vmap(step, (axes[0], None, None, None, axes[1]))(x, scale, bias, dy, mask)
    for i in range(2):
        own_x, own_mask = (v if axis is None else v[i] for v, axis in zip((x, mask), axes, strict=True))
        own = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        require_step(own, own_x, scale, bias, dy, mask=own_mask)


def test_two_nested_vmaps_equal_each_model_alone(platform):
    x = normal((2, 3, 128, 4), 5) * np.float32([1, 10])[:, None, None, None]
    _, moments = jax.jit(jax.vmap(jax.vmap(jaxbn.batch_normalize)))(x)
    mean, var, _ = reference.moments(x, axis=(0, 1, 3))
    require_moments(moments, mean, var)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=["both", "outer", "inner"])
def test_epsilon_may_be_mapped_by_either_of_two_vmaps(platform, axes):
    x = normal((2, 3, 128, 4), 5)
    epsilon = np.float32([[1e-5, 1e-3, 1], [1e-4, 1e-2, 10]])[
        tuple(0 if axis is None else slice(None) for axis in axes)
    ]
    over_inner = jax.vmap(normalized_with, (0, axes[1]))
    y = jax.jit(jax.vmap(over_inner, (0, axes[0])))(x, epsilon)
    epsilon = np.broadcast_to(
        np.reshape(epsilon, [1 if axis is None else n for axis, n in zip(axes, (2, 3), strict=True)]), (2, 3)
    )
    for i in np.ndindex(2, 3):
        require_output(y[i], reference.batch_norm(x[i], epsilon=epsilon[i])[0])


def normalized_with(x, epsilon):
    return jaxbn.batch_normalize(x, epsilon=epsilon)[0]


# Devices


DEVICES = 8
SPREAD = 64, 24, 24, 2  # 4608 positions on each device


@pytest.fixture(scope="module")
def sharding():
    return NamedSharding(jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,)), P("d"))


def on_devices(shape, mean, shift):
    """Returns a batch whose parts on the devices have different means."""
    x, *rest = sample(shape, mean)
    return x + np.repeat(np.float32(shift) * normal(DEVICES, seed=5), shape[0] // DEVICES)[:, None, None, None], *rest


@pytest.mark.parametrize("shift", [0, 3, 100])
@pytest.mark.parametrize("mean", [0, 3, 1e4])
@pytest.mark.parametrize("shape", [SPREAD, (16, 3, 3, 6)], ids=["large", "small"])
def test_a_batch_over_devices_under_jit_equals_the_oracle(platform, sharding, shape, mean, shift):
    x, scale, bias, dy = on_devices(shape, mean, shift)
    found = ours(jax.device_put(x, sharding), scale, bias, jax.device_put(dy, sharding))
    require_step(jax.device_get(found), x, scale, bias, dy)


def test_a_batch_that_devices_cannot_share_evenly_equals_the_oracle_under_jit(platform, sharding):
    x, scale, bias, dy = sample((20, 14, 14, 2), 10)

    @functools.partial(jax.jit, in_shardings=NamedSharding(sharding.mesh, P()))
    def replicated(x, scale, bias, dy):
        return step(x, scale, bias, dy)

    require_step(jax.device_get(replicated(x, scale, bias, dy)), x, scale, bias, dy)


def collectives(function, *arguments):
    """Returns the collectives of a compiled program; those in loops, of no turn or one, are conditional."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    loop = r"condition=%?([\w.-]+), body=%?([\w.-]+)"
    assert not re.search(r"body=%?([\w.-]+), condition=", text)
    return hlo.collectives(re.sub(loop, r"branch_computations={\1, \2}", text))


@pytest.mark.parametrize("shape", [SPREAD, (16, 3, 3, 6)], ids=["large", "small"])
def test_the_moments_of_a_batch_under_jit_take_one_collective(platform, sharding, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    assert len(hlo.executed(collectives(jaxbn.moments, x))) == 1


def test_the_moments_of_a_batch_under_shard_map_take_one_collective_and_seldom_a_second_one(platform, sharding):
    moments = jax.shard_map(
        functools.partial(jaxbn.moments, axis_name="d"), mesh=sharding.mesh, in_specs=P("d"), out_specs=P()
    )
    found = collectives(moments, jax.ShapeDtypeStruct(SPREAD, jnp.float32, sharding=sharding))
    assert sorted(collective.conditional for collective in found) == [False, True]


@pytest.mark.slow
@FORCED
@pytest.mark.parametrize(("api", "case"), test_parallel.MATRIX)
def test_on_every_api_a_batch_over_devices_is_normalised_as_if_in_one_piece(platform, api, case):
    found = test_parallel.errors(api, case)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= test_parallel.TOLERANCE}
    assert not wrong, f"relative errors above {test_parallel.TOLERANCE:.1e}: {wrong}"


# Laws


@pytest.mark.slow
@FORCED
@pytest.mark.parametrize("law", test_testing.LAWS, ids=lambda law: law.name)
def test_our_batch_norm_keeps_the_law(platform, law):
    # The function; the layers give its bits, which is tested elsewhere.
    test_testing.check_batch_norm(test_testing.OURS["function"], [law])
