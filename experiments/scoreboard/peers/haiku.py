"""Haiku's batch norm, through ``haiku.transform_with_state``."""

import contextlib

import haiku as hk
import jax.numpy as jnp
import jmp

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import AXIS, Adapter

NAME = "batch_norm"


def layer() -> Adapter:
    """Makes the adapter of ``haiku.BatchNorm``."""
    return _layer(None, over_devices=_layer(AXIS))


def _layer(cross_replica_axis: str | None, over_devices: Adapter | None = None) -> Adapter:
    def transformed(cross_replica_axis: str | None) -> hk.TransformedWithState:
        def call(x, is_training):
            norm = hk.BatchNorm(
                create_scale=True,
                create_offset=True,
                decay_rate=MOMENTUM,
                eps=EPSILON,
                cross_replica_axis=cross_replica_axis,
                name=NAME,
            )
            return norm(x, is_training)

        return hk.transform_with_state(call)

    norm = transformed(cross_replica_axis)

    def init(x):
        with _precision_for(x):
            # The laws call `init` outside of the program with the device axis.
            return transformed(None).init(None, x, True)

    def train(state, x, mask):
        del mask
        params, stats = state
        with _precision_for(x):
            y, stats = norm.apply(params, stats, None, x, True)
        return y, (params, stats)

    def evaluate(state, x):
        with _precision_for(x):
            return norm.apply(*state, None, x, False)[0]

    def statistics(state):
        return tuple(state[1][f"{NAME}/~/{name}_ema"]["average"].reshape(-1) for name in ("mean", "var"))

    def with_parameters(state, scale, bias):
        shape = state[0][NAME]["scale"].shape  # [1, ..., C]
        return {NAME: {"scale": jnp.reshape(scale, shape), "offset": jnp.reshape(bias, shape)}}, state[1]

    return Adapter(
        name="haiku",
        init=init,
        train=train,
        evaluate=evaluate,
        statistics=statistics,
        with_parameters=with_parameters,
        epsilon=EPSILON,
        momentum=MOMENTUM,
        debiased=True,
        over_devices=over_devices,
    )


def _precision_for(x) -> contextlib.AbstractContextManager:
    """Applies the policy that Haiku recommends for batch norm in half precision: compute in float32, then round."""
    dtype = jnp.result_type(x)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return contextlib.nullcontext()
    policy = jmp.Policy(param_dtype=jnp.float32, compute_dtype=jnp.float32, output_dtype=dtype)
    return hk.mixed_precision.push_policy(hk.BatchNorm, policy)
