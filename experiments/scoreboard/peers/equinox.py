"""Equinox's batch norm, which works on single examples, channels first, under a vmap over the batch."""

import equinox as eqx
import jax
import jax.numpy as jnp

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import AXIS, Adapter

BATCH = "batch"


def layer() -> Adapter:
    """Returns the adapter of ``equinox.nn.BatchNorm(mode="batch")``.

    Its documentation speaks of the "unbiased variance"; since there is no factor m/(m - 1), this is understood as the
    correction of the average for its start, which its comments name, and the adapter declares that.
    """
    return _layer(BATCH, over_devices=_layer((BATCH, AXIS)))


def _layer(axis_name, over_devices=None) -> Adapter:
    def make(features):
        make_norm = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        return make_norm(features, axis_name=axis_name, eps=EPSILON, momentum=MOMENTUM, mode="batch")

    def init(x):
        norm, stats = make(x.shape[-1])
        return norm.weight, norm.bias, stats

    def apply(state, x, inference):
        weight, bias, stats = state
        norm = eqx.tree_at(lambda norm: (norm.weight, norm.bias), make(len(weight))[0], (weight, bias))

        def one(x, stats):
            return norm(x, stats, inference=inference)

        batched = jax.vmap(one, axis_name=BATCH, in_axes=(0, None), out_axes=(0, None))
        y, stats = batched(jnp.moveaxis(x, -1, 1), stats)
        return jnp.moveaxis(y, 1, -1), (weight, bias, stats)

    def statistics(state):
        weight, _, stats = state
        norm, _ = make(len(weight))
        # As the layer itself takes them in evaluation; it has no name for them.
        batches = stats.get(norm.batch_counter)
        correction = jnp.where(batches == 0, 1, 1 - MOMENTUM**batches)
        return tuple(hidden / correction for hidden in stats.get(norm.batch_state_index))

    return Adapter(
        name="equinox",
        init=init,
        train=lambda state, x, mask: apply(state, x, inference=False),
        evaluate=lambda state, x: apply(state, x, inference=True)[0],
        statistics=statistics,
        with_parameters=lambda state, scale, bias: (scale, bias, state[2]),
        epsilon=EPSILON,
        momentum=MOMENTUM,
        debiased=True,
        over_devices=over_devices,
    )
