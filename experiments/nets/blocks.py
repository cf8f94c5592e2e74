"""What a net of the studies puts around its layers with weights: norm, activation, noise, and how the weights start.

Convention: `train` says whether batch norm uses, and updates, the statistics of the batch, and whether noise is added.
Random numbers in training come from the key "noise" of `apply`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn
from experiments.config import Activation, Config, Noise, Norm, NormLayers, Placement, Tuning
from jaxbn.linen import Affine, BatchNorm

MAX_GROUPS = 8
LECUN_NORMAL = nn.initializers.lecun_normal()
ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid}


class Block(NamedTuple):
    """What is put around the layers of a net; `Config` has the same fields, and says what they mean."""

    norm: Norm = "batch"
    group_size: int | None = None
    norm_layers: NormLayers = "hidden"
    placement: Placement = "before"
    affine: bool = True
    momentum: float | None = None
    debias: bool = False
    epsilon: float | None = None
    noise: Noise = "none"
    tuning: Tuning = "trained"
    activation: Activation = "relu"
    dropout: float = 0.0
    deep_supervision: bool = False
    init_scale: float | None = None

    @classmethod
    def of(cls, config: Config) -> "Block":
        """Returns the block of the net that a run trains."""
        return cls(**{name: getattr(config, name) for name in cls._fields})

    @property
    def hidden_norm(self) -> Norm:
        """The norm after the convolutions."""
        return self.norm if self.norm_layers == "hidden" else "none"


class ConvNorm(nn.Module):
    """A convolution, what normalizes its output, and the activation.

    Attributes:
      features: number of output channels.
      kernel_size: side of the square kernel.
      block: what is put around it.
      strides: steps between the positions of the kernel.
      use_bias: whether the convolution has a bias. None: where no norm follows at once, which would remove it again.
      activate: False leaves the activation to the caller.
      kernel_init: initializer of the kernel, where `block` has none.
      momentum: of batch norm's running statistics, where `block` has none: the weight of the old value.
      epsilon: what the norms add to the variance, where `block` says nothing.
      use_scale: whether the norm learns a scale as well as a bias, where it learns.
    """

    features: int
    kernel_size: int
    block: Block = Block()
    strides: int = 1
    use_bias: bool | None = None
    activate: bool = True
    kernel_init: Callable = LECUN_NORMAL
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Returns the normalized convolution of x, shape [n, height, width, features]."""
        block = self.block
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            self.strides,
            use_bias=needs_bias(block) if self.use_bias is None else self.use_bias,
            kernel_init=start(block, self.kernel_init),
        )(x)
        activate = ACTIVATIONS[block.activation] if self.activate else lambda x: x
        if block.hidden_norm == "none":
            return activate(x)
        options = {"momentum": self.momentum, "epsilon": self.epsilon, "use_scale": self.use_scale}
        norm = functools.partial(normalize, block, train=train, mask=mask, **options)
        return norm(activate(x)) if block.placement == "after" else activate(norm(x))


def needs_bias(block: Block) -> bool:
    """Says whether a convolution has a bias: not where a norm follows at once, which would remove it again."""
    return block.hidden_norm == "none" or block.placement == "after"


def classify(
    block: Block,
    x: jax.Array,
    num_classes: int,
    *,
    train: bool,
    mask: jax.Array | None = None,
    kernel_init: Callable = LECUN_NORMAL,
    name: str | None = None,
) -> jax.Array:
    """Returns logits: a global average, dropout, a dense layer, and its norm where `block` wants one there.

    Call it in a compact method of a module.

    Args:
      block: what is put around the dense layer.
      x: activations, shape [n, height, width, features].
      num_classes: number of logits.
      train: see the module.
      mask: booleans [n]; images that are False there are left out of the statistics.
      kernel_init: initializer of the kernel, where `block` has none.
      name: of the dense layer, where it is not the only one.
    """
    x = nn.Dropout(block.dropout, rng_collection="noise")(x.mean((1, 2)), deterministic=not train)
    x = nn.Dense(num_classes, kernel_init=start(block, kernel_init), name=name)(x)
    return normalize(block, x, train=train, mask=mask) if block.norm_layers == "logits" else x


def start(block: Block, initializer: Callable) -> Callable:
    """Returns the initializer of weights: the given one, or uniform between plus and minus `block.init_scale`."""
    if block.init_scale is None:
        return initializer
    scale = block.init_scale
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)


def normalize(
    block: Block,
    x: jax.Array,
    *,
    train: bool,
    mask: jax.Array | None = None,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    use_scale: bool = True,
) -> jax.Array:
    """Returns x [n, ..., features] after the norm of `block`, and its noise; call it in a compact method of a module.

    Args:
      block: says which norm.
      x: activations.
      train: see the module.
      mask: booleans [n]; images that are False there are left out of the statistics.
      momentum: weight of the old value in batch norm's running statistics, where `block` says none.
      epsilon: what is added to the variance, where `block` says nothing.
      use_scale: whether the norm learns a scale as well as a bias, where it learns.
    """
    epsilon = epsilon if block.epsilon is None else block.epsilon
    learned = {"use_scale": use_scale and block.affine, "use_bias": block.affine}
    if block.norm == "none":
        raise ValueError("norm='none' normalizes nothing; call this where there is a norm.")
    if block.norm == "group":
        return nn.GroupNorm(num_groups(x.shape[-1]), epsilon=epsilon, **learned)(x)
    if block.tuning != "trained":
        return Affine(fixed=block.tuning == "frozen", name="BatchNorm_0")(x)
    options = {"momentum": momentum if block.momentum is None else block.momentum, "epsilon": epsilon}
    if block.debias:
        options["debias"] = True
    if block.norm == "ghost":
        options["method"] = functools.partial(jaxbn.ghost_normalize, group_size=block.group_size)
    elif block.norm == "renorm":
        options["method"] = jaxbn.batch_renormalize
    mask = None if mask is None else mask.reshape(-1, *(1,) * (x.ndim - 1))
    if block.noise == "matched":  # comes before scale and bias, as the noise of the statistics does
        x = BatchNorm(use_running_average=not train, **options, use_scale=False, use_bias=False)(x, mask=mask)
        x = MatchedNoise(block.group_size)(x, train)
        return Affine(**learned)(x) if block.affine else x
    x = BatchNorm(use_running_average=not train, **options, **learned)(x, mask=mask)
    return ShiftingNoise()(x, train) if block.noise == "shifting" else x


def num_groups(features: int) -> int:
    """Returns the number of groups for group norm: the largest divisor of `features` that is at most 8.

    Wu and He (2018) use 32 groups or 16 channels a group on nets of 64 to 2048 channels. These nets start at 16
    channels, where 32 groups are impossible and 8 leave two channels to share a mean. A divisor exists for every number
    of channels, so that group norm never changes the widths.
    """
    return max(g for g in range(1, MAX_GROUPS + 1) if features % g == 0)


class MatchedNoise(nn.Module):
    """Noise of the size that ghost batch norm's has, and without its dependence on the images.

    Ghost batch norm shifts each group of images by its own mean and divides it by its own standard deviation. Here each
    group is shifted and scaled by normal random numbers instead, whose spread over the groups is, for each channel,
    that of the groups' true means and standard deviations in this batch.

    Attributes:
      group_size: images per group; divides the batch.
    """

    group_size: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns normalized activations x, shape [n, ..., features], with the noise in training."""
        if not train:
            return x
        groups = x.reshape(-1, self.group_size, *x.shape[1:])
        within = tuple(range(1, groups.ndim - 1))
        mean, std = jax.lax.stop_gradient((groups.mean(within), groups.std(within)))  # [groups, features]
        shift, scale = jax.random.normal(self.make_rng("noise"), (2, *mean.shape))
        shape = (len(mean), *(1,) * len(within), x.shape[-1])
        noisy = (groups - (shift * mean.std(0)).reshape(shape)) / jnp.maximum(1 + scale * std.std(0), 0.1).reshape(
            shape
        )
        return noisy.reshape(x.shape)


class ShiftingNoise(nn.Module):
    """Noise whose distribution is another one at each step: the "noisy batch norm" of Santurkar et al.

    At each step, a mean from U(-0.5, 0.5) and a scale from U(1, 1.25) are drawn for every channel; each image is then
    shifted by a number from U(mean - 0.1, mean + 0.1) and scaled by one from N(scale, 0.1).

    References:
      Santurkar, Tsipras, Ilyas, Madry 2018, arXiv:1805.11604, appendix A.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns activations x, shape [n, ..., features], with the noise in training."""
        if not train:
            return x
        of_step, of_image, scales, scale_noise = jax.random.split(self.make_rng("noise"), 4)
        features, images = (x.shape[-1],), (len(x), *(1,) * (x.ndim - 2), x.shape[-1])
        mean = jax.random.uniform(of_step, features, minval=-0.5, maxval=0.5)
        scale = jax.random.uniform(scales, features, minval=1.0, maxval=1.25)
        shift = mean + jax.random.uniform(of_image, images, minval=-0.1, maxval=0.1)
        return (scale + 0.1 * jax.random.normal(scale_noise, images)) * x + shift
