"""The networks have the published sizes, and differ only in their norm."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.nets import blocks
from experiments.nets import linen as linen_nets

NETS = ("cnn7", "resnet20", "inception")
NORMS = ("batch", "none", "group")
EVERY_NET_AND_NORM = [(net, norm) for net in NETS for norm in NORMS]
FAST = [("cnn7", "none"), ("cnn7", "group"), ("resnet20", "batch")]  # each norm and two networks


@functools.cache
def shapes(net, norm, **changes):
    """Returns the shapes of a net's variables, computing none of them."""
    module = linen_nets.build(Config(net=net, norm=norm, **changes), num_classes=10)
    return jax.eval_shape(lambda key: module.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


QUICKLY = {"xla_backend_optimization_level": 0}  # compiles several times faster


class Narrow:
    """A narrow net, random variables for it, and its outputs in training and evaluation mode for images of 8x8."""

    def __init__(self, net, norm):
        self.norm = norm
        module = linen_nets.build(Config(net=net, norm=norm, width=1 / 16), num_classes=7)
        self.x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 3))
        rng = np.random.RandomState(0)
        structure = jax.eval_shape(lambda key: module.init(key, self.x, train=False), jax.random.key(0))
        # Positive, as a variance must be.
        self.variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype), structure)

        def train(variables, x):
            return module.apply(variables, x, train=True, mutable=["batch_stats"])

        def evaluate(variables, x):
            return module.apply(variables, x, train=False)

        self.train, self.evaluate = (
            functools.partial(jax.jit(f).lower(self.variables, self.x).compile(QUICKLY), self.variables)
            for f in (train, evaluate)
        )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(pair, id="-".join(pair), marks=[] if pair in FAST else [pytest.mark.slow])
        for pair in EVERY_NET_AND_NORM
    ],
)
def narrow(request):
    """Every net with every norm; a parameter of the fixture, so that tests of the same net follow one another."""
    return Narrow(*request.param)


@pytest.mark.parametrize(
    ("net", "norm", "parameters"),
    [
        ("cnn7", "batch", 72_954),
        ("cnn7", "none", 72_730),
        ("resnet20", "batch", 269_722),
        ("resnet20", "none", 269_034),
        ("inception", "batch", 5_820_074),
        ("inception", "none", 5_813_114),
    ],
)
def test_the_number_of_parameters_is_the_published_one(net, norm, parameters):
    assert count(shapes(net, norm)["params"]) == parameters


@pytest.mark.parametrize("net", NETS)
def test_group_norm_has_the_parameters_of_batch_norm(net):
    assert count(shapes(net, "group")["params"]) == count(shapes(net, "batch")["params"])


@pytest.mark.parametrize(("net", "layers"), [("cnn7", 7), ("resnet20", 20), ("inception", 9 * 6 + 1)])
def test_the_number_of_layers_with_weights_is_the_one_in_the_name(net, layers):
    paths = jax.tree_util.tree_flatten_with_path(shapes(net, "batch")["params"])[0]
    assert sum(path[-1].key == "kernel" for path, _ in paths) == layers


def test_logits_in_training_are_finite_and_one_per_class(narrow):
    logits, _ = narrow.train(narrow.x)
    assert (logits.shape, logits.dtype) == ((4, 7), jnp.float32)
    assert np.isfinite(logits).all()


def test_training_updates_every_batch_statistic(narrow):
    _, updated = narrow.train(narrow.x)
    before, after = (jax.tree.leaves(tree.get("batch_stats", {})) for tree in (narrow.variables, updated))
    assert bool(before) == (narrow.norm == "batch")
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


def test_in_training_the_other_images_of_a_batch_matter_to_batch_norm_alone(narrow):
    others = jnp.concatenate([narrow.x[:1], narrow.x[1:] ** 2])
    differs = narrow.train(narrow.x)[0][0] != narrow.train(others)[0][0]
    assert differs.any() == (narrow.norm == "batch")


def test_in_evaluation_the_other_images_of_a_batch_do_not_matter(narrow):
    others = jnp.concatenate([narrow.x[:1], narrow.x[1:] ** 2])
    np.testing.assert_array_equal(narrow.evaluate(narrow.x)[0], narrow.evaluate(others)[0])


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_masked_images_change_neither_the_other_logits_nor_the_statistics(net):
    narrow = Narrow(net, "batch")
    module = linen_nets.build(Config(net=net, norm="batch", width=1 / 16), num_classes=7)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def train(x, mask):
        return module.apply(narrow.variables, x, train=True, mask=mask, mutable=["batch_stats"])

    padded = jnp.concatenate([narrow.x, 9 * narrow.x[:2]])
    logits, updated = train(padded, jnp.arange(6) < 4)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (logits[:4], updated), narrow.train(narrow.x))


@pytest.mark.parametrize(("net", "norm"), EVERY_NET_AND_NORM)
def test_batch_statistics_exist_for_batch_norm_alone(net, norm):
    assert ("batch_stats" in shapes(net, norm)) == (norm == "batch")


@pytest.mark.parametrize(("net", "norm"), EVERY_NET_AND_NORM)
def test_only_convolutions_without_a_norm_have_a_bias_and_those_of_inception_never(net, norm):
    paths = jax.tree_util.tree_flatten_with_path(shapes(net, norm)["params"])[0]
    has_bias = any(path[-2].key == "Conv_0" and path[-1].key == "bias" for path, _ in paths)
    assert has_bias == (norm == "none" and net != "inception")


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_norms_of_inception_have_no_scale(norm):
    paths = jax.tree_util.tree_flatten_with_path(shapes("inception", norm)["params"])[0]
    assert not any(path[-1].key == "scale" for path, _ in paths)


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [0.01, 0.3, 2.0])
def test_every_width_builds_with_every_norm(width, norm):
    assert count(shapes("inception", norm, width=width)["params"]) > 0


def test_width_multiplies_the_channels_and_leaves_at_least_one():
    assert [linen_nets.scaled(16, width) for width in (1.0, 0.5, 0.125, 0.01)] == [16, 8, 2, 1]


@pytest.mark.parametrize(("features", "groups"), [(1, 1), (2, 2), (7, 7), (12, 6), (13, 1), (16, 8), (64, 8), (320, 8)])
def test_groups_are_the_largest_divisor_up_to_eight(features, groups):
    assert blocks.num_groups(features) == groups


def test_the_shortcut_keeps_the_input_and_fills_new_channels_with_zeros():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    y = linen_nets.shortcut(x, 5, 2)
    np.testing.assert_array_equal(y[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)


@pytest.mark.slow
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_max_pool_and_its_gradient_equal_those_of_flax(size, strides):
    x = jax.random.normal(jax.random.key(0), (2, size, 8, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradient(pool):
        values, pull_back = jax.vjp(pool, x)
        return values, pull_back(jnp.cos(values))[0]

    ours = value_and_gradient(lambda x: linen_nets.max_pool(x, strides=strides))
    flax = value_and_gradient(lambda x: nn.max_pool(x, (3, 3), (strides, strides), "SAME"))
    np.testing.assert_array_equal(ours[0], flax[0])
    np.testing.assert_allclose(ours[1], flax[1], rtol=1e-5, atol=1e-6)
