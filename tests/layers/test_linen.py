"""The linen layer in place of ``flax.linen.BatchNorm``: same arguments, variables and behavior."""

import dataclasses
import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxbn.linen import BatchNorm
from tests.layers.linen_layers import (
    AFFINE,
    BF16_EPS,
    CLOSE,
    KEY,
    MASK,
    X,
    evaluate,
    flaxs,
    ours,
    train,
    variables_of,
)

# Constructor


def test_fields_are_flaxs_then_ours():
    own = ["method", "unbiased", "debias", "frozen", "accumulate", "update_stats"]
    names = [field.name for field in dataclasses.fields(BatchNorm)]
    expected = [field.name for field in dataclasses.fields(nn.BatchNorm)]
    assert [name for name in names if name not in ("parent", "name")] == [
        *(name for name in expected if name not in ("parent", "name")),
        *own,
    ]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(nn.BatchNorm)])
def test_default_is_flaxs(name):
    defaults, expected = (
        {field.name: field.default for field in dataclasses.fields(cls)} for cls in (BatchNorm, nn.BatchNorm)
    )
    assert defaults[name] == expected[name]


def test_use_running_average_given_twice_is_refused():
    layer = BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match="use_running_average"):
        layer.init(KEY, X, use_running_average=True)


def test_use_running_average_given_nowhere_is_refused():
    with pytest.raises(ValueError, match="use_running_average"):
        BatchNorm().init(KEY, X)


# Variables


@pytest.mark.parametrize(("use_scale", "use_bias"), AFFINE)
def test_variables_are_flaxs(use_scale, use_bias):
    options = {"use_scale": use_scale, "use_bias": use_bias, "use_running_average": True}
    found, expected = (layer(**options).init(KEY, X) for layer in (BatchNorm, nn.BatchNorm))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("force_float32_reductions", [True, False])
def test_initialized_variables_are_flaxs_for_custom_initializers_and_dtypes(force_float32_reductions):
    options = {
        "scale_init": nn.initializers.normal(1.0),
        "bias_init": nn.initializers.uniform(1.0),
        "param_dtype": jnp.bfloat16,
        "use_running_average": False,
        "force_float32_reductions": force_float32_reductions,
    }
    found, expected = (layer(**options).init(KEY, X) for layer in (BatchNorm, nn.BatchNorm))
    # Flax's statistics would be bfloat16 for False; ours are float32 or wider.
    expected["batch_stats"] = jax.tree.map(jnp.float32, expected["batch_stats"])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_init_does_not_update_the_statistics():
    stats = BatchNorm(use_running_average=False).init(KEY, X)["batch_stats"]
    chex.assert_trees_all_equal(stats, {"mean": jnp.zeros(3), "var": jnp.ones(3)})


def test_init_needs_no_axis_name():
    layer = BatchNorm(use_running_average=False, axis_name="devices", axis_index_groups=[[0, 1]])
    chex.assert_trees_all_equal(layer.init(KEY, X), BatchNorm(use_running_average=False).init(KEY, X))


@pytest.mark.parametrize("option", [{"momentum": None}, {"debias": True}])
def test_statistics_without_their_number_of_batches_are_refused_by_a_layer_that_counts(option):
    trained = BatchNorm(use_running_average=False).init(KEY, X)
    with pytest.raises(ValueError, match="the statistics of the layer must include 'steps', the number of batches"):
        BatchNorm(use_running_average=False, **option).apply(trained, X, mutable=["batch_stats"])


def test_a_number_of_features_is_refused():
    with pytest.raises(ValueError, match="use_running_average must be True or False, got 8. The linen layer takes"):
        BatchNorm(8).init(KEY, X)


def test_evaluation_needs_no_number_of_batches():
    trained = BatchNorm(use_running_average=False).init(KEY, X)
    expected = BatchNorm(use_running_average=True).apply(trained, X)
    np.testing.assert_array_equal(BatchNorm(use_running_average=True, debias=True).apply(trained, X), expected)
    np.testing.assert_array_equal(BatchNorm(use_running_average=True, momentum=None).apply(trained, X), expected)


@pytest.mark.parametrize("option", [{"momentum": None}, {"debias": True}])
def test_averages_that_count_batches_add_steps(option):
    stats = BatchNorm(use_running_average=False, **option).init(KEY, X)["batch_stats"]
    assert set(stats) == {"mean", "var", "steps"}


# Values


def test_training_is_close_to_flaxs():
    variables = variables_of(ours())
    chex.assert_trees_all_close(train(ours(), variables), train(flaxs(), variables), **CLOSE)


def test_training_with_a_mask_is_close_to_flaxs():
    variables = variables_of(ours())
    chex.assert_trees_all_close(train(ours(), variables, mask=MASK), train(flaxs(), variables, mask=MASK), **CLOSE)


def test_evaluation_is_close_to_flaxs():
    variables = variables_of(ours())
    chex.assert_trees_all_close(evaluate(ours(), variables), evaluate(flaxs(), variables), **CLOSE)


@pytest.mark.parametrize("axis", [(-1, 0), *(pytest.param(axis, marks=pytest.mark.slow) for axis in (1, (0, 1, 2)))])
@pytest.mark.filterwarnings("ignore:an input of shape:UserWarning")
def test_any_feature_axes_are_close_to_flaxs(axis):
    variables = variables_of(ours(axis=axis))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, variables_of(flaxs(axis=axis)))
    chex.assert_trees_all_close(train(ours(axis=axis), variables), train(flaxs(axis=axis), variables), **CLOSE)


def test_complex_inputs_are_close_to_flaxs():
    x = jnp.asarray(X + 1j * X[::-1])
    variables = nn.BatchNorm(use_running_average=True).init(KEY, x)
    found, expected = train(ours(), variables, x), train(flaxs(), variables, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [None, jnp.float16])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_the_result_has_flaxs_dtype(dtype, x_dtype, param_dtype):
    x = jnp.asarray(X, x_dtype)

    def result(cls):
        layer = cls(dtype=dtype, param_dtype=param_dtype, use_running_average=True)
        return jax.eval_shape(lambda: layer.init_with_output(KEY, x)[0])

    assert result(BatchNorm).dtype == result(nn.BatchNorm).dtype


def test_statistics_stored_in_param_dtype_are_flaxs_to_its_precision():
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16}
    variables, x = variables_of(ours(**options)), jnp.asarray(X, jnp.bfloat16)
    _, found = train(ours(**options), variables, x)
    _, expected = train(flaxs(**options), variables, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    # Flax sums squares of up to 20 in bfloat16, of which a tenth is added: some roundings of half a unit of that.
    difference = jax.tree.map(lambda a, b: jnp.abs(jnp.float32(a) - jnp.float32(b)), found, expected)
    chex.assert_trees_all_close(difference, jax.tree.map(jnp.zeros_like, difference), atol=8 * 2 * BF16_EPS, rtol=0)


@pytest.mark.parametrize("x_dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float32])
def test_statistics_of_half_precision_layers_are_float32(x_dtype):
    layer = ours(force_float32_reductions=False, param_dtype=jnp.bfloat16)
    _, updates = train(layer, variables_of(layer), jnp.asarray(X, x_dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


def test_cumulative_average_is_the_mean_of_the_batches():
    layer = BatchNorm(momentum=None)
    variables = layer.init(KEY, X, use_running_average=False)
    batches = [X, 2 * X + 1, X[::-1] - 4]
    for x in batches:
        variables |= train(layer, variables, x)[1]
    expected = np.mean([x.mean((0, 1), dtype=np.float64) for x in batches], axis=0)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], expected, **CLOSE)


def test_debiased_average_forgets_its_start():
    layer = BatchNorm(momentum=0.9, debias=True)
    _, updates = train(layer, layer.init(KEY, X, use_running_average=False))
    np.testing.assert_allclose(updates["batch_stats"]["var"], X.var((0, 1), dtype=np.float64), **CLOSE)


def test_unbiased_multiplies_the_variance_by_m_over_m_minus_1():
    layer = BatchNorm(momentum=0.0, unbiased=True)
    _, updates = train(layer, layer.init(KEY, X, use_running_average=False))
    expected = X.var((0, 1), dtype=np.float64, ddof=1)
    np.testing.assert_allclose(updates["batch_stats"]["var"], expected, **CLOSE)


# Collections


def test_training_with_immutable_statistics_raises_flaxs_error():
    layer = ours()
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables_of(layer), X, use_running_average=False)


def test_a_missing_collection_raises_flaxs_error():
    layer = ours()
    params = {"params": variables_of(layer)["params"]}
    with pytest.raises(flax.errors.ScopeCollectionNotFound):
        layer.apply(params, X, use_running_average=True)


def test_a_frozen_layer_evaluates_in_training():
    variables = variables_of(ours())
    step = functools.partial(ours(frozen=True).apply, use_running_average=False)
    y = jax.jit(step)(variables, X)  # with immutable statistics
    chex.assert_trees_all_equal(y, evaluate(ours(), variables))


def test_a_frozen_layer_need_not_be_told_to_evaluate():
    variables = variables_of(ours())
    chex.assert_trees_all_equal(jax.jit(ours(frozen=True).apply)(variables, X), evaluate(ours(), variables))


def test_a_frozen_layer_leaves_the_statistics():
    variables = variables_of(ours())
    _, updates = train(ours(frozen=True), variables)
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


def test_a_layer_called_twice_updates_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = BatchNorm(use_running_average=False, momentum=0.5, name="norm")
            norm(x)
            return norm(x + 2)

    variables = Twice().init(KEY, X)
    _, updates = Twice().apply(variables, X, mutable=["batch_stats"])
    mean = X.mean((0, 1), dtype=np.float64)
    expected = 0.25 * mean + 0.5 * (mean + 2)
    np.testing.assert_allclose(updates["batch_stats"]["norm"]["mean"], expected, **CLOSE)
