"""Inputs, masks and arrays of a wrong shape or dtype are refused, and a single value per feature warns.

A message says what an argument must be, what it was, and what to do.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.core.checked import FOUR, FUNCTIONS, MASKING, MEASURING, THREE, X, refused


@pytest.mark.parametrize("axis", [3, -4, (1, 3)])
@pytest.mark.parametrize("function", FUNCTIONS | MEASURING)
def test_an_axis_out_of_range_is_refused(function, axis):
    message = f"axis must be between -3 and 2 for an input of shape (8, 5, 3), got {axis}. Choose an axis that"
    with refused(message):
        (FUNCTIONS | MEASURING)[function](X, axis=axis)


@pytest.mark.parametrize("axis", [(2, -1), (1, 1)])
@pytest.mark.parametrize("function", FUNCTIONS | MEASURING)
def test_an_axis_named_twice_is_refused(function, axis):
    message = f"axis must name at least one axis of an input of shape (8, 5, 3), and none twice, got {axis}. List each"
    with refused(message):
        (FUNCTIONS | MEASURING)[function](X, axis=axis)


def test_no_axis_at_all_is_refused():
    with refused("axis must name at least one axis of an input of shape (8, 5, 3), and none twice, got (). List each"):
        jaxbn.moments(X, axis=())


def test_an_axis_that_is_not_an_integer_is_refused():
    with refused("axis must be an integer or a sequence of integers, got 1.5. Use for example axis=-1."):
        jaxbn.moments(X, axis=1.5)


def test_a_scalar_is_refused():
    with refused("x must have a feature axis, as in shape [N, C], got a scalar. Reshape it."):
        jaxbn.moments(jnp.float32(1))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
@pytest.mark.parametrize("function", FUNCTIONS | MEASURING)
def test_integers_and_booleans_are_refused(function, dtype):
    message = (
        f"x must be floating-point or complex, got dtype {np.dtype(dtype)}. "
        "Convert it first, for example with x.astype(jnp.float32)."
    )
    with refused(message):
        (FUNCTIONS | MEASURING)[function](X.astype(dtype))


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_parameter_for_another_number_of_features_is_refused(function, name):
    message = (
        f"{name} must have shape (3,), the features of an input of shape (8, 5, 3) on axis (2,), got (4,). "
        f"Check that {name} belongs to this layer, or set axis to where the features are."
    )
    with refused(message):
        FUNCTIONS[function](X, **{name: FOUR})


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_for_another_number_of_features_are_refused(name):
    message = f"{name} must have shape (3,), the features of an input of shape (8, 5, 3) on axis (2,), got (4,)."
    stats = jaxbn.BatchStats(**{"mean": THREE, "var": THREE, name: FOUR})
    with refused(message):
        jaxbn.normalize(X, *stats)
    for average in (True, False):
        with refused(message):
            jaxbn.batch_norm(X, stats, use_running_average=average)
    for method in (jaxbn.batch_renormalize, jaxbn.shifted_normalize):
        with refused(message):
            method(X, stats=stats)


def test_statistics_of_other_features_are_not_combined():
    one, eight = jaxbn.moments(X[..., :1]), jaxbn.moments(np.ones((4, 8), np.float32))
    with refused("the moments must have shape (1,), like the running statistics, got (8,). Combine only statistics of"):
        jaxbn.update_stats(jaxbn.init_stats(1), eight, momentum=0.9)
    with refused("the moments b must have shape (1,), like the moments a, got (8,). Combine only statistics of the"):
        jaxbn.combine(one, eight)


# Masks


@pytest.mark.parametrize("shape", [(5,), (7,), (8, 3), (7, 1, 1), (1, 8, 5, 3)])
@pytest.mark.parametrize("function", MASKING)
def test_a_mask_that_does_not_broadcast_to_the_input_is_refused(function, shape):
    message = (
        f"mask of shape {shape} does not broadcast to an input of shape (8, 5, 3); "
        "for one entry per example, pass a mask of shape (8, 1, 1)."
    )
    with refused(message):
        MASKING[function](X, mask=np.ones(shape, bool))


@pytest.mark.parametrize(
    ("shape", "first", "last", "entry"),
    [
        ((3,), (3, 1, 1), (1, 1, 3), "example"),
        ((3, 3), (3, 3, 1), (1, 3, 3), "position"),
        ((1, 3), (1, 3, 1), (1, 1, 3), "position"),
    ],
)
@pytest.mark.parametrize("function", MASKING)
def test_a_mask_that_fits_the_first_axes_and_the_last_is_refused_and_both_readings_are_named(
    function, shape, first, last, entry
):
    message = (
        f"mask of shape {shape} fits an input of shape (3, 3, 3) in two ways. Reshape it to {first} for one entry per "
        f"{entry} (the first axes), or to {last} to mask along the last axes."
    )
    with refused(message):
        MASKING[function](X[:3, :3], mask=np.ones(shape, bool))


@pytest.mark.parametrize("function", MASKING)
def test_a_mask_of_weights_is_refused(function):
    message = (
        "mask must hold booleans, or integers 0 and 1, got dtype float32. "
        "It says which positions count, not how much; pass for example mask > 0."
    )
    with refused(message):
        MASKING[function](X, mask=np.ones((8, 1, 1), np.float32))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("lengths", [[0, 2] * 4, [0, -1] * 4])
@pytest.mark.parametrize("function", MASKING)
def test_a_mask_of_integers_other_than_0_and_1_is_refused(function, lengths, array):
    message = (
        "mask must hold booleans, or integers 0 and 1, got other integers. "
        "Pass for example mask > 0, or for lengths, jnp.arange(size) < lengths[:, None]."
    )
    with refused(message):
        MASKING[function](X, mask=array(lengths).reshape(8, 1, 1))


# One value per feature


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
@pytest.mark.parametrize("function", ["batch_normalize", "train", "batch_renormalize"])
def test_training_on_one_value_per_feature_warns(function, shape):
    message = (
        f"an input of shape {shape} has one value per feature, so training normalizes it to 0; "
        "use a batch of at least two examples, or use_running_average=True."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        FUNCTIONS[function](np.ones(shape, np.float32))


@pytest.mark.parametrize("function", ["normalize", "evaluate"])
def test_evaluating_one_value_per_feature_does_not_warn(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FUNCTIONS[function](np.ones((1, 3), np.float32))


def test_ghost_groups_of_one_value_warn_of_the_group_size():
    with pytest.warns(UserWarning, match="group_size=1 leaves one value per group and feature"):
        jaxbn.ghost_normalize(X[:, 0], group_size=1)


def test_one_value_per_feature_on_each_of_many_devices_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(jax.vmap(lambda x: jaxbn.batch_normalize(x, axis_name="d"), axis_name="d"), X[:, :1])


def test_one_value_per_feature_becomes_the_bias():
    with pytest.warns(UserWarning):
        y, _ = jaxbn.batch_normalize(np.full((1, 3), 7, np.float32), bias=2 * THREE)
    np.testing.assert_array_equal(y, np.full((1, 3), 2))
