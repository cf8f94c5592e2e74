"""ResNet-20 and Inception of :mod:`experiments.nets.linen` in flax.nnx, with batch norm.

Conventions: as there, images are float32 [n, height, width, channels] in [0, 1], and every network is called as
`net(x, train)`; with `train`, batch norm uses and updates the statistics of the batch. The arguments of a network are
the number of logits, a `width` that multiplies its numbers of channels, and the number of `channels` of the images.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.nets.blocks import GLOROT_UNIFORM, HE_NORMAL
from experiments.nets.linen import INCEPTION_CHANNELS, max_pool, scaled, shortcut
from jaxbn.nnx import BatchNorm


class ConvNorm(nnx.Module):
    """A convolution without bias, followed by batch norm; the caller applies the ReLU.

    Args:
      in_features: number of input channels.
      features: number of output channels.
      kernel_size: side of the square kernel.
      strides: steps between the positions of the kernel.
      kernel_init: initializer of the kernel.
      rngs: keys for the initializers.
      **options: arguments of the batch norm.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int,
        strides: int = 1,
        *,
        kernel_init: Callable,
        rngs: nnx.Rngs,
        **options,
    ):
        size = (kernel_size, kernel_size)
        self.conv = nnx.Conv(in_features, features, size, strides, use_bias=False, kernel_init=kernel_init, rngs=rngs)
        self.norm = BatchNorm(features, **options, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the normalized convolution of x, shape [n, height, width, features]."""
        return self.norm(self.conv(x), use_running_average=not train)


class ResNet20(nnx.Module):
    """The 20-layer residual network for CIFAR-10: three stages of three blocks."""

    def __init__(self, num_classes: int, width: float, *, channels: int = 3, rngs: nnx.Rngs):
        features = scaled(16, width)
        self.stem = _residual_conv(channels, features, rngs=rngs)
        self.blocks = nnx.List()
        for stage, features_next in enumerate(scaled(16 * 2**stage, width) for stage in range(3)):
            for block in range(3):
                strides = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(ResidualBlock(features, features_next, strides, rngs=rngs))
                features = features_next
        self.dense = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the logits of the images x, shape [n, num_classes]."""
        x = nnx.relu(self.stem(x, train))
        for block in self.blocks:
            x = block(x, train)
        return self.dense(x.mean((1, 2)))


class ResidualBlock(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, in_features: int, features: int, strides: int, *, rngs: nnx.Rngs):
        self.first = _residual_conv(in_features, features, strides, rngs=rngs)
        self.second = _residual_conv(features, features, rngs=rngs)
        self.features, self.strides = features, strides

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the block's output, shape [n, height / strides, width / strides, features]."""
        y = self.second(nnx.relu(self.first(x, train)), train)
        return nnx.relu(y + shortcut(x, self.features, self.strides))


def _residual_conv(in_features: int, features: int, strides: int = 1, *, rngs: nnx.Rngs) -> ConvNorm:
    return ConvNorm(in_features, features, 3, strides, kernel_init=HE_NORMAL, rngs=rngs, momentum=0.9)


class Inception(nnx.Module):
    """Nine Inception modules directly on the image, without a stem."""

    def __init__(self, num_classes: int, width: float, *, channels: int = 3, rngs: nnx.Rngs):
        self.modules = nnx.List()
        for module_channels in INCEPTION_CHANNELS:
            scaled_channels = tuple(scaled(features, width) for features in module_channels)
            module = InceptionModule(channels, scaled_channels, rngs=rngs)
            self.modules.append(module)
            channels = module.features
        self.dense = nnx.Linear(channels, num_classes, kernel_init=GLOROT_UNIFORM, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the logits of the images x, shape [n, num_classes]."""
        for number, module in enumerate(self.modules, start=1):
            x = module(x, train)
            if number in (2, 7):
                x = max_pool(x, strides=2)
        return self.dense(x.mean((1, 2)))


class InceptionModule(nnx.Module):
    """Four parallel branches, concatenated along the channels.

    Args:
      in_features: number of input channels.
      channels: output channels of the 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5 and pool projection convolutions.
      rngs: keys for the initializers.
    """

    def __init__(self, in_features: int, channels: tuple[int, int, int, int, int, int], *, rngs: nnx.Rngs):
        conv = functools.partial(
            ConvNorm,
            kernel_init=GLOROT_UNIFORM,
            rngs=rngs,
            use_scale=False,
            momentum=0.99,
            epsilon=1e-3,
        )
        features_1x1, reduce_3x3, features_3x3, reduce_5x5, features_5x5, projection = channels
        self.one = conv(in_features, features_1x1, 1)
        self.three_reduce = conv(in_features, reduce_3x3, 1)
        self.three = conv(reduce_3x3, features_3x3, 3)
        self.five_reduce = conv(in_features, reduce_5x5, 1)
        self.five = conv(reduce_5x5, features_5x5, 5)
        self.projection = conv(in_features, projection, 1)
        self.features = features_1x1 + features_3x3 + features_5x5 + projection

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the outputs of all branches, shape [n, height, width, sum of their channels]."""

        def conv(layer: ConvNorm, x: jax.Array) -> jax.Array:
            return nnx.relu(layer(x, train))

        branches = (
            conv(self.one, x),
            conv(self.three, conv(self.three_reduce, x)),
            conv(self.five, conv(self.five_reduce, x)),
            conv(self.projection, max_pool(x, strides=1)),
        )
        return jnp.concatenate(branches, axis=-1)
