"""Masks, and batches that must not spoil the running statistics: not finite, masked everywhere or empty."""

import itertools

import chex
import jax
import jax.export
import numpy as np
import pytest

import jaxbn
import jaxbn.nnx
from jaxbn._core import checks
from tests import reference
from tests.core.training import BIAS, CLOSE, DY, MASKS, SCALE, SHAPE, STATS, SUMS, X, evaluate, step, train

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("mask", MASKS)
def test_masked_positions_are_normalized_with_the_moments_of_the_others(mask):
    mask = MASKS[mask]
    y, stats = train(X, mask=mask)
    expected, *moments = reference.batch_norm(X, SCALE, BIAS, mask=mask)
    expected_stats = reference.update(*STATS, *moments, momentum=0.9)
    chex.assert_trees_all_close((y, tuple(stats)), (expected, expected_stats), **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_with_a_mask_are_those_of_the_paper(mask):
    mask = MASKS[mask]
    _, _, gradients = step(X, STATS, SCALE, BIAS, DY, mask=mask)
    chex.assert_trees_all_close(gradients, reference.gradients(X, SCALE, BIAS, DY, mask=mask), **SUMS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mask", ["one per example", "full, unequal per feature", "per feature", "nothing"])
def test_masked_nan_and_infinity_reach_neither_outputs_nor_gradients_nor_statistics(mask, value):
    mask = MASKS[mask]
    spoiled = np.where(mask, X, np.float32(value))
    clean = np.where(mask, X, np.float32(0))
    *results, (dx, *parameters) = step(spoiled, STATS, SCALE, BIAS, DY, mask=mask)
    *expected_results, (expected_dx, *expected_parameters) = step(clean, STATS, SCALE, BIAS, DY, mask=mask)
    chex.assert_trees_all_equal((results, parameters), (expected_results, expected_parameters))
    chex.assert_trees_all_equal(dx, np.where(mask, expected_dx, 0))


def test_masked_nan_does_not_reach_the_output_of_evaluation():
    mask = MASKS["full, unequal per feature"]
    y, _ = evaluate(np.where(mask, X, np.float32(np.nan)), STATS, SCALE, BIAS, mask=mask)
    expected = reference.normalize(np.where(mask, X, 0), *STATS, SCALE, BIAS)
    np.testing.assert_allclose(y, expected, **CLOSE)


def test_padding_a_batch_and_masking_the_padding_changes_nothing():
    padded = np.concatenate([X, np.full((2, *SHAPE[1:]), 1e3, np.float32)])
    mask = np.arange(8)[:, None, None, None] < 6
    (y, stats), (y_padded, stats_padded) = train(X), train(padded, mask=mask)
    chex.assert_trees_all_close((y_padded[:6], stats_padded), (y, stats), **CLOSE)


def test_a_mask_of_true_changes_nothing():
    mask = np.ones((6, 1, 1, 1), bool)
    chex.assert_trees_all_close(train(X, mask=mask), train(X), **CLOSE)


def test_a_feature_that_is_masked_everywhere_becomes_its_bias():
    y, _ = train(X, mask=MASKS["per feature"])
    np.testing.assert_array_equal(y[..., 1], np.broadcast_to(BIAS[1], SHAPE[:-1]))


# Masks with fewer axes than the input


def test_a_mask_of_the_first_axes_leaves_out_the_same_positions_in_every_feature():
    mask = RNG.random(SHAPE[:2]) < 0.6
    y, stats = train(X, mask=mask)
    expected, *moments = reference.batch_norm(X, SCALE, BIAS, mask=mask[..., None, None])
    chex.assert_trees_all_close(
        (y, tuple(stats)), (expected, reference.update(*STATS, *moments, momentum=0.9)), **CLOSE
    )


def test_a_mask_is_accepted_if_and_only_if_all_the_readings_that_fit_are_equal():
    for rank, sizes in (1, (1, 2, 3)), (2, (1, 2, 3)), (3, (1, 2)):
        for shape in itertools.product(sizes, repeat=rank):
            x = jax.ShapeDtypeStruct(shape, np.float32)
            for mask_shape in (m for k in range(rank + 1) for m in itertools.product(sizes, repeat=k)):
                mask = RNG.random(mask_shape) < 0.5
                readings = [_placed(np.arange(mask.size), mask_shape, shape, at) for at in ("first", "last")]
                readings = {at.tobytes() for at in readings if at is not None}
                if len(readings) == 1:
                    (index,) = (np.frombuffer(reading, np.int64).reshape(shape) for reading in readings)
                    found = np.broadcast_to(checks.mask(mask, x), shape)
                    np.testing.assert_array_equal(found, mask.ravel()[index], f"{mask_shape} for {shape}")
                else:
                    with pytest.raises(ValueError, match="in two ways" if readings else "does not broadcast"):
                        checks.mask(mask, x)


def _placed(values, mask_shape, shape, at):
    """Broadcasts the values of a mask along the first or the last axes of a shape; None if they do not fit."""
    ones = (1,) * (len(shape) - len(mask_shape))
    values = values.reshape(mask_shape + ones if at == "first" else ones + mask_shape)
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        return None


def test_an_input_without_values_takes_a_mask_of_either_reading():
    assert checks.mask(np.ones(4, bool), jax.ShapeDtypeStruct((4, 0, 4), np.float32)).shape == (1, 1, 4)


def test_a_mask_of_a_batch_of_unknown_size_is_exported():
    (n,) = jax.export.symbolic_shape("n")
    moments = jax.jit(lambda x, mask: jaxbn.moments(x, mask=mask))
    shapes = jax.ShapeDtypeStruct((n, 5, 3), np.float32), jax.ShapeDtypeStruct((n,), bool)
    exported = jax.export.export(moments)(*shapes)
    x, mask = X[:, 0], np.arange(6) < 4
    chex.assert_trees_all_close(tuple(exported.call(x, mask)), reference.moments(x[:4]), **CLOSE)


# Batches that must not spoil the running statistics


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_a_batch_that_is_not_finite_leaves_the_statistics_of_that_feature_and_moves_the_others(value):
    x = X.copy()
    x[3, 2, 1, 1] = value  # the square of 1e30 overflows
    _, stats = train(x)
    _, expected = train(X)
    for got, old, new in zip(stats, STATS, expected, strict=True):
        assert got[1] == old[1]
        np.testing.assert_array_equal(got[::2], new[::2])


@pytest.mark.parametrize("counted", [False, True])
def test_a_batch_that_is_masked_everywhere_leaves_the_statistics(counted):
    stats = jaxbn.CountedStats(*STATS, np.array([2, 3, 4], np.int32)) if counted else STATS
    chex.assert_trees_all_equal(train(X, stats, mask=MASKS["nothing"])[1], stats)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (4, 0, 3)])
def test_an_empty_batch_leaves_the_statistics_and_has_an_empty_output(shape):
    y, stats = train(np.zeros(shape, np.float32))
    chex.assert_shape(y, shape)
    chex.assert_trees_all_equal(stats, STATS)


def test_an_empty_batch_has_gradients_of_zero():
    x = np.zeros((0, 3), np.float32)
    _, _, gradients = step(x, STATS, SCALE, BIAS, x)
    chex.assert_trees_all_equal(gradients, (x, np.zeros(3, np.float32), np.zeros(3, np.float32)))


def test_a_nan_in_one_feature_leaves_the_outputs_and_gradients_of_the_others():
    x = X.copy()
    x[3, 2, 1, 1] = np.nan
    (y, _, gradients), (expected_y, _, expected) = (step(x, STATS, SCALE, BIAS, DY) for x in (x, X))
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda a: a[..., ::2], (y, *g)) for y, g in ((y, gradients), (expected_y, expected)))
    )
