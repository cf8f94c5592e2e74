"""This library's batch norm: the function and the two layers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import jaxbn.linen
import jaxbn.nnx
from experiments.scoreboard.peers import EPSILON, MOMENTUM, flax
from jaxbn.testing import AXIS, Adapter


class State(NamedTuple):
    """Running statistics and parameters of the function."""

    stats: jaxbn.BatchStats
    scale: jax.Array
    bias: jax.Array


def functional() -> Adapter:
    """Makes the adapter of ``jaxbn.batch_norm``."""
    return _functional(None, over_devices=_functional(AXIS))


def linen() -> Adapter:
    """Makes the adapter of ``jaxbn.linen.BatchNorm``."""
    return flax.linen_layer("jaxbn-linen", jaxbn.linen.BatchNorm)


def nnx() -> Adapter:
    """Makes the adapter of ``jaxbn.nnx.BatchNorm``."""
    return flax.nnx_layer("jaxbn-nnx", jaxbn.nnx.BatchNorm)


def _functional(axis_name: str | None, over_devices: Adapter | None = None) -> Adapter:
    def apply(state, x, mask, use_running_average):
        y, stats = jaxbn.batch_norm(
            x,
            *state,
            use_running_average=use_running_average,
            momentum=MOMENTUM,
            epsilon=EPSILON,
            axis_name=None if use_running_average else axis_name,
            mask=mask,
        )
        return y, state._replace(stats=stats)

    def init(x):
        features = x.shape[-1]
        return State(jaxbn.init_stats(features), jnp.ones(features), jnp.zeros(features))

    return Adapter(
        name="jaxbn",
        init=init,
        train=lambda state, x, mask: apply(state, x, mask, use_running_average=False),
        evaluate=lambda state, x: apply(state, x, None, use_running_average=True)[0],
        statistics=lambda state: (state.stats.mean, state.stats.var),
        with_parameters=lambda state, scale, bias: state._replace(scale=scale, bias=bias),
        epsilon=EPSILON,
        momentum=MOMENTUM,
        masks=True,
        over_devices=over_devices,
    )
