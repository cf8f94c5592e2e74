"""The three networks of the studies in flax.linen, made of the layers in `experiments.nets.blocks`.

Conventions: images are float32 [n, height, width, channels] in [0, 1], and every network is called as
`module(x, train)`; with `train`, batch norm uses and updates the statistics of the batch. An optional `mask`, booleans
[n], leaves out the images marked False.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import Config
from experiments.nets.blocks import ACTIVATIONS, GLOROT_UNIFORM, HE_NORMAL, Block, ConvNorm, classify
from jaxbn.linen import BatchNorm

AUXILIARY = "auxiliary"  # collection of the logits that deep supervision adds


def build(config: Config, num_classes: int, batch_norm: Callable[..., nn.Module] = BatchNorm) -> nn.Module:
    """Makes the network of a training run, not yet initialized.

    Args:
      config: the training run.
      num_classes: number of logits.
      batch_norm: makes a layer of batch norm from the arguments of ``flax.linen.BatchNorm``.

    Returns:
      A module; `module.apply(variables, x, train)` gives logits of shape [n, num_classes]. In training it needs a key
      "noise" if the config has noise or dropout.
    """
    nets = {"cnn7": CNN7, "resnet20": ResNet20, "inception": Inception}
    return nets[config.net](num_classes=num_classes, width=config.width, block=Block.of(config, batch_norm))


class CNN7(nn.Module):
    """Six 3x3 convolutions, a global average and a dense layer: seven layers with weights.

    With deep supervision (Lee et al. 2015), classifiers also follow the second and the fourth convolution; in training
    their logits are sown into the collection `AUXILIARY`.
    """

    num_classes: int
    width: float
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the images x, shape [n, num_classes]."""
        for layer, (features, strides) in enumerate(((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 1)), start=1):
            x = ConvNorm(scaled(features, self.width), 3, self.block, strides)(x, train, mask)
            if self.block.deep_supervision and layer in (2, 4):
                early = classify(self.block, x, self.num_classes, train=train, mask=mask, name=f"{AUXILIARY}_{layer}")
                if train and not self.is_initializing():
                    self.sow(AUXILIARY, f"logits_{layer}", early)
        return classify(self.block, x, self.num_classes, train=train, mask=mask)


class ResNet20(nn.Module):
    """The 20-layer residual network for CIFAR-10: three stages of three blocks.

    References:
      He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", section 4.2; initialization:
      He, Zhang, Ren, Sun 2015, "Delving deep into rectifiers".
    """

    num_classes: int
    width: float
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the images x, shape [n, num_classes]."""
        conv = functools.partial(ConvNorm, block=self.block, kernel_init=HE_NORMAL)
        x = conv(scaled(16, self.width), 3)(x, train, mask)
        for stage, features in enumerate((16, 32, 64)):
            features = scaled(features, self.width)
            for block in range(3):
                strides = 2 if stage > 0 and block == 0 else 1
                y = conv(features, 3, strides=strides)(x, train, mask)
                y = conv(features, 3, activate=False)(y, train, mask)
                x = ACTIVATIONS[self.block.activation](y + shortcut(x, features, strides))
        return classify(self.block, x, self.num_classes, train=train, mask=mask)


def shortcut(x: jax.Array, features: int, strides: int) -> jax.Array:
    """Brings x to the shape of a block's output without parameters (option A of He et al. 2015).

    Keeps every `strides`-th position, and fills the missing channels with zeros.
    """
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


# Channels of the nine modules: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection (Szegedy et al. 2015, table 1).
INCEPTION_CHANNELS = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class Inception(nn.Module):
    """Nine Inception modules directly on the image, without a stem: the network of the published CIFAR-10 comparison.

    Convolutions have no bias, except where the norm follows the activation, and norms have no scale. The rest follows
    Keras's defaults, as published: momentum 0.99, epsilon 1e-3, Glorot-uniform kernels.

    References:
      Szegedy et al. 2015, "Going deeper with convolutions".
    """

    num_classes: int
    width: float
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the images x, shape [n, num_classes]."""
        for number, channels in enumerate(INCEPTION_CHANNELS, start=1):
            x = InceptionModule(tuple(scaled(c, self.width) for c in channels), self.block)(x, train, mask)
            if number in (2, 7):
                x = max_pool(x, strides=2)
        return classify(self.block, x, self.num_classes, train=train, mask=mask, kernel_init=GLOROT_UNIFORM)


class InceptionModule(nn.Module):
    """Four parallel branches, concatenated along the channels.

    Attributes:
      channels: output channels of the 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5 and pool projection convolutions.
      block: norm, activation and initialization of the convolutions.
    """

    channels: tuple[int, int, int, int, int, int]
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the outputs of all branches, shape [n, height, width, sum of their channels]."""

        def conv(features: int, kernel_size: int, x: jax.Array) -> jax.Array:
            layer = ConvNorm(
                features,
                kernel_size,
                self.block,
                use_bias=self.block.placement == "after",
                use_scale=False,
                momentum=0.99,
                epsilon=1e-3,
                kernel_init=GLOROT_UNIFORM,
            )
            return layer(x, train, mask)

        features_1x1, reduce_3x3, features_3x3, reduce_5x5, features_5x5, projection = self.channels
        branches = (
            conv(features_1x1, 1, x),
            conv(features_3x3, 3, conv(reduce_3x3, 1, x)),
            conv(features_5x5, 5, conv(reduce_5x5, 1, x)),
            conv(projection, 1, max_pool(x, strides=1)),
        )
        return jnp.concatenate(branches, axis=-1)


def max_pool(x: jax.Array, *, strides: int) -> jax.Array:
    """Computes the maximum over 3x3 windows, at every `strides`-th position, like flax.linen.max_pool with SAME.

    XLA's own window operation has a slow derivative on CPUs: it makes a training step of Inception take half as long
    again. So this takes the maximum of three shifted copies along each axis.
    """
    for axis in (1, 2):
        size = -(-x.shape[axis] // strides)
        span = (size - 1) * strides + 1  # from the first position to the last
        missing = max(span + 2 - x.shape[axis], 0)
        before, after = missing // 2, missing - missing // 2  # SAME puts the odd one at the end
        widths = [(0, 0)] * x.ndim
        widths[axis] = (before, after)
        padded = jnp.pad(x, widths, constant_values=-jnp.inf)
        first, second, third = (jax.lax.slice_in_dim(padded, i, i + span, strides, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def scaled(features: int, width: float) -> int:
    """Returns `features` times `width`, rounded, at least 1; independent of the norm, so that arms stay comparable."""
    return max(1, round(features * width))
