"""Networks that are converted: those of the golden files, in Flax, and a small one; and the entries of a batch norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import interop
from tests.golden import make_keras
from tests.golden import make_pytorch_training as make_pytorch
from tests.interop.comparisons import random

OPTIONS = interop.batch_norm_options_from_torch(momentum=0.1, eps=1e-5)


COUNTED = interop.batch_norm_options_from_torch(momentum=None)


class LinenNet(nn.Module):
    """PyTorch's net of the golden file."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 5), padding=(1, 2), use_bias=False)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(not train, **OPTIONS)(x))
        x = nn.Conv(8, (3, 3), strides=2, padding=1, feature_group_count=2)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(not train, **COUNTED)(x))
        return nn.Dense(make_pytorch.CLASSES)(x.reshape(len(x), -1))


class NNXNet(nnx.Module):
    """The same."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Dict(
            conv=nnx.Conv(3, 6, (3, 5), padding=(1, 2), use_bias=False, rngs=rngs),
            norm=jaxbn.nnx.BatchNorm(6, **OPTIONS, rngs=rngs),
        )
        self.blocks = nnx.List([nnx.Conv(6, 8, (3, 3), strides=2, padding=1, feature_group_count=2, rngs=rngs)])
        self.norm = jaxbn.nnx.BatchNorm(8, **COUNTED, rngs=rngs)
        self.head = nnx.Linear(96, make_pytorch.CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem["norm"](self.stem["conv"](x)))
        x = nnx.relu(self.norm(self.blocks[0](x)))
        return self.head(x.reshape(len(x), -1))


NAMES = {
    "linen": {"conv1": "Conv_0", "bn1": "BatchNorm_0", "conv2": "Conv_1", "bn2": "BatchNorm_1", "fc": "Dense_0"},
    "nnx": {"conv1": "stem/conv", "bn1": "stem/norm", "conv2": "blocks/0", "bn2": "norm", "fc": "head"},
}


LAYOUTS = {"fc": interop.dense_layout(flattened=make_pytorch.FLATTENED)}


class KerasNet(nn.Module):
    """Keras's net of the golden file."""

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(jaxbn.linen.BatchNorm, not train, epsilon=1e-3)
        x = nn.relu(norm(momentum=0.9, name="norm")(nn.Conv(6, (3, 5), use_bias=False, name="conv")(x)))
        x = nn.Conv(12, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = nn.relu(norm(use_scale=False, name="norm_without_scale")(x))
        x = nn.Conv(8, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
        x = nn.relu(norm(use_bias=False, name="norm_without_bias")(x))
        x = nn.ConvTranspose(6, (3, 2), strides=(2, 2), name="transposed")(x)
        x = nn.relu(norm(use_scale=False, use_bias=False, name="norm_without_either")(x))
        return nn.Dense(make_keras.CLASSES, name="dense")(x.reshape(len(x), -1))


KERAS_LAYOUTS = {
    "depthwise": interop.depthwise_conv_layout(multiplier=2),
    "transposed": interop.conv_transpose_layout(),
}


class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2)(jaxbn.linen.BatchNorm(not train)(nn.Conv(4, (3,))(x)))


SMALL = {"conv": "Conv_0", "norm": "BatchNorm_0", "fc": "Dense_0"}


@functools.cache
def small():
    """Returns variables of the small net, and its ``state_dict``."""
    shapes = jax.eval_shape(Small().init, jax.random.key(0), jnp.ones((1, 5, 3)))
    variables = jax.tree.map(lambda leaf: random(leaf.shape, leaf.dtype, 0), shapes)
    return variables, interop.to_torch(variables, SMALL)


BATCH_NORM = {
    "weight": np.array([1.0, 2.0]),
    "bias": np.array([3.0, 4.0]),
    "running_mean": np.array([5.0, 6.0]),
    "running_var": np.array([7.0, 8.0]),
    "num_batches_tracked": np.array(9),
}
