"""Weights are read from tensors, boxes and the variables of Keras; what has no values or would lose them is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxbn import interop
from tests.interop.comparisons import assert_same_bits, refused

# Tensors


def test_parameters_views_and_bfloat16_of_pytorch_are_read():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(3, 2).T.to(torch.bfloat16) / 3)
    found = interop.dense_layout().from_torch({"weight": weight})["params"]["kernel"]
    np.testing.assert_array_equal(found, weight.detach().float().numpy().T)
    assert found.dtype == np.float32


def test_tensors_come_from_their_device():
    class OnDevice:
        dtype = "torch.float32"
        detach = lambda self: self  # noqa: E731
        cpu = lambda self: np.ones((3, 2), np.float32)  # noqa: E731

    assert interop.dense_layout().from_torch({"weight": OnDevice()})["params"]["kernel"].shape == (2, 3)


def test_training_on_in_pytorch_leaves_the_variables_as_they_were():
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm1d(2)
    variables = interop.batch_norm_layout().from_torch(norm.state_dict())
    norm(torch.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)


# Boxes


BOXED = nn.Dense(
    3,
    kernel_init=nn.with_partitioning(nn.initializers.ones, ("x", None)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("y",)),
)


@pytest.mark.parametrize(
    "init", [BOXED.init, lambda *args: jax.eval_shape(BOXED.init, *args)], ids=["values", "shapes"]
)
def test_boxes_are_opened(init):
    entries = {"fc.weight": np.arange(6, dtype=np.float32).reshape(3, 2), "fc.bias": np.ones(3, np.float32)}
    variables = interop.from_torch(entries, init(jax.random.key(0), jnp.ones((1, 2))), {"fc": ""})
    assert_same_bits(variables, {"params": {"kernel": entries["fc.weight"].T, "bias": entries["fc.bias"]}})


def test_boxes_are_opened_on_the_way_out():
    variables = BOXED.init(jax.random.key(0), jnp.ones((1, 2)))
    assert_same_bits(interop.to_torch(variables, {"fc": ""}), interop.to_torch(nn.unbox(variables), {"fc": ""}))


# Keras


def named(**arrays):
    """Returns stand-ins for ``layer.weights`` of Keras."""

    class Variable(types.SimpleNamespace):
        def __array__(self, *_, **__):
            return self.value

    return [Variable(name=name, value=value) for name, value in arrays.items()]


WITHOUT_BETA = {"gamma": np.full(2, 5.0), "moving_mean": np.zeros(2), "moving_variance": np.ones(2)}


@pytest.mark.parametrize(
    "weights",
    [
        WITHOUT_BETA,
        dict(reversed(WITHOUT_BETA.items())),
        named(**WITHOUT_BETA),
        named(**{f"net/norm/{name}:0": value for name, value in reversed(WITHOUT_BETA.items())}),
    ],
    ids=["mapping", "mapping in another order", "variables", "variables of Keras 2 in another order"],
)
def test_weights_of_keras_are_known_by_their_names(weights):
    found = interop.batch_norm_layout(use_bias=False).from_keras(weights)
    assert_same_bits(found, interop.batch_norm_layout(use_bias=False).from_keras([*WITHOUT_BETA.values()]))


@pytest.mark.parametrize("weights", [WITHOUT_BETA, named(**WITHOUT_BETA)], ids=["mapping", "variables"])
def test_a_gamma_with_its_name_is_not_read_as_a_beta(weights):
    with refused("must have beta, moving_mean, moving_variance, got gamma, moving_mean, moving_variance; pass only"):
        interop.batch_norm_layout(use_scale=False).from_keras(weights)


def test_weights_of_several_layers_of_keras_are_refused():
    weights = named(kernel=np.ones((2, 2)), bias=np.ones(2)) * 2
    with refused(
        "a dense layer in Keras must have kernel and may have bias, got 4 arrays; pass only the weights of this"
    ):
        interop.dense_layout().from_keras(weights)


# Values


def stats(dtype):
    return {"batch_stats": {"mean": jax.ShapeDtypeStruct((2,), dtype), "var": jax.ShapeDtypeStruct((2,), dtype)}}


LARGE = {"running_mean": np.zeros(2), "running_var": np.array([1, 1e6]), "num_batches_tracked": np.array(1)}
SHAPES = jax.eval_shape(nn.Dense(3).init, jax.random.key(0), jnp.ones((1, 2)))
LOSSES = {
    "shapes for values": (
        lambda: interop.to_torch(SHAPES, {"fc": ""}),
        "params/kernel is a ShapeDtypeStruct without numbers; pass values, not shapes.",
    ),
    "shapes of a norm for values": (
        lambda: interop.to_keras(stats(jnp.float32), {"norm": ""}),
        "batch_stats/mean is a ShapeDtypeStruct without numbers; pass values, not shapes.",
    ),
    "shapes in nnx for values": (
        lambda: interop.to_torch(
            {"params": nnx.state(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))))}, {"fc": ""}
        ),
        "params/kernel is a Param without numbers; pass values, not shapes.",
    ),
    "objects": (
        lambda: interop.dense_layout().from_torch({"weight": np.array([[None]])}),
        "weight is a ndarray without numbers; pass values, not shapes.",
    ),
    "infinite values": (
        lambda: interop.from_torch(LARGE, stats(jnp.float16), {"": ""}),
        "1 values of batch_stats/var, at most 1000000.0, would be infinite in float16; pass variables of a wider dtype",
    ),
    "complex values": (
        lambda: interop.from_keras({"fc": [np.ones((2, 3)) * 1j, np.ones(3)]}, SHAPES, {"fc": ""}),
        "params/kernel is complex, but float32 in Flax; pass variables of a complex dtype.",
    ),
}


@pytest.mark.parametrize("case", LOSSES)
def test_values_that_are_not_there_or_would_be_lost_are_refused(case):
    call, message = LOSSES[case]
    with refused(message):
        call()


def test_a_tensor_without_values_is_refused():
    torch = pytest.importorskip("torch")
    with refused("weight is a Tensor without numbers; pass values, not shapes."):
        interop.dense_layout().from_torch({"weight": torch.ones((3, 2), device="meta")})


def test_infinities_that_were_there_stay_and_bfloat16_takes_large_values():
    large = LARGE | {"running_mean": np.array([np.inf, 1e38])}
    found = interop.from_torch(large, stats(jnp.bfloat16), {"": ""})
    assert np.isinf(found["batch_stats"]["mean"].astype(np.float32)).tolist() == [True, False]
