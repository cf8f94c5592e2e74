"""The oracle against finite differences of itself, and against batches worked out by hand."""

import numpy as np
import pytest

from tests import reference

CASES = {
    "plain": ((7, 3), -1, None),
    "feature axis in the middle": ((4, 3, 2), 1, None),
    "two feature axes": ((4, 3, 2, 2), (1, 3), None),
    "mask": ((7, 3), -1, np.arange(7)[:, None] % 3 != 1),
    "mask per feature": ((7, 3), -1, np.arange(21).reshape(7, 3) % 4 != 1),
    "everything masked": ((7, 3), -1, np.zeros((7, 1), bool)),
}


@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("case", CASES)
def test_closed_form_gradients_equal_finite_differences(case, mean):
    shape, axis, mask = CASES[case]
    rng = np.random.default_rng(0)
    features = tuple(shape[a] for a in np.atleast_1d(axis))
    arguments = [rng.normal(mean, 1, shape), rng.normal(1, 0.3, features), rng.normal(0, 1, features)]
    dy = rng.normal(size=shape)

    def loss(*arguments):
        return (dy * reference.batch_norm(*arguments, axis=axis, mask=mask)[0]).sum()

    exact = reference.gradients(*arguments, dy, axis=axis, mask=mask)
    for position, gradient in enumerate(exact):
        measured = np.empty_like(gradient)
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like(gradient)
            step[index] = 1e-5
            ahead, behind = (
                loss(*(a + sign * step if i == position else a for i, a in enumerate(arguments))) for sign in (1, -1)
            )
            measured[index] = (ahead - behind) / 2e-5
        # Central differences in float64: h^2 = 1e-10 of truncation, 1e-16 * mean / h = 1e-10 of rounding.
        np.testing.assert_allclose(gradient, measured, atol=1e-8)


def test_gradients_of_renorm_equal_finite_differences_with_r_and_d_held():
    rng = np.random.default_rng(0)
    x, dy, scale, bias, mean, var = *rng.normal(1, 1, (2, 7, 3)), *rng.normal(1, 0.3, (3, 3)), rng.uniform(1, 2, 3)
    limits = {"r_max": 1.1, "d_max": 0.2}
    _, r, d = reference.renorm(x, mean, var, **limits)

    def loss(x, scale, bias):
        return (dy * reference.batch_norm(x, scale * r, scale * d + bias)[0]).sum()

    exact = reference.renorm_gradients(x, mean, var, scale, bias, dy, **limits)
    direction = rng.normal(size=(7, 3)), *rng.normal(size=(2, 3))
    ahead, behind = (
        loss(*(a + sign * v for a, v in zip((x, scale, bias), direction, strict=True))) for sign in (1e-5, -1e-5)
    )
    along = sum((gradient * v).sum() for gradient, v in zip(exact, direction, strict=True))
    np.testing.assert_allclose(along, (ahead - behind) / 2e-5, atol=1e-8)


def test_two_values_become_minus_one_and_one():
    y, mean, var, count = reference.batch_norm(np.array([[1.0], [3.0]]), epsilon=0)
    assert (y.ravel() == [-1, 1]).all()
    assert (mean, var, count) == (2, 1, 2)


def test_a_masked_value_that_is_not_finite_counts_as_zero_in_the_output_and_has_no_derivative():
    x, mask = np.array([[1.0], [3.0], [np.nan]]), np.array([[True], [True], [False]])
    y, mean, var, _ = reference.batch_norm(x, epsilon=0, mask=mask)
    assert (mean, var) == (2, 1)
    assert y[2] == -2
    dx, _, _ = reference.gradients(x, None, None, np.ones((3, 1)), epsilon=0, mask=mask)
    assert dx[2] == 0
