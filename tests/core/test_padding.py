"""Padding: every example of a ragged batch counts once."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import reference

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (5, 4, 3)).astype(np.float32)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def test_a_padded_batch_begins_with_the_batch_and_the_mask_says_how_far():
    batch = {"x": X, "label": np.arange(5)}
    padded, mask = jaxbn.pad_batch(batch, 8)
    assert mask.dtype == bool and mask.tolist() == [True] * 5 + [False] * 3
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[mask], padded), batch)
    chex.assert_tree_shape_prefix(padded, (8,))


def test_a_full_batch_stays_as_it_is():
    padded, mask = jaxbn.pad_batch(X, 5)
    np.testing.assert_array_equal(padded, X)
    assert mask.all()


def test_a_batch_without_examples_becomes_padding_alone():
    padded, mask = jaxbn.pad_batch(X[:0], 2)
    assert padded.shape == (2, 4, 3) and not mask.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float16, jnp.bfloat16, bool])
def test_arrays_keep_their_dtype_and_their_library(dtype):
    on_host, _ = jaxbn.pad_batch(X.astype(dtype), 8)
    assert type(on_host) is np.ndarray and on_host.dtype == dtype
    on_device, _ = jaxbn.pad_batch(jnp.asarray(X, dtype), 8)
    assert isinstance(on_device, jax.Array) and on_device.dtype == dtype


def test_padding_under_jit_is_that_without():
    padded, mask = jax.jit(lambda x: jaxbn.pad_batch(x, 8))(X)
    chex.assert_trees_all_equal((padded, mask), jaxbn.pad_batch(X, 8))


@pytest.mark.slow
def test_moments_output_and_gradients_of_the_examples_are_those_without_padding():
    scale, bias, dy = np.float32([1.0, 2.0, -1.0]), np.float32([0.0, 1.0, 2.0]), RNG.normal(size=X.shape)
    (padded, padded_dy), mask = jaxbn.pad_batch((X, dy.astype(np.float32)), 8)

    def loss(x, scale, bias):
        y, _ = jaxbn.batch_normalize(x, scale, bias, mask=mask[:, None, None])
        return jnp.vdot(y, padded_dy), y

    dx_and_more, y = jax.grad(loss, (0, 1, 2), has_aux=True)(padded, scale, bias)
    dx, dscale, dbias = dx_and_more
    np.testing.assert_allclose(y[:5], reference.batch_norm(X, scale, bias)[0], **CLOSE)
    expected = reference.gradients(X, scale, bias, dy)
    for found, exact in zip((dx[:5], dscale, dbias), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_an_epoch_in_padded_batches_sees_every_example_once():
    labels, seen = np.arange(1, 12), []
    for first in range(0, len(labels), 4):
        batch, mask = jaxbn.pad_batch(labels[first : first + 4], 4)
        seen += batch[mask].tolist()
    assert seen == labels.tolist()


def test_more_examples_than_the_size_are_refused():
    with pytest.raises(
        ValueError, match="size must be at least the 5 examples of the batch, got 4. Pass the full batch size"
    ):
        jaxbn.pad_batch(X, 4)


@pytest.mark.parametrize("batch", [{}, {"x": X, "seed": np.int32(3)}, {"x": X, "label": np.arange(4)}])
def test_arrays_without_a_common_first_axis_are_refused(batch):
    shapes = re.escape(str([np.shape(a) for a in jax.tree.leaves(batch)]))
    with pytest.raises(
        ValueError, match=f"batch must hold arrays with a common first axis, the examples, got shapes {shapes}"
    ):
        jaxbn.pad_batch(batch, 8)
