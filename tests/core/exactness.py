"""How precisely the moments, outputs and gradients of a batch have to equal the oracle, on every platform."""

import functools
import math

import jax
import numpy as np

import jaxbn
from jaxbn._core.moment_algorithms import CANCELLATION
from tests import reference
from tests.core.test_numerics import GRADIENT_ERROR, OUTPUT_ERROR, ROUNDING

SHAPE = 32, 12, 12, 4
POSITIONS = math.prod(SHAPE[:-1])
STATISTICS = 8 * (1 + CANCELLATION) * ROUNDING  # of the variance, relative; see tests/core/test_numerics.py
# The variance about a sampled pivot is a difference of sums up to eight times as large.
STATISTICS_SAMPLED = 8 * (1 + 8) * ROUNDING


@functools.partial(jax.jit, static_argnames=("axis", "method"))
def step(x, scale, bias, dy, mask=None, *, axis=-1, method=jaxbn.batch_normalize):
    """Returns output, gradients and moments."""
    normalize = functools.partial(method, axis=axis, mask=mask)
    y, vjp, moments = jax.vjp(normalize, x, scale, bias, has_aux=True)
    return y, vjp(dy.astype(y.dtype)), moments


def require_step(found, x, scale, bias, dy, **options):
    """Compares what `step` returns with the oracle."""
    y, gradients, moments = found
    exact, mean, var, count = reference.batch_norm(x, scale, bias, **options)
    require_output(y, exact)
    require_gradients(gradients, reference.gradients(x, scale, bias, dy, **options))
    require_moments(moments, mean, var)
    assert (moments.count == count).all()


def require_output(y, exact):
    # An outlier among many values is normalized to more than 5, and rounded there.
    assert (abs(np.asarray(y) - exact) <= OUTPUT_ERROR * np.maximum(1, abs(exact))).all()


def require_gradients(gradients, exact):
    require_gradient(gradients[0], exact[0])
    # Those of scale and bias are sums of as many terms as there are positions, of either sign: about its root, by luck
    # less.
    of_random_terms = math.sqrt(gradients[0].size / exact[1].size)
    for gradient, expected in zip(gradients[1:], exact[1:], strict=True):
        require_gradient(gradient, expected, least=of_random_terms)


def require_gradient(gradient, exact, least=0.0):
    assert abs(np.asarray(gradient) - exact).max() <= GRADIENT_ERROR * max(abs(exact).max(), least)


def require_moments(moments, mean, var, tolerance=STATISTICS):
    spread = np.sqrt(var)
    assert (abs(moments.mean - mean) <= 8 * ROUNDING * np.maximum(abs(mean), spread)).all()
    np.testing.assert_allclose(moments.var, var, rtol=tolerance)


def normal(shape, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)
