"""Normalisation in evaluation and in training, masks, batches that spoil statistics, and the transformations of JAX."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.nnx
from tests import reference

ROUNDING = float(jnp.finfo(jnp.float32).eps)
CLOSE = {"rtol": 32 * ROUNDING, "atol": 32 * ROUNDING}  # of values near 1, after sums of about a hundred numbers
SUMS = {"rtol": 64 * ROUNDING, "atol": 64 * ROUNDING}  # of such sums themselves


@functools.partial(jax.jit, static_argnames=("axis", "unbiased"))
def step(x, stats, scale, bias, dy, *, axis=-1, mask=None, momentum=0.9, unbiased=False):
    """Returns y, the new statistics, and the gradients of vdot(y, dy) in x, scale and bias."""

    def apply(x, scale, bias):
        options = {"axis": axis, "mask": mask, "momentum": momentum, "unbiased": unbiased}
        return jaxbn.batch_norm(x, stats, scale, bias, use_running_average=False, **options)

    y, vjp, stats = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, stats, vjp(dy)


normalize = jax.jit(jaxbn.normalize, static_argnames=("axis",))
evaluate = jax.jit(functools.partial(jaxbn.batch_norm, use_running_average=True))


def sample(shape, axis=-1, seed=0):
    """Returns x, scale, bias and the cotangent of y."""
    rng = np.random.default_rng(seed)
    features = tuple(shape[a] for a in np.atleast_1d(axis))
    arrays = rng.normal(2, 3, shape), rng.normal(1, 0.3, features), rng.normal(0, 1, features), rng.normal(size=shape)
    return tuple(a.astype(np.float32) for a in arrays)


SHAPE = (6, 4, 5, 3)
X, SCALE, BIAS, DY = sample(SHAPE)
STATS = jaxbn.BatchStats(np.array([1.0, -2.0, 3.0], np.float32), np.array([4.0, 0.5, 6.0], np.float32))
ROWS = np.array([True, False, True, True, False, True])
MASKS = {
    "one per example": ROWS[:, None, None, None],
    "per feature": np.array([True, False, True]),
    "full, unequal per feature": np.random.default_rng(2).random(SHAPE) < [0.2, 0.5, 0.9],
    "one example": np.arange(6)[:, None, None, None] == 2,
    "nothing": np.zeros((6, 1, 1, 1), bool),
}
LAYOUTS = [((40, 3), -1), (SHAPE, 1), (SHAPE, (1, 3)), ((4, 3, 2, 2, 3), -1)]


def train(x, stats=STATS, scale=SCALE, bias=BIAS, **options):
    """Returns y and the new statistics."""
    return step(x, stats, scale, bias, np.ones_like(x), **options)[:2]


# Training and evaluation


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_training_normalises_each_feature_with_its_own_moments(shape, axis):
    x, scale, bias, dy = sample(shape, axis)
    y, moments, _ = step(x, jaxbn.init_stats(scale.shape), scale, bias, dy, axis=axis, momentum=0.0)
    expected, *expected_moments, _ = reference.batch_norm(x, scale, bias, axis=axis)
    chex.assert_trees_all_close((y, tuple(moments)), (expected, tuple(expected_moments)), **CLOSE)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_the_gradients_are_those_of_the_paper(shape, axis):
    x, scale, bias, dy = sample(shape, axis)
    _, _, gradients = step(x, jaxbn.init_stats(scale.shape), scale, bias, dy, axis=axis, momentum=0.0)
    chex.assert_trees_all_close(gradients, reference.gradients(x, scale, bias, dy, axis=axis), **SUMS)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_evaluation_normalises_with_the_statistics_given(shape, axis):
    x, scale, bias, _ = sample(shape, axis)
    y = normalize(x, bias, scale**2, scale, bias, axis=axis)
    np.testing.assert_allclose(y, reference.normalize(x, bias, scale**2, scale, bias, axis=axis), **CLOSE)


def test_the_order_in_which_feature_axes_are_named_does_not_matter():
    x, scale, bias, _ = sample(SHAPE, (1, 3))
    programs = (jax.make_jaxpr(functools.partial(jaxbn.batch_normalize, axis=axis))(x) for axis in ((1, 3), (-1, 1)))
    assert len({str(program) for program in programs}) == 1


@pytest.mark.parametrize("left_out", ["scale", "bias", "both"])
def test_no_scale_is_a_scale_of_one_and_no_bias_one_of_zero(left_out):
    given = (None if left_out != "bias" else SCALE), (None if left_out != "scale" else BIAS)
    explicit = (SCALE if left_out == "bias" else np.ones(3)), (BIAS if left_out == "scale" else np.zeros(3))
    y, _ = jax.jit(jaxbn.batch_normalize)(X, *given)
    np.testing.assert_allclose(y, reference.batch_norm(X, *explicit)[0], **CLOSE)
    np.testing.assert_allclose(normalize(X, *STATS, *given), reference.normalize(X, *STATS, *explicit), **CLOSE)


def test_epsilon_is_added_to_the_variance():
    y, _ = jax.jit(functools.partial(jaxbn.batch_normalize, epsilon=10.0))(X)
    np.testing.assert_allclose(y, reference.batch_norm(X, epsilon=10.0)[0], **CLOSE)
    y = jax.jit(functools.partial(jaxbn.normalize, epsilon=10.0))(X, *STATS)
    np.testing.assert_allclose(y, reference.normalize(X, *STATS, epsilon=10.0), **CLOSE)


def test_batch_norm_in_training_is_batch_normalize_and_an_update_of_the_statistics():
    y, stats = train(X, momentum=0.9, unbiased=True)
    expected_y, mean, var, count = reference.batch_norm(X, SCALE, BIAS)
    expected_stats = reference.update(*STATS, mean, var, count, momentum=0.9, unbiased=True)
    chex.assert_trees_all_close((y, tuple(stats)), (expected_y, expected_stats), **CLOSE)


def test_the_output_of_training_does_not_depend_on_the_running_statistics():
    other = jaxbn.BatchStats(STATS.mean + np.float32(np.nan), STATS.var * np.float32(1e6))
    chex.assert_trees_all_equal(train(X)[0], train(X, other)[0])


def test_batch_norm_in_evaluation_is_normalize_and_leaves_the_statistics():
    y, stats = evaluate(X, STATS, SCALE, BIAS)
    chex.assert_trees_all_equal(y, normalize(X, *STATS, SCALE, BIAS))
    chex.assert_trees_all_equal(stats, STATS)


def test_evaluation_accepts_statistics_that_count_and_leaves_their_number():
    stats = jaxbn.CountedStats(*STATS, np.array([7, 7, 7], np.int32))
    y, same = evaluate(X, stats)
    chex.assert_trees_all_equal(y, normalize(X, *STATS))
    chex.assert_trees_all_equal(same, stats)


# Types


@pytest.mark.parametrize("parameters", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_output_has_the_dtype_to_which_input_and_parameters_promote(dtype, parameters):
    x = jnp.asarray(X, dtype)
    scale, bias = (None, None) if parameters is None else (jnp.asarray(p, parameters) for p in (SCALE, BIAS))
    expected = dtype if parameters is None else jnp.result_type(dtype, parameters)
    trained, evaluated = (
        jax.eval_shape(functools.partial(jaxbn.batch_norm, use_running_average=average), x, STATS, scale, bias)[0]
        for average in (False, True)
    )
    assert (trained.dtype, evaluated.dtype) == (expected, expected)


def test_evaluation_in_bfloat16_is_rounded_once():
    x = jnp.asarray(X, jnp.bfloat16)
    exact = reference.normalize(x, *STATS)
    half = float(jnp.finfo(jnp.bfloat16).eps) / 2
    assert (abs(np.float64(normalize(x, *STATS)) - exact) <= half * abs(exact) + 32 * ROUNDING).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_scan_over_steps_trains_with_any_dtype_of_input(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        batches = jnp.asarray(X.reshape(6, 20, 3), dtype)
        stats, ys = jax.jit(run)(jaxbn.init_stats(3), batches)
        chex.assert_type(list(stats), jnp.float32)
        chex.assert_type(ys, dtype)
        mean, var = np.zeros(3), np.ones(3)
        for batch in np.float64(batches):
            mean, var = reference.update(mean, var, *reference.moments(batch), momentum=0.9)
    chex.assert_trees_all_close(tuple(stats), (mean, var), **CLOSE)


def run(stats, batches):
    def step(stats, x):
        y, stats = jaxbn.batch_norm(x, stats, use_running_average=False, momentum=0.9)
        return stats, y

    return jax.lax.scan(step, stats, batches)


def test_complex_inputs_are_normalised_by_their_distance_from_the_mean():
    x = (X[..., :2] + 1j * X[..., 1:]).astype(np.complex64)
    complex_train = jax.jit(functools.partial(jaxbn.batch_norm, use_running_average=False, momentum=0.9))
    y, stats = complex_train(x, jaxbn.init_stats(2), SCALE[:2], BIAS[:2])
    expected, mean, var, count = reference.batch_norm(x, SCALE[:2], BIAS[:2])
    np.testing.assert_allclose(y, expected, **CLOSE)
    chex.assert_type([y, *stats], [jnp.complex64, jnp.complex64, jnp.float32])
    expected_stats = reference.update(np.zeros(2), np.ones(2), mean, var, count, momentum=0.9)
    chex.assert_trees_all_close(tuple(stats), expected_stats, **CLOSE)
    np.testing.assert_allclose(evaluate(x, stats)[0], reference.normalize(x, *expected_stats), **CLOSE)


@pytest.mark.parametrize("method", [jaxbn.batch_normalize, functools.partial(jaxbn.ghost_normalize, group_size=3)])
@pytest.mark.parametrize("mask", [None, MASKS["full, unequal per feature"]], ids=["all", "mask"])
def test_nothing_relies_on_implicit_promotion_of_rank_or_dtype(mask, method):
    def loss(x, scale, bias, stats):
        y, stats = jaxbn.batch_norm(
            x, stats, scale, bias, use_running_average=False, mask=mask, unbiased=True, method=method
        )
        y, stats = jaxbn.batch_norm(y, stats, scale, bias, use_running_average=True, mask=mask)
        return jnp.vdot(y, DY), stats

    arrays = jax.tree.map(jnp.asarray, (X, SCALE, BIAS))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for counted in (False, True):
            jax.make_jaxpr(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays, jaxbn.init_stats(3, counted=counted))


def test_batch_renormalize_does_not_rely_on_implicit_promotion_either():
    stats = jax.tree.map(jnp.asarray, STATS)
    arrays = jax.tree.map(jnp.asarray, (X, SCALE, BIAS))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.make_jaxpr(functools.partial(jaxbn.batch_renormalize, stats=stats))(*arrays)


# Masks


@pytest.mark.parametrize("mask", MASKS)
def test_masked_positions_are_normalised_with_the_moments_of_the_others(mask):
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
    spoilt = np.where(mask, X, np.float32(value))
    clean = np.where(mask, X, np.float32(0))
    *results, (dx, *parameters) = step(spoilt, STATS, SCALE, BIAS, DY, mask=mask)
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


# Transformations


def test_without_jit_training_and_evaluation_give_the_same():
    y, stats = jaxbn.batch_norm(X, STATS, SCALE, BIAS, use_running_average=False, momentum=0.9)
    chex.assert_trees_all_close((y, stats), train(X), rtol=8 * ROUNDING, atol=8 * ROUNDING)
    y = jaxbn.normalize(X, *STATS, SCALE, BIAS)
    chex.assert_trees_all_close(y, normalize(X, *STATS, SCALE, BIAS), rtol=8 * ROUNDING, atol=8 * ROUNDING)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_vmap_over_models_equals_one_after_the_other(mean):
    x, scale, bias, _ = (np.stack(arrays) for arrays in zip(*(sample((40, 3), seed=s) for s in range(3)), strict=True))
    x[1] += np.float32(mean)  # one model in the centred branch, the others not
    stats = jax.tree.map(lambda s: np.stack([s, s + 1, s + 2]), STATS)
    together = jax.jit(jax.vmap(functools.partial(jaxbn.batch_norm, use_running_average=False)))(x, stats, scale, bias)
    for i in range(3):
        alone = train(x[i], jax.tree.map(lambda s, i=i: s[i], stats), scale[i], bias[i], momentum=0.99)
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], together), alone, **CLOSE)


# Devices, in outline


def loss(x, scale, bias, axis_name=None):
    y, stats = jaxbn.batch_norm(x, STATS, scale, bias, use_running_average=False, axis_name=axis_name)
    return (jnp.sin(y) * jnp.arange(3.0)).sum(), (y, stats)


SPLITTABLE = sample((16, 5, 3))[:3]


def collectives(f, *arguments):
    """Returns the names of the collectives that are executed, leaving out the branch for features that cancel."""
    names = []

    def walk(value):
        for equation in getattr(getattr(value, "jaxpr", value), "eqns", ()):
            if equation.primitive.name.startswith(("psum", "all_", "reduce_scatter", "ppermute")):
                names.append(equation.primitive.name)
            if equation.primitive.name != "cond":
                jax.tree.map(walk, list(equation.params.values()))

    walk(jax.make_jaxpr(f, axis_env=[("d", 8)])(*arguments))
    return names


def test_a_forward_pass_has_one_collective_and_a_backward_pass_one_more():
    x, scale, bias = SPLITTABLE
    assert len(collectives(lambda x: loss(x, scale, bias, "d"), x)) == 1
    assert len(collectives(jax.grad(lambda x: loss(x, scale, bias, "d")[0]), x)) == 2


def test_a_second_eager_call_compiles_nothing():
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    layer = jaxbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    layer(x)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    jax.jit(lambda x: x + 1)(x)
    assert any("compile" in name for name in compiled)  # the listener hears what it should
    compiled.clear()
    layer(x)
    assert not [name for name in compiled if "compile" in name]


def test_steps_of_complex_inputs_scan_from_complex_statistics():
    x = np.arange(24).reshape(2, 4, 3) * np.complex64(1 + 2j)

    def step(stats, x):
        y, stats = jaxbn.batch_norm(x, stats, use_running_average=False)
        return stats, y

    stats, _ = jax.lax.scan(step, jaxbn.init_stats(3, dtype=jnp.complex64), x)
    assert (stats.mean.dtype, stats.var.dtype) == (jnp.complex64, jnp.float32)


@pytest.mark.parametrize("method", [jaxbn.batch_normalize, jaxbn.shifted_normalize])
def test_batch_norm_and_its_gradient_work_with_jit_disabled(method):
    x, scale, bias = SPLITTABLE

    def loss(x):
        return (method(x, scale, bias, stats=STATS)[0] * jnp.arange(3.0)).sum()

    with jax.disable_jit():
        found = jax.grad(loss)(x)
    np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("platform", ["METAL", "rocm"])
def test_batch_norm_lowers_for_a_platform_that_is_not_known_here(platform):
    exported = jax.export.export(jax.jit(jaxbn.batch_normalize), platforms=[platform], disabled_checks=[])(
        SPLITTABLE[0]
    )
    assert exported.platforms == (platform,)
