"""The three nets of the studies in flax.linen, with whatever `experiments.nets.blocks` puts around their layers.

Convention: images come as float32 [n, height, width, channels] in [0, 1], and every net is called as
`module(x, train)`; `train` says whether batch norm uses, and updates, the statistics of the batch. With a `mask`,
booleans [n], it leaves out the images that are False there.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.config import Config
from experiments.nets.blocks import ACTIVATIONS, Block, ConvNorm, classify

AUXILIARY = "auxiliary"  # the collection of the logits that deep supervision adds


def build(config: Config, num_classes: int) -> nn.Module:
    """Returns the net that `config` describes, not yet initialized.

    Args:
      config: the training run.
      num_classes: number of logits.

    Returns:
      A module; `module.apply(variables, x, train)` gives logits of shape [n, num_classes]. In training, it wants a key
      "noise" where the config has noise or dropout.
    """
    nets = {"cnn7": CNN7, "resnet20": ResNet20, "inception": Inception}
    return nets[config.net](num_classes=num_classes, width=config.width, block=Block.of(config))


class CNN7(nn.Module):
    """Six 3x3 convolutions, a global average and a dense layer: seven layers with weights.

    With deep supervision (Lee et al. 2015), classifiers follow the second and the fourth convolution as well; their
    logits in training are sown into the collection `AUXILIARY`.
    """

    num_classes: int
    width: float
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the images x."""
        for layer, (features, strides) in enumerate(((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 1)), start=1):
            x = ConvNorm(scaled(features, self.width), 3, self.block, strides)(x, train, mask)
            if self.block.deep_supervision and layer in (2, 4):
                early = classify(self.block, x, self.num_classes, train=train, mask=mask, name=f"{AUXILIARY}_{layer}")
                if train and not self.is_initializing():
                    self.sow(AUXILIARY, f"logits_{layer}", early)
        return classify(self.block, x, self.num_classes, train=train, mask=mask)


class ResNet20(nn.Module):
    """The 20-layer residual net for CIFAR-10: three stages of three blocks.

    References:
      He, Zhang, Ren, Sun 2015, "Deep residual learning for image recognition", section 4.2; its weights start as in
      He, Zhang, Ren, Sun 2015, "Delving deep into rectifiers".
    """

    num_classes: int
    width: float
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the images x."""
        conv = functools.partial(ConvNorm, block=self.block, kernel_init=nn.initializers.he_normal())
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
    """Returns x brought to the shape of a block's output without parameters (option A of He et al. 2015).

    Every `strides`-th position is kept, and the channels that x lacks are zeros.
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
    """Nine Inception modules straight on the image, without a stem: the net of the published CIFAR-10 comparison.

    Its convolutions have no bias (but where the norm comes after the activation), its norms have no scale, and the rest
    follows Keras's defaults (momentum 0.99, epsilon 1e-3, Glorot-uniform kernels), as published.

    References:
      Szegedy et al. 2015, "Going deeper with convolutions".
    """

    num_classes: int
    width: float
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the logits of the images x."""
        for number, channels in enumerate(INCEPTION_CHANNELS, start=1):
            x = InceptionModule(tuple(scaled(c, self.width) for c in channels), self.block)(x, train, mask)
            if number in (2, 7):
                x = max_pool(x, strides=2)
        glorot = nn.initializers.glorot_uniform()
        return classify(self.block, x, self.num_classes, train=train, mask=mask, kernel_init=glorot)


class InceptionModule(nn.Module):
    """Four branches side by side, joined along the channels.

    Attributes:
      channels: of the 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5 and pool projection convolutions.
      block: what is put around the convolutions.
    """

    channels: tuple[int, int, int, int, int, int]
    block: Block = Block()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the four branches' outputs, shape [n, height, width, sum of their channels]."""

        def conv(features, kernel_size, x):
            layer = ConvNorm(
                features,
                kernel_size,
                self.block,
                use_bias=self.block.placement == "after",
                use_scale=False,
                momentum=0.99,
                epsilon=1e-3,
                kernel_init=nn.initializers.glorot_uniform(),
            )
            return layer(x, train, mask)

        one, three_reduce, three, five_reduce, five, projection = self.channels
        branches = (
            conv(one, 1, x),
            conv(three, 3, conv(three_reduce, 1, x)),
            conv(five, 5, conv(five_reduce, 1, x)),
            conv(projection, 1, max_pool(x, strides=1)),
        )
        return jnp.concatenate(branches, axis=-1)


def max_pool(x: jax.Array, *, strides: int) -> jax.Array:
    """Returns the largest values in 3x3 windows, at every `strides`-th position, as flax.linen.max_pool with SAME.

    It takes the maximum of three shifted copies along each axis, because the derivative of XLA's own window operation
    makes a step of the Inception net half as slow again on a CPU.
    """
    for axis in (1, 2):
        size = -(-x.shape[axis] // strides)
        span = (size - 1) * strides + 1  # from the first position to the last
        missing = max(span + 2 - x.shape[axis], 0)
        widths = [(0, 0)] * x.ndim
        widths[axis] = (missing // 2, missing - missing // 2)
        padded = jnp.pad(x, widths, constant_values=-jnp.inf)
        first, second, third = (jax.lax.slice_in_dim(padded, i, i + span, strides, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def scaled(features: int, width: float) -> int:
    """Returns `features` times `width`, rounded, at least 1; whatever the norm, so that arms compare like with like."""
    return max(1, round(features * width))
