"""Folding: which layers can take a batch norm in, on which side, and what is said of those that cannot."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
from jaxbn import surgery

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"
RNG = np.random.default_rng(0)
FEATURES = 6  # of the inputs
MASK = (RNG.random((3, 3, FEATURES, 12)) < 0.5).astype(np.float32)
CONV = {"features": 12, "kernel_size": (3, 3)}

# kind -> the linen layer, its arguments, and whether it can take in a batch norm in front of it, too.
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
IN_NNX = {
    nn.Conv: nnx.Conv,
    nn.ConvTranspose: nnx.ConvTranspose,
    nn.Dense: nnx.Linear,
    nn.DenseGeneral: nnx.LinearGeneral,
}


def inputs(kind):
    positions = len(KINDS[kind][1].get("kernel_size", (1,)))
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, *(6,) * positions, FEATURES)), jnp.float32)


def randomized(tree):
    """Returns arrays of these shapes, away from their initial values, statistics and scales positive."""

    def random(a):
        values = RNG.normal(size=a.shape)
        return jnp.asarray(abs(values) + 0.1 if a.ndim == 1 else values, a.dtype)

    return jax.tree.map(random, tree)


def variables_of(net, x):
    """Returns random variables of a linen net."""
    return randomized(jax.eval_shape(net.init, jax.random.key(0), x))


class LinenNet(nn.Module):
    kind: str
    before: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        layer, options, _ = KINDS[self.kind]
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = x if self.before else norm()(nn.relu(x))
        x = layer(**options, use_bias=self.use_bias)(x)
        return nn.relu(norm()(x) if self.before else x)


class NnxNet(nnx.Module):
    def __init__(self, kind, before, use_bias):
        layer, options, _ = KINDS[kind]
        options = options | {"kernel_init": nnx.initializers.zeros_init()}  # compiles in no time
        features = options.pop("features")
        axes = np.atleast_1d(options.get("axis", -1))
        inputs_of = tuple(inputs(kind).shape[axis] for axis in axes) if "axis" in options else FEATURES
        self.linear = IN_NNX[layer](inputs_of, features, **options, use_bias=use_bias, rngs=nnx.Rngs(0))
        normalised = np.atleast_1d(features)[-1] if before else FEATURES
        self.norm = nnx.BatchNorm(int(normalised), use_running_average=True, rngs=nnx.Rngs(0))
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


def settings(*fast):
    """Returns the frameworks, with and without a bias; all but one is slow."""
    every = [(framework, use_bias) for framework in ("linen", "nnx") for use_bias in (True, False)]
    return [pytest.param(*one, marks=() if one == fast else pytest.mark.slow) for one in every]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("framework", "use_bias"), settings("nnx", False))
def test_a_layer_takes_in_the_batch_norm_behind_it(framework, kind, use_bias):
    net, variables, x = make(framework, kind, True, use_bias)
    done = surgery.fold(net, variables, x)
    assert len(done.layers) == 1 and not done.kept
    assert done.scale > 0.1 and done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("kind", [kind for kind, (_, _, after) in KINDS.items() if after])
@pytest.mark.parametrize(("framework", "use_bias"), settings("linen", True))
def test_a_layer_that_pads_with_no_zeros_takes_in_the_batch_norm_in_front_of_it(framework, kind, use_bias):
    net, variables, x = make(framework, kind, False, use_bias)
    done = surgery.fold(net, variables, x)
    assert len(done.layers) == 1 and not done.kept
    assert done.scale > 0.1 and done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("kind", [kind for kind, (_, _, after) in KINDS.items() if not after])
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


def test_the_page_lists_every_kind_and_its_sides():
    if not PAGE.is_file():
        pytest.skip("the pages are not in this distribution")
    rows = re.findall(r"^\| (.+?) \| (yes) \| (yes|no) \|$", PAGE.read_text(), re.MULTILINE)
    assert {kind: after == "yes" for kind, _, after in rows} == {kind: after for kind, (*_, after) in KINDS.items()}


class Chain(nn.Module):
    """Batch norm, dense, batch norm: the layer in the middle takes in both."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        return norm()(nn.Dense(5)(norm()(nn.relu(x))))


def test_a_layer_takes_in_batch_norms_on_both_sides():
    x = inputs("dense")
    done = surgery.fold(Chain(), variables_of(Chain(), x), x)
    assert len(done.layers) == 2 and done.difference <= 1e-5 * done.scale


def net_of(function):
    """Returns a linen net whose call is a function of the layers that it may use, and of x."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            def norm(x, name, **options):
                return nn.BatchNorm(use_running_average=True, name=name, **options)(x)

            return function(SimpleNamespace(dense=nn.Dense(FEATURES, name="dense"), norm=norm), x)

    return Net()


def shared(net, x):
    return net.norm(net.dense(net.dense(x)), "norm")


REASONS = {
    "its input is the model's input, with no layer before it": lambda net, x: nn.relu(net.norm(x, "norm")),
    "relu stands between it and dense": lambda net, x: nn.relu(net.norm(nn.relu(net.dense(x)), "norm")),
    "dense is shared: it is called 2 times": shared,
    "the output of dense is also used elsewhere": lambda net, x: net.norm(y := net.dense(x), "norm") + y,
    "add stands between it and dense": lambda net, x: net.norm(net.dense(x) + x, "norm"),
    "its features are on axis 1": lambda net, x: net.norm(net.dense(x), "norm", axis=1),
    "it follows another batch norm, first": lambda net, x: net.norm(net.norm(x + 1, "first"), "norm"),
    "after it, another batch norm follows": lambda net, x: net.norm(net.norm(x + 1, "norm"), "second"),
    "after it, its output is used more than once": lambda net, x: net.dense(y := net.norm(nn.relu(x), "norm")) + y,
    "after it, relu follows": lambda net, x: net.dense(nn.relu(net.norm(nn.relu(x), "norm"))),
    "after it, its output is the model's": lambda net, x: net.norm(nn.relu(net.dense(x)), "norm"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_folded_is_refused_with_the_reason(reason):
    net, x = net_of(REASONS[reason]), inputs("dense")
    variables = variables_of(net, x)
    before = jax.tree.map(np.array, variables)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        surgery.fold(net, variables, x, layers="norm")
    assert "cannot fold norm: " in str(error.value) and "Nothing was changed" in str(error.value)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))


def test_what_cannot_be_folded_is_listed_beside_what_can():
    net = net_of(lambda net, x: net.norm(nn.relu(net.norm(net.dense(x), "first")), "second"))
    x = inputs("dense")
    variables = variables_of(net, x)
    done = surgery.fold(net, variables, x)
    assert done.layers == ("first",) and done.difference <= 1e-5 * done.scale
    assert done.kept == {"second": "before it, relu stands between it and first; after it, its output is the model's"}
    assert set(done.variables["batch_stats"]) == {"second"}


def test_a_layer_that_is_asked_for_and_cannot_be_folded_is_refused():
    net = net_of(lambda net, x: net.norm(nn.relu(net.norm(net.dense(x), "first")), "second"))
    x = inputs("dense")
    with pytest.raises(ValueError, match="cannot fold second: before it, relu stands between"):
        surgery.fold(net, net.init(jax.random.key(0), x), x, layers=["first", "second"])


def test_a_batch_norm_folds_into_each_of_the_layers_that_it_follows():
    def function(net, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        return norm(net.dense(x)) * norm(nn.Dense(FEATURES, name="other")(x))

    net, x = net_of(function), inputs("dense")
    done = surgery.fold(net, variables_of(net, x), x)
    assert done.layers == ("norm",) and done.difference <= 1e-5 * done.scale


def test_a_cast_between_a_layer_and_its_batch_norm_does_no_harm():
    net = net_of(lambda net, x: net.norm(net.dense(x).astype(jnp.float32), "norm"))
    x = inputs("dense").astype(jnp.bfloat16)
    done = surgery.fold(net, variables_of(net, x), x)
    assert done.layers == ("norm",) and done.difference <= 1e-2 * done.scale


@pytest.mark.parametrize("wrap", [nn.remat, nn.checkpoint], ids=["remat", "checkpoint"])
def test_a_block_that_is_recomputed_folds(wrap):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(LinenNet)("dense", True, False)(x)

    x = inputs("dense")
    done = surgery.fold(Net(), variables_of(Net(), x), x)
    assert done.layers == ("CheckpointLinenNet_0/BatchNorm_0",) and done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_kernel_that_is_not_used_as_it_is_stored_is_found_out(dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.WeightNorm(nn.Dense(4, dtype=dtype))
            return nn.BatchNorm(use_running_average=True, dtype=dtype)(layer(x))

    x = inputs("dense")
    with pytest.raises(ValueError, match=r"Dense_0 does not use its kernel as it is stored.* Nothing was changed"):
        surgery.fold(Net(), variables_of(Net(), x), x)


def test_a_kernel_that_is_used_elsewhere_too_is_found_out():
    class Net(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(FEATURES, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.dense(x)) @ self.dense.kernel[...].T

    with pytest.raises(ValueError, match="dense does not use its kernel as it is stored"):
        surgery.fold(Net(), None, inputs("dense"))


def test_padding_decides_and_not_the_size_of_the_sample():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.relu(x))
            return nn.Conv(5, (2, 2), strides=2)(x)  # "SAME" pads no even size

    x = jnp.ones((1, 8, 8, 3))
    with pytest.raises(ValueError, match="Conv_0 pads with zeros"):
        surgery.fold(Net(), variables_of(Net(), x), x)


def test_several_values_in_one_operation_are_not_handed_on():
    def function(net, x):
        first, _ = jax.lax.optimization_barrier((nn.Dense(FEATURES, name="other")(x), net.dense(x)))
        return net.norm(first, "norm")

    net, x = net_of(function), inputs("dense")
    with pytest.raises(ValueError, match="optimization_barrier stands between it and"):
        surgery.fold(net, variables_of(net, x), x)


def test_a_kernel_for_each_entry_of_an_axis_is_refused():
    net = net_of(lambda net, x: net.norm(nn.DenseGeneral(5, batch_dims=(0,), name="general")(x), "norm"))
    x = inputs("dense")
    with pytest.raises(ValueError, match="general has a kernel for each entry of an axis"):
        surgery.fold(net, variables_of(net, x), x)


def test_a_layer_under_vmap_is_refused():
    def function(net, x):
        lifted = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)
        return net.norm(lifted(4, name="dense_of_each")(x), "norm")

    net, x = net_of(function), inputs("dense")
    with pytest.raises(ValueError, match="dense_of_each runs in a loop or under vmap, with a kernel for each turn"):
        surgery.fold(net, variables_of(net, x), x)


def test_a_batch_norm_in_a_branch_is_refused():
    def function(net, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        return nn.cond(x.sum() > 0, lambda norm, x: norm(x), lambda norm, x: 2 * norm(x), norm, net.dense(x))

    net, x = net_of(function), inputs("dense")
    with pytest.raises(ValueError, match="a loop or a branch keeps its input"):
        surgery.fold(net, net.init(jax.random.key(0), x), x)


def test_inputs_may_be_given_by_name_in_any_order():
    net = net_of(lambda net, x: nn.BatchNorm(name="norm")(use_running_average=True, x=net.dense(inputs=x)))
    x = inputs("dense")
    done = surgery.fold(net, variables_of(net, x), x)
    assert done.layers == ("norm",) and done.difference <= 1e-5 * done.scale


def test_complex_layers_fold():
    net = net_of(
        lambda net, x: jaxbn.linen.BatchNorm(use_running_average=True)(nn.Dense(4, param_dtype=jnp.complex64)(x))
    )
    x = inputs("dense") * (1 + 2j)
    variables = variables_of(net, x)
    variables["params"]["Dense_0"] = jax.tree.map(lambda a: a * (1 - 0.5j), variables["params"]["Dense_0"])
    variables["batch_stats"]["BatchNorm_0"]["mean"] *= 1 + 1j
    done = surgery.fold(net, variables, x)
    assert len(done.layers) == 1 and done.difference <= 1e-5 * done.scale


def test_layers_with_one_kernel_between_them_are_refused():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first, self.second = (nnx.Linear(FEATURES, FEATURES, rngs=rngs) for _ in range(2))
            self.second.kernel = self.first.kernel
            self.norm = nnx.BatchNorm(FEATURES, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.second(self.first(x)))

    with pytest.raises(ValueError, match="second shares its arrays with first"):
        surgery.fold(Net(), None, inputs("dense"))


@pytest.mark.slow
def test_a_batch_norm_in_a_loop_is_refused():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(FEATURES)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                Block, {"params": 0, "batch_stats": 0}, length=2, split_rngs={"params": True}, in_axes=nn.broadcast
            )
            return scan()(x, None)[0]

    x = inputs("dense")
    with pytest.raises(ValueError, match="it runs in a loop or under vmap"):
        surgery.fold(Net(), Net().init(jax.random.key(0), x), x)


@pytest.mark.slow
def test_a_batch_norm_under_vmap_is_refused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            return nn.vmap(LinenNet, **lifted)("dense", True, False)(x)

    x = inputs("dense")
    with pytest.raises(ValueError, match="it runs in a loop or under vmap"):
        surgery.fold(Net(), Net().init(jax.random.key(0), x), x)
