"""Keras's batch norm on its JAX backend, through ``stateless_call``."""

import functools
import os

import jax
import jax.numpy as jnp

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import Adapter

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported

import keras  # noqa: E402

POLICIES = {
    "bfloat16": "mixed_bfloat16",
    "float16": "mixed_float16",
}  # by the inputs' dtype; otherwise it is that dtype


def layer() -> Adapter:
    """Returns the adapter of ``keras.layers.BatchNormalization``.

    It declares no statistics over devices: ``synchronized=True`` is for the TensorFlow backend alone.

    Raises:
      ValueError: Keras runs on another backend already.
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on its {keras.backend.backend()} backend already; the JAX backend is needed; set "
            "KERAS_BACKEND=jax before Keras is first imported."
        )

    def init(x):
        norm = _layer(x.ndim, x.shape[-1], jnp.result_type(x).name)
        return [[one.value for one in some] for some in (norm.trainable_variables, norm.non_trainable_variables)]

    def apply(state, x, **options):
        norm = _layer(x.ndim, x.shape[-1], jnp.result_type(x).name)
        y, statistics = norm.stateless_call(*state, x, **options)
        return y, [state[0], statistics]

    def train(state, x, mask):
        if mask is None or mask.shape[-1] == 1:
            mask = None if mask is None else jnp.broadcast_to(mask[..., 0], x.shape[:-1])
            return apply(state, x, training=True, mask=mask)
        # Keras's masks have no feature axis: it gets the mask of each feature in turn, and of the results that feature.
        each = jax.vmap(lambda mask: apply(state, x, training=True, mask=mask), in_axes=-1, out_axes=-1)
        y, (_, statistics) = each(mask)
        return jnp.diagonal(y, axis1=-2, axis2=-1), [state[0], [jnp.diagonal(one) for one in statistics]]

    return Adapter(
        name="keras",
        init=init,
        train=train,
        evaluate=lambda state, x: apply(state, x, training=False)[0],
        statistics=lambda state: tuple(state[1]),
        with_parameters=lambda state, scale, bias: [[scale, bias], state[1]],
        epsilon=EPSILON,
        momentum=MOMENTUM,
        masks=True,
    )


@functools.cache
def _layer(dimensions, features, dtype):
    """A layer that is built, once for each kind of input; its variables are never used but at the start."""
    with jax.ensure_compile_time_eval():
        policy = POLICIES.get(dtype, dtype)
        norm = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
        norm.build((None,) * (dimensions - 1) + (features,))
        return norm
