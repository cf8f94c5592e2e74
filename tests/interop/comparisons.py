"""Shared by the tests of conversions: golden files, random arrays, and how results are compared."""

import functools
import re

import jax
import numpy as np
import pytest


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


@functools.cache
def golden(file):
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays}


def golden_tree(file, prefix):
    return {name.removeprefix(prefix): array for name, array in golden(file).items() if name.startswith(prefix)}


def assert_within_rounding(found, expected, steps=1):
    """Compares trees: a step rounds each value some tens of times, 64 units of the largest, which it may sum with."""
    found, expected = (jax.tree.map(np.asarray, tree) for tree in (found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(abs(array).max() for array in jax.tree.leaves(expected) if array.dtype.kind == "f")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        units = 64 * steps * np.finfo(one.dtype).eps if one.dtype.kind == "f" else 0
        np.testing.assert_allclose(one, other, rtol=0, atol=units * largest)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def random(shape, dtype, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)
