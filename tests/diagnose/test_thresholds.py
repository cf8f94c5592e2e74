"""Each threshold lies between what is measured in healthy networks and in faulty ones.

These are the numbers that jaxbn/diagnose/_thresholds.py states.
"""

import numpy as np
import pytest

from jaxbn.diagnose import _thresholds, diagnose
from jaxbn.diagnose._start import fit_start
from tests.diagnose.nets import LAYER, STANDARD, Net, evaluate, far, held_out, holding_start, normal, planted, updated

seeds = pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])


def independent_values(layer):
    """Number of independent values whose mean is as exact as that of a batch."""
    return min(1 / layer.noise**2, layer.values)


def relative(values):
    """The smallest of a layer's values, as a fraction of their 0.9 quantile."""
    return min(values) / np.quantile(values, 0.9)


def independent_examples(number, size, count):
    """Diagnoses batches of independent values."""
    return diagnose(LAYER, STANDARD, [normal(size, 3, seed=1000 * number + k) for k in range(count)]).layers[0]


@seeds
def test_gap(seed):
    healthy = [layer.gap for layer in planted("none", seed=seed).layers]
    assert max(healthy) < 0.05 < _thresholds.GAP
    for fault in ("less contrast", "inverted"):
        gaps = [layer.gap for layer in planted(fault, seed=seed).layers]
        assert _thresholds.GAP < 0.6 < max(gaps)


@seeds
def test_independent_values_and_few_examples(seed):
    of_two = planted("batches of two", seed=seed).layers
    assert {layer.examples for layer in of_two} == {2} and 2 < _thresholds.FEW_EXAMPLES < 32
    # By the number of independent values alone, batches of two would pass in a shallow network.
    assert _thresholds.INDEPENDENT_VALUES < 22 < min(map(independent_values, of_two))
    assert _thresholds.INDEPENDENT_VALUES < 300 < min(map(independent_values, planted("none", seed=seed).layers))


def test_independent_values_of_a_dense_layer():
    assert independent_values(independent_examples(0, size=16, count=20)) < 17 < _thresholds.INDEPENDENT_VALUES
    assert _thresholds.INDEPENDENT_VALUES < 30 < independent_values(independent_examples(0, size=32, count=20))


@seeds
def test_excess_and_score(seed):
    for layer in planted("none", seed=seed).layers:
        assert layer.excess < 1.3 < _thresholds.EXCESS and layer.score < 0.7 < _thresholds.SCORE
    for layer in planted("sorted by class", seed=seed).layers:
        assert layer.excess > 4 > _thresholds.EXCESS and layer.score > 5 > _thresholds.SCORE


def test_excess_of_two_batches_is_large_by_chance_and_their_score_is_not():
    layers = [independent_examples(number, size=32, count=2) for number in range(60)]
    assert max(layer.excess for layer in layers) > _thresholds.EXCESS
    assert max(layer.score for layer in layers) < 2 < _thresholds.SCORE


@seeds
def test_start_of_healthy_averages(seed):
    fit = fit_start(planted("none", seed=seed).layers)
    assert fit.gain < 0.01 < _thresholds.EXPLAINED_GAP
    assert fit.gain / fit.error < 0.5 < _thresholds.ERRORS_OF_START


@pytest.mark.parametrize("steps", [2, 8, 15])
def test_start_of_averages_that_have_not_converged(steps):
    fit = fit_start(diagnose(Net(), updated(steps), held_out(), call=evaluate).layers)
    assert fit.gain > 0.2 > _thresholds.EXPLAINED_GAP
    assert fit.gain / fit.error > 10 > _thresholds.ERRORS_OF_START
    assert fit.explained > 0.99 > _thresholds.EXPLAINED
    assert growth(fit) < 0.01


@pytest.mark.parametrize("inputs", ["mean 5", "0..255"])
def test_only_a_shift_makes_a_gap_grow_for_inputs_far_from_zero(inputs):
    net, variables, batches = far(inputs)
    for steps in (30, 100, 300):
        held = diagnose(net, holding_start(variables, 0.99**steps), batches, call=evaluate)
        assert growth(fit_start(held.layers)) < 0.01
    shifted = fit_start(diagnose(net, variables, [x + np.std(x) for x in batches], call=evaluate).layers)
    # In all else the shift passes for a start.
    assert shifted.explained > _thresholds.EXPLAINED
    assert shifted.gain > max(_thresholds.EXPLAINED_GAP, _thresholds.ERRORS_OF_START * shifted.error)
    assert growth(shifted) > 10


def growth(fit):
    """The largest factor by which the fitted start makes a squared gap larger; a finding needs at most 1."""
    return (fit.after / fit.before).max()


@seeds
def test_variances_and_scales_of_dead_features(seed):
    for layer in planted("none", seed=seed).layers:
        assert _thresholds.DEAD_VAR < 0.1 < relative(layer.population.var)
        assert _thresholds.DEAD_SCALE < 0.3 < relative(layer.scale)
    (dead,) = (layer for layer in planted("dead features", seed=seed).layers if layer.path == "first")
    assert relative(dead.population.var) == 0
    assert relative(dead.scale) == 0
