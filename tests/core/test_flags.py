"""Flags are booleans that are known when a program is traced; everything else is refused by the flag's name."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._core import checks
from tests.core.checked import STATS, THREE, X, refused, train

MOMENTS = jaxbn.Moments(THREE, THREE, THREE)
FLAGS = {
    "use_running_average": lambda flag: jaxbn.batch_norm(X, STATS, use_running_average=flag),
    "unbiased": lambda flag: train(unbiased=flag),
    "unbiased of update_stats": lambda flag: jaxbn.update_stats(STATS, MOMENTS, momentum=0.9, unbiased=flag),
    "counted": lambda flag: jaxbn.init_stats(3, counted=flag),
}


@pytest.mark.parametrize("value", [1, 0, "no", [True], None, 0.5], ids=repr)
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_that_is_no_boolean_is_refused(name, value):
    with refused(f"{name.split()[0]} must be True or False, got {value!r}. Pass one of the two."):
        FLAGS[name](value)


@pytest.mark.parametrize("name", FLAGS)
def test_a_traced_flag_is_refused_with_the_remedy(name):
    flag = name.split()[0]
    message = (
        f"{flag} must be True or False, got a traced array of shape () and dtype bool. It decides which program is "
        "compiled, so its value must be known when the program is traced: let jax.jit treat it as static, as in "
        f'jax.jit(step, static_argnames="{flag}"), bind it with functools.partial, or choose between two calls with '
        "jax.lax.cond."
    )
    with refused(message):
        jax.eval_shape(FLAGS[name], jax.ShapeDtypeStruct((), bool))


def test_a_static_flag_under_jit_chooses_the_program():
    step = jax.jit(
        lambda x, use_running_average: jaxbn.batch_norm(x, STATS, use_running_average=use_running_average)[0],
        static_argnames="use_running_average",
    )
    np.testing.assert_allclose(step(X, use_running_average=True), X / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(step(X, use_running_average=False).mean((0, 1)), 0, atol=1e-6)


@pytest.mark.parametrize("true", [True, np.bool_(True), np.array(True), jnp.array(True)], ids=repr)
def test_booleans_of_numpy_and_jax_that_are_known_are_accepted(true):
    chex.assert_trees_all_equal(FLAGS["use_running_average"](true), FLAGS["use_running_average"](True))


@pytest.mark.parametrize("trace", [lambda f, v: f(v), jax.eval_shape], ids=["known", "traced"])
def test_a_mask_in_place_of_a_flag_is_recognized(trace):
    check = functools.partial(checks.boolean, "use_running_average")
    with refused("of shape (8, 1, 1) and dtype bool. If it is a mask, pass it by name: mask=...; it is not use_runn"):
        trace(check, jnp.ones((8, 1, 1), bool))


def test_a_number_of_features_in_place_of_the_mode_is_recognized():
    with refused("use_running_average must be True or False, got 8. The linen layer takes the number of features"):
        checks.boolean("use_running_average", 8)
