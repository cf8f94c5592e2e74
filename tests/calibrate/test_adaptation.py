"""A classifier with wrong statistics, or on another domain, gets its accuracy back; domains are blended."""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import freeze

from jaxbn import calibrate
from tests.calibrate.models import FEATURES, VARIABLES, Block, NnxNet, X, layer_variables, stats_of


class Classifier(nn.Module):
    """Two layers with random weights, and one that is fitted to their outputs."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "left"):
            x = Block(nn.BatchNorm, features=32, name=name)(x)
        return nn.Dense(3, name="last")(x), x


class Task(NamedTuple):
    variables: dict
    x: np.ndarray
    labels: np.ndarray

    def accuracy(self, variables, x):
        """Returns the fraction of the examples that is recognized, in evaluation mode."""
        logits, _ = predict(variables, x)
        return np.mean(np.argmax(logits, -1) == self.labels)


apply = jax.jit(Classifier().apply)


def predict(variables, x):
    return jax.device_get(apply(variables, x))


@functools.cache
def task():
    """Returns a model that recognizes three classes, and examples of them."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, 256)
    x = (random.normal(0, 1, (256, FEATURES)) + 3 * np.eye(3, FEATURES)[labels]).astype(np.float32)
    shapes = jax.eval_shape(Classifier().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: random.normal(0, 1, a.shape).astype(a.dtype), shapes)
    variables = calibrate.layer_by_layer(Classifier(), variables, [x])
    features = np.c_[predict(variables, x)[1], np.ones(256)]
    solved, *_ = np.linalg.lstsq(features, np.eye(3)[labels])
    solved = solved.astype(np.float32)
    variables["params"]["last"] = {"kernel": solved[:-1], "bias": solved[-1]}
    variables = jax.device_get(variables)
    return Task(variables, x, labels)


@pytest.mark.parametrize("function", [calibrate.one_pass, calibrate.layer_by_layer])
def test_a_model_with_wrecked_statistics_recovers(function):
    variables, x, _ = task()
    accuracy = task().accuracy(variables, x)
    wrecked = variables | {"batch_stats": jax.tree.map(lambda a: 10 * a + 3, variables["batch_stats"])}
    assert accuracy > 0.9 and task().accuracy(wrecked, x) < 0.6
    assert task().accuracy(function(Classifier(), wrecked, [x]), x) == accuracy


def test_statistics_of_another_domain_adapt_a_model_to_it():
    variables, x, _ = task()
    shifted = 5 * x + 5
    adapted = calibrate.layer_by_layer(Classifier(), variables, [shifted])
    assert task().accuracy(variables, shifted) < 0.6
    assert task().accuracy(adapted, shifted) == task().accuracy(variables, x)


def test_a_blend_mixes_statistics_and_takes_the_rest_from_the_target():
    source, target = VARIABLES, jax.tree.map(lambda a: a + 1, VARIABLES)
    blended = calibrate.blend(source, target, source_weight=0.25)
    desired = jax.tree.map(lambda a: a + 0.75, source["batch_stats"])
    chex.assert_trees_all_close(blended["batch_stats"], desired, rtol=1e-6)
    chex.assert_trees_all_equal(blended["params"], target["params"])


def test_variables_come_back_in_the_containers_that_they_came_in():
    variables = layer_variables()
    for kind in (freeze, lambda given: {name: freeze(tree) for name, tree in given.items()}):
        given = kind(variables)
        calibrated = calibrate.one_pass(nn.BatchNorm(use_running_average=True), given, [X])
        blended = calibrate.blend(given, calibrated, source_weight=0.5)
        assert jax.tree.structure(calibrated) == jax.tree.structure(blended) == jax.tree.structure(given)
        np.testing.assert_allclose(calibrated["batch_stats"]["mean"], X.mean(0), rtol=1e-5)


@pytest.mark.slow
def test_nnx_models_blend_like_linen_variables():
    source, target = NnxNet(), calibrate.layer_by_layer(NnxNet(), None, [X])
    before = jax.tree.map(np.array, stats_of(target))
    blended = jax.tree.map(np.array, stats_of(calibrate.blend(source, target, source_weight=0.25)))
    desired = jax.tree.map(lambda s, t: 0.25 * s + 0.75 * t, stats_of(source), before)
    chex.assert_trees_all_close(blended, desired, rtol=1e-6)
    chex.assert_trees_all_equal(stats_of(target), before)


def test_counters_are_those_of_the_target():
    source, target = ({"batch_stats": {"steps": np.full(2, n), "mean": np.zeros(2)}} for n in (3, 5))
    blended = calibrate.blend(source, target, source_weight=0.5)
    np.testing.assert_array_equal(blended["batch_stats"]["steps"], [5, 5])


@pytest.mark.parametrize(
    ("source", "target", "weight", "message"),
    [
        (VARIABLES, VARIABLES, 1.5, r"source_weight must be in \[0, 1\], got 1.5"),
        (VARIABLES, layer_variables(), 0.5, "source and target must be two states of one model"),
        (VARIABLES["params"], VARIABLES, 0.5, "source and target must be two nnx modules, .* got a dict"),
    ],
)
def test_blends_of_different_models_are_refused(source, target, weight, message):
    with pytest.raises(ValueError, match=message):
        calibrate.blend(source, target, source_weight=weight)
