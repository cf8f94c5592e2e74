"""Each kind of linear layer absorbs a batch norm on either side, where that is exact."""

import functools
import itertools
import re
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
from jaxbn import surgery
from tests.surgery.nets import ZEROS, randomized, variables_of

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"


FEATURES = 6  # of the inputs


MASK = (np.random.default_rng(0).random((3, 3, FEATURES, 12)) < 0.5).astype(np.float32)


CONV = {"features": 12, "kernel_size": (3, 3)}


KINDS = {
    "convolution": (nn.Conv, CONV, False),
    "without padding": (nn.Conv, CONV | {"padding": "VALID"}, True),
    "1x1": (nn.Conv, {"features": 12, "kernel_size": (1, 1)}, True),
    "circular padding": (nn.Conv, CONV | {"padding": "CIRCULAR"}, True),
    "reflected padding": (nn.Conv, CONV | {"padding": "REFLECT"}, True),
    "causal": (nn.Conv, {"features": 12, "kernel_size": (3,), "padding": "CAUSAL"}, False),
    "1-D": (nn.Conv, {"features": 12, "kernel_size": (3,), "padding": "VALID"}, True),
    "3-D": (nn.Conv, {"features": 4, "kernel_size": (2, 3, 2)}, False),
    "strided": (nn.Conv, CONV | {"strides": 2, "padding": "VALID"}, True),
    "dilated": (nn.Conv, CONV | {"kernel_dilation": 2, "padding": "VALID"}, True),
    "dilated inputs": (nn.Conv, CONV | {"input_dilation": 2, "padding": [(1, 1), (1, 1)]}, False),
    "grouped": (nn.Conv, CONV | {"feature_group_count": 3, "padding": "VALID"}, True),
    "depthwise": (nn.Conv, CONV | {"feature_group_count": FEATURES, "padding": "VALID"}, True),
    "masked kernel": (nn.Conv, CONV | {"mask": MASK, "padding": "VALID"}, True),
    "transposed": (nn.ConvTranspose, CONV | {"strides": (2, 2)}, False),
    "transposed, `transpose_kernel=True`": (
        nn.ConvTranspose,
        CONV | {"strides": (2, 2), "transpose_kernel": True},
        False,
    ),
    "transposed, dilated": (nn.ConvTranspose, CONV | {"kernel_dilation": (2, 2)}, False),
    "transposed, circular padding": (nn.ConvTranspose, CONV | {"padding": "CIRCULAR"}, True),
    "dense": (nn.Dense, {"features": 7}, True),
    "dense, several axes of features": (nn.DenseGeneral, {"features": (4, 5)}, True),
    "dense, over several axes": (nn.DenseGeneral, {"features": 7, "axis": (-2, -1)}, False),
}


# Kinds of which one case is in the fast suite.
FAST_KINDS = {
    "convolution",
    "without padding",
    "circular padding",
    "grouped",
    "masked kernel",
    "transposed",
    "transposed, `transpose_kernel=True`",
    "dense",
    "dense, several axes of features",
    "dense, over several axes",
}
IN_NNX = {
    nn.Conv: nnx.Conv,
    nn.ConvTranspose: nnx.ConvTranspose,
    nn.Dense: nnx.Linear,
    nn.DenseGeneral: nnx.LinearGeneral,
}


def inputs(kind):
    positions = len(KINDS[kind][1].get("kernel_size", (1,)))
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, *(6,) * positions, FEATURES)), jnp.float32)


class LinenNet(nn.Module):
    kind: str
    before: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        layer, options, _ = KINDS[self.kind]
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = x if self.before else norm()(nn.relu(x))
        x = layer(**options, use_bias=self.use_bias, kernel_init=ZEROS)(x)
        return nn.relu(norm()(x) if self.before else x)


class NnxNet(nnx.Module):
    def __init__(self, kind, before, use_bias):
        layer, options, _ = KINDS[kind]
        options = options | {"kernel_init": ZEROS}
        features = options.pop("features")
        axes = np.atleast_1d(options.get("axis", -1))
        inputs_of = tuple(inputs(kind).shape[axis] for axis in axes) if "axis" in options else FEATURES
        self.linear = IN_NNX[layer](inputs_of, features, **options, use_bias=use_bias, rngs=nnx.Rngs(0))
        normalized = np.atleast_1d(features)[-1] if before else FEATURES
        self.norm = nnx.BatchNorm(int(normalized), use_running_average=True, rngs=nnx.Rngs(0))
        self.before = before

    def __call__(self, x):
        x = self.linear(x if self.before else self.norm(nnx.relu(x)))
        return nnx.relu(self.norm(x) if self.before else x)


def make(framework, kind, before, use_bias):
    """Returns a net with one batch norm on one side of one layer, its variables and a sample."""
    x = inputs(kind)
    if framework == "linen":
        net = LinenNet(kind, before, use_bias)
        return net, variables_of(net, x), x
    net = NnxNet(kind, before, use_bias)
    nnx.update(net, randomized(nnx.state(net)))
    return net, None, x


def cases(kinds, fast):
    """Returns kinds, frameworks, and whether there is a bias; all are slow but some kinds with ``fast`` settings."""
    return [
        pytest.param(kind, *settings, marks=() if kind in FAST_KINDS and settings == fast else pytest.mark.slow)
        for kind in kinds
        for settings in itertools.product(("linen", "nnx"), (True, False))
    ]


@pytest.mark.parametrize(("kind", "framework", "use_bias"), cases(KINDS, fast=("nnx", False)))
def test_a_layer_takes_in_the_batch_norm_behind_it(kind, framework, use_bias):
    net, variables, x = make(framework, kind, True, use_bias)
    done = surgery.fold(net, variables, x)
    assert len(done.layers) == 1 and not done.kept
    assert done.scale > 0.1 and done.difference <= 1e-5 * done.scale


EXACT_IN_FRONT = [kind for kind, (_, _, is_exact) in KINDS.items() if is_exact]


@pytest.mark.parametrize(("kind", "framework", "use_bias"), cases(EXACT_IN_FRONT, fast=("linen", True)))
def test_a_layer_that_pads_with_no_zeros_takes_in_the_batch_norm_in_front_of_it(kind, framework, use_bias):
    net, variables, x = make(framework, kind, False, use_bias)
    done = surgery.fold(net, variables, x)
    assert len(done.layers) == 1 and not done.kept
    assert done.scale > 0.1 and done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in EXACT_IN_FRONT])
def test_a_layer_that_would_not_be_exact_is_refused(kind):
    net, variables, x = make("linen", kind, False, True)
    with pytest.raises(ValueError, match=r"pads with zeros, which its shift would change|along other axes"):
        surgery.fold(net, variables, x)


def test_a_shift_of_zero_goes_into_a_convolution_that_pads_with_zeros():
    net, variables, x = make("linen", "convolution", False, True)
    norm = {"scale": variables["params"]["BatchNorm_0"]["scale"], "bias": jnp.zeros(FEATURES)}
    statistics = variables["batch_stats"]["BatchNorm_0"] | {"mean": jnp.zeros(FEATURES)}
    variables = {
        "params": variables["params"] | {"BatchNorm_0": norm},
        "batch_stats": {"BatchNorm_0": statistics},
    }
    done = surgery.fold(net, variables, x)
    assert done.difference <= 1e-5 * done.scale


def test_padding_decides_and_not_the_size_of_the_sample():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.relu(x))
            return nn.Conv(5, (2, 2), strides=2)(x)  # "SAME" pads no even size

    x = jnp.ones((1, 8, 8, 3))
    with pytest.raises(ValueError, match="Conv_0 pads with zeros"):
        surgery.fold(Net(), variables_of(Net(), x), x)


class Chain(nn.Module):
    """Batch norm, dense, batch norm: the layer in the middle absorbs both."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        return norm()(nn.Dense(5)(norm()(nn.relu(x))))


def test_a_layer_takes_in_batch_norms_on_both_sides():
    x = inputs("dense")
    done = surgery.fold(Chain(), variables_of(Chain(), x), x)
    assert len(done.layers) == 2 and done.difference <= 1e-5 * done.scale


def test_complex_layers_fold():
    net = nn.Sequential([nn.Dense(4, param_dtype=jnp.complex64), jaxbn.linen.BatchNorm(use_running_average=True)])
    x = inputs("dense") * (1 + 2j)
    variables = variables_of(net, x)
    variables["params"]["layers_0"]["kernel"] *= 1 - 0.5j
    variables["params"]["layers_0"]["bias"] *= 1 - 0.5j
    variables["batch_stats"]["layers_1"]["mean"] *= 1 + 1j
    done = surgery.fold(net, variables, x)
    assert len(done.layers) == 1 and done.difference <= 1e-5 * done.scale


def test_the_page_lists_every_kind_and_its_sides():
    if not PAGE.is_file():
        pytest.skip("the pages are not in this distribution")
    rows = re.findall(r"^\| (.+?) \| (yes) \| (yes|no) \|$", PAGE.read_text(), re.MULTILINE)
    assert {kind: after == "yes" for kind, _, after in rows} == {kind: after for kind, (*_, after) in KINDS.items()}
