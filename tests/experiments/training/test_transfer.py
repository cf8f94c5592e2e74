"""Runs that start from a trained network: variables that are kept, new variables, and the mode of the batch norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.training.loop import fit
from experiments.training.transfer import LAST, transplant

TUNINGS = ("trained", "frozen", "affine")
SOURCE, TARGET = 5, 3  # classes
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Moved:
    """A narrow net as if it had been trained, and what runs with every tuning take over from it."""

    def __init__(self, net):
        self.start = Config(net=net, width=1 / 16)
        self.images = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)
        self.trained = self._variables(self.start, SOURCE, seed=1)
        self.configs = {tuning: self.start.replace(start=self.start, tuning=tuning) for tuning in TUNINGS}
        self.fresh = {tuning: self._variables(config, TARGET, seed=2) for tuning, config in self.configs.items()}
        self.variables = {
            tuning: transplant(config, self.trained, self.fresh[tuning], self.images[:1])
            for tuning, config in self.configs.items()
        }

    def _variables(self, config, classes, seed):
        """Random numbers in the place of variables, with a `batch_stats` even where it is empty."""
        rng, module = np.random.default_rng(seed), linen_nets.build(config, classes)
        shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), self.images)
        values = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype), shapes)
        return {"batch_stats": {}} | values

    def features(self, tuning, variables, *, train):
        """Returns the logits with the last layer of the trained net, and the statistics then."""
        module = linen_nets.build(self.configs[tuning], SOURCE)
        variables = variables | {"params": variables["params"] | {LAST: self.trained["params"][LAST]}}
        apply = quickly(functools.partial(module.apply, train=train, mutable=["batch_stats"]))
        logits, updated = apply(variables, self.images)
        return logits, updated.get("batch_stats", {})


@pytest.fixture(
    scope="module",
    params=["cnn7", *(pytest.param(net, marks=pytest.mark.slow) for net in ("resnet20", "inception"))],
)
def moved(request):
    return Moved(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
def test_last_layer_is_new(moved, tuning):
    jax.tree.map(
        np.testing.assert_array_equal,
        moved.variables[tuning]["params"][LAST],
        moved.fresh[tuning]["params"][LAST],
    )


@pytest.mark.parametrize("tuning", TUNINGS)
def test_net_sees_what_the_trained_one_sees(moved, tuning):
    expected, _ = moved.features("trained", moved.trained, train=False)
    actual, _ = moved.features(tuning, moved.variables[tuning], train=False)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_trained_net_is_taken_over_bit_by_bit_where_its_batch_norms_stay(moved):
    actual, expected = moved.variables["trained"], moved.trained
    np.testing.assert_equal(actual["batch_stats"], expected["batch_stats"])
    assert actual["params"].keys() == expected["params"].keys()
    np.testing.assert_equal(
        {name: leaves for name, leaves in actual["params"].items() if name != LAST},
        {name: leaves for name, leaves in expected["params"].items() if name != LAST},
    )


@pytest.mark.slow
def test_batch_norms_that_are_trained_go_on_counting(moved):
    evaluated, before = moved.features("trained", moved.variables["trained"], train=False)
    logits, after = moved.features("trained", moved.variables["trained"], train=True)
    assert not np.allclose(logits, evaluated, rtol=1e-3)
    assert all((old != new).any() for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True))


@pytest.mark.parametrize("tuning", ["frozen", "affine"])
def test_other_batch_norms_do_the_same_in_training_and_in_evaluation(moved, tuning):
    evaluated, before = moved.features(tuning, moved.variables[tuning], train=False)
    logits, after = moved.features(tuning, moved.variables[tuning], train=True)
    np.testing.assert_array_equal(logits, evaluated)
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
def test_affine_maps_learn_and_frozen_batch_norms_do_not(moved):
    def names(tree):
        return {path[-1].key for path, _ in jax.tree.leaves_with_path(tree)}

    frozen, affine = moved.variables["frozen"], moved.variables["affine"]
    assert names(frozen["params"]) == {"kernel", "bias"} and names(frozen["batch_stats"]) == {"scale", "bias"}
    assert names(affine["params"]) == {"kernel", "scale", "bias"} and not affine["batch_stats"]
    n = len(jax.tree.leaves(moved.trained["batch_stats"]))  # a mean and a variance for each batch norm
    assert len(jax.tree.leaves(frozen["batch_stats"])) == n


def test_net_of_other_images_is_refused(moved):
    config = moved.configs["trained"]
    shapes = jax.eval_shape(
        functools.partial(linen_nets.build(config, TARGET).init, train=False),
        jax.random.key(0),
        jnp.zeros((1, 8, 8, 1)),
    )
    gray = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    with pytest.raises(ValueError, match="does not match .* \\d+ variables differ, .*. Start from the same kind of"):
        transplant(config, moved.trained, gray, moved.images[:1])


@pytest.mark.parametrize(
    ("start", "start_variables", "shown"),
    [(None, {"params": {}}, "start_variables=variables and config.start=None"), ("a run", None, "=None and .*=a run")],
)
def test_run_and_variables_to_start_from_go_together(tiny, blobs, start, start_variables, shown):
    config = tiny.replace(start=tiny if start else None)
    with pytest.raises(ValueError, match=f"if and only if config.start is set, got .*{shown}; pass"):
        fit(config, blobs, start_variables=start_variables)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
def test_run_begins_with_the_trained_net(tiny, blobs, tuning):
    source = fit(tiny, blobs)
    # At so small a rate weights stay, and only what is not learned can move.
    config = tiny.replace(start=tiny, tuning=tuning, learning_rate=1e-12, epochs=1)
    run = fit(config, blobs, start_variables=source.variables)
    expected = transplant(config, source.variables, run.variables, blobs.train_images[:1] / np.float32(255))
    jax.tree.map(np.testing.assert_array_equal, run.variables["params"], expected["params"])
    same = jax.tree.map(np.array_equal, run.variables["batch_stats"], expected["batch_stats"])
    assert all(jax.tree.leaves(same)) == (tuning != "trained")


@pytest.mark.slow
def test_pretrained_net_needs_fewer_steps(tiny, blobs):
    source = fit(tiny.replace(epochs=4), blobs)
    again = fit(tiny.replace(start=tiny.replace(epochs=4)), blobs, start_variables=source.variables)
    assert again.rows[0]["train_loss"] < source.rows[0]["train_loss"]
