"""Choices by the platform for which a program is compiled, seen in programs for platforms that are not present."""

import functools
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from experiments.benchmarks.numerics import ours, sample
from jaxbn._core import lowering
from jaxbn._core.moment_algorithms import SAMPLES
from tests import reference
from tests.core.test_numerics import GRADIENT_ERROR, OUTPUT_ERROR

SHAPE = 32, 12, 12, 4
BATCH = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
PLATFORMS = "cpu", "cuda", "tpu"
ACCELERATORS = "cuda", "rocm", "tpu"


def lowered(function, platform, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def branches(text):
    """Counts the branches of the conditionals in a program, except their first; a choice of a platform has no other."""
    of_a_choice = r"\s*%\w+ = stablehlo\.constant dense<\d+> : tensor<i32>\s*stablehlo\.return"  # of its number
    return len(re.findall(rf"\}}, \{{(?!{of_a_choice})", text))


# choose


def add(x):
    """Adds a number that tells the platform."""
    return lowering.choose(x, cpu=lambda x: x + 11, accelerator=lambda x: x + 22)


@pytest.mark.parametrize(("platform", "number"), [("cpu", 11), *((accelerator, 22) for accelerator in ACCELERATORS)])
def test_a_program_does_only_what_is_chosen_for_its_platform(platform, number):
    text = lowered(add, platform, jnp.ones(3))
    assert [n for n in (11, 22) if f"dense<{n / 10:.6f}e+01>" in text] == [number]


def test_a_program_for_several_platforms_chooses_where_it_runs():
    exported = jax.export.export(jax.jit(add), platforms=PLATFORMS)(jnp.ones(3))
    chosen = 11 if jax.default_backend() == "cpu" else 22
    np.testing.assert_array_equal(exported.call(jnp.ones(3)), [1 + chosen] * 3)


@pytest.mark.parametrize(("platform", "number"), [("cpu", 11), ("tpu", 22), ("cuda", 22)])
def test_the_platform_assumed_is_that_chosen_for(platform, number):
    with lowering.assumed(platform):
        assert jax.jit(add)(0.0) == number


# rematerialized


@lowering.rematerialized(static_argnums=(1,))
def wave(x, n, y):
    return jnp.sin(jnp.cos(x) * n) * y


def plain_wave(x, n, y):
    return jnp.sin(jnp.cos(x) * n) * y


X, Y = np.float32(np.random.default_rng(0).normal(size=(2, 5)))


def gradients_of(function):
    return jax.grad(lambda x, y: function(x, 3, y).sum(), (0, 1))


@pytest.mark.parametrize("platform", [None, *PLATFORMS])
def test_nothing_but_the_arguments_is_kept_for_the_backward_pass(platform):
    def kept():
        vjp = jax.vjp(lambda x, y: wave(x, 3, y), X, Y)[1]
        return [leaf for leaf in jax.tree.leaves(vjp) if jnp.shape(leaf)]  # without the number of the platform

    if platform is None:
        arrays = kept()
    else:
        with lowering.assumed(platform):
            arrays = kept()
    assert sorted(map(tuple, np.asarray(arrays))) == sorted(map(tuple, (X, Y)))


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
def test_barriers_hold_the_backward_pass_apart_on_the_cpu_alone(platform):
    text = lowered(gradients_of(wave), platform, X, Y)
    assert ("optimization_barrier" in text) == (platform == "cpu")


@pytest.mark.parametrize("platform", ["cpu", pytest.param("cuda", marks=pytest.mark.slow), "tpu"])
def test_computing_again_changes_no_gradient(platform):
    with lowering.assumed(platform):
        chex.assert_trees_all_close(gradients_of(wave)(X, Y), gradients_of(plain_wave)(X, Y), rtol=1e-6)


def test_a_second_call_traces_nothing():
    traced = []

    @lowering.rematerialized()
    def double(x):
        traced.append(x)
        return 2 * jnp.sin(x)

    def call():
        double(X)
        jax.vjp(double, X)[1](Y)

    call()
    after_one = len(traced)
    call()
    assert len(traced) == after_one


# assumed


def test_an_assumption_ends_where_an_error_leaves_it():
    with pytest.raises(RuntimeError), lowering.assumed("tpu"):
        raise RuntimeError
    assert lowering.lowered_for("cpu") == "cpu"


def test_what_was_compiled_before_an_assumption_is_compiled_again_inside_and_after():
    step = jax.jit(add)
    numbers = [step(0.0)]
    with lowering.assumed("tpu"):
        numbers.append(step(0.0))
        with lowering.assumed("cpu"):
            numbers.append(step(0.0))
        numbers.append(step(0.0))
    numbers.append(step(0.0))
    outside = 11 if jax.default_backend() == "cpu" else 22
    assert numbers == [outside, 22, 11, 22, outside]


# Batch norm


def gradient(x):
    return jax.grad(lambda x: (jaxbn.batch_normalize(x)[0] ** 3).sum())(x)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_on_gpus_a_pivot_comes_from_a_sample(platform):
    assert f"tensor<{SAMPLES}x{SHAPE[-1]}xf32>" in lowered(jaxbn.moments, platform, BATCH)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_elsewhere_no_sample_is_taken(platform):
    assert f"tensor<{SAMPLES}x" not in lowered(jaxbn.moments, platform, BATCH)


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("function", [jaxbn.moments, gradient])
def test_on_accelerators_nothing_is_conditional(function, platform):
    text = lowered(function, platform, BATCH)
    assert branches(text) == 0
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("function", [jaxbn.moments, jax.vmap(jaxbn.moments), jax.vmap(jax.vmap(jaxbn.moments))])
@pytest.mark.parametrize("feature", [2, 64])
def test_on_the_cpu_one_conditional_decides_for_all_models_under_vmap(function, feature):
    x = jax.ShapeDtypeStruct((2, 3, 64, feature), jnp.float32)
    text = lowered(function, "cpu", x)
    assert branches(text) == 1
    assert "stablehlo.select" not in text  # which would compute both branches


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compiles for the CPU")
@pytest.mark.parametrize("function", [jaxbn.moments, gradient])
def test_of_a_compiled_step_one_conditional_is_left_on_the_cpu(function):
    assert jax.jit(function).lower(BATCH).compile().as_text().count(" conditional(") == 1


@functools.cache
def exported():
    """Returns a step for all platforms, its results in a list."""
    flat = jax.jit(lambda *arguments: jax.tree.leaves(ours(*arguments)))
    return jax.export.export(flat, platforms=PLATFORMS)(*sample(SHAPE, 0))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is called on the CPU")
@pytest.mark.parametrize("mean", [0, 10, 1e4])
def test_a_step_exported_for_all_platforms_is_as_exact_on_the_cpu(mean):
    x, *rest = sample(SHAPE, mean)
    y, *found = exported().call(x, *rest)
    assert abs(np.asarray(y) - reference.batch_norm(x, *rest[:2])[0]).max() <= OUTPUT_ERROR
    for one, expected in zip(found, reference.gradients(x, *rest), strict=False):
        assert abs(np.asarray(one) - expected).max() <= GRADIENT_ERROR * abs(expected).max()
