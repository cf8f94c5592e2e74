"""The figures of a layer are those that NumPy and SciPy compute from all its inputs."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn
from flax import nnx

import jaxbn.linen
from jaxbn.diagnose import diagnose
from tests.diagnose.nets import LAYER, STANDARD, names, normal, state_of


def test_figures_are_those_of_all_values_however_they_are_split_and_masked():
    x = 5 + 3 * normal(40, 6, 3)
    counts = np.random.default_rng(1).integers(0, 7, 40)
    mask = (np.arange(6) < counts[:, None])[..., None]
    batches = [(x[a:b], mask[a:b]) for a, b in ((0, 16), (16, 32), (32, 40))]
    layer = diagnose(LAYER, STANDARD, batches, call=lambda layer, batch: layer(batch[0], mask=batch[1])).layers[0]

    values = np.float64(x)[mask[..., 0]]
    mean, var = values.mean(0), values.var(0)
    np.testing.assert_allclose(layer.population.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.population.var, var, rtol=1e-6)
    assert (layer.population.count == counts.sum()).all()
    squares = [np.float64(v)[m[..., 0]].var(0) * m.sum() for v, m in batches]
    np.testing.assert_allclose(layer.batch.var, sum(squares) / counts.sum(), rtol=1e-6)

    running = STANDARD["batch_stats"]
    y_measured = (values - mean) / np.sqrt(var + 1e-5)
    y_running = (values - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    gap = np.sqrt(((y_running - y_measured) ** 2).sum() / (y_measured**2).sum())
    np.testing.assert_allclose(layer.gap, gap, rtol=1e-6)


def test_a_mask_for_the_examples_leaves_them_out():
    batches = [(normal(20, 4, 3, seed=k), np.arange(20) < 12) for k in range(9)]
    padded = diagnose(LAYER, STANDARD, batches, call=lambda layer, batch: layer(batch[0]), mask=lambda batch: batch[1])
    whole = diagnose(LAYER, STANDARD, [x[:12] for x, _ in batches])
    assert names(padded) == names(whole) == []
    for name in ("values", "examples", "gap", "noise", "excess", "score"):
        np.testing.assert_allclose(getattr(padded.layers[0], name), getattr(whole.layers[0], name), rtol=1e-5)


def test_the_excess_of_batches_is_the_f_statistic_of_their_examples():
    batches = [normal(n, 5, 1, seed=k) + k / 5 for k, n in enumerate((11, 17, 11))]
    layer = diagnose(LAYER, state_of([0.1], [1]), batches).layers[0]
    expected = scipy.stats.f_oneway(*(np.float64(x).mean(1) for x in batches))
    np.testing.assert_allclose(layer.excess, expected.statistic, rtol=1e-5)
    np.testing.assert_allclose(scipy.stats.norm.sf(layer.score), expected.pvalue, rtol=0.1)


def test_a_mean_far_above_the_standard_deviation_costs_nothing():
    far = state_of([1e4] * 3, [1, 1, 1])
    diagnosis = diagnose(LAYER, far, [1e4 + normal(32, 2, 3, seed=k) for k in range(9)])
    near = diagnose(LAYER, STANDARD, [normal(32, 2, 3, seed=k) for k in range(9)])
    assert names(diagnosis) == []
    np.testing.assert_allclose(diagnosis.layers[0].noise, near.layers[0].noise, rtol=1e-2)


def test_complex_inputs_are_diagnosed():
    batches = [normal(64, 3, seed=k) + 1j * normal(64, 3, seed=100 + k) for k in range(9)]
    stats = {"mean": jnp.zeros(3, complex), "var": jnp.full(3, 2.0)}
    variables = {"params": STANDARD["params"], "batch_stats": stats}
    for scale in (jnp.ones(3, complex), jnp.full(3, 1j)):
        state = variables | {"params": variables["params"] | {"scale": scale}}
        assert names(diagnose(jaxbn.linen.BatchNorm(True), state, batches)) == []
        assert names(diagnose(jaxbn.linen.BatchNorm(True), state, [x + 1j for x in batches])) == ["shifted inputs"]


def test_layers_behind_a_frozen_one_see_in_training_what_it_hands_on():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxbn.linen.BatchNorm(use_running_average=True, frozen=True, name="a")(x)
            return nn.BatchNorm(use_running_average=True, name="b")(x)

    stats = {"a": state_of([0.1] * 3, [4, 4, 4]), "b": state_of([0.1] * 3, [0.25] * 3)}
    variables = {kind: {name: of_layer[kind] for name, of_layer in stats.items()} for kind in ("params", "batch_stats")}
    behind = diagnose(Two(), variables, [normal(64, 3, seed=k) for k in range(9)]).layers[1]
    np.testing.assert_allclose(behind.batch.var, 0.25, rtol=0.1)


def test_several_rows_of_each_example_are_not_taken_for_independent_examples():
    class Rows(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x.reshape(-1, 3))

    batches = [0.9 * normal(32, 1, 3, seed=k) + 0.4 * normal(32, 10, 3, seed=100 + k) for k in range(9)]
    diagnosis = diagnose(Rows(), {name: {"BatchNorm_0": value} for name, value in STANDARD.items()}, batches)
    assert names(diagnosis) == [] and diagnosis.layers[0].examples == 32


def test_an_empty_batch_says_nothing():
    batches = [normal(64, 3, seed=k) for k in range(9)]
    without = diagnose(LAYER, STANDARD, batches)
    diagnosis = diagnose(LAYER, STANDARD, [*batches, batches[0][:0]])
    assert names(diagnosis) == [] and diagnosis.layers[0].gap == without.layers[0].gap


def test_a_layer_that_is_called_twice_has_the_moments_of_both_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True)
            return norm(x) + norm(1 + 2 * x)

    batches = [normal(32, 3, seed=k) for k in range(9)]
    diagnosis = diagnose(Twice(), {name: {"BatchNorm_0": value} for name, value in STANDARD.items()}, batches)
    both = np.concatenate([np.float64(f(x)) for x in batches for f in (lambda x: x, lambda x: 1 + 2 * x)])
    np.testing.assert_allclose(diagnosis.layers[0].population.var, both.var(0), rtol=1e-6)
    assert diagnosis.layers[0].values == 64 and diagnosis.layers[0].examples == 32
    assert "batches not independent" not in names(diagnosis)


@pytest.mark.slow
def test_layers_under_jit_and_remat_are_found_in_the_order_of_their_calls():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="b")(x)
            return nn.BatchNorm(use_running_average=True, name="a")(nn.relu(x))

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, block in (("z", nn.jit(Block)), ("y", nn.jit(Block)), ("x", nn.remat(Block))):
                x = block(name=name)(x)
            return x

    batches = [normal(32, 3, seed=k) for k in range(3)]
    block = {name: {"b": value, "a": value} for name, value in STANDARD.items()}
    variables = {name: {"z": value, "y": value, "x": value} for name, value in block.items()}
    paths = [layer.path for layer in diagnose(Blocks(), variables, batches).layers]
    assert paths == ["z/b", "z/a", "y/b", "y/a", "x/b", "x/a"]


def test_each_layer_of_a_stack_has_its_own_figures():
    layers = nnx.vmap(lambda _: nnx.BatchNorm(3, rngs=nnx.Rngs(0)))(jnp.arange(2))
    means = jnp.array([[0.1, -0.1, 0.2], [1.0, 1.1, 0.9]])
    layers.mean.set_value(means)
    batches = [normal(64, 3, seed=k) for k in range(9)]
    stacked = diagnose(layers, None, batches, call=nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))).layers
    assert [layer.path for layer in stacked] == ["[0]", "[1]"]
    for layer, mean in zip(stacked, means, strict=True):
        alone = diagnose(LAYER, state_of(mean, [1, 1, 1]), batches).layers[0]
        for name in ("values", "examples", "gap", "shift", "noise", "excess"):
            np.testing.assert_allclose(getattr(layer, name), getattr(alone, name), rtol=1e-5)
