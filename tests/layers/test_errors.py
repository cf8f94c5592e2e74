"""Errors of the layers themselves, beyond the checks of the functions that they call."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.core.checked import (
    X,
    refused,
)


def test_an_nnx_layer_for_another_number_of_features_names_num_features():
    message = (
        "num_features must be 3 for an input of shape (8, 5, 3) with features on axis -1, got 4. "
        "Construct the layer with num_features=3, or set axis to where the features are."
    )
    with refused(message):
        jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(X)


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda **dtype: jaxbn.linen.BatchNorm(**dtype).init(jax.random.key(0), X, use_running_average=True),
        lambda **dtype: jaxbn.nnx.BatchNorm(3, **dtype, rngs=nnx.Rngs(0)),
        lambda **dtype: jaxbn.linen.Affine(**dtype).init(jax.random.key(0), X),
        lambda **dtype: jaxbn.nnx.Affine(3, **dtype),
    ],
    ids=["linen", "nnx", "linen_affine", "nnx_affine"],
)
def test_a_layer_whose_results_or_parameters_would_be_integers_is_refused(layer, name):
    with pytest.raises(ValueError, match=f"^{name} must be floating-point or complex, got .*int32.*. Use for example"):
        layer(**{name: jnp.int32})


def test_init_on_one_example_neither_warns_nor_needs_whole_groups():
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False, method=functools.partial(jaxbn.ghost_normalize, group_size=4)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.init(jax.random.key(0), np.ones((1, 3), np.float32))
