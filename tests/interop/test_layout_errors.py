"""Layouts refuse arrays that are not those of such a layer, and say what is wrong with them."""

import numpy as np
import pytest

from jaxbn import interop
from tests.interop.comparisons import refused, without
from tests.interop.nets import BATCH_NORM

MISTAKES = {
    "a convolution of two axes": (
        lambda: interop.conv_layout().from_torch({"weight": np.ones((3, 2))}),
        "the kernel of a convolution must have 3 or 4 or 5 axes, got the shape (3, 2); use the layout of the layer",
    ),
    "a dense layer of four axes": (
        lambda: interop.dense_layout().from_keras([np.ones((3, 3, 2, 2))]),
        "the kernel of a dense layer must have 2 axes, got the shape (3, 3, 2, 2); use the layout of the layer",
    ),
    "a transposed convolution of two groups": (
        lambda: interop.conv_transpose_layout().from_torch({"weight": np.ones((4, 3, 5)), "bias": np.ones(6)}),
        "a transposed convolution without groups with a kernel of shape (5, 4, 3) in Flax has 3 features, but its bias "
        "has the shape (6,); pass kernel and bias of one layer, of this kind.",
    ),
    "a prefix": (
        lambda: interop.dense_layout().from_torch({"fc.weight": np.ones((3, 2))}),
        "a dense layer in PyTorch must have weight and may have bias, got fc.weight; "
        "pass only what belongs to this layer, by these names.",
    ),
    "no entries": (
        lambda: interop.batch_norm_layout().from_torch({}),
        "a batch norm in PyTorch may have weight, bias, running_mean, running_var, num_batches_tracked, "
        "got nothing; pass only what belongs to this layer, by these names.",
    ),
    "variables without collections": (
        lambda: interop.dense_layout().to_torch({"kernel": np.ones((2, 3))}),
        "a dense layer in Flax must have params/kernel and may have params/bias, got kernel; pass only what",
    ),
    "norm arrays of two sizes": (
        lambda: interop.batch_norm_layout().from_torch(BATCH_NORM | {"bias": np.ones(3)}),
        "the arrays of a norm must have the same shape, got {'running_mean': (2,), 'running_var': (2,), "
        "'weight': (2,), 'bias': (3,)}; pass those of one layer.",
    ),
    "a count that is missing": (
        lambda: interop.batch_norm_layout(counted=True).from_torch(without(BATCH_NORM, "num_batches_tracked")),
        "a batch norm in PyTorch must have running_mean, running_var, num_batches_tracked and may have weight, bias,",
    ),
    "three arrays for a norm of four": (
        lambda: interop.batch_norm_layout().from_keras([np.ones(2)] * 3),
        "a batch norm in Keras must have gamma, beta, moving_mean, moving_variance, got 3 arrays; "
        "pass only the weights of this layer, and give the layout the options of the layer.",
    ),
    "no arrays for a norm of two": (
        lambda: interop.batch_norm_layout(use_scale=False, use_bias=False).from_keras([]),
        "a batch norm in Keras must have moving_mean, moving_variance, got 0 arrays; pass only the weights of this",
    ),
    "arrays of two sizes from Keras": (
        lambda: interop.batch_norm_layout().from_keras([np.ones(2), np.ones(2), np.ones(3), np.ones(3)]),
        "the arrays of a norm must have the same shape, got {'gamma': (2,), 'beta': (2,), 'moving_mean': (3,), "
        "'moving_variance': (3,)}; pass those of one layer.",
    ),
    "arrays of two sizes to Keras": (
        lambda: interop.batch_norm_layout().to_keras({"params": {"scale": np.ones(2), "bias": np.ones(3)}}),
        "the arrays of a norm must have the same shape, got {'params/scale': (2,), 'params/bias': (3,)}; pass those",
    ),
    "arrays of two sizes to PyTorch": (
        lambda: interop.batch_norm_layout().to_torch({"params": {"scale": np.ones(2), "bias": np.ones(3)}}),
        "the arrays of a norm must have the same shape, got {'params/scale': (2,), 'params/bias': (3,)}; pass those",
    ),
    "a norm over several axes": (
        lambda: interop.batch_norm_layout().from_torch({"weight": np.ones((4, 3, 2)), "bias": np.ones((4, 3, 2))}),
        "the arrays of a norm must have one axis, the features, got {'weight': (4, 3, 2), 'bias': (4, 3, 2)}; the "
        "order of several axes differs between frameworks: move them yourself, in your own Layout.",
    ),
    "a mean without a variance": (
        lambda: interop.batch_norm_layout().to_torch({"batch_stats": {"mean": np.ones(2)}}),
        "a batch norm in Flax must have batch_stats/mean, batch_stats/var and may have params/scale, params/bias, "
        "batch_stats/steps, got batch_stats/mean;",
    ),
    "a count beyond int32": (
        lambda: interop.batch_norm_layout(counted=True).from_torch(
            BATCH_NORM | {"num_batches_tracked": np.array(2**31)}
        ),
        "num_batches_tracked must be one number from 0 to 2**31 - 1, as Flax's int32 is, got 2147483648; pass a "
        "smaller one, since after so many batches the average changes by less than it is rounded.",
    ),
    "counts by feature": (
        lambda: interop.batch_norm_layout(counted=True).from_torch(
            BATCH_NORM | {"num_batches_tracked": np.array([7, 7])}
        ),
        "num_batches_tracked must be one number from 0 to 2**31 - 1, as Flax's int32 is, got [7 7]",
    ),
    "a bias of another layer": (
        lambda: interop.conv_layout().to_torch({"params": {"kernel": np.ones((3, 2, 4)), "bias": np.ones(2)}}),
        "a convolution with a kernel of shape (3, 2, 4) in Flax has 4 features, but its bias has the shape (2,)",
    ),
    "a grouped kernel as depthwise": (
        lambda: interop.depthwise_conv_layout().to_keras({"params": {"kernel": np.ones((3, 3, 2, 8))}}),
        "a kernel of shape (3, 3, 2, 8) in Flax is not depthwise with the multiplier 1, which has the shape [*k, 1,",
    ),
    "a scale that the layout denies": (
        lambda: interop.batch_norm_layout(use_scale=False).to_keras(interop.batch_norm_layout().from_torch(BATCH_NORM)),
        "a batch norm in Flax must have params/bias, batch_stats/mean, batch_stats/var and may have batch_stats/steps,",
    ),
    "three arrays for a convolution": (
        lambda: interop.conv_layout().from_keras([np.ones((3, 3, 4, 1)), np.ones((1, 1, 4, 8)), np.ones(8)]),
        "a convolution in Keras must have kernel and may have bias, got 3 arrays; pass only the weights of",
    ),
    "another multiplier in Keras": (
        lambda: interop.depthwise_conv_layout().from_keras([np.ones((3, 3, 4, 2))]),
        "a depthwise kernel of shape (3, 3, 4, 2) in Keras has the multiplier 2, not 1; "
        "use depthwise_conv_layout(multiplier=2).",
    ),
    "another multiplier in Flax": (
        lambda: interop.depthwise_conv_layout(multiplier=3).to_keras({"params": {"kernel": np.ones((3, 3, 1, 8))}}),
        "a kernel of shape (3, 3, 1, 8) in Flax is not depthwise with the multiplier 3, "
        "which has the shape [*k, 1, in*3]; use another multiplier, or conv_layout().",
    ),
    "another flattened shape": (
        lambda: interop.dense_layout(flattened=(2, 4, 4)).from_torch({"weight": np.ones((3, 30))}),
        "flattened=(2, 4, 4) makes 32 features, but this layer has 30; "
        "pass the shape [C, *k] of one example in PyTorch where it is not flat.",
    ),
    "another unflattened shape": (
        lambda: interop.dense_layout(unflattened=(2, 2)).to_torch({"params": {"kernel": np.ones((4, 3))}}),
        "unflattened=(2, 2) makes 4 features, but this layer has 3; pass the shape [C, *k] of one example in PyTorch",
    ),
    "another flattened shape of a norm": (
        lambda: interop.batch_norm_layout(flattened=(2, 2)).from_torch(BATCH_NORM),
        "flattened=(2, 2) makes 4 features, but this layer has 2; pass the shape [C, *k] of one example in PyTorch",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_layout_refuses(case):
    call, message = MISTAKES[case]
    with refused(message):
        call()
