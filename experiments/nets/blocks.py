"""The building blocks of the studies' networks: convolution, norm, activation, noise and initialization.

Conventions: with `train`, batch norm uses and updates the statistics of the batch, and noise is added. Random numbers
in training come from the key "noise" of `apply`.
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
# Initializers of kernels: of the 7-layer network (Flax's default), of ResNet-20, and of the Inception network.
LECUN_NORMAL = nn.initializers.lecun_normal()
HE_NORMAL = nn.initializers.he_normal()
GLOROT_UNIFORM = nn.initializers.glorot_uniform()
ACTIVATIONS = {"relu": nn.relu, "sigmoid": nn.sigmoid}


class Block(NamedTuple):
    """How a network normalizes, activates and initializes its layers.

    `Config` has the same fields and documents them, except for:

    Attributes:
      batch_norm: makes the layer of batch norm from the arguments of ``flax.linen.BatchNorm``. The benchmarks compare
        implementations in the same network.
    """

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
    batch_norm: Callable[..., nn.Module] = BatchNorm

    @classmethod
    def of(cls, config: Config, batch_norm: Callable[..., nn.Module] = BatchNorm) -> "Block":
        """Returns the block of the network that a run trains."""
        options = {name: getattr(config, name) for name in cls._fields if name != "batch_norm"}
        return cls(**options, batch_norm=batch_norm)

    @property
    def hidden_norm(self) -> Norm:
        """The norm around the convolutions."""
        return self.norm if self.norm_layers == "hidden" else "none"


class ConvNorm(nn.Module):
    """A convolution with its norm and activation.

    Attributes:
      features: number of output channels.
      kernel_size: side of the square kernel.
      block: norm, activation and initialization.
      strides: steps between the positions of the kernel.
      use_bias: whether the convolution has a bias. None: only if no norm directly follows, since a norm removes it.
      activate: False leaves the activation to the caller.
      kernel_init: initializer of the kernel, unless `block` has one.
      momentum: weight of the old value in batch norm's running statistics, unless `block` has one.
      epsilon: added to the variance by the norms, unless `block` has one.
      use_scale: whether an affine norm learns a scale in addition to a bias.
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
        """Returns the normalized and activated convolution of x, shape [n, height, width, features]."""
        block = self.block
        x = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            self.strides,
            use_bias=needs_bias(block) if self.use_bias is None else self.use_bias,
            kernel_init=initializer_of(block, self.kernel_init),
        )(x)
        activate = ACTIVATIONS[block.activation] if self.activate else lambda x: x
        if block.hidden_norm == "none":
            return activate(x)
        options = {"momentum": self.momentum, "epsilon": self.epsilon, "use_scale": self.use_scale}
        norm = functools.partial(normalize, block, train=train, mask=mask, **options)
        return norm(activate(x)) if block.placement == "after" else activate(norm(x))


def needs_bias(block: Block) -> bool:
    """Says whether a convolution needs a bias: a norm that directly follows would remove it."""
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
    """Computes logits: a global average, dropout, a dense layer, and a norm if `block` normalizes the logits.

    Call it in a compact method of a module.

    Args:
      block: dropout, norm and initialization.
      x: activations, shape [n, height, width, features].
      num_classes: number of logits.
      train: see the module.
      mask: booleans [n]; images marked False are left out of the statistics.
      kernel_init: initializer of the kernel, unless `block` has one.
      name: name of the dense layer, unless it is the only one.
    """
    x = nn.Dropout(block.dropout, rng_collection="noise")(x.mean((1, 2)), deterministic=not train)
    x = nn.Dense(num_classes, kernel_init=initializer_of(block, kernel_init), name=name)(x)
    return normalize(block, x, train=train, mask=mask) if block.norm_layers == "logits" else x


def initializer_of(block: Block, initializer: Callable) -> Callable:
    """Returns this initializer of weights, or a uniform one between plus and minus `block.init_scale`."""
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
    """Applies the norm and the noise of `block`; call it in a compact method of a module.

    Args:
      block: the norm, its options and its noise.
      x: activations, shape [n, ..., features].
      train: see the module.
      mask: booleans [n]; images marked False are left out of the statistics.
      momentum: weight of the old value in batch norm's running statistics, unless `block` has one.
      epsilon: added to the variance, unless `block` has one.
      use_scale: whether an affine norm learns a scale in addition to a bias.

    Raises:
      ValueError: `block` has no norm.
    """
    if block.norm == "none":
        raise ValueError("norm='none' normalizes nothing; do not call `normalize` for such a block.")
    epsilon = epsilon if block.epsilon is None else block.epsilon
    learned = {"use_scale": use_scale and block.affine, "use_bias": block.affine}
    if block.norm == "group":
        return nn.GroupNorm(num_groups(x.shape[-1]), epsilon=epsilon, **learned)(x)
    if block.tuning != "trained":
        # `surgery.to_affine` puts its variables where the batch norm was, so this layer takes the same name.
        return Affine(fixed=block.tuning == "frozen", name="BatchNorm_0")(x)
    options = {"momentum": momentum if block.momentum is None else block.momentum, "epsilon": epsilon}
    if block.debias:
        options["debias"] = True
    if block.norm == "ghost":
        options["method"] = functools.partial(jaxbn.ghost_normalize, group_size=block.group_size)
    elif block.norm == "renorm":
        options["method"] = jaxbn.batch_renormalize
    options["use_running_average"] = not train
    mask = None if mask is None else mask.reshape(-1, *(1,) * (x.ndim - 1))
    if block.noise == "matched":
        # Noise in the statistics of ghost batch norm acts before scale and bias, so this noise does too.
        x = block.batch_norm(**options, use_scale=False, use_bias=False)(x, mask=mask)
        x = MatchedNoise(block.group_size)(x, train)
        return Affine(**learned)(x) if block.affine else x
    x = block.batch_norm(**options, **learned)(x, mask=mask)
    return ShiftingNoise()(x, train) if block.noise == "shifting" else x


def num_groups(features: int) -> int:
    """Returns the number of groups for group norm: the largest divisor of `features` that is at most 8.

    Wu and He (2018) use 32 groups, or 16 channels per group, in networks of 64 to 2048 channels. These networks start
    at 16 channels, where 32 groups are impossible, and 8 groups leave two channels to share a mean. Every number of
    channels has such a divisor, so group norm never changes the widths.
    """
    return max(g for g in range(1, MAX_GROUPS + 1) if features % g == 0)


class MatchedNoise(nn.Module):
    """Noise as large as that of ghost batch norm, but independent of the images.

    Ghost batch norm shifts each group of images by its own mean and divides it by its own standard deviation. This
    module shifts and scales each group by normal random numbers instead. For each channel, their standard deviation
    over the groups is that of the true means and standard deviations of the groups in this batch.

    Attributes:
      group_size: images per group; divides the batch.
    """

    group_size: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Adds the noise to normalized activations x, shape [n, ..., features], in training."""
        if not train:
            return x
        groups = x.reshape(-1, self.group_size, *x.shape[1:])
        within = tuple(range(1, groups.ndim - 1))
        # Shape [groups, features]. No gradient, since the noise must not depend on the images.
        mean, std = jax.lax.stop_gradient((groups.mean(within), groups.std(within)))
        shift, scale = jax.random.normal(self.make_rng("noise"), (2, *mean.shape))
        shift = shift * mean.std(0)
        scale = jnp.maximum(1 + scale * std.std(0), 0.1)  # far from 0, which a normal number can reach
        broadcast = (len(mean), *(1,) * len(within), x.shape[-1])
        noisy = (groups - shift.reshape(broadcast)) / scale.reshape(broadcast)
        return noisy.reshape(x.shape)


class ShiftingNoise(nn.Module):
    """Noise whose distribution changes at each step: the "noisy batch norm" of Santurkar et al.

    Each step draws a mean from U(-0.5, 0.5) and a scale from U(1, 1.25) for every channel. Each image is then shifted
    by a number from U(mean - 0.1, mean + 0.1) and scaled by one from N(scale, 0.1).

    References:
      Santurkar, Tsipras, Ilyas, Madry 2018, arXiv:1805.11604, appendix A.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Adds the noise to activations x, shape [n, ..., features], in training."""
        if not train:
            return x
        mean_key, shift_key, scale_key, factor_key = jax.random.split(self.make_rng("noise"), 4)
        per_channel = (x.shape[-1],)
        per_image = (len(x), *(1,) * (x.ndim - 2), x.shape[-1])
        mean = jax.random.uniform(mean_key, per_channel, minval=-0.5, maxval=0.5)
        scale = jax.random.uniform(scale_key, per_channel, minval=1.0, maxval=1.25)
        shift = mean + jax.random.uniform(shift_key, per_image, minval=-0.1, maxval=0.1)
        factor = scale + 0.1 * jax.random.normal(factor_key, per_image)
        return factor * x + shift
