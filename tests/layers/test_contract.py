"""Every method, through every front-end: the function, the linen layer and the nnx layer give equal bits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import reference

METHODS = {
    "batch": jaxbn.batch_normalize,
    "ghost": functools.partial(jaxbn.ghost_normalize, group_size=4),
    "renorm": jaxbn.batch_renormalize,
    "shifted": jaxbn.shifted_normalize,
}
SHAPE = (8, 2, 3)
RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=SHAPE) + [0.0, 2.0, -50.0]).astype(np.float32)
MASK = RNG.random((8, 2, 1)) < 0.7
SCALE, BIAS = RNG.normal(size=(2, 3)).astype(np.float32)
STATS = jaxbn.BatchStats(jnp.array([0.1, 2.0, -40.0]), jnp.array([8.0, 9.0, 4.0]))

# dtype, mask, scale, bias
SETTINGS = {
    "float32": ("float32", None, SCALE, BIAS),
    "float32-mask-scale": ("float32", MASK, SCALE, None),
    "bfloat16-bias": ("bfloat16", None, None, BIAS),
    "bfloat16-mask-plain": ("bfloat16", MASK, None, None),
}


def function(x, stats, scale, bias, *, train, mask=None, **options):
    return jaxbn.batch_norm(x, stats, scale, bias, use_running_average=not train, mask=mask, **options)


def linen(x, stats, scale, bias, *, train, mask=None, **options):
    layer = jaxbn.linen.BatchNorm(use_scale=scale is not None, use_bias=bias is not None, **options)
    params = {name: value for name, value in [("scale", scale), ("bias", bias)] if value is not None}
    variables = {"params": params, "batch_stats": stats._asdict()}
    y, updates = layer.apply(variables, x, use_running_average=not train, mask=mask, mutable=["batch_stats"])
    return y, jaxbn.BatchStats(**updates["batch_stats"])


def nnx_layer(x, stats, scale, bias, *, train, mask=None, **options):
    layer = jaxbn.nnx.BatchNorm(
        x.shape[-1], use_scale=scale is not None, use_bias=bias is not None, **options, rngs=nnx.Rngs(0)
    )
    given = {"mean": stats.mean, "var": stats.var, "scale": scale, "bias": bias}
    for name, value in given.items():
        if value is not None:
            getattr(layer, name)[...] = value
    y = layer(x, use_running_average=not train, mask=mask)
    return y, jaxbn.BatchStats(layer.mean[...], layer.var[...])


FRONT_ENDS = {"function": function, "linen": linen, "nnx": nnx_layer}
LAYERS = {"linen": linen, "nnx": nnx_layer}


@functools.cache
def program(front_end, method, train=True):
    step = functools.partial(FRONT_ENDS[front_end], method=METHODS[method], momentum=0.9, unbiased=True, train=train)
    return jax.jit(step)


@functools.cache
def run(front_end, method, setting, train):
    dtype, mask, scale, bias = SETTINGS[setting]
    return program(front_end, method, train)(jnp.asarray(X, dtype), STATS, scale, bias, mask=mask)


def assert_equal_bits(found, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


# A layer hands its method on, and its settings too: each is tested once, and their product in slow tests.
FAST = {*((setting, "batch") for setting in SETTINGS), *zip(SETTINGS, METHODS, strict=True)}


@pytest.mark.parametrize(
    ("setting", "method"),
    [
        pytest.param(setting, method, marks=[] if (setting, method) in FAST else pytest.mark.slow)
        for setting in SETTINGS
        for method in METHODS
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_in_training_give_the_bits_of_the_function(layer, method, setting):
    assert_equal_bits(run(layer, method, setting, True), run("function", method, setting, True))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_in_evaluation_give_the_bits_of_the_function(layer, setting):
    assert_equal_bits(run(layer, "batch", setting, False), run("function", "batch", setting, False))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_outside_jit_give_the_bits_of_the_function(layer, train):
    found, expected = (front_end(X, STATS, SCALE, BIAS, train=train) for front_end in (LAYERS[layer], function))
    assert_equal_bits(found, expected)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_evaluation_does_not_depend_on_the_method(front_end):
    programs = {str(program(front_end, method, train=False).trace(X, STATS, SCALE, BIAS).jaxpr) for method in METHODS}
    assert len(programs) == 1


@pytest.mark.parametrize("method", METHODS)
def test_training_uses_the_method(method):
    y, _ = run("function", method, "float32", True)
    x, epsilon = np.float64(X), 1e-5
    expected = {
        "batch": lambda: reference.batch_norm(x, SCALE, BIAS, epsilon=epsilon)[0],
        "ghost": lambda: reference.ghost(x, SCALE, BIAS, group_size=4, epsilon=epsilon),
        "renorm": lambda: reference.renorm(x, *STATS, SCALE, BIAS, r_max=3.0, d_max=5.0, epsilon=epsilon)[0],
        "shifted": lambda: reference.batch_norm(x, SCALE, BIAS, epsilon=epsilon)[0],
    }[method]()
    # x - mean is exact to half a unit of x, 50 * 2^-24, over sigma = 3 and times scale <= 2; the rest is of that size.
    np.testing.assert_allclose(y, expected, rtol=0, atol=16 * np.finfo(np.float32).eps * abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_vmap_over_models_gives_each_model_alone(front_end, method):
    step = program(front_end, method)
    models = [(X, STATS, SCALE, BIAS), (X[::-1] * 2, jax.tree.map(lambda s: s + 1, STATS), BIAS, SCALE)]
    together = jax.vmap(step)(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *models))
    alone = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(step(*model) for model in models))
    # The two programs may order their sums of 16 values differently: 16 roundings at the largest value, about 50.
    chex.assert_trees_all_close(together, alone, rtol=0, atol=16 * 50 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_statistics_of_any_input_are_float32(front_end, setting):
    _, stats = run(front_end, "batch", setting, True)
    assert [s.dtype for s in stats] == [jnp.float32] * 2


@pytest.mark.parametrize(("setting", "dtype"), [("bfloat16-bias", "float32"), ("bfloat16-mask-plain", "bfloat16")])
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_the_output_has_the_dtype_of_input_and_parameters(front_end, setting, dtype):
    y, _ = run(front_end, "batch", setting, True)
    assert y.dtype == dtype


BF16 = jnp.asarray(X, jnp.bfloat16)
MOMENTS = jaxbn.Moments(jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, 5.0, 6.0]), jnp.full(3, 16.0))
DOMAIN_STATS = jax.tree.map(lambda value: jnp.stack([value, value]), STATS)
CALLS = {
    "affine": lambda x: jaxbn.affine(x, *jnp.array([[2, 0.5, -1], [3, -4, 0.25]], x.dtype)),
    "batch_norm": lambda x: jaxbn.batch_norm(x, STATS, use_running_average=False),
    "batch_normalize": jaxbn.batch_normalize,
    "batch_renormalize": lambda x: jaxbn.batch_renormalize(x, stats=STATS),
    "combine": lambda x: jaxbn.combine(jaxbn.moments(x), MOMENTS),
    "domain_batch_norm": lambda x: jaxbn.domain_batch_norm(x, DOMAIN_STATS, 1, use_running_average=False),
    "ghost_normalize": lambda x: jaxbn.ghost_normalize(x, group_size=4),
    "moments": jaxbn.moments,
    "normalize": lambda x: jaxbn.normalize(x, *STATS),
    "shifted_normalize": lambda x: jaxbn.shifted_normalize(x, stats=STATS),
    "update_stats": lambda x: jaxbn.update_stats(STATS, jaxbn.moments(x), momentum=0.9),
}


@functools.cache
def compiled(name):
    return jax.jit(CALLS[name])


def test_every_public_function_is_called_here():
    functions = {name for name in jaxbn.__all__ if not isinstance(getattr(jaxbn, name), type)}
    assert functions == set(CALLS) | {"domain", "init_stats", "pad_batch"}  # which compute nothing


@pytest.mark.parametrize("name", CALLS)
def test_functions_under_jit_give_what_they_give_without(name):
    plain, jitted = CALLS[name](X), compiled(name)(X)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, jitted)
    # Fusion may round or order the sums of 16 values differently: 16 roundings at the largest value.
    for found, expected in zip(jax.tree.leaves(jitted), jax.tree.leaves(plain), strict=True):
        atol = 16 * np.finfo(np.float32).eps * abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name",
    [
        # The others under vmap are in tests/core/test_variants.py and test_functional.py too.
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("batch_norm", "ghost_normalize", "batch_renormalize") else []
        )
        for name in CALLS
    ],
)
def test_functions_under_vmap_give_what_they_give_for_each(name):
    batches = jnp.stack([X, 2 * X])
    together = jax.jit(jax.vmap(CALLS[name]))(batches)
    alone = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(compiled(name), batches))
    for found, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
        atol = 16 * np.finfo(np.float32).eps * abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CALLS)
def test_functions_of_bfloat16_round_only_their_result(name):
    rounded = compiled(name)(BF16)
    exact = compiled(name)(BF16.astype(jnp.float32))
    for found, expected in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        assert found.dtype == (jnp.bfloat16 if found.shape == SHAPE else jnp.float32)
        # Half a unit of the result's dtype, and 16 float32 roundings at the largest value before that.
        eps = float(jnp.finfo(found.dtype).eps) / 2
        atol = 16 * np.finfo(np.float32).eps * abs(expected).max()
        np.testing.assert_allclose(np.float32(found), expected, rtol=eps, atol=atol)
