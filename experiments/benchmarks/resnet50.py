"""ResNet-50 in flax.linen with any batch norm, for images of 224 x 224 (He et al. 2015).

Conventions: the 3x3 convolutions carry the strides, and the last scale of each block starts at 0 (Goyal et al. 2017).
"""

from collections.abc import Callable

import flax.linen as nn
import jax

STAGES = (3, 4, 6, 3)
CLASSES = 1000
IMAGE_SIZE = 224


class ConvNorm(nn.Module):
    """A convolution without bias and its norm.

    Attributes:
      features: number of output channels.
      size: side of the square kernel.
      strides: strides of the convolution.
      norm: makes a linen layer from the arguments of ``flax.linen.BatchNorm``; None for no norm.
      scale_init: initializer of the norm's scale.
    """

    features: int
    size: int
    strides: int
    norm: Callable[..., nn.Module] | None
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the outputs, shape [n, height / strides, width / strides, features]."""
        padding, size, strides = self.size // 2, (self.size, self.size), (self.strides, self.strides)
        x = nn.Conv(self.features, size, strides, padding=padding, use_bias=False)(x)
        if self.norm is None:
            return x
        return self.norm(momentum=0.9, dtype=x.dtype, scale_init=self.scale_init)(x, use_running_average=not train)


class Bottleneck(nn.Module):
    """A residual block of three convolutions, with a fourth one in the shortcut if the shape changes.

    Attributes:
      features: output channels of the first two convolutions; the block has four times as many.
      strides: strides of the block.
      norm: see `ConvNorm`.
    """

    features: int
    strides: int
    norm: Callable[..., nn.Module] | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the outputs, shape [n, height / strides, width / strides, 4 * features]."""
        y = nn.relu(ConvNorm(self.features, 1, 1, self.norm)(x, train))
        y = nn.relu(ConvNorm(self.features, 3, self.strides, self.norm)(y, train))
        y = ConvNorm(4 * self.features, 1, 1, self.norm, nn.initializers.zeros)(y, train)
        if x.shape != y.shape:
            x = ConvNorm(4 * self.features, 1, self.strides, self.norm)(x, train)
        return nn.relu(x + y)


class ResNet50(nn.Module):
    """The network.

    Attributes:
      norm: see `ConvNorm`.
      num_classes: number of logits.
    """

    norm: Callable[..., nn.Module] | None
    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns logits, shape [n, num_classes], of images [n, height, width, 3]."""
        x = nn.relu(ConvNorm(64, 7, 2, self.norm)(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, blocks in enumerate(STAGES):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(64 * 2**stage, strides, self.norm)(x, train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
