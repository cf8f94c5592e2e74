"""The nnx layer in place of ``flax.nnx.BatchNorm``: same arguments, variables and behavior."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
from jaxbn.nnx import BatchNorm
from tests.layers.nnx_layers import AFFINE, CLOSE, MASK, SIGNATURES, Net, X, call, layer_of, values

# Constructor


def test_arguments_are_flaxs_then_ours():
    own = ["method", "unbiased", "debias", "frozen", "accumulate", "update_stats"]
    assert list(SIGNATURES[BatchNorm]) == [*SIGNATURES[nnx.BatchNorm], *own]


@pytest.mark.parametrize("name", SIGNATURES[nnx.BatchNorm])
def test_argument_has_flaxs_kind_and_default(name):
    found, expected = (SIGNATURES[cls][name] for cls in (BatchNorm, nnx.BatchNorm))
    assert found.kind == expected.kind
    if not name.endswith("_init"):  # every call of zeros_init makes another function; compared below
        assert found.default == expected.default


def test_call_has_flaxs_arguments_then_ours():
    found, expected = (inspect.signature(cls.__call__).parameters for cls in (BatchNorm, nnx.BatchNorm))
    assert [(p.name, p.kind, p.default) for p in found.values()] == [
        *((p.name, p.kind, p.default) for p in expected.values()),
        ("update_stats", inspect.Parameter.KEYWORD_ONLY, None),
    ]


def test_use_running_average_given_nowhere_is_refused():
    layer = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"use_running_average must be True to evaluate or False to train, got None.*nnx\.view"
    ):
        layer(X)


def test_the_call_goes_before_the_constructor():
    layer = layer_of(use_running_average=True)
    before = values(layer)
    layer(X, use_running_average=False)
    assert not np.array_equal(values(layer)["mean"], before["mean"])


# Variables


@pytest.mark.parametrize(("use_scale", "use_bias"), AFFINE)
def test_state_is_flaxs(use_scale, use_bias):
    found, expected = (
        nnx.state(cls(3, use_scale=use_scale, use_bias=use_bias, rngs=nnx.Rngs(0)))
        for cls in (BatchNorm, nnx.BatchNorm)
    )
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_initialized_state_is_flaxs_for_custom_initializers_and_dtypes():
    options = {
        "scale_init": nnx.initializers.normal(1.0),
        "bias_init": nnx.initializers.uniform(1.0),
        "param_dtype": jnp.bfloat16,
    }
    found, expected = (nnx.state(cls(3, **options, rngs=nnx.Rngs(0))) for cls in (BatchNorm, nnx.BatchNorm))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def test_variables_have_flaxs_types():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    kinds = {name: type(getattr(layer, name)) for name in ("mean", "var", "scale", "bias")}
    assert kinds == {"mean": nnx.BatchStat, "var": nnx.BatchStat, "scale": nnx.Param, "bias": nnx.Param}


@pytest.mark.parametrize(("use_scale", "use_bias"), AFFINE)
def test_attributes_are_flaxs_then_ours(use_scale, use_bias):
    options = {"use_scale": use_scale, "use_bias": use_bias}
    found, expected = ({*vars(cls(3, **options, rngs=nnx.Rngs(0)))} for cls in (BatchNorm, nnx.BatchNorm))
    assert (
        found - expected == {"method", "unbiased", "debias", "frozen", "accumulate", "update_stats"}
        and not expected - found
    )


@pytest.mark.parametrize("option", [{"momentum": None}, {"debias": True}])
def test_averages_that_count_batches_add_steps(option):
    state = nnx.state(BatchNorm(3, **option, rngs=nnx.Rngs(0)), nnx.BatchStat)
    assert set(state) == {"mean", "var", "steps"}


# Values


@pytest.mark.parametrize("options", [{}, {"mask": MASK}, {"use_running_average": True}], ids=["train", "mask", "eval"])
def test_calls_are_close_to_flaxs(options):
    found, expected = layer_of(), layer_of(nnx.BatchNorm)
    step = nnx.jit(functools.partial(lambda layer, x, **options: layer(x, **options), **options))
    chex.assert_trees_all_close(step(found, X), step(expected, X), **CLOSE)
    chex.assert_trees_all_close(values(found), values(expected), **CLOSE)


def test_a_feature_axis_in_the_middle_is_close_to_flaxs():
    x = jnp.moveaxis(X, -1, 1)
    found, expected = layer_of(axis=1), layer_of(nnx.BatchNorm, axis=1)
    chex.assert_trees_all_close(call(found, x), call(expected, x), **CLOSE)
    chex.assert_trees_all_close(values(found), values(expected), **CLOSE)


def test_complex_inputs_have_a_complex_mean_and_a_real_variance():
    x = jnp.asarray(X + 1j * X[::-1])
    found, expected = layer_of(), jaxbn.linen.BatchNorm(momentum=0.9)
    variables = {
        "params": {name: getattr(found, name)[...] for name in ("scale", "bias")},
        "batch_stats": {name: getattr(found, name)[...] for name in ("mean", "var")},
    }
    y, updates = expected.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    chex.assert_trees_all_equal(found(x), y)
    assert (found.mean.dtype, found.var.dtype) == (jnp.complex64, jnp.float32)
    chex.assert_trees_all_equal({name: getattr(found, name)[...] for name in ("mean", "var")}, updates["batch_stats"])


def test_gradients_are_close_to_flaxs():
    def gradients(layer):
        @nnx.jit
        def of(layer, x):
            return nnx.grad(lambda layer, x: jnp.vdot(layer(x), X[::-1]), argnums=(0, 1))(layer, x)

        return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(of(layer, X))))

    # The gradient of the scale sums 32 products of up to 10 * 10.
    chex.assert_trees_all_close(
        gradients(layer_of()), gradients(layer_of(nnx.BatchNorm)), rtol=0, atol=32 * CLOSE["atol"]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_that_of_the_result(dtype):
    layer = layer_of(dtype=dtype)
    assert jax.eval_shape(lambda x: layer(x, use_running_average=True), X).dtype == dtype


def test_custom_promotion_is_called_on_all_arrays():
    given = []

    def promote(arrays, *, dtype):
        given.append(([None if array is None else array.shape for array in arrays], dtype))
        return arrays

    layer = layer_of(promote_dtype=promote, dtype=jnp.bfloat16, use_bias=False)
    layer(X, use_running_average=True)
    assert given == [([X.shape, (3,), (3,), (3,), None], jnp.bfloat16)]


def test_cumulative_average_is_the_mean_of_the_batches():
    layer = BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
    batches = [X, 2 * X + 1, X[::-1] - 4]
    for x in batches:
        call(layer, x)
    expected = np.mean([x.mean((0, 1), dtype=np.float64) for x in batches], axis=0)
    np.testing.assert_allclose(layer.mean[...], expected, **CLOSE)


def test_debiased_average_forgets_its_start():
    layer = BatchNorm(3, momentum=0.9, debias=True, rngs=nnx.Rngs(0))
    call(layer, X)
    np.testing.assert_allclose(layer.var[...], X.var((0, 1), dtype=np.float64), **CLOSE)


# Modes


def mode_by_method(layer, train):
    (layer.train if train else layer.eval)()
    return layer


def mode_by_view(layer, train):
    return nnx.view(layer, use_running_average=not train)


@pytest.mark.parametrize("mode", [mode_by_method, mode_by_view])
def test_evaluation_mode_leaves_the_statistics(mode):
    layer = mode(layer_of(), False)
    before = values(layer)
    layer(X)
    chex.assert_trees_all_equal(values(layer), before)


@pytest.mark.parametrize("mode", [mode_by_method, mode_by_view])
def test_training_mode_updates_the_statistics(mode):
    layer = mode(mode(layer_of(), False), True)
    before = values(layer)
    layer(X)
    assert not np.array_equal(values(layer)["mean"], before["mean"])


def test_a_view_shares_the_statistics():
    layer = layer_of(use_running_average=True)
    nnx.view(layer, use_running_average=False)(X)
    assert not np.array_equal(values(layer)["mean"], values(layer_of())["mean"])


def test_train_and_eval_reach_the_layers_of_a_model():
    net = Net(BatchNorm, nnx.Rngs(0))
    net.eval()
    assert net.norm.use_running_average
    net.train()
    assert not net.norm.use_running_average


def test_frozen_survives_train():
    layer = layer_of(frozen=True)
    before = values(layer)
    layer.train()
    y = layer(X, use_running_average=False)
    chex.assert_trees_all_equal(values(layer), before)
    chex.assert_trees_all_equal(y, layer(X, use_running_average=True))


def test_a_frozen_layer_need_not_be_told_to_evaluate():
    layer = layer_of(frozen=True, use_running_average=None)
    chex.assert_trees_all_equal(layer(X), layer(X, use_running_average=True))
