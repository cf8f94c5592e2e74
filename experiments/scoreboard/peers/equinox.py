"""Equinox's batch norm, which takes single examples, channels first, under a vmap over the batch."""

import equinox as eqx
import jax
import jax.numpy as jnp

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import AXIS, Adapter

BATCH = "batch"


def layer() -> Adapter:
    """Makes the adapter of ``equinox.nn.BatchNorm(mode="batch")``.

    Its documentation mentions an "unbiased variance". There is no factor m/(m - 1), so we take this to mean the bias
    correction of the running average, which its comments mention, and the adapter declares that.
    """
    return _layer(BATCH, over_devices=_layer((BATCH, AXIS)))


def _layer(axis_name: str | tuple[str, ...], over_devices: Adapter | None = None) -> Adapter:
    def make(features):
        make_norm = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        return make_norm(features, axis_name=axis_name, eps=EPSILON, momentum=MOMENTUM, mode="batch")

    def init(x):
        norm, stats = make(x.shape[-1])
        return norm.weight, norm.bias, stats

    def apply(state, x, inference):
        weight, bias, stats = state
        norm = eqx.tree_at(lambda norm: (norm.weight, norm.bias), make(len(weight))[0], (weight, bias))

        def normalize_example(x, stats):
            return norm(x, stats, inference=inference)

        batched = jax.vmap(normalize_example, axis_name=BATCH, in_axes=(0, None), out_axes=(0, None))
        y, stats = batched(jnp.moveaxis(x, -1, 1), stats)
        return jnp.moveaxis(y, 1, -1), (weight, bias, stats)

    def statistics(state):
        weight, _, stats = state
        norm, _ = make(len(weight))
        # The statistics that the layer uses in evaluation. It computes them there, and stores only the average.
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
