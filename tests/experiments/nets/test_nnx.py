"""The nnx networks compute the same as the linen networks, with the same variables."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.nets import nnx as nnx_nets

pytestmark = pytest.mark.slow

WIDTH = 1 / 16
QUICKLY = {"xla_backend_optimization_level": 0}  # compiles several times faster


def resnet_convolutions(net):
    """Returns the convolutions with their norms, by their place in the linen net's variables."""
    layers = [net.stem, *itertools.chain.from_iterable((block.first, block.second) for block in net.blocks)]
    return {(f"ConvNorm_{i}",): layer for i, layer in enumerate(layers)}


def inception_convolutions(net):
    names = ("one", "three_reduce", "three", "five_reduce", "five", "projection")
    return {
        (f"InceptionModule_{i}", f"ConvNorm_{j}"): getattr(module, name)
        for i, module in enumerate(net.modules)
        for j, name in enumerate(names)
    }


def at(tree, path):
    for step in path:
        tree = tree.get(step, {})
    return tree


def fill(net, convolutions, variables):
    """Copies the variables of a linen net into an nnx net; every one of them, into a place of its shape."""
    layers = {("Dense_0",): net.dense}
    for path, layer in convolutions.items():
        layers |= {(*path, "Conv_0"): layer.conv, (*path, "BatchNorm_0"): layer.norm}
    copied = 0
    for path, layer in layers.items():
        for name, value in [item for tree in variables.values() for item in at(tree, path).items()]:
            assert getattr(layer, name).shape == value.shape
            getattr(layer, name).set_value(value)
            copied += 1
    assert copied == len(jax.tree.leaves(variables)) == len(jax.tree.leaves(nnx.state(net, nnx.Param, nnx.BatchStat)))


class Both:
    """A narrow linen net with random variables, its twin, and what both give in evaluation and in training."""

    def __init__(self, name, cls, convolutions_of):
        linen = linen_nets.build(Config(net=name, width=WIDTH), num_classes=7)
        twin = nnx.eval_shape(lambda: cls(num_classes=7, width=WIDTH, rngs=nnx.Rngs(0)))
        x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
        rng = np.random.default_rng(0)
        structure = jax.eval_shape(lambda key: linen.init(key, x, train=False), jax.random.key(0))
        # Positive, as a variance must be.
        variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype), structure)
        convolutions = convolutions_of(twin)
        fill(twin, convolutions, variables)
        self.norms = {path: layer.norm for path, layer in convolutions.items()}

        def run_linen(variables, x):
            trained, updates = linen.apply(variables, x, train=True, mutable=["batch_stats"])
            return linen.apply(variables, x, train=False), trained, updates["batch_stats"]

        def run_nnx(state, x):
            net = nnx.merge(definition, state)
            return net(x, train=False), net(x, train=True), nnx.state(net, nnx.BatchStat)

        definition, state = nnx.split(twin)
        evaluated, trained, self.stats = jax.jit(run_linen, compiler_options=QUICKLY)(variables, x)
        twins_evaluated, twins_trained, stats = jax.jit(run_nnx, compiler_options=QUICKLY)(state, x)
        nnx.update(twin, stats)
        self.evaluated, self.trained = (twins_evaluated, evaluated), (twins_trained, trained)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("resnet20", nnx_nets.ResNet20, resnet_convolutions), id="resnet20"),
        pytest.param(("inception", nnx_nets.Inception, inception_convolutions), id="inception", marks=pytest.mark.slow),
    ],
)
def both(request):
    return Both(*request.param)


def assert_equal_to_rounding(actual, expected):
    # The same operations, compiled twice: some roundings in each of 20 layers.
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_outputs_hang_on_the_images(both):
    assert all(np.ptp(outputs, axis=0).all() for outputs in (*both.evaluated, *both.trained))


def test_outputs_in_evaluation_are_those_of_the_linen_net(both):
    assert_equal_to_rounding(*both.evaluated)


def test_outputs_in_training_are_those_of_the_linen_net(both):
    assert_equal_to_rounding(*both.trained)


def test_training_moves_the_statistics_as_in_the_linen_net(both):
    for path, norm in both.norms.items():
        expected = at(both.stats, path)["BatchNorm_0"]
        for name, value in expected.items():
            assert_equal_to_rounding(getattr(norm, name)[...], value)


@pytest.mark.parametrize(("net", "cls"), [("resnet20", nnx_nets.ResNet20), ("inception", nnx_nets.Inception)])
def test_full_nets_have_the_published_number_of_parameters(net, cls):
    linen = linen_nets.build(Config(net=net), num_classes=10)
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(lambda key: linen.init(key, x, train=False), jax.random.key(0))["params"]
    twin = nnx.eval_shape(lambda: cls(num_classes=10, width=1.0, rngs=nnx.Rngs(0)))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, nnx.state(twin, nnx.Param))]
    assert sizes[0] == sizes[1]
