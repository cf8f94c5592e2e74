"""Measurements on the layers of networks that are so small that the answer is known."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.probes import activations
from jaxbn.linen import BatchNorm

KEY = jax.random.key(0)


class Small(nn.Module):
    """Two dense layers on flattened images, and batch norm between them."""

    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, use_bias=False)(x.reshape(len(x), -1))
        return nn.Dense(2)(BatchNorm(epsilon=self.epsilon)(x, use_running_average=not train))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (8, 2, 2, 1))


@pytest.fixture(scope="module")
def variables(images):
    return Small().init(KEY, images, train=False)


@functools.cache
def order(net):
    config = Config(net=net, width=1 / 16)
    return activations.order_of(linen_nets.build(config, num_classes=10), (8, 8, 3))


def test_layers_of_the_small_net_are_six_convolutions_and_a_dense_layer():
    assert order("cnn7").layers == [(f"ConvNorm_{i}", "Conv_0") for i in range(6)] + [("Dense_0",)]


def test_norm_is_as_deep_as_the_layer_that_it_follows():
    assert [order("cnn7").depth[f"ConvNorm_{i}", "BatchNorm_0"] for i in range(6)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_layers_in_nested_modules_are_found_in_the_order_of_their_calls():
    found = order("inception")
    assert len(found.layers) == 9 * 6 + 1
    assert found.layers[0] == ("InceptionModule_0", "ConvNorm_0", "Conv_0")
    assert found.depth["InceptionModule_8", "ConvNorm_5", "BatchNorm_0"] == 54


def test_pass_shows_what_enters_and_leaves_a_layer(variables, images):
    logits, found = activations.forward(Small(), variables, images, KEY)
    first = images.reshape(8, 4) @ variables["params"]["Dense_0"]["kernel"]
    normalized = (first - first.mean(0)) / first.std(0)
    np.testing.assert_allclose(found.inputs[0], images.reshape(8, 4))
    np.testing.assert_allclose(found.outputs[0], first, rtol=1e-5)
    np.testing.assert_allclose(found.normalized[0], normalized, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.inputs[1], found.normalized[0])
    np.testing.assert_array_equal(found.outputs[1], logits)
    assert found.normalized[1] is None


def test_what_is_added_to_an_input_enters_the_layer(variables, images):
    added = [jnp.zeros((8, 4)), jnp.ones((8, 3))]
    logits, _ = activations.forward(Small(), variables, images, KEY, added)
    without, _ = activations.forward(Small(), variables, images, KEY)
    kernel = variables["params"]["Dense_1"]["kernel"]
    np.testing.assert_allclose(logits - without, jnp.broadcast_to(kernel.sum(0), (8, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_size_is_the_root_mean_square_however_small(variables, images, scale):
    first = images.reshape(8, 4) @ variables["params"]["Dense_0"]["kernel"]
    kernels = {"kernel": scale * variables["params"]["Dense_0"]["kernel"]}
    found = activations.sizes(Small(), variables | {"params": variables["params"] | {"Dense_0": kernels}}, images, KEY)
    assert found.layers[0] == pytest.approx(scale * np.sqrt(np.mean(first**2)), rel=1e-5)
    assert found.layers[1] == found.logits


def test_weights_of_zero_have_outputs_of_size_zero(variables, images):
    found = activations.sizes(Small(), jax.tree.map(jnp.zeros_like, variables), images, KEY)
    assert found == ([0.0, 0.0], 0.0)


@pytest.mark.slow
def test_scaling_the_weights_scales_their_gradient_back_and_changes_nothing_else_without_epsilon(variables, images):
    changes = activations.rescaling(Small(), variables, images, KEY, (0.1, 10.0))
    np.testing.assert_array_less(list(changes.values()), 1e-4)


def test_scaling_is_measured_with_products_in_full_float32(variables, images, monkeypatch):
    chosen = []

    def gradients(*_):
        chosen.append(jax.config.jax_default_matmul_precision)
        return activations._Gradients([None, None], [], {})

    monkeypatch.setattr(activations, "_gradients", gradients)
    with pytest.raises(ValueError):  # nothing was measured, and nothing is the largest
        activations.rescaling(Small(), variables, images, KEY, (10.0,))
    assert set(chosen) == {"highest"}


def test_scaling_changes_the_output_as_epsilon_has_it(images):
    """Weights times a give an output of (x - mean) / sqrt(var + epsilon / a²), of the unscaled x, mean and var."""
    epsilon, factor = 0.01, 0.5
    net = Small(epsilon)
    variables = net.init(KEY, images, train=False)
    first = np.asarray(images.reshape(8, 4) @ variables["params"]["Dense_0"]["kernel"], np.float64)
    before, after = ((first - first.mean(0)) / np.sqrt(first.var(0) + epsilon / a**2) for a in (1, factor))
    expected = np.abs(after - before).max() / np.abs(before).max()
    change = activations.rescaling(net, variables, images, KEY, (factor,))[factor]
    assert change.output == pytest.approx(expected, rel=1e-4)
    assert min(change) > 0.01  # of the gradients too


def test_first_images_are_floats_up_to_one(blobs):
    images, labels = activations.first_images(blobs, 10)
    assert images.shape == (10, 8, 8, 1) and 0.5 < images.max() <= 1
    np.testing.assert_array_equal(labels, blobs.train_labels[:10])
    assert len(activations.first_images(blobs)[1]) == len(blobs.train_labels)
