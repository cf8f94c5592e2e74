"""Every algorithm for the moments of a batch with masks, features on any axes, ghost groups and under vmap."""

import functools
import math

import chex
import jax
import jax.export
import numpy as np
import pytest

import jaxbn
from experiments.benchmarks.numerics import sample
from tests import reference
from tests.core.exactness import (
    SHAPE,
    normal,
    require_gradient,
    require_moments,
    require_output,
    require_step,
    step,
)

normalize = jax.jit(jaxbn.batch_normalize)


# Masks, gaps and layouts


@pytest.mark.parametrize("mean", [0, 10, 1e4])
@pytest.mark.parametrize(
    "of",
    [
        pytest.param((32, 12, 12, 1), id="positions"),
        pytest.param((32, 1, 1, 1), id="examples", marks=pytest.mark.slow),
        pytest.param(SHAPE, id="features", marks=pytest.mark.slow_but_on_cpu),
    ],
)
def test_masked_batches_equal_the_oracle(platform, of, mean):
    x, scale, bias, dy = sample(SHAPE, mean)
    mask = np.random.default_rng(1).random(of) < 0.7
    require_step(step(x, scale, bias, dy, mask), x, scale, bias, dy, mask=mask)


def test_what_is_masked_may_be_far_off_or_not_finite(platform):
    x, scale, bias, dy = sample(SHAPE, 10)
    mask = np.random.default_rng(1).random((*SHAPE[:-1], 1)) < 0.7
    spoiled = np.where(mask, x, np.resize(np.float32([np.nan, np.inf, -np.inf]), SHAPE))
    _, (dx, *_), moments = step(spoiled, scale, bias, np.where(mask, dy, 0), mask)
    require_moments(moments, *reference.moments(x, mask=mask)[:2])
    assert np.isfinite(dx).all()


def test_a_batch_that_is_masked_everywhere_becomes_the_bias(platform):
    x, scale, bias, dy = sample(SHAPE, 10)
    y, (dx, *_), moments = step(x, scale, bias, dy, np.zeros((*SHAPE[:-1], 1), bool))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    np.testing.assert_array_equal(dx, 0)
    chex.assert_trees_all_equal(jax.device_get(moments), jaxbn.Moments(*np.zeros((3, 4), np.float32)))


def test_an_empty_batch_has_statistics_of_zero(platform):
    y, moments = normalize(np.zeros((0, 5, 3), np.float32))
    assert y.shape == (0, 5, 3)
    chex.assert_trees_all_equal(jax.device_get(moments), jaxbn.Moments(*np.zeros((3, 3), np.float32)))


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
    [
        pytest.param((32, 2, 12, 3, 12), (1, 3), id="features between"),
        pytest.param((32, 6, 12, 12), 1, id="features second", marks=pytest.mark.slow_but_on_cpu),
        pytest.param((6, 32, 12, 12), 0, id="features first", marks=pytest.mark.slow),
        pytest.param((2, 32, 12, 12, 3), (0, -1), id="features at both ends", marks=pytest.mark.slow),
    ],
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
    x, *rest = sample(SPREAD_GROUPS, 0)
    x = GROUPS + x
    _, _, moments = step(x, *rest, method=GHOST)
    require_moments(moments, *reference.moments(x)[:2])


# Models under vmap


@pytest.mark.slow_but_on_cpu
@pytest.mark.parametrize("axis", [0, 2, -1])
def test_models_under_vmap_equal_each_alone(platform, axis):
    x, scale, bias, dy = sample(SHAPE, 0)
    models = np.stack([x, x + np.float32(10), np.sort(x, 0) + np.float32(1e4)], axis)
    found = jax.vmap(step, (axis, None, None, None))(models, scale, bias, dy)
    for i, model in enumerate(np.moveaxis(models, axis, 0)):
        require_step(jax.tree.map(lambda leaf, i=i: leaf[i], found), model, scale, bias, dy)


@pytest.mark.slow_but_on_cpu
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param((0, 0), id="both"),
        pytest.param((None, 0), id="mask", marks=pytest.mark.slow),
        pytest.param((0, None), id="x", marks=pytest.mark.slow),
    ],
)
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


@pytest.mark.slow_but_on_cpu
def test_two_nested_vmaps_equal_each_model_alone(platform):
    x = normal((2, 3, 128, 4), 5) * np.float32([1, 10])[:, None, None, None]
    _, moments = jax.jit(jax.vmap(jax.vmap(jaxbn.batch_normalize)))(x)
    mean, var, _ = reference.moments(x, axis=(0, 1, 3))
    require_moments(moments, mean, var)


@pytest.mark.slow_but_on_cpu
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
