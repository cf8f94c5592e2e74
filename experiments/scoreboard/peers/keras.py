"""Keras's batch norm on its JAX backend, through ``stateless_call``."""

import functools
import os

import jax
import jax.numpy as jnp

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import Adapter

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported

import keras  # noqa: E402

# Policy by the dtype of the inputs; for other dtypes, the dtype itself is the policy.
POLICIES = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def layer() -> Adapter:
    """Makes the adapter of ``keras.layers.BatchNormalization``.

    It declares no statistics over devices, since only the TensorFlow backend supports ``synchronized=True``.

    Raises:
      ValueError: Keras already runs on another backend.
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras already runs on its {keras.backend.backend()} backend, but the laws need the JAX backend; set "
            "KERAS_BACKEND=jax before Keras is first imported."
        )

    def init(x):
        norm = _layer(x.ndim, x.shape[-1], jnp.result_type(x).name)
        collections = (norm.trainable_variables, norm.non_trainable_variables)
        return [[variable.value for variable in collection] for collection in collections]

    def apply(state, x, **options):
        norm = _layer(x.ndim, x.shape[-1], jnp.result_type(x).name)
        y, statistics = norm.stateless_call(*state, x, **options)
        return y, [state[0], statistics]

    def train(state, x, mask):
        if mask is None or mask.shape[-1] == 1:
            mask = None if mask is None else jnp.broadcast_to(mask[..., 0], x.shape[:-1])
            return apply(state, x, training=True, mask=mask)
        # Keras's masks have no feature axis. So run the layer with the mask of each feature, and keep only that feature
        # of each result.
        run_with_masks = jax.vmap(lambda mask: apply(state, x, training=True, mask=mask), in_axes=-1, out_axes=-1)
        y, (_, statistics) = run_with_masks(mask)
        return jnp.diagonal(y, axis1=-2, axis2=-1), [state[0], [jnp.diagonal(statistic) for statistic in statistics]]

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
def _layer(dimensions: int, features: int, dtype: str) -> "keras.layers.Layer":
    """Builds a layer, once for each kind of input; only `init` reads its variables."""
    with jax.ensure_compile_time_eval():
        policy = POLICIES.get(dtype, dtype)
        norm = keras.layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPSILON, dtype=policy)
        norm.build((None,) * (dimensions - 1) + (features,))
        return norm
