"""Shifts of inputs and gradients, and the bend of the loss, where the answer is known."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.probes import shifts

KEY = jax.random.key(0)
STEP = 0.3


class Linear(nn.Module):
    """Two dense layers on flattened images, with nothing between them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, use_bias=False)(x.reshape(len(x), -1))
        return nn.Dense(2, use_bias=False)(x)


@pytest.fixture(scope="module")
def batch():
    return jax.random.uniform(jax.random.key(1), (8, 2, 2, 1)), jnp.arange(8) % 2


@pytest.fixture(scope="module")
def variables(batch):
    return Linear().init(KEY, batch[0], train=False)


def kernels(variables):
    return [np.asarray(variables["params"][f"Dense_{i}"]["kernel"], np.float64) for i in (0, 1)]


def derivatives(first, second, images, labels):
    """The gradients of the mean cross-entropy with respect to both kernels, written out."""
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    logits = x @ first @ second
    residuals = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[labels]) / len(x)
    return x.T @ residuals @ second.T, (x @ first).T @ residuals


def test_moments_are_those_of_what_enters_every_layer_but_the_first(variables, batch):
    ((mean, var),) = shifts.input_moments(Linear(), variables, batch[0], KEY)
    inputs = np.asarray(batch[0]).reshape(8, 4) @ kernels(variables)[0]
    np.testing.assert_allclose(mean, inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, inputs.var(0), rtol=1e-4)
    assert isinstance(mean[0], float)


def test_distribution_that_stays_does_not_shift():
    moments = [[[1.0, -2.0], [0.5, 3.0]]]
    assert shifts.distribution_shift(moments, moments) == (0, 0)


def test_shift_of_means_counts_standard_deviations():
    shift = shifts.distribution_shift([[[0.0, 0.0], [4.0, 1.0]]], [[[2.0, 7.0], [4.0, 1.0]]])
    assert shift.mean == pytest.approx(5.0) and shift.var == 0  # root mean square of 1 and 7


def test_shift_of_variances_is_as_large_either_way():
    small, large = [[[0.0], [1.0]]], [[[0.0], [9.0]]]
    assert shifts.distribution_shift(small, large).var == pytest.approx(math.log(9))
    assert shifts.distribution_shift(large, small).var == pytest.approx(math.log(9))


def test_shift_of_the_mean_is_in_standard_deviations_of_both_times():
    shift = shifts.distribution_shift([[[0.0], [1.0]]], [[[5.0], [49.0]]])
    assert shift.mean == pytest.approx(1.0)  # sqrt((1 + 49) / 2) = 5


def test_shift_is_averaged_over_the_layers():
    before, after = [[[0.0], [1.0]], [[0.0], [1.0]]], [[[1.0], [1.0]], [[3.0], [1.0]]]
    assert shifts.distribution_shift(before, after).mean == pytest.approx(2.0)


def test_constant_features_do_not_count():
    before = [[[0.0, 0.0, 5.0], [1.0, 0.0, 1e-13]]]
    after = [[[1.0, 9.0, 7.0], [1.0, 1.0, 1e-13]]]
    assert shifts.distribution_shift(before, after) == (1, 0)


def test_layers_whose_features_are_all_constant_do_not_count():
    before, after = [[[0.0], [1.0]], [[0.0], [0.0]]], [[[1.0], [1.0]], [[2.0], [0.0]]]
    assert shifts.distribution_shift(before, after).mean == 1
    assert math.isnan(shifts.distribution_shift(before[1:], after[1:]).mean)


def test_shift_of_a_diverged_net_is_not_a_number():
    lost = [[[math.nan], [math.nan]]]
    assert all(map(math.isnan, shifts.distribution_shift(lost, lost)))


def test_gradient_shift_is_the_change_that_the_update_of_the_layers_below_makes(variables, batch):
    first, second = kernels(variables)
    below, g = derivatives(first, second, *batch)
    _, shifted = derivatives(first - STEP * below, second, *batch)
    found = shifts.gradient_shift(Linear(), variables, batch, KEY, STEP)
    length = np.linalg.norm(g)
    assert found.distance == pytest.approx(np.linalg.norm(shifted - g) / length, rel=1e-3)
    assert found.cosine == pytest.approx(np.vdot(g, shifted) / length / np.linalg.norm(shifted), rel=1e-5)


def test_gradient_does_not_shift_without_an_update(variables, batch):
    found = shifts.gradient_shift(Linear(), variables, batch, KEY, 0.0)
    assert found.distance == 0 and found.cosine == pytest.approx(1)


def test_net_without_a_gradient_has_no_gradient_shift(variables, batch):
    found = shifts.gradient_shift(Linear(), jax.tree.map(jnp.zeros_like, variables), batch, KEY, STEP)
    assert all(map(math.isnan, found))


def test_gradient_is_that_of_the_mean_cross_entropy(variables, batch):
    loss, found = shifts.gradient(Linear(), variables, batch, KEY)
    for i, expected in enumerate(derivatives(*kernels(variables), *batch)):
        np.testing.assert_allclose(found[f"Dense_{i}"]["kernel"], expected, rtol=1e-3, atol=1e-6)
    assert 0 < loss < 5


@pytest.fixture
def parabola(monkeypatch):
    """A loss of curvature 3 in place of a net's: 1.5 x², at x = 2."""

    def gradient(net, variables, batch, key):
        x = variables["params"]["x"]
        return 1.5 * x**2, {"x": 3 * x}

    monkeypatch.setattr(shifts, "gradient", gradient)
    return {"params": {"x": jnp.float32(2)}}


def test_smoothness_of_a_parabola_is_its_curvature(parabola):
    assert shifts.along_gradient(None, parabola, None, KEY, (0.1, 0.2)).beta == pytest.approx(3, rel=1e-5)


def test_gradient_of_a_parabola_changes_most_after_the_longest_step(parabola):
    found = shifts.along_gradient(None, parabola, None, KEY, (0.2, 0.1))
    assert found.gradient_change == pytest.approx(3 * 0.2, rel=1e-5)


def test_range_of_the_loss_includes_the_start(parabola):
    """From x = 2 the steps lead to x = 1.4, 0 and -1.6."""
    found = shifts.along_gradient(None, parabola, None, KEY, (0.1, 1 / 3, 0.6))
    assert found.loss_range == pytest.approx(1.5 * 2**2, rel=1e-5)


def test_diverged_net_has_no_smoothness(parabola):
    lost = {"params": {"x": jnp.float32(math.nan)}}
    assert all(map(math.isnan, shifts.along_gradient(None, lost, None, KEY, (0.1,))))
