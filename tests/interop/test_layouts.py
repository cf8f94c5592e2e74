"""Layouts move the values of a layer there and back bit for bit, and allow for what a layer may lack."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbn import interop
from tests.interop.comparisons import assert_same_bits, random, refused
from tests.interop.nets import BATCH_NORM

DTYPE = st.sampled_from([np.float16, np.float32, np.float64])


SIZE = st.integers(1, 4)


@st.composite
def kernels(draw):
    """Draws a layout and variables of a layer with it."""
    k = tuple(draw(st.lists(SIZE, min_size=1, max_size=3)))
    groups, per_group, out_per_group = draw(SIZE), draw(SIZE), draw(SIZE)
    transpose_kernel = draw(st.booleans())
    ends = (groups * per_group, groups * out_per_group)
    layout, shape, features = draw(
        st.sampled_from(
            [
                (interop.conv_layout(), (*k, per_group, ends[1]), ends[1]),
                (interop.depthwise_conv_layout(multiplier=out_per_group), (*k, 1, ends[1]), ends[1]),
                (
                    interop.conv_transpose_layout(transpose_kernel=transpose_kernel),
                    (*k, *(ends[::-1] if transpose_kernel else ends)),
                    ends[1],
                ),
                (interop.dense_layout(), ends, ends[1]),
                (interop.dense_layout(flattened=(groups, *k)), (groups * math.prod(k), ends[1]), ends[1]),
                (
                    interop.dense_layout(unflattened=(groups, *k)),
                    (ends[0], groups * math.prod(k)),
                    groups * math.prod(k),
                ),
            ]
        )
    )
    dtype = draw(DTYPE)
    variables = {"kernel": random(shape, dtype, 0)}
    if draw(st.booleans()):
        variables["bias"] = random((features,), dtype, 1)
    return layout, {"params": variables}


@st.composite
def norms(draw):
    use_scale, use_bias, counted = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    flattened, dtype = draw(st.lists(SIZE, min_size=1, max_size=3)), draw(DTYPE)
    features = math.prod(flattened)
    params = {
        name: random((features,), dtype, seed) for seed, name in enumerate(["scale"] * use_scale + ["bias"] * use_bias)
    }
    stats = {"mean": random((features,), np.float32, 2), "var": random((features,), np.float32, 3)}
    if counted:
        stats["steps"] = np.full(features, draw(st.integers(0, 2**31 - 1)), np.int32)
    layout = interop.batch_norm_layout(
        use_scale=use_scale, use_bias=use_bias, counted=counted, flattened=draw(st.sampled_from([None, flattened]))
    )
    return layout, {"params": params, "batch_stats": stats} if params else {"batch_stats": stats}


@settings(max_examples=100, deadline=None)
@given(st.one_of(kernels(), norms()))
def test_variables_to_pytorch_and_back_are_the_same_bits(case):
    layout, variables = case
    entries = layout.to_torch(variables)
    assert_same_bits(layout.from_torch(entries), variables)
    assert_same_bits(layout.to_torch(layout.from_torch(entries)), entries)


@settings(max_examples=100, deadline=None)
@given(st.one_of(kernels(), norms()))
def test_variables_to_keras_and_back_are_the_same_bits_but_for_steps(case):
    layout, variables = case
    weights = layout.to_keras(variables)
    variables.get("batch_stats", {}).pop("steps", None)
    assert_same_bits(layout.from_keras(weights), variables)
    assert_same_bits(layout.to_keras(layout.from_keras(weights)), weights)


def test_results_share_no_memory_with_what_is_given():
    entries = {"weight": np.ones((1, 1, 1)), "bias": np.ones(1)}
    layout = interop.conv_layout()
    variables = layout.from_torch(entries)
    for results, sources in [
        (variables, entries),
        (layout.to_torch(variables), variables),
        (layout.to_keras(variables), variables),
        (layout.from_keras(list(entries.values())), entries),
    ]:
        pairs = itertools.product(jax.tree.leaves(results), jax.tree.leaves(sources))
        assert not any(np.shares_memory(one, other) for one, other in pairs)


def test_results_are_contiguous_and_writable_as_pytorch_needs_them():
    variables = {"params": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones(4)}}
    layout = interop.conv_layout()
    for array in (*layout.to_torch(variables).values(), *layout.to_keras(variables)):
        assert array.flags.c_contiguous and array.flags.writeable


def only(*names):
    return {name: BATCH_NORM[name] for name in names}


def test_without_affine_there_are_no_params():
    found = interop.batch_norm_layout().from_torch(only("running_mean", "running_var", "num_batches_tracked"))
    assert list(found) == ["batch_stats"] and list(found["batch_stats"]) == ["mean", "var"]
    entries = interop.batch_norm_layout().to_torch(found)
    assert list(entries) == ["running_mean", "running_var", "num_batches_tracked"]
    assert entries["num_batches_tracked"] == 0  # the layer does not count


def test_without_running_statistics_there_are_no_batch_stats():
    found = interop.batch_norm_layout(counted=True).from_torch(only("weight", "bias"))
    assert list(found) == ["params"]
    assert_same_bits(interop.batch_norm_layout().to_torch(found), only("weight", "bias"))


def test_steps_are_read_only_for_layers_that_count():
    assert "steps" not in interop.batch_norm_layout().from_torch(BATCH_NORM)["batch_stats"]
    found = interop.batch_norm_layout(counted=True).from_torch(BATCH_NORM)["batch_stats"]["steps"]
    assert_same_bits(found, np.array([9, 9], np.int32))


def test_the_feature_that_saw_most_batches_counts_them_for_all():
    stats = {"mean": np.zeros(2), "var": np.ones(2), "steps": np.array([7, 9], np.int32)}
    assert interop.batch_norm_layout(counted=True).to_torch({"batch_stats": stats})["num_batches_tracked"] == 9


def test_a_scale_or_bias_that_flax_lacks_is_neutral_in_pytorch():
    variables = {"params": {"bias": np.array([3.0, 4.0])}, "batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}
    layout = interop.batch_norm_layout(use_scale=False)
    np.testing.assert_array_equal(layout.to_torch(variables)["weight"], 1)
    assert_same_bits(layout.from_torch(layout.to_torch(variables)), variables)
    with refused("the weight of this batch norm is not 1 everywhere, but Flax's layer has none; make Flax's layer"):
        layout.from_torch(BATCH_NORM)


@pytest.mark.parametrize(("own", "entry"), [("scale", "weight"), ("bias", "bias")])
def test_a_scale_or_bias_that_flax_lacks_has_no_momentum(own, entry):
    momenta = {"params": {own: np.zeros(2)}}
    layout = interop.batch_norm_layout(use_scale=own == "scale", use_bias=own == "bias")
    assert list(layout.to_torch(momenta)) == [entry]
    assert_same_bits(layout.from_torch(layout.to_torch(momenta)), momenta)


def test_weights_of_several_groups_without_a_bias_look_like_those_of_fewer_features():
    found = interop.conv_transpose_layout().from_torch({"weight": np.ones((4, 3, 5))})
    assert found["params"]["kernel"].shape == (5, 4, 3)
