"""Ghost batch norm, batch renormalization and shifted batch norm, against their formulas."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import reference

ROUNDING = float(jnp.finfo(jnp.float32).eps)
CLOSE = {"rtol": 32 * ROUNDING, "atol": 32 * ROUNDING}  # of values near 1, after sums of about a hundred numbers
SUMS = {"rtol": 64 * ROUNDING, "atol": 64 * ROUNDING}  # of such sums themselves

SHAPE = (6, 4, 5, 3)
RNG = np.random.default_rng(0)
# Examples of different means, so that the groups differ.
X = (RNG.normal(size=SHAPE) + RNG.normal(0, 2, (6, 1, 1, 3))).astype(np.float32)
DY = RNG.normal(size=SHAPE).astype(np.float32)
SCALE, BIAS = np.array([0.5, 1.0, 2.0], np.float32), np.array([0.0, -1.0, 3.0], np.float32)
MASK = RNG.random(SHAPE) < [0.3, 0.6, 0.9]
MASKS = {"all": None, "full": MASK, "per example": MASK[:, :1, :1, :1], "per feature": np.array([True, False, True])}


# Ghost batch norm


@functools.partial(jax.jit, static_argnames=("group_size", "axis"))
def ghost(x, scale, bias, dy, *, group_size, axis=-1, mask=None):
    def apply(x, scale, bias):
        return jaxbn.ghost_normalize(x, scale, bias, group_size=group_size, axis=axis, mask=mask)

    y, vjp, moments = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, moments, vjp(dy)


@pytest.mark.parametrize("mask", MASKS)
def test_ghost_groups_are_normalized_separately(mask):
    mask = MASKS[mask]
    y, _, _ = ghost(X, SCALE, BIAS, DY, group_size=2, mask=mask)
    np.testing.assert_allclose(y, reference.ghost(X, SCALE, BIAS, group_size=2, mask=mask), **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
def test_ghost_moments_are_those_of_the_whole_batch(mask):
    mask = MASKS[mask]
    _, moments, _ = ghost(X, SCALE, BIAS, DY, group_size=2, mask=mask)
    chex.assert_trees_all_close(tuple(moments), reference.moments(X, mask=mask), **CLOSE)


@pytest.mark.parametrize("mask", MASKS)
def test_ghost_gradients_are_those_of_the_groups(mask):
    mask = MASKS[mask]
    _, _, (dx, dscale, dbias) = ghost(X, SCALE, BIAS, DY, group_size=2, mask=mask)
    whole = np.broadcast_to(True if mask is None else mask, SHAPE)
    parts = [slice(i, i + 2) for i in (0, 2, 4)]
    groups = [reference.gradients(X[p], SCALE, BIAS, DY[p], mask=whole[p]) for p in parts]
    expected_dx, dscales, dbiases = zip(*groups, strict=True)
    np.testing.assert_allclose(dx, np.concatenate(expected_dx), **SUMS)
    np.testing.assert_allclose(dscale, sum(dscales), **SUMS)
    np.testing.assert_allclose(dbias, sum(dbiases), **SUMS)


@pytest.mark.parametrize("axis", [1, (1, 3)])
def test_ghost_groups_work_with_features_on_any_axis_but_the_first(axis):
    features = tuple(SHAPE[a] for a in np.atleast_1d(axis))
    scale, bias = RNG.normal(1, 0.3, features).astype(np.float32), RNG.normal(size=features).astype(np.float32)
    y, moments, _ = ghost(X, scale, bias, DY, group_size=3, axis=axis)
    np.testing.assert_allclose(y, reference.ghost(X, scale, bias, group_size=3, axis=axis), **CLOSE)
    chex.assert_trees_all_close(tuple(moments), reference.moments(X, axis=axis), **CLOSE)


def test_a_single_ghost_group_is_batch_norm():
    y, moments, _ = ghost(X, SCALE, BIAS, DY, group_size=6)
    expected_y, expected = jax.jit(jaxbn.batch_normalize)(X, SCALE, BIAS)
    chex.assert_trees_all_close((y, moments), (expected_y, expected), **CLOSE)


def test_ghost_groups_are_exact_at_a_large_mean():
    x = X + np.float32(1e4)
    y, moments, _ = ghost(x, SCALE, BIAS, DY, group_size=2)
    np.testing.assert_allclose(y, reference.ghost(x, SCALE, BIAS, group_size=2), **CLOSE)
    # The groups' means, some 2 apart, are floats near 1e4: half a rounding off, which the square of a distance doubles.
    np.testing.assert_allclose(moments.var, reference.moments(x)[1], atol=2 * 2 * 1e4 * ROUNDING / 2)


def test_as_a_method_ghost_batch_norm_updates_the_statistics_with_the_whole_batch():
    method = functools.partial(jaxbn.ghost_normalize, group_size=2)
    train = functools.partial(jaxbn.batch_norm, use_running_average=False, momentum=0.9, unbiased=True, method=method)
    y, stats = jax.jit(train)(X, jaxbn.init_stats(3), SCALE, BIAS)
    expected = reference.update(np.zeros(3), np.ones(3), *reference.moments(X), momentum=0.9, unbiased=True)
    np.testing.assert_allclose(y, reference.ghost(X, SCALE, BIAS, group_size=2), **CLOSE)
    chex.assert_trees_all_close(tuple(stats), expected, **CLOSE)


# Batch renormalization

STATS = jaxbn.BatchStats(np.array([1.0, -2.0, 0.1], np.float32), np.array([4.0, 0.5, 6.0], np.float32))
LIMITS = [(3.0, 5.0), (1.1, 0.2), (1.0, 0.0), (1e6, 1e6)]


@jax.jit
def renorm(x, scale, bias, dy, stats, r_max, d_max):
    def apply(x, scale, bias):
        return jaxbn.batch_renormalize(x, scale, bias, r_max=r_max, d_max=d_max, stats=stats)

    y, vjp, moments = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, moments, vjp(dy)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_renorm_follows_the_formulas_of_the_paper(r_max, d_max):
    y, moments, _ = renorm(X, SCALE, BIAS, DY, STATS, r_max, d_max)
    expected, r, d = reference.renorm(X, *STATS, SCALE, BIAS, r_max=r_max, d_max=d_max)
    np.testing.assert_allclose(y, expected, **CLOSE)
    chex.assert_trees_all_close(tuple(moments), reference.moments(X), **CLOSE)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_renorm_differentiates_r_and_d_as_constants(r_max, d_max):
    _, _, (dx, dscale, dbias) = renorm(X, SCALE, BIAS, DY, STATS, r_max, d_max)
    expected = reference.renorm_gradients(X, *STATS, SCALE, BIAS, DY, r_max=r_max, d_max=d_max)
    chex.assert_trees_all_close((dx, dscale, dbias), expected, **SUMS)


def test_renorm_with_limits_of_one_and_zero_is_batch_norm():
    y, moments, _ = renorm(X, SCALE, BIAS, DY, STATS, 1.0, 0.0)
    expected = jax.jit(jaxbn.batch_normalize)(X, SCALE, BIAS)
    chex.assert_trees_all_close((y, moments), expected, rtol=4 * ROUNDING, atol=4 * ROUNDING)


def test_renorm_without_binding_limits_gives_what_evaluation_gives():
    y, _, _ = renorm(X, SCALE, BIAS, DY, STATS, 1e6, 1e6)
    np.testing.assert_allclose(y, reference.normalize(X, *STATS, SCALE, BIAS), **CLOSE)


def test_renorm_is_exact_at_a_large_mean():
    x = X + np.float32(1e4)
    stats = STATS._replace(mean=STATS.mean + np.float32(1e4))
    y, _, _ = renorm(x, SCALE, BIAS, DY, stats, 3.0, 5.0)
    expected, _, _ = reference.renorm(x, *stats, SCALE, BIAS, r_max=3.0, d_max=5.0)
    # d is the difference of two means that are floats near 1e4, each a rounding of 1e4 off.
    error = 1e4 * ROUNDING * (SCALE / np.sqrt(STATS.var)).max()
    np.testing.assert_allclose(y, expected, rtol=32 * ROUNDING, atol=error)


def test_renorm_leaves_masked_positions_out():
    padded = np.concatenate([X, np.full((2, *SHAPE[1:]), np.nan, np.float32)])
    mask = np.arange(8)[:, None, None, None] < 6
    y, moments = jax.jit(functools.partial(jaxbn.batch_renormalize, stats=STATS, mask=mask))(padded, SCALE, BIAS)
    expected, _, _ = reference.renorm(X, *STATS, SCALE, BIAS, r_max=3.0, d_max=5.0)
    np.testing.assert_allclose(y[:6], expected, **CLOSE)
    assert np.isfinite(y).all()
    chex.assert_trees_all_close(tuple(moments), reference.moments(X), **CLOSE)


def test_as_a_method_renorm_compares_with_the_running_statistics_before_the_batch():
    train = functools.partial(jaxbn.batch_norm, use_running_average=False, momentum=0.9, method=jaxbn.batch_renormalize)
    y, stats = jax.jit(train)(X, STATS, SCALE, BIAS)
    expected, _, _ = reference.renorm(X, *STATS, SCALE, BIAS, r_max=3.0, d_max=5.0)
    np.testing.assert_allclose(y, expected, **CLOSE)
    chex.assert_trees_all_close(tuple(stats), reference.update(*STATS, *reference.moments(X), momentum=0.9), **CLOSE)


# Both

METHODS = {
    "ghost": functools.partial(jaxbn.ghost_normalize, group_size=3),
    "renorm": functools.partial(jaxbn.batch_renormalize, stats=STATS),
}


@pytest.mark.parametrize("parameters", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("method", METHODS)
def test_variants_return_the_dtype_to_which_input_and_parameters_promote_and_float32_moments(method, parameters):
    x = jnp.asarray(X, jnp.bfloat16)
    given = () if parameters is None else tuple(jnp.asarray(p, parameters) for p in (SCALE, BIAS))
    y, moments = jax.eval_shape(METHODS[method], x, *given)
    assert y.dtype == (jnp.float32 if parameters == jnp.float32 else jnp.bfloat16)
    assert {m.dtype for m in moments} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("method", METHODS)
def test_variants_run_under_vmap(method):
    x = np.stack([X, 2 * X - 1])
    y, moments = jax.jit(jax.vmap(lambda x: METHODS[method](x, SCALE, BIAS)))(x)
    for i in range(2):
        alone = jax.jit(METHODS[method])(x[i], SCALE, BIAS)
        chex.assert_trees_all_close((y[i], jax.tree.map(lambda m, i=i: m[i], moments)), alone, **CLOSE)


# Shifted batch norm


@jax.jit
def shifted(x, scale, bias, dy, mean, mask=None):
    def apply(x, scale, bias):
        stats = jaxbn.BatchStats(mean, jnp.ones_like(mean))
        return jaxbn.shifted_normalize(x, scale, bias, stats=stats, mask=mask)

    y, vjp, moments = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, moments, vjp(dy)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mean", [0, 1e4])
def test_shifted_batch_norm_is_batch_norm_where_the_running_mean_is_near(mean, mask):
    mask, x = MASKS[mask], (X + mean).astype(np.float32)
    near = (reference.moments(x, mask=mask)[0] + 0.5).astype(np.float32)
    y, moments, gradients = shifted(x, SCALE, BIAS, DY, near, mask)
    np.testing.assert_allclose(y, reference.batch_norm(x, SCALE, BIAS, mask=mask)[0], **CLOSE)
    chex.assert_trees_all_close(tuple(moments), reference.moments(x, mask=mask), **CLOSE)
    chex.assert_trees_all_close(gradients, tuple(reference.gradients(x, SCALE, BIAS, DY, mask=mask)), **SUMS)


@pytest.mark.parametrize("distance", [0, 1, 10, 100])  # in standard deviations
def test_shifted_batch_norm_loses_as_many_digits_as_the_squared_distance_of_the_running_mean(distance):
    x = np.random.default_rng(1).normal(size=(4096, 3)).astype(np.float32)
    _, moments = jax.jit(jaxbn.shifted_normalize)(x, stats=jaxbn.BatchStats(jnp.full(3, float(distance)), jnp.ones(3)))
    # Half a dozen roundings of the sums about the running mean.
    np.testing.assert_allclose(moments.var, x.var(0, dtype=np.float64), rtol=6 * ROUNDING * (1 + distance**2))


def test_the_running_mean_has_no_gradient_in_shifted_batch_norm():
    def loss(mean):
        return jaxbn.shifted_normalize(X, stats=jaxbn.BatchStats(mean, jnp.ones(3)))[0].sum()

    assert (jax.grad(loss)(jnp.ones(3)) == 0).all()


def test_shifted_batch_norm_over_devices_is_that_of_the_whole_batch_with_one_collective():
    stats = jaxbn.BatchStats(jnp.full(3, 50.0), jnp.ones(3))  # so far off that another method would add twice

    def apply(x):
        return jaxbn.shifted_normalize(x, stats=stats, axis_name="d")

    parts = jax.vmap(apply, axis_name="d")(X.reshape(3, 2, *SHAPE[1:]))
    whole = jaxbn.shifted_normalize(X, stats=stats)
    np.testing.assert_allclose(parts[0].reshape(SHAPE), whole[0], rtol=0, atol=1e-3)
    text = str(jax.make_jaxpr(apply, axis_env=[("d", 3)])(X[:2]))
    assert text.count("psum") == 1


@pytest.mark.parametrize("mean", [np.float16, np.float32, np.complex64])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.complex64])
def test_shifted_batch_norm_takes_a_running_mean_of_any_dtype(dtype, mean):
    def loss(x):
        stats = jaxbn.BatchStats(jnp.ones(3, mean), jnp.ones(3))
        y, moments = jaxbn.shifted_normalize(x, stats=stats, mask=jnp.ones(SHAPE, bool))
        return abs(y).sum().real.astype(jnp.float32), moments

    gradient, moments = jax.eval_shape(jax.grad(loss, has_aux=True), jnp.asarray(X, dtype))
    assert gradient.dtype == dtype
    assert (moments.mean.dtype, moments.var.dtype) == (
        np.complex64 if dtype == np.complex64 else np.float32,
        np.float32,
    )
