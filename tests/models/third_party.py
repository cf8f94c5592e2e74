"""Models as others write them, with Flax's batch norm, which the tools for whole models must accept unchanged.

Each is built like a public model, but small: the ResNet of Flax's ImageNet example and the generator of DCGAN in linen,
MobileNet and DenseNet in nnx.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Net(NamedTuple):
    """A model with random variables, and the expected results.

    Attributes:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      x: a batch.
      evaluate: how the model evaluates a batch.
      train: how it is called in training.
      batch_norms: their number.
      kept: paths of those that cannot be folded, with the reason.
    """

    model: Any
    variables: Any
    x: jax.Array
    evaluate: Callable[[Any, jax.Array], jax.Array]
    train: Callable[[Any, jax.Array], jax.Array]
    batch_norms: int
    kept: dict[str, str]


# The ResNet of Flax's ImageNet example: layers are passed as partials, batch norm is synchronized over "batch", the
# last scale of a block starts at zero, and a projection is in the shortcut where shapes change.


class Bottleneck(nn.Module):
    filters: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    act: Callable[[jax.Array], jax.Array]
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return self.act(x + y)


class ResNet(nn.Module):
    stage_sizes: Sequence[int]
    num_classes: int
    num_filters: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name="batch",
        )
        x = conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                strides = (2, 2) if stage > 0 and block == 0 else (1, 1)
                x = Bottleneck(self.num_filters * 2**stage, conv, norm, nn.relu, strides)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype)(jnp.mean(x, axis=(1, 2)))
        return jnp.asarray(x, self.dtype)


def resnet(dtype=jnp.float32) -> Net:
    """Builds the ResNet, which computes in ``dtype``."""
    x = _normal((6, 16, 16, 3))
    model = ResNet(stage_sizes=(1, 1), num_classes=5, num_filters=4, dtype=dtype)
    evaluate, train = (functools.partial(_with_train_flag, train=train) for train in (False, True))
    return Net(model, _variables(model, x, evaluate), x, evaluate, train, batch_norms=9, kept={})


# The generator of DCGAN: transposed convolutions from a vector to an image.


class Generator(nn.Module):
    features: int

    @nn.compact
    def __call__(self, z, train: bool):
        def norm(x):
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        x = norm(nn.Dense(4 * 4 * self.features, use_bias=False)(z).reshape(-1, 4, 4, self.features))
        x = norm(nn.ConvTranspose(self.features // 2, (4, 4), (2, 2), use_bias=False)(x))
        x = norm(nn.ConvTranspose(self.features // 4, (3, 3), transpose_kernel=True)(x))
        return nn.tanh(nn.ConvTranspose(3, (4, 4), (2, 2))(x))


def generator() -> Net:
    """Builds the generator, for random vectors."""
    z = _normal((6, 8))
    evaluate, train = (functools.partial(_with_train_flag, train=train) for train in (False, True))
    model = Generator(features=16)
    variables = _variables(model, z, evaluate)
    kept = {"BatchNorm_0": "before it, reshape stands between it and Dense_0; after it, relu follows"}
    return Net(model, variables, z, evaluate, train, batch_norms=3, kept=kept)


# MobileNet with the gates of its later versions: blocks widen, convolve depthwise, weight the channels and narrow.


def conv_norm(inputs, outputs, kernel_size, strides=1, groups=1, act=nnx.relu6, *, rngs):
    size = (kernel_size, kernel_size)
    conv = nnx.Conv(inputs, outputs, size, strides, feature_group_count=groups, use_bias=False, rngs=rngs)
    norm = nnx.BatchNorm(outputs, momentum=0.9, epsilon=1e-3, rngs=rngs)
    return nnx.Sequential(conv, norm) if act is None else nnx.Sequential(conv, norm, act)


class SqueezeExcite(nnx.Module):
    def __init__(self, features, *, rngs):
        self.reduce = nnx.Conv(features, features // 4, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(features // 4, features, (1, 1), rngs=rngs)

    def __call__(self, x):
        weights = self.expand(nnx.silu(self.reduce(x.mean((1, 2), keepdims=True))))
        return x * nnx.sigmoid(weights)


class InvertedResidual(nnx.Module):
    def __init__(self, inputs, outputs, strides, expansion, *, rngs):
        hidden = inputs * expansion
        self.layers = nnx.Sequential(
            conv_norm(inputs, hidden, 1, rngs=rngs),
            conv_norm(hidden, hidden, 3, strides, groups=hidden, rngs=rngs),
            SqueezeExcite(hidden, rngs=rngs),
            conv_norm(hidden, outputs, 1, act=None, rngs=rngs),
        )
        self.is_residual = strides == 1 and inputs == outputs

    def __call__(self, x):
        return x + self.layers(x) if self.is_residual else self.layers(x)


class MobileNet(nnx.Module):
    def __init__(self, num_classes, *, rngs):
        self.stem = conv_norm(3, 4, 3, 2, rngs=rngs)
        widths = ((4, 4, 1), (4, 8, 2))  # inputs, outputs, strides
        self.blocks = nnx.List([InvertedResidual(*numbers, expansion=2, rngs=rngs) for numbers in widths])
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((1, 2))))


def mobilenet() -> Net:
    """Builds MobileNet."""
    model = _filled(MobileNet(5, rngs=nnx.Rngs(0)))
    return Net(model, None, _normal((6, 16, 16, 3)), _evaluating, _training, batch_norms=7, kept={})


# DenseNet: batch norm comes before the ReLU and the convolution, and every layer reads all outputs before it.


class DenseLayer(nnx.Module):
    def __init__(self, inputs, growth, *, rngs):
        self.norm1 = nnx.BatchNorm(inputs, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, 4 * growth, (1, 1), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(4 * growth, rngs=rngs)
        self.conv2 = nnx.Conv(4 * growth, growth, (3, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return jnp.concatenate([x, y], axis=-1)


class DenseNet(nnx.Module):
    def __init__(self, block_sizes, growth, num_classes, *, rngs):
        features = 2 * growth
        self.stem = nnx.Conv(3, features, (3, 3), use_bias=False, rngs=rngs)
        self.blocks, self.transitions = nnx.List(), nnx.List()
        for size in block_sizes:
            layers = [DenseLayer(features + i * growth, growth, rngs=rngs) for i in range(size)]
            features += size * growth
            self.blocks.append(nnx.Sequential(*layers))
            self.transitions.append(
                nnx.Sequential(
                    nnx.BatchNorm(features, rngs=rngs),
                    nnx.relu,
                    nnx.Conv(features, features // 2, (1, 1), use_bias=False, rngs=rngs),
                )
            )
            features //= 2
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = nnx.avg_pool(transition(block(x)), (2, 2), strides=(2, 2))
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


def densenet() -> Net:
    """Builds DenseNet."""
    model = _filled(DenseNet((2,), 4, 5, rngs=nnx.Rngs(0)))
    relu = "; after it, relu follows"
    kept = {
        "blocks/0/layers/0/norm1": f"before it, the output of stem is also used elsewhere{relu}",
        "blocks/0/layers/1/norm1": f"before it, concatenate stands between it and stem{relu}",
        "transitions/0/layers/0": f"before it, concatenate stands between it and stem{relu}",
        "norm": f"before it, div stands between it and transitions/0/layers/2{relu}",  # div: of the average pooling
    }
    return Net(model, None, _normal((6, 8, 8, 3)), _evaluating, _training, batch_norms=6, kept=kept)


NETS = {"resnet": resnet, "generator": generator, "mobilenet": mobilenet, "densenet": densenet}


def _with_train_flag(model, x, *, train):
    return model(x, train=train)


def _evaluating(model, x):
    model.eval()
    return model(x)


def _training(model, x):
    model.train()
    model.set_attributes(nnx.Dropout, deterministic=True, raise_if_not_found=False)  # makes outputs comparable
    return model(x)


def _normal(shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def _variables(model, x, evaluate):
    """Returns random variables of a linen model."""
    return _random(jax.eval_shape(lambda key: model.init(key, x, method=evaluate), jax.random.key(0)))


def _filled(model):
    """Gives an nnx model random variables."""
    nnx.update(model, _random(nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))))
    return model


def _random(tree):
    """Returns variables far from the initial ones, with which values keep their magnitude from layer to layer."""
    rng = np.random.default_rng(0)

    def variable(path, leaf):
        low, high = {"scale": (0.5, 1.5), "var": (0.5, 2.0)}.get(path[-1].key, (-0.5, 0.5))
        if path[-1].key == "kernel":
            high = math.sqrt(6 / math.prod(leaf.shape[:-1]))
            low = -high
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(variable, tree)
