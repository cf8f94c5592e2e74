"""Every mode of differentiation, at ordinary and at large means, against float64.

The oracle's gradients are a closed form; its Hessian-vector products are central differences of that, in float64.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxbn
from tests import reference

ROUNDING = float(jnp.finfo(jnp.float32).eps)
MEANS = [0.0, 1e3]  # below and above the ratio at which the sums are taken again, centered
RNG = np.random.default_rng(0)

SHAPE = (12, 5, 3)
MASK = RNG.random(SHAPE) < [0.4, 0.7, 0.9]
DY = RNG.normal(size=SHAPE).astype(np.float32)
ARGUMENTS = RNG.normal(size=SHAPE), RNG.normal(1, 0.3, 3), RNG.normal(size=3)
V, W = (tuple(RNG.normal(size=np.shape(a)).astype(np.float32) for a in ARGUMENTS) for _ in range(2))


def arguments(mean):
    x, scale, bias = ARGUMENTS
    return tuple(a.astype(np.float32) for a in (x + mean, scale, bias))


def inner(a, b):
    return sum(jnp.vdot(p, q) for p, q in zip(a, b, strict=True))


def assert_close(computed, expected):
    """Allows a few dozen roundings of the largest entry: sums of sixty float32 numbers, multiplied a few times."""
    scale = max(abs(e).max() for e in jax.tree.leaves(expected))
    chex.assert_trees_all_close(computed, expected, rtol=0, atol=64 * ROUNDING * float(scale))


# Exact answers


def exact_gradients(primals, mask):
    return reference.gradients(*(np.float64(p) for p in primals), DY, mask=mask)


def exact_product(primals, tangents, mask):
    """Returns the Hessian-vector product of vdot(y, DY), in x, scale and bias."""
    step = 1e-4
    ahead, behind = (
        reference.gradients(*(np.float64(p) + s * t for p, t in zip(primals, tangents, strict=True)), DY, mask=mask)
        for s in (step, -step)
    )
    return tuple((a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True))


# First order.  Each mode takes the loss, its arguments and a tangent.


def grad(f, primals, v):
    return jax.grad(f, (0, 1, 2))(*primals)


def grad_of_remat(f, primals, v):
    return jax.grad(jax.checkpoint(f), (0, 1, 2))(*primals)


def transpose_of_linearize(f, primals, v):
    _, linear = jax.linearize(f, *primals)
    return jax.linear_transpose(linear, *primals)(1.0)


def jvp(f, primals, v):
    return jax.jvp(f, primals, v)[1]


def linearize(f, primals, v):
    return jax.linearize(f, *primals)[1](*v)


# Second order: products of the Hessian with v.


def forward_over_reverse(f, primals, v):
    return jax.jvp(lambda *p: grad(f, p, v), primals, v)[1]


def reverse_over_reverse(f, primals, v):
    return jax.grad(lambda p: inner(grad(f, p, v), v))(primals)


def reverse_over_forward(f, primals, v):
    return jax.grad(lambda p: jvp(f, p, v))(primals)


def remat_of_reverse_over_reverse(f, primals, v):
    return reverse_over_reverse(jax.checkpoint(f), primals, v)


def forward_over_forward(f, primals, v):
    return jax.jvp(lambda *p: jvp(f, p, v), primals, W)[1]


@functools.partial(jax.jit, static_argnames="mode")
def differentiate(mode, primals, v, mask=None):
    def loss(x, scale, bias):
        return jnp.vdot(jaxbn.batch_normalize(x, scale, bias, mask=mask)[0], DY)

    return mode(loss, primals, v)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize(
    "mode", [grad, *(pytest.param(mode, marks=pytest.mark.slow) for mode in (grad_of_remat, transpose_of_linearize))]
)
def test_reverse_modes_give_the_gradients_of_the_paper(mode, mask, mean):
    primals = arguments(mean)
    assert_close(differentiate(mode, primals, V, mask), exact_gradients(primals, mask))


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("mode", [jvp, linearize])
def test_forward_modes_give_the_directional_derivative(mode, mask, mean):
    primals = arguments(mean)
    terms = [g * v for g, v in zip(exact_gradients(primals, mask), V, strict=True)]
    # A sum of terms that cancel: the roundings are those of the terms, as many as there are.
    error = 8 * ROUNDING * sum(abs(t).sum() for t in terms)
    np.testing.assert_allclose(differentiate(mode, primals, V, mask), sum(t.sum() for t in terms), atol=error)


@pytest.mark.slow
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize(
    "mode", [forward_over_reverse, reverse_over_reverse, reverse_over_forward, remat_of_reverse_over_reverse]
)
def test_hessian_vector_products_agree_with_differences_of_the_gradients(mode, mask, mean):
    primals = arguments(mean)
    assert_close(differentiate(mode, primals, V, mask), exact_product(primals, V, mask))


@pytest.mark.parametrize("mean", MEANS)
def test_forward_over_forward_is_the_hessian_between_two_directions(mean):
    primals = arguments(mean)
    terms = [h * w for h, w in zip(exact_product(primals, V, None), W, strict=True)]
    error = 8 * ROUNDING * sum(abs(t).sum() for t in terms)
    computed = differentiate(forward_over_forward, primals, V)
    np.testing.assert_allclose(computed, sum(t.sum() for t in terms), atol=error)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("mode", [grad, grad_of_remat, forward_over_reverse, reverse_over_reverse])
def test_half_precision_is_differentiated_as_the_same_numbers_in_float32(mode, mask):
    half = jnp.bfloat16
    (x, *parameters), (v, *others) = arguments(1.0), V
    computed = differentiate(mode, (x.astype(half), *parameters), (v.astype(half), *others), mask)
    wide = [value.astype(half).astype(np.float32) for value in (x, v)]
    expected = differentiate(mode, (wide[0], *parameters), (wide[1], *others), mask)
    # The gradient in x alone is rounded to half precision; products of the Hessian are made of it.
    unit = float(jnp.finfo(half).eps)
    others = 64 * ROUNDING if mode in (grad, grad_of_remat) else 4 * unit
    largest = float(max(abs(e).max() for e in jax.tree.leaves(expected)))
    for c, e in zip(jax.tree.leaves(computed), jax.tree.leaves(expected), strict=True):
        error = max(others, unit / 2) if c.dtype == half else others
        np.testing.assert_allclose(np.float64(c), np.float64(e), rtol=0, atol=error * largest)


@pytest.mark.parametrize("mean", MEANS)
def test_forward_and_reverse_jacobians_agree(mean):
    x = arguments(mean)[0][:6, 0]
    forward, reverse = (jacobians(x, jacobian) for jacobian in (jax.jacfwd, jax.jacrev))
    assert_close(forward, reverse)


@functools.partial(jax.jit, static_argnames="jacobian")
def jacobians(x, jacobian):
    return jacobian(lambda x: jaxbn.batch_normalize(x)[0])(x)


# check_grads compares with finite differences in float64, in both modes up to second order.

LAYOUTS = {
    "features last": ((6, 3), -1, None),
    "features second": ((4, 3, 2), 1, None),
    "two feature axes": ((5, 2, 2, 2), (1, 3), None),
    "mask": ((6, 3), -1, np.arange(18).reshape(6, 3) % 4 != 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_and_second_derivatives_agree_with_finite_differences(layout, mean):
    shape, axis, mask = LAYOUTS[layout]
    rng = np.random.default_rng(1)
    features = tuple(shape[a] for a in np.atleast_1d(axis))
    primals = rng.normal(mean, 1, shape), rng.normal(1, 0.3, features), rng.normal(size=features)
    with jax.enable_x64(True):
        f = jax.jit(lambda *p: jaxbn.batch_normalize(*p, axis=axis, mask=mask)[0])
        # Steps of 1e-4 leave 1e-8 of truncation, and 1e-9 of rounding at a mean of 1000.
        check_grads(f, primals, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5, eps=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mean", MEANS)
def test_derivatives_of_the_moments_agree_with_finite_differences(mean):
    x = np.random.default_rng(1).normal(mean, 1, (6, 3))
    with jax.enable_x64(True):
        f = jax.jit(lambda x: jaxbn.moments(x, mask=LAYOUTS["mask"][2])[:2])
        check_grads(f, (x,), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5, eps=1e-4)


# Running statistics, evaluation, complex inputs


@pytest.mark.parametrize("mean", MEANS)
def test_the_derivative_of_the_running_statistics_is_that_of_the_weighted_moments(mean):
    x = arguments(mean)[0]

    def update(x):
        return jaxbn.batch_norm(x, jaxbn.init_stats(3), use_running_average=False, momentum=0.75)[1]

    _, vjp = jax.vjp(jax.jit(update), x)
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    m = x[..., 0].size
    exact_mean, _, _ = reference.moments(x)
    (from_mean,), (from_var,) = vjp(jaxbn.BatchStats(ones, zeros)), vjp(jaxbn.BatchStats(zeros, ones))
    assert_close(from_mean, np.full(x.shape, 0.25 / m))
    assert_close(from_var, 0.25 * 2 * (x - exact_mean) / m)


def test_evaluation_differentiates_by_its_statistics_too():
    x, scale, bias = (np.float64(a) for a in arguments(0.0))
    with jax.enable_x64(True):
        f = jax.jit(jaxbn.normalize)
        check_grads(f, (x[:2], bias, scale**2, scale, bias), order=1, atol=1e-5, rtol=1e-5, eps=1e-4)


@pytest.mark.parametrize("mean", [0, 1e3 - 2e3j])
def test_the_gradient_of_a_complex_input_is_that_of_its_real_and_imaginary_parts(mean):
    rng = np.random.default_rng(2)
    x, dy = (rng.normal(size=(6, 2)) + 1j * rng.normal(size=(6, 2)) for _ in range(2))
    x = (x + mean).astype(np.complex64)
    scale, bias = np.array([0.5, 2.0], np.float32), np.array([1.0, -1.0], np.float32)

    def loss(x):
        return (dy.conj() * reference.batch_norm(x, scale, bias)[0]).real.sum()

    def difference(direction):
        exact = np.empty(x.shape)
        for index in np.ndindex(x.shape):
            step = np.zeros(x.shape, complex)
            step[index] = 1e-5 * direction
            exact[index] = (loss(x + step) - loss(x - step)) / 2e-5
        return exact

    def ours(x):
        return jnp.vdot(dy.astype(np.complex64), jaxbn.batch_normalize(x, scale, bias)[0]).real

    # JAX's gradient of a real function of a complex number is d/d real - i d/d imaginary.
    assert_close(jax.jit(jax.grad(ours))(x), difference(1) - 1j * difference(1j))


# Transformations around the gradient


@pytest.mark.parametrize("large", [False, True])
def test_gradients_under_vmap_over_models_are_those_of_each_model(large):
    models = [arguments(0.0), arguments(5.0 if not large else 1e4), arguments(-1.0)]
    stacked = tuple(np.stack(parts) for parts in zip(*models, strict=True))
    computed = gradients_of_models(stacked)
    for i, primals in enumerate(models):
        assert_close(jax.tree.map(lambda g, i=i: g[i], computed), exact_gradients(primals, None))


@jax.jit
def gradients_of_models(stacked):
    return jax.vmap(lambda *primals: differentiate(grad, primals, V))(*stacked)


@pytest.mark.slow
def test_gradients_through_a_scan_equal_those_of_the_steps_one_by_one():
    """A chain: each step normalizes the output of the one before, and the statistics count in the loss."""
    x, scale, bias = arguments(3.0)

    def body(carry, scale):
        y, stats = jaxbn.batch_norm(*carry, scale, bias, use_running_average=False, momentum=0.5)
        return (jnp.sin(y) + carry[0], stats), None

    def value(carry):
        y, stats = carry
        return jnp.vdot(y, DY) + stats.mean.sum() + stats.var.sum()

    def scanned(x, scales):
        return value(jax.lax.scan(body, (x, jaxbn.init_stats(3)), scales)[0])

    def unrolled(x, scales):
        carry = x, jaxbn.init_stats(3)
        for scale in scales:
            carry, _ = body(carry, scale)
        return value(carry)

    scales = np.stack([scale, scale + 1])
    computed, expected = (jax.jit(jax.grad(f, (0, 1)))(x, scales) for f in (scanned, unrolled))
    assert_close(computed, expected)


def test_a_mask_that_admits_nothing_has_gradients_of_zero_in_every_mode():
    primals = arguments(0.0)
    nothing = np.zeros(SHAPE, bool)
    dx, dscale, dbias = differentiate(grad, primals, V, nothing)
    assert_close(dbias, DY.sum((0, 1)))
    chex.assert_trees_all_equal((dx, dscale), (np.zeros_like(primals[0]), np.zeros(3, np.float32)))
    product = differentiate(forward_over_reverse, primals, V, nothing)
    chex.assert_trees_all_equal(product, jax.tree.map(np.zeros_like, primals))


@pytest.mark.parametrize("mode", [forward_over_reverse, pytest.param(reverse_over_reverse, marks=pytest.mark.slow)])
def test_masked_nan_does_not_reach_hessian_vector_products(mode):
    x, scale, bias = arguments(0.0)
    spoiled = np.where(MASK, x, np.float32(np.nan))
    clean = np.where(MASK, x, np.float32(0))
    tangents = np.where(MASK, V[0], np.float32(0)), *V[1:]
    (dx, *parameters), (expected, *expected_parameters) = (
        differentiate(mode, (x, scale, bias), tangents, MASK) for x in (spoiled, clean)
    )
    chex.assert_trees_all_equal((dx, parameters), (np.where(MASK, expected, 0), expected_parameters))
