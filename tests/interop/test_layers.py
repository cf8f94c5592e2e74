"""A layer of PyTorch or Keras gives the same output in Flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxbn
import jaxbn.linen
from jaxbn import interop
from tests.golden import make_keras
from tests.golden import make_pytorch_training as make_pytorch
from tests.interop.comparisons import assert_same_bits, assert_within_rounding, golden, random


def transposed(k, stride, padding=0, output_padding=0, dilation=1):
    """Returns the options of Flax's transposed convolution for those of PyTorch's, as the docstring says."""

    def each(value):
        return (value,) * len(k) if isinstance(value, int) else value

    low = [d * (size - 1) - p for d, size, p in zip(each(dilation), k, each(padding), strict=True)]
    high = [one + q for one, q in zip(low, each(output_padding), strict=True)]
    padding = list(zip(low, high, strict=True))
    return {"kernel_size": k, "strides": each(stride), "padding": padding, "kernel_dilation": each(dilation)}


FROM_TORCH = {
    "conv-1d": (interop.conv_layout(), nn.Conv(4, (5,), strides=2, padding=2)),
    "conv-2d-grouped": (
        interop.conv_layout(),
        nn.Conv(6, (3, 2), padding="VALID", kernel_dilation=(2, 1), feature_group_count=2, use_bias=False),
    ),
    "conv-2d-depthwise": (
        interop.depthwise_conv_layout(multiplier=2),
        nn.Conv(6, (3, 3), padding=1, feature_group_count=3),
    ),
    "conv-3d": (interop.conv_layout(), nn.Conv(4, (2, 3, 1), padding=(1, 1, 0))),
    "conv-transpose-1d": (interop.conv_transpose_layout(), nn.ConvTranspose(4, **transposed((5,), 2))),
    "conv-transpose-2d": (
        interop.conv_transpose_layout(),
        nn.ConvTranspose(4, **transposed((3, 2), (2, 3), padding=(1, 0), output_padding=(1, 2))),
    ),
    "conv-transpose-2d-dilated": (
        interop.conv_transpose_layout(transpose_kernel=True),
        nn.ConvTranspose(
            3,
            **transposed((3, 3), 2, padding=2, output_padding=1, dilation=2),
            use_bias=False,
            transpose_kernel=True,
        ),
    ),
    "conv-transpose-3d": (
        interop.conv_transpose_layout(),
        nn.ConvTranspose(3, **transposed((2, 3, 1), 2, padding=(1, 2, 0))),
    ),
    "dense": (interop.dense_layout(), nn.Dense(3)),
}


FROM_KERAS = {
    "conv-1d": (interop.conv_layout(), nn.Conv(4, (3,), strides=2)),
    "conv-2d-grouped": (
        interop.conv_layout(),
        nn.Conv(6, (3, 2), padding="VALID", feature_group_count=2, use_bias=False),
    ),
    "conv-3d": (interop.conv_layout(), nn.Conv(4, (2, 3, 1), padding="VALID")),
    "depthwise-1d": (
        interop.depthwise_conv_layout(multiplier=2),
        nn.Conv(6, (3,), padding="VALID", feature_group_count=3),
    ),
    "depthwise-2d": (
        interop.depthwise_conv_layout(multiplier=3),
        nn.Conv(12, (3, 2), strides=2, feature_group_count=4),
    ),
    "conv-transpose-1d": (interop.conv_transpose_layout(), nn.ConvTranspose(4, (5,), strides=(2,), padding="VALID")),
    "conv-transpose-2d": (interop.conv_transpose_layout(), nn.ConvTranspose(4, (3, 2), strides=(2, 3))),
    "conv-transpose-3d": (
        interop.conv_transpose_layout(transpose_kernel=True),
        nn.ConvTranspose(3, (2, 3, 1), strides=(2, 2, 2), padding="VALID", use_bias=False, transpose_kernel=True),
    ),
    "dense": (interop.dense_layout(), nn.Dense(3)),
    **{
        "batch-norm" + name: (
            interop.batch_norm_layout(**options),
            jaxbn.linen.BatchNorm(use_running_average=True, epsilon=1e-3, **options),
        )
        for name, options in {
            "": {},
            "-without-scale": {"use_scale": False},
            "-without-bias": {"use_bias": False},
            "-without-either": {"use_scale": False, "use_bias": False},
        }.items()
    },
}


@pytest.mark.parametrize("source", ["golden", "live"])
@pytest.mark.parametrize("case", make_pytorch.LAYERS)
def test_a_layer_of_pytorch_gives_the_same_output_in_flax(case, source):
    if source == "live":
        pytest.importorskip("torch", reason="PyTorch is not installed; the golden file stands for it")
    expected = make_pytorch.run_layer(case) if source == "live" else golden(make_pytorch.FILE)[f"layers/{case}"]
    layout, layer = FROM_TORCH[case]
    entries, x = make_pytorch.layer_inputs(case)
    with jax.enable_x64(True):
        y = jax.jit(layer.apply)(layout.from_torch(entries), np.moveaxis(x, 1, -1))
    assert_within_rounding(np.moveaxis(y, -1, 1), expected)


@pytest.mark.parametrize("case", make_keras.LAYERS)
def test_a_layer_of_keras_gives_the_same_output_in_flax(case):
    layout, layer = FROM_KERAS[case]
    weights, x = make_keras.layer_inputs(case)
    y = jax.jit(layer.apply)(layout.from_keras(weights), x)
    assert_within_rounding(y, golden(make_keras.FILE)[f"layers/{case}"])


class Flattened(nn.Module):
    """A flattening in PyTorch and in Flax orders the features of a batch norm and a dense layer differently."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID")(x)
        x = jaxbn.linen.BatchNorm(True)(x.reshape(len(x), -1))
        return nn.Dense(7)(x)


class Unflattened(nn.Module):
    """The same of an unflattening."""

    @nn.compact
    def __call__(self, x):
        x = jaxbn.linen.BatchNorm(True)(nn.Dense(24)(x))
        x = jaxbn.linen.BatchNorm(True)(x.reshape(len(x), 2, 3, 4))
        return nn.ConvTranspose(3, **transposed((3, 2), 1))(x)


CHAINS = {
    "flattened": (
        Flattened(),
        {"0": "Conv_0", "2": "BatchNorm_0", "3": "Dense_0"},
        {"2": interop.batch_norm_layout(flattened=(4, 2, 3)), "3": interop.dense_layout(flattened=(4, 2, 3))},
    ),
    "unflattened": (
        Unflattened(),
        {"0": "Dense_0", "1": "BatchNorm_0", "3": "BatchNorm_1", "4": "ConvTranspose_0"},
        {
            "0": interop.dense_layout(unflattened=(4, 2, 3)),
            "1": interop.batch_norm_layout(flattened=(4, 2, 3)),
            "4": interop.conv_transpose_layout(),
        },
    ),
}


@pytest.mark.parametrize("source", ["golden", "live"])
@pytest.mark.parametrize("case", make_pytorch.CHAINS)
def test_a_chain_of_pytorch_gives_the_same_output_in_flax_and_the_same_bits_back(case, source):
    if source == "live":
        pytest.importorskip("torch", reason="PyTorch is not installed; the golden file stands for it")
    expected = make_pytorch.run_chain(case) if source == "live" else golden(make_pytorch.FILE)[f"chains/{case}"]
    model, names, layouts = CHAINS[case]
    entries, x = make_pytorch.chain_inputs(case)
    x = np.moveaxis(x, 1, -1)
    with jax.enable_x64(True):
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), jax.eval_shape(model.init, jax.random.key(0), x)
        )
        variables = interop.from_torch(entries, shapes, names, layouts=layouts)
        y = jax.jit(model.apply)(variables, x)
    assert_within_rounding(np.moveaxis(y, -1, 1), expected)
    back = interop.to_torch(variables, names, layouts=layouts)
    assert_same_bits({name: array for name, array in back.items() if "num_batches" not in name}, entries)


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_a_transposed_convolution_is_the_same_with_either_kernel(transpose_kernel):
    layout = interop.conv_transpose_layout(transpose_kernel=transpose_kernel)
    layer = nn.ConvTranspose(4, (3, 2), padding="VALID", transpose_kernel=transpose_kernel)
    entries = {"weight": random((2, 4, 3, 2), np.float64, 0), "bias": random((4,), np.float64, 1)}
    other = interop.conv_transpose_layout(transpose_kernel=not transpose_kernel)
    x = random((1, 4, 3, 2), np.float64, 2)
    with jax.enable_x64(True):
        y = layer.apply(layout.from_torch(entries), x)
        expected = layer.clone(transpose_kernel=not transpose_kernel).apply(other.from_torch(entries), x)
    assert_within_rounding(y, expected)
    assert_same_bits(layout.to_torch(layout.from_torch(entries)), entries)
    assert_same_bits(layout.to_keras(layout.from_torch(entries)), other.to_keras(other.from_torch(entries)))


def test_averages_without_the_share_of_their_start_are_those_of_debias():
    @jax.jit
    def averages(batches):
        plain, debiased = jaxbn.init_stats(1), jaxbn.init_stats(1, counted=True)
        for moments in batches:
            plain, debiased = (jaxbn.update_stats(stats, moments, momentum=0.9) for stats in (plain, debiased))
        return plain, debiased

    plain, debiased = averages([jaxbn.Moments(*np.array([[n + 2], [n + 3], [8]], np.float32)) for n in range(3)])
    share = 0.9**3
    corrected = [plain.mean / (1 - share), (plain.var - share) / (1 - share)]
    assert_within_rounding(corrected, [debiased.mean, debiased.var])


def test_an_average_of_biased_variances_times_m_over_m_minus_1_is_that_of_unbiased_ones():
    @functools.partial(jax.jit, static_argnums=1)
    def var(batches, unbiased):
        stats = jaxbn.init_stats(2, counted=True)
        for batch in batches:
            stats = jaxbn.update_stats(stats, jaxbn.moments(batch), momentum=None, unbiased=unbiased)
        return stats.var

    batches = np.random.default_rng(0).normal(size=(3, 5, 4, 2))  # m = 5 * 4
    assert_within_rounding(var(batches, False) * 20 / 19, var(batches, True))
