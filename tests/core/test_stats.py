"""Moments, the monoid that they form, and the running statistics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn._core.devices import Devices
from jaxbn._core.stats import pool
from tests import reference

ROUNDING = float(jnp.finfo(jnp.float32).eps)

X = np.random.default_rng(0).normal(2, 3, (6, 4, 5, 3)).astype(np.float32)
MASKS = {
    "none": None,
    "one per example": np.arange(6).reshape(6, 1, 1, 1) % 3 != 0,
    "one per position": np.random.default_rng(1).random((6, 4, 5, 1)) < 0.5,
    "one per feature": np.array([True, False, True]),
    "full, unequal per feature": np.random.default_rng(2).random((6, 4, 5, 3)) < [0.2, 0.5, 0.9],
    "integers": (np.arange(6).reshape(6, 1, 1, 1) % 2).astype(np.int32),
    "nothing": np.zeros((1, 1, 1, 1), bool),
}
AXES = {"last": -1, "second": 1, "two": (1, -1), "two, unsorted": (3, 0), "all": (0, 1, 2, 3)}


moments = jax.jit(jaxbn.moments, static_argnames=("axis",))
update = jax.jit(jaxbn.update_stats, static_argnames=("unbiased",))


def assert_moments(measured, expected):
    """Sums of about a hundred float32 numbers: a few dozen roundings."""
    chex.assert_trees_all_close(tuple(measured), expected, rtol=32 * ROUNDING, atol=32 * ROUNDING)


# Moments


@pytest.mark.parametrize("mask", MASKS)
def test_moments_are_those_of_the_positions_that_the_mask_admits(mask):
    assert_moments(moments(X, mask=MASKS[mask]), reference.moments(X, mask=MASKS[mask]))


@pytest.mark.parametrize("axis", AXES)
def test_moments_have_the_shape_of_the_feature_axes_and_average_over_the_others(axis):
    assert_moments(moments(X, axis=AXES[axis]), reference.moments(X, axis=AXES[axis]))


def test_masked_moments_equal_those_of_the_data_without_the_masked_rows():
    kept = np.array([True, False, True, True, False, True])
    masked = moments(X, mask=kept[:, None, None, None])
    chex.assert_trees_all_close(masked, moments(X[kept]), rtol=32 * ROUNDING)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_stands_in_masked_positions_does_not_reach_the_moments(value):
    mask = MASKS["full, unequal per feature"]
    expected = moments(np.where(mask, X, 0), mask=mask)
    chex.assert_trees_all_equal(moments(np.where(mask, X, value), mask=mask), expected)


def test_the_order_of_the_examples_does_not_change_the_moments():
    order = np.random.default_rng(3).permutation(6)
    chex.assert_trees_all_close(moments(X[order]), moments(X), rtol=8 * ROUNDING)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_an_empty_batch_has_moments_of_zero(shape):
    for part in moments(np.zeros(shape, np.float32)):
        np.testing.assert_array_equal(part, np.zeros(3))


@pytest.mark.slow
def test_the_count_is_exact_beyond_the_integers_that_float32_adds_one_by_one():
    mask = np.ones((2**24 + 3, 1), bool)  # adding ones in float32 stops at 2^24
    x = np.broadcast_to(np.zeros((), np.float16), mask.shape)
    assert moments(x, mask=mask).count[0] == np.float32(2**24 + 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_moments_of_reduced_precision_are_float32(dtype):
    chex.assert_type(list(moments(X.astype(dtype))), jnp.float32)


def test_moments_of_float64_are_float64():
    with jax.enable_x64(True):
        measured = moments(X.astype(np.float64))
        chex.assert_type(list(measured), jnp.float64)
    chex.assert_trees_all_close(tuple(measured), reference.moments(X), rtol=1e-14)


def test_a_complex_input_has_a_complex_mean_and_a_real_variance():
    x = X[..., 0] + 1j * X[..., 1] + (100 - 50j)
    measured = moments(x.astype(np.complex64))
    chex.assert_type(list(measured), [jnp.complex64, jnp.float32, jnp.float32])
    mean, var, count = reference.moments(x.astype(np.complex64))
    np.testing.assert_allclose(measured.mean, mean, rtol=8 * ROUNDING)
    np.testing.assert_allclose(measured.var, var, rtol=32 * ROUNDING)
    np.testing.assert_array_equal(measured.count, count)


# The monoid


sizes = st.lists(st.integers(0, 5), min_size=3, max_size=3)
seeds = st.integers(0, 2**32 - 1)
means = st.sampled_from([0.0, 1.0, 100.0, -1e4])
laws = settings(max_examples=25, deadline=None)


def batches(sizes, seed, mean):
    """Returns batches of some sizes, empty ones among them, of std 1 and means about the mean given."""
    rng = np.random.default_rng(seed)
    # One shape for all, so that nothing is compiled again: a mask makes the sizes.
    xs = [(rng.normal(size=(5, 2)) + mean + rng.normal(size=2)).astype(np.float32) for _ in sizes]
    return xs, [moments(x, mask=np.arange(5)[:, None] < size) for x, size in zip(xs, sizes, strict=True)]


def close(a, b, mean):
    """Float32 keeps a mean, and the difference of two, to a rounding of their size; squared it enters the variance."""
    error = 8 * ROUNDING * (1 + abs(mean))
    chex.assert_trees_all_close(a.mean, b.mean, atol=error)
    chex.assert_trees_all_close(a.var, b.var, rtol=8 * ROUNDING, atol=8 * error)
    chex.assert_trees_all_equal(a.count, b.count)


combine = jax.jit(jaxbn.combine)


@laws
@given(sizes, seeds, means)
def test_combine_gives_the_moments_of_the_batches_taken_together(sizes, seed, mean):
    xs, (a, b, c) = batches(sizes, seed, mean)
    together = np.concatenate([x[:size] for x, size in zip(xs, sizes, strict=True)])
    close(combine(combine(a, b), c), jaxbn.Moments(*reference.moments(together)), mean)


@laws
@given(sizes, seeds, means)
def test_combine_is_associative(sizes, seed, mean):
    _, (a, b, c) = batches(sizes, seed, mean)
    close(combine(combine(a, b), c), combine(a, combine(b, c)), mean)


@laws
@given(sizes, seeds, means)
def test_combine_is_commutative(sizes, seed, mean):
    _, (a, b, _) = batches(sizes, seed, mean)
    close(combine(a, b), combine(b, a), mean)


@laws
@given(sizes, seeds, means)
def test_the_moments_of_an_empty_batch_are_the_identity_of_combine(sizes, seed, mean):
    _, (a, *_) = batches(sizes, seed, mean)
    empty = moments(np.zeros((5, 2), np.float32), mask=np.zeros((5, 1), bool))
    chex.assert_trees_all_equal(combine(empty, a), a)
    chex.assert_trees_all_equal(combine(a, empty), a)


def test_moments_of_no_values_are_an_identity_with_any_finite_mean():
    nothing, some = (jaxbn.Moments(*(jnp.array([v]) for v in values)) for values in ((1e8, 3.0, 0.0), (0.1, 2.0, 5.0)))
    chex.assert_trees_all_equal(combine(nothing, some), some)
    chex.assert_trees_all_equal(combine(some, nothing), some)


@pytest.mark.slow
@laws
@given(sizes, seeds, means)
def test_pool_equals_folding_combine(sizes, seed, mean):
    _, (a, b, c) = batches(sizes, seed, mean)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), a, b, c)
    close(jax.jit(functools.partial(pool, devices=Devices()))(stacked), combine(combine(a, b), c), mean)


def test_combine_keeps_a_variance_that_is_tiny_compared_to_the_mean():
    a, b = (jaxbn.Moments(*(jnp.array([v]) for v in (1e6, 1e-6, count))) for count in (3.0, 5.0))
    np.testing.assert_allclose(combine(a, b).var, 1e-6, rtol=4 * ROUNDING)


def test_combine_of_complex_moments_is_that_of_the_batches_together():
    x = (X[..., 0] + 1j * X[..., 1]).reshape(6, -1).astype(np.complex64)
    combined = combine(moments(x[:3]), moments(x[3:]))
    assert_moments(combined, reference.moments(x))


# Running statistics


def test_statistics_start_at_mean_zero_and_variance_one_in_float32():
    stats = jaxbn.init_stats((2, 3))
    chex.assert_trees_all_equal(stats, jaxbn.BatchStats(np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)))
    chex.assert_type(list(stats), jnp.float32)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0, 0.0, 0.9, 0.99, 1.0])
def test_update_moves_the_statistics_toward_the_batch_by_one_minus_momentum(momentum, unbiased):
    stats = jaxbn.BatchStats(jnp.array([1.0, -2.0, 3.0]), jnp.array([4.0, 0.5, 6.0]))
    updated = update(stats, moments(X), momentum=momentum, unbiased=unbiased)
    expected = reference.update(*stats, *reference.moments(X), momentum=momentum, unbiased=unbiased)
    chex.assert_trees_all_close(tuple(updated), expected, rtol=32 * ROUNDING)


def test_one_value_has_no_unbiased_variance_and_its_biased_one_is_kept():
    single = jaxbn.Moments(jnp.array([3.0]), jnp.array([0.0]), jnp.array([1.0]))
    updated = update(jaxbn.init_stats(1), single, momentum=0.5, unbiased=True)
    np.testing.assert_array_equal(updated.var, [0.5])


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("part", ["mean", "var", "count"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_without_finite_moments_keeps_its_statistics_and_the_others_move(part, value, counted):
    good = jaxbn.Moments(*(jnp.array([2.0, 2.0]) for _ in range(3)))
    bad = good._replace(**{part: jnp.array([0.0 if part == "count" else value, 2.0])})
    stats = jaxbn.init_stats(2, counted=counted)
    updated = update(stats, bad, momentum=0.5)
    expected = update(stats, good, momentum=0.5)
    chex.assert_trees_all_equal(jax.tree.map(lambda s: s[0], updated), jax.tree.map(lambda s: s[0], stats))
    chex.assert_trees_all_equal(jax.tree.map(lambda s: s[1], updated), jax.tree.map(lambda s: s[1], expected))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updated_statistics_are_at_least_float32(dtype):
    stats = jaxbn.BatchStats(jnp.zeros(3, dtype), jnp.ones(3, dtype))
    chex.assert_type(list(update(stats, moments(X), momentum=0.9)), jnp.float32)


def test_half_precision_statistics_are_refused_at_the_start():
    with pytest.raises(ValueError, match="dtype must be float32 or wider, got bfloat16: a running average in half"):
        jaxbn.init_stats(3, dtype=jnp.bfloat16)


@jax.jit
def accumulate(stats, batches, momentum):
    def step(stats, x):
        return jaxbn.update_stats(stats, jaxbn.moments(x), momentum=momentum), None

    return jax.lax.scan(step, stats, batches)[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64])
def test_statistics_never_drift_in_dtype_over_a_scan(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        batches = jnp.asarray(X.reshape(6, 20, 3), dtype)
        stats = jaxbn.init_stats(3, counted=True)
        chex.assert_trees_all_equal_dtypes(accumulate(stats, batches, 0.9), stats)


def test_float64_statistics_stay_float64_over_a_scan():
    with jax.enable_x64(True):
        stats = jaxbn.BatchStats(jnp.zeros(3, jnp.float64), jnp.ones(3, jnp.float64))
        stats = accumulate(stats, jnp.asarray(X.reshape(6, 20, 3), jnp.float64), 0.9)
        chex.assert_type(list(stats), jnp.float64)
    mean, var = np.zeros(3), np.ones(3)
    for batch in X.reshape(6, 20, 3):
        mean, var = reference.update(mean, var, *reference.moments(batch), momentum=0.9)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(stats.var, var, rtol=1e-13)


# Statistics that count


def adam_average(values, momentum):
    """Returns the average of Kingma and Ba 2015, section 3, in the form of its sum."""
    weights = (1 - momentum) * momentum ** np.arange(len(values) - 1, -1, -1)
    return (weights[:, None] * values).sum(0) / (1 - momentum ** len(values))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
def test_counted_statistics_are_averages_with_adams_correction(momentum):
    batches = X.reshape(6, 20, 3)
    stats = accumulate(jaxbn.init_stats(3, counted=True), batches, momentum)
    means, variances, _ = zip(*(reference.moments(x) for x in batches), strict=True)
    # A momentum known only at run time is a float32, and one minus it keeps few digits.
    rtol = 64 * ROUNDING / (1 - momentum)
    np.testing.assert_allclose(stats.mean, adam_average(np.array(means), momentum), rtol=rtol)
    np.testing.assert_allclose(stats.var, adam_average(np.array(variances), momentum), rtol=rtol)


@pytest.mark.parametrize("momentum", [None, 1.0])
def test_without_forgetting_counted_statistics_are_plain_averages(momentum):
    batches = X.reshape(6, 20, 3)
    stats = accumulate(jaxbn.init_stats(3, counted=True), batches, momentum)
    means, variances, _ = zip(*(reference.moments(x) for x in batches), strict=True)
    np.testing.assert_allclose(stats.mean, np.mean(means, 0), rtol=32 * ROUNDING)
    np.testing.assert_allclose(stats.var, np.mean(variances, 0), rtol=32 * ROUNDING)
    np.testing.assert_array_equal(stats.steps, [6, 6, 6])


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0, None])
def test_the_first_batch_alone_makes_the_counted_statistics(momentum):
    stats = update(jaxbn.init_stats(3, counted=True), moments(X), momentum=momentum)
    mean, var, _ = reference.moments(X)
    rtol = 32 * ROUNDING / (1 - (momentum or 0) if momentum != 1 else 1)
    np.testing.assert_allclose(stats.mean, mean, rtol=rtol)
    np.testing.assert_allclose(stats.var, var, rtol=rtol)


@pytest.mark.parametrize("momentum", [0.98, 0.999, 0.999999, 0.9999999])
def test_counted_statistics_keep_their_digits_at_a_momentum_near_1(momentum):
    stats = jaxbn.init_stats(3, counted=True)
    batches = X.reshape(6, 20, 3)
    for x in batches:
        stats = jaxbn.update_stats(stats, moments(x), momentum=momentum)
    means, variances, _ = zip(*(reference.moments(x) for x in batches), strict=True)
    np.testing.assert_allclose(stats.mean, adam_average(np.array(means), momentum), rtol=64 * ROUNDING)
    np.testing.assert_allclose(stats.var, adam_average(np.array(variances), momentum), rtol=64 * ROUNDING)


def counted_stats(mean, var, steps):
    return jaxbn.CountedStats(jnp.float32([mean]), jnp.float32([var]), jnp.array([steps]))


@pytest.mark.parametrize("steps", [1, 2, 1_000, 100_000, 1_000_000])
@pytest.mark.parametrize("momentum", [0.9, 0.999, 0.99999, None])
def test_a_batch_has_its_weight_to_float32_however_many_came_before(momentum, steps):
    weight = 1 / steps if momentum is None else (1 - momentum) / (1 - momentum**steps)
    batch = jaxbn.Moments(jnp.ones(1), jnp.ones(1), jnp.full(1, 8.0))
    updated = jaxbn.update_stats(counted_stats(0.0, 0.0, steps - 1), batch, momentum=momentum)
    np.testing.assert_allclose(updated.mean, [weight], rtol=4 * ROUNDING)
    np.testing.assert_allclose(updated.var, [weight], rtol=4 * ROUNDING)


@pytest.mark.parametrize("momentum", [0.99999, None])
def test_batches_with_the_moments_of_the_counted_statistics_leave_them(momentum):
    # If the weights of old and new did not add up to 1, every step would move the average by the same rounding.
    for mean, var in np.random.default_rng(0).uniform(1, 2, (8, 2)):
        stats = counted_stats(mean, var, 99_999)
        batch = jaxbn.Moments(stats.mean, stats.var, jnp.full(1, 8.0))
        updated = jaxbn.update_stats(stats, batch, momentum=momentum)
        chex.assert_trees_all_equal((updated.mean, updated.var), (stats.mean, stats.var))


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.98, 0.99, 0.995, 0.999, 0.999999, None])
def test_the_counted_variance_of_constant_data_is_not_negative(momentum):
    stats = jaxbn.init_stats(1, counted=True)
    for _ in range(5):
        stats = jaxbn.update_stats(stats, moments(np.ones((8, 1), np.float32)), momentum=momentum)
        assert stats.var[0] >= 0


@pytest.mark.parametrize("momentum", [0.9, None])
def test_counted_statistics_skip_batches_that_are_not_finite_feature_by_feature(momentum):
    spoiled = X.reshape(6, 20, 3).copy()
    spoiled[0, 3, 1], spoiled[4, 7, 1] = np.nan, np.inf

    start = jaxbn.init_stats(3, counted=True)
    runs = (spoiled, spoiled[[1, 2, 3, 5]], X.reshape(6, 20, 3))
    stats, skipped, whole = (accumulate(start, batches, momentum) for batches in runs)
    np.testing.assert_array_equal(stats.steps, [6, 4, 6])
    for got, without, others in zip(stats, skipped, whole, strict=True):
        assert got[1] == without[1]
        np.testing.assert_array_equal(got[::2], others[::2])
