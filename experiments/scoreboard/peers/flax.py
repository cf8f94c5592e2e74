"""Flax's batch norm in linen and nnx; also used for this library's layers, which take the same arguments."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx as flax_nnx

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import AXIS, Adapter


def linen() -> Adapter:
    """Makes the adapter of ``flax.linen.BatchNorm``."""
    return linen_layer("flax-linen", nn.BatchNorm)


def linen_stable() -> Adapter:
    """Makes the adapter of the same layer with two passes over the inputs, Flax's numerically stable option."""
    return linen_layer("flax-linen-stable", nn.BatchNorm, use_fast_variance=False)


def nnx() -> Adapter:
    """Makes the adapter of ``flax.nnx.BatchNorm``."""
    return nnx_layer("flax-nnx", flax_nnx.BatchNorm)


def linen_layer(name: str, layer: Callable[..., nn.Module], **options: Any) -> Adapter:
    """Makes the adapter of a linen layer with the arguments and variables of Flax's layer."""
    return _linen(name, layer, options, over_devices=_linen(name, layer, options | {"axis_name": AXIS}))


def nnx_layer(name: str, layer: Callable[..., flax_nnx.Module], **options: Any) -> Adapter:
    """Makes the adapter of an nnx layer with the arguments and variables of Flax's layer."""
    return _nnx(name, layer, options, over_devices=_nnx(name, layer, options | {"axis_name": AXIS}))


def _linen(name: str, layer: Callable[..., nn.Module], options: dict, over_devices: Adapter | None = None) -> Adapter:
    norm = layer(momentum=MOMENTUM, epsilon=EPSILON, **options)

    def init(x):
        return norm.init(jax.random.key(0), x, use_running_average=False)

    def train(variables, x, mask):
        y, updates = norm.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
        return y, variables | updates

    def evaluate(variables, x):
        return norm.apply(variables, x, use_running_average=True)

    return Adapter(
        name=name,
        init=init,
        train=train,
        evaluate=evaluate,
        statistics=lambda variables: (variables["batch_stats"]["mean"], variables["batch_stats"]["var"]),
        with_parameters=lambda variables, scale, bias: variables | {"params": {"scale": scale, "bias": bias}},
        epsilon=EPSILON,
        momentum=MOMENTUM,
        masks=True,
        over_devices=over_devices,
    )


def _nnx(
    name: str, layer: Callable[..., flax_nnx.Module], options: dict, over_devices: Adapter | None = None
) -> Adapter:
    """Makes the adapter of an nnx layer, whose state is the result of ``nnx.split``."""

    def init(x):
        norm = layer(x.shape[-1], momentum=MOMENTUM, epsilon=EPSILON, rngs=flax_nnx.Rngs(0), **options)
        return flax_nnx.split(norm)

    def train(state, x, mask):
        norm = flax_nnx.merge(*state, copy=True)
        y = norm(x, use_running_average=False, mask=mask)
        return y, flax_nnx.split(norm)

    def evaluate(state, x):
        return flax_nnx.merge(*state, copy=True)(x, use_running_average=True)

    def statistics(state):
        norm = flax_nnx.merge(*state, copy=True)
        return norm.mean[...], norm.var[...]

    def with_parameters(state, scale, bias):
        norm = flax_nnx.merge(*state, copy=True)
        norm.scale[...], norm.bias[...] = scale, bias
        return flax_nnx.split(norm)

    return Adapter(
        name=name,
        init=init,
        train=train,
        evaluate=evaluate,
        statistics=statistics,
        with_parameters=with_parameters,
        epsilon=EPSILON,
        momentum=MOMENTUM,
        masks=True,
        over_devices=over_devices,
    )
