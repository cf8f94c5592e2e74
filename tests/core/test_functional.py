"""Normalization in evaluation and in training, dtypes, and the transformations of JAX."""

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
from tests.core.training import (
    BIAS,
    CLOSE,
    DY,
    LAYOUTS,
    MASKS,
    ROUNDING,
    SCALE,
    SHAPE,
    STATS,
    SUMS,
    X,
    evaluate,
    normalize,
    sample,
    step,
    train,
)

# Training and evaluation


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_training_normalizes_each_feature_with_its_own_moments(shape, axis):
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
def test_evaluation_normalizes_with_the_statistics_given(shape, axis):
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64])
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


def test_complex_inputs_are_normalized_by_their_distance_from_the_mean():
    x = (X[..., :2] + 1j * X[..., 1:]).astype(np.complex64)
    complex_train = jax.jit(functools.partial(jaxbn.batch_norm, use_running_average=False, momentum=0.9))
    y, stats = complex_train(x, jaxbn.init_stats(2), SCALE[:2], BIAS[:2])
    expected, mean, var, count = reference.batch_norm(x, SCALE[:2], BIAS[:2])
    np.testing.assert_allclose(y, expected, **CLOSE)
    chex.assert_type([y, *stats], [jnp.complex64, jnp.complex64, jnp.float32])
    expected_stats = reference.update(np.zeros(2), np.ones(2), mean, var, count, momentum=0.9)
    chex.assert_trees_all_close(tuple(stats), expected_stats, **CLOSE)
    np.testing.assert_allclose(evaluate(x, stats)[0], reference.normalize(x, *expected_stats), **CLOSE)


GHOST = functools.partial(jaxbn.ghost_normalize, group_size=3)


@pytest.mark.parametrize(
    ("method", "mask"),
    [
        pytest.param(jaxbn.batch_normalize, None, id="batch", marks=pytest.mark.slow),
        pytest.param(jaxbn.batch_normalize, MASKS["full, unequal per feature"], id="batch-mask"),
        pytest.param(GHOST, None, id="ghost"),
        pytest.param(GHOST, MASKS["full, unequal per feature"], id="ghost-mask", marks=pytest.mark.slow),
    ],
)
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


# Transformations


def test_without_jit_training_and_evaluation_give_the_same():
    y, stats = jaxbn.batch_norm(X, STATS, SCALE, BIAS, use_running_average=False, momentum=0.9)
    chex.assert_trees_all_close((y, stats), train(X), rtol=8 * ROUNDING, atol=8 * ROUNDING)
    y = jaxbn.normalize(X, *STATS, SCALE, BIAS)
    chex.assert_trees_all_close(y, normalize(X, *STATS, SCALE, BIAS), rtol=8 * ROUNDING, atol=8 * ROUNDING)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_vmap_over_models_equals_one_after_the_other(mean):
    x, scale, bias, _ = (np.stack(arrays) for arrays in zip(*(sample((40, 3), seed=s) for s in range(3)), strict=True))
    x[1] += np.float32(mean)  # one model in the centered branch, the others not
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [jaxbn.batch_normalize, pytest.param(jaxbn.shifted_normalize, marks=pytest.mark.slow)]
)
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
