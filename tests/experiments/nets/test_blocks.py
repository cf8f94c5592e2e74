"""Blocks around the layers of a network follow the config, and are off in evaluation if they are random."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.nets.blocks import Block, ConvNorm, MatchedNoise, ShiftingNoise, classify, initializer_of, normalize

KEY = jax.random.key(0)
quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
EVERY_NORM = [
    Block("batch"),
    Block("group"),
    Block("ghost", group_size=2),
    Block("renorm"),
    Block("batch", noise="matched", group_size=2),
    Block("batch", noise="shifting"),
]
every_norm = pytest.mark.parametrize("block", EVERY_NORM, ids=lambda block: f"{block.norm}-{block.noise}")


class Inside(nn.Module):
    """A module around a function that needs one."""

    function: Callable

    @nn.compact
    def __call__(self, x, train):
        return self.function(x, train=train)


def activations(n=8, features=3):
    """Activations of n images, no channel centered or of unit variance."""
    x = np.random.default_rng(0).normal(size=(n, 2, 2, features)).astype(np.float32)
    return x * np.arange(1, 1 + features, dtype=np.float32) + np.arange(features, dtype=np.float32)


def train(module, x, key=KEY, variables=None):
    """Returns the output in training, and the variables then; they start as ever where none are given."""

    def both(x, key, variables):
        if variables is None:
            variables = module.init(KEY, x, train=False)
        y, updated = module.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"noise": key})
        return y, variables | updated

    return jax.device_get(quickly(both)(x, key, variables))


def shapes(module, x):
    return jax.eval_shape(functools.partial(module.init, train=False), KEY, x)


# Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["before", "after"])
def test_norm_comes_before_or_after_the_activation(placement):
    y, _ = train(ConvNorm(4, 3, Block(placement=placement)), activations())
    centered = np.allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    assert (y >= 0).all() == (placement == "before")
    assert centered == (placement == "after")


@pytest.mark.parametrize(("activation", "largest"), [("relu", np.inf), ("sigmoid", 1.0)])
def test_activation_is_the_one_of_the_block(activation, largest):
    y, _ = train(ConvNorm(4, 3, Block("none", activation=activation)), 100 * activations())
    assert y.min() >= 0 and (y.max() <= 1) == (largest == 1.0)


@every_norm
def test_norm_that_is_not_affine_has_no_parameters(block):
    learned = shapes(ConvNorm(4, 3, block._replace(affine=True)), activations())["params"]
    fixed = shapes(ConvNorm(4, 3, block._replace(affine=False)), activations())["params"]
    assert len(learned) == 2 and {*fixed} == {"Conv_0"} and {*fixed["Conv_0"]} == {"kernel"}


@every_norm
def test_norm_without_scale_learns_the_bias_alone(block):
    norm = shapes(ConvNorm(4, 3, block, use_scale=False), activations())["params"]
    (learned,) = [leaves for name, leaves in norm.items() if name != "Conv_0"]
    assert {*learned} == {"bias"}


def test_norm_of_the_logits_alone_leaves_the_convolutions_their_bias():
    net = linen_nets.build(Config(net="cnn7", norm_layers="logits"), num_classes=5)
    actual = shapes(net, jnp.zeros((2, 8, 8, 3)))
    assert jax.tree.map(jnp.shape, actual["batch_stats"]) == {"BatchNorm_0": {"mean": (5,), "var": (5,)}}
    assert all("bias" in actual["params"][f"ConvNorm_{i}"]["Conv_0"] for i in range(6))


def test_norm_of_the_logits_normalizes_them():
    net = Inside(functools.partial(classify, Block(norm_layers="logits"), num_classes=5))
    logits, _ = train(net, activations(n=50))
    np.testing.assert_allclose(logits.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(logits.std(0), 1, atol=1e-2)


def test_groups_of_ghost_batch_norm_do_not_see_each_other():
    norm = Inside(functools.partial(normalize, Block("ghost", group_size=4)))
    x = activations()
    y, other = (train(norm, each)[0] for each in (x, np.concatenate([x[:4], 3 * x[4:]])))
    np.testing.assert_array_equal(y[:4], other[:4])
    np.testing.assert_allclose(y.reshape(2, -1, 3).mean(1), 0, atol=1e-5)


@pytest.mark.parametrize(("momentum", "weight"), [(None, 0.9), (0.25, 0.25)])
def test_momentum_of_the_block_goes_before_that_of_the_net(momentum, weight):
    x = activations()
    _, variables = train(Inside(functools.partial(normalize, Block(momentum=momentum), momentum=0.9)), x)
    mean = variables["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, (1 - weight) * x.mean((0, 1, 2)), rtol=1e-5)


def test_debiased_statistics_are_the_batch_s_after_one_step():
    norm = Inside(functools.partial(normalize, Block(debias=True)))
    y, variables = train(norm, activations())
    np.testing.assert_allclose(norm.apply(variables, activations(), train=False), y, atol=1e-4)


@pytest.mark.parametrize(("tuning", "collection"), [("affine", "params"), ("frozen", "batch_stats")])
def test_tuned_norm_is_an_affine_map_that_learns_or_not(tuning, collection):
    y, variables = train(Inside(functools.partial(normalize, Block(tuning=tuning))), activations())
    assert {name for name, leaves in variables.items() if leaves} == {collection}
    assert {*variables[collection]["BatchNorm_0"]} == {"scale", "bias"}
    np.testing.assert_array_equal(y, activations())


# Noise ----------------------------------------------------------------------------------------------------------------


def draws(noise, x, keys):
    """Returns x with noise, shape [keys, n, ..., features]."""
    return jax.device_get(quickly(jax.vmap(lambda key: noise.apply({}, x, True, rngs={"noise": key})))(keys))


def test_matched_noise_has_the_spread_of_the_groups_moments():
    x = activations(n=12)
    groups = x.reshape(3, -1, 3)
    noisy = draws(MatchedNoise(group_size=4), x, jax.random.split(KEY, 2000)).reshape(2000, *groups.shape)
    # Within a group, (x - shift) / scale; two positions give both.
    scale = (groups[:, 0] - groups[:, 1]) / (noisy[:, :, 0] - noisy[:, :, 1])
    shift = groups[:, 0] - noisy[:, :, 0] * scale
    np.testing.assert_allclose(shift.mean((0, 1)) / groups.mean(1).std(0), 0, atol=0.1)
    np.testing.assert_allclose(shift.std((0, 1)), groups.mean(1).std(0), rtol=0.05)
    np.testing.assert_allclose(scale.mean((0, 1)), 1, atol=0.02)
    np.testing.assert_allclose(scale.std((0, 1)), groups.std(1).std(0), rtol=0.05)


def test_matched_noise_is_drawn_for_each_group_and_channel():
    x = np.concatenate([np.ones((4, 2)), -np.ones((4, 2))]).astype(np.float32)
    (noisy,) = draws(MatchedNoise(group_size=2), x, KEY[None])
    np.testing.assert_array_equal(noisy[::2], noisy[1::2])
    assert len(np.unique(noisy - x)) == 8


def test_gradient_of_matched_noise_sees_no_other_image():
    x = activations(n=4)[:, 0, 0, :2]
    noise = functools.partial(MatchedNoise(group_size=2).apply, {}, train=True, rngs={"noise": KEY})
    jacobian = jax.device_get(quickly(jax.jacobian(noise))(x)).reshape(8, 8)
    assert np.count_nonzero(jacobian) == np.count_nonzero(np.diag(jacobian)) == 8


def test_matched_noise_comes_before_scale_and_bias():
    norm = Inside(functools.partial(normalize, Block(noise="matched", group_size=2)))
    plain, variables = train(norm, activations())
    assert jax.tree.map(jnp.shape, variables["params"]) == {"Affine_0": {"scale": (3,), "bias": (3,)}}
    learned = {"Affine_0": {"scale": np.full(3, 2.0, np.float32), "bias": np.full(3, 5.0, np.float32)}}
    moved, _ = train(norm, activations(), variables=variables | {"params": learned})
    np.testing.assert_allclose(moved, 5 + 2 * plain, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def shifting():
    """Shifts and factors of 300 steps, each for 200 images and 2 channels, as noise on 0 and on 1 tells them."""
    keys = jax.random.split(KEY, 300)
    shift, ones = (draws(ShiftingNoise(), np.full((200, 3, 2), value, np.float32), keys) for value in (0.0, 1.0))
    return shift, ones - shift


def test_shifting_noise_has_another_mean_and_scale_in_each_step(shifting):
    shift, factor = (values.mean((1, 2)) for values in shifting)  # [steps, channels]
    np.testing.assert_allclose([shift.min(), shift.max()], [-0.5, 0.5], atol=0.03)
    np.testing.assert_allclose(shift.std(0), 1 / np.sqrt(12), rtol=0.1)
    np.testing.assert_allclose([factor.min(), factor.max()], [1.0, 1.25], atol=0.03)
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.2  # of the channels


def test_shifting_noise_differs_between_images_and_not_between_positions(shifting):
    shift, factor = shifting
    assert np.ptp(shift, axis=2).max() == 0 and np.ptp(factor, axis=2).max() < 1e-6
    within = shift[:, :, 0] - shift[:, :, 0].mean(1, keepdims=True)
    np.testing.assert_allclose(within.std(), 0.2 / np.sqrt(12), rtol=0.02)
    np.testing.assert_allclose((factor[:, :, 0] - factor[:, :, 0].mean(1, keepdims=True)).std(), 0.1, rtol=0.02)


@every_norm
def test_evaluation_needs_no_key_and_sees_each_image_alone(block):
    layer, x = ConvNorm(4, 3, block), activations()

    @quickly
    def evaluate(x):
        variables = layer.init(KEY, x, train=False)
        return layer.apply(variables, x, train=False), layer.apply(variables, x[:4], train=False)

    all_of_them, first = evaluate(x)
    np.testing.assert_array_equal(all_of_them[:4], first)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["matched", "shifting"])
def test_noise_is_another_with_another_key(noise):
    block = Block(noise=noise, group_size=2 if noise == "matched" else None)
    norm = Inside(functools.partial(normalize, block))
    first, again, other = (train(norm, activations(), jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_dropout_drops_features_in_training_alone():
    layer = Inside(functools.partial(classify, Block(dropout=0.5), num_classes=2))
    x = np.ones((100, 2, 2, 64), np.float32)
    variables = {"params": {"Dense_0": {"kernel": np.ones((64, 2), np.float32), "bias": np.ones(2, np.float32)}}}
    dropping, _ = train(layer, x, variables=variables)
    np.testing.assert_allclose([dropping.mean(), dropping.std()], [64 + 1, 8], rtol=0.1)
    np.testing.assert_allclose(layer.apply(variables, x, False), 64 + 1)  # needs no key


# Starts and early classifiers -----------------------------------------------------------------------------------------


def test_weights_start_uniform_up_to_the_scale():
    weights = initializer_of(Block(init_scale=0.001), nn.initializers.lecun_normal())(KEY, (100, 100))
    np.testing.assert_allclose([weights.min(), weights.max()], [-0.001, 0.001], rtol=0.01)
    np.testing.assert_allclose(weights.std(), 0.001 / np.sqrt(3), rtol=0.02)


def test_weights_start_as_published_where_no_scale_is_given():
    initializer = nn.initializers.lecun_normal()
    assert initializer_of(Block(), initializer) is initializer


@pytest.mark.slow
@pytest.mark.parametrize("net", ["cnn7", "resnet20", "inception"])
def test_scale_is_that_of_every_layer_with_weights(net):
    module = linen_nets.build(Config(net=net, width=1 / 16, norm="none", init_scale=1e-3), num_classes=7)
    init = quickly(functools.partial(module.init, train=False))
    for path, leaf in jax.tree.leaves_with_path(init(KEY, jnp.zeros((1, 8, 8, 3)))["params"]):
        largest = abs(leaf).max()
        assert largest == 0 if path[-1].key == "bias" else 0 < largest <= 1e-3


def test_early_classifiers_are_heard_in_training_alone():
    net = linen_nets.build(Config(net="cnn7", deep_supervision=True), num_classes=5)
    x = jnp.zeros((2, 8, 8, 3))
    variables = shapes(net, x)

    def sown(train):
        apply = functools.partial(net.apply, train=train, mutable=["batch_stats", linen_nets.AUXILIARY])
        return jax.eval_shape(apply, variables, x)[1].get(linen_nets.AUXILIARY, {})

    assert variables.keys() == {"params", "batch_stats"} and sown(train=False) == {}
    assert jax.tree.map(jnp.shape, sown(train=True)) == {"logits_2": ((2, 5),), "logits_4": ((2, 5),)}


def test_early_classifiers_follow_the_second_and_the_fourth_convolution():
    nets = (linen_nets.build(Config(net="cnn7", deep_supervision=deep), num_classes=5) for deep in (True, False))
    deep, plain = (shapes(net, jnp.zeros((2, 8, 8, 3)))["params"] for net in nets)
    added = {name: deep[name]["kernel"].shape for name in deep.keys() - plain.keys()}
    assert added == {"auxiliary_2": (16, 5), "auxiliary_4": (32, 5)} and plain.keys() < deep.keys()
