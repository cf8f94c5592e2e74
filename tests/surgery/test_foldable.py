"""Which linear layer is found for a batch norm, however the model is written, and why there is none."""

import re
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbn import surgery
from tests.surgery.nets import ZEROS, variables_of

FEATURES = 6
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, FEATURES)), jnp.float32)


class Block(nn.Module):
    """A dense layer and its batch norm."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(FEATURES, kernel_init=ZEROS)(x))


def net_of(function):
    """Returns a linen net whose call is a function of the layers that it may use, and of x."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            def norm(x, name, **options):
                return nn.BatchNorm(use_running_average=True, name=name, **options)(x)

            return function(SimpleNamespace(dense=nn.Dense(FEATURES, kernel_init=ZEROS, name="dense"), norm=norm), x)

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
    net = net_of(REASONS[reason])
    variables = variables_of(net, X)
    before = jax.tree.map(np.array, variables)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        surgery.fold(net, variables, X, layers="norm")
    assert "cannot fold norm: " in str(error.value) and "Nothing was changed" in str(error.value)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, variables))


def test_kept_lists_what_cannot_be_folded():
    net = net_of(lambda net, x: net.norm(nn.relu(net.norm(net.dense(x), "first")), "second"))
    variables = variables_of(net, X)
    done = surgery.fold(net, variables, X)
    assert done.layers == ("first",) and done.difference <= 1e-5 * done.scale
    assert done.kept == {"second": "before it, relu stands between it and first; after it, its output is the model's"}
    assert set(done.variables["batch_stats"]) == {"second"}


def test_a_layer_that_is_asked_for_and_cannot_be_folded_is_refused():
    net = net_of(lambda net, x: net.norm(nn.relu(net.norm(net.dense(x), "first")), "second"))
    with pytest.raises(ValueError, match="cannot fold second: before it, relu stands between"):
        surgery.fold(net, variables_of(net, X), X, layers=["first", "second"])


def test_a_batch_norm_folds_into_each_of_the_layers_that_it_follows():
    def function(net, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        return norm(net.dense(x)) * norm(nn.Dense(FEATURES, name="other")(x))

    net = net_of(function)
    done = surgery.fold(net, variables_of(net, X), X)
    assert done.layers == ("norm",) and done.difference <= 1e-5 * done.scale


def test_a_cast_may_stand_between_a_layer_and_its_batch_norm():
    net = net_of(lambda net, x: net.norm(net.dense(x).astype(jnp.float32), "norm"))
    x = X.astype(jnp.bfloat16)
    done = surgery.fold(net, variables_of(net, x), x)
    assert done.layers == ("norm",) and done.difference <= 1e-2 * done.scale


@pytest.mark.parametrize("wrap", [nn.remat, nn.checkpoint], ids=["remat", "checkpoint"])
def test_a_block_that_is_recomputed_folds(wrap):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return wrap(Block)()(x)

    done = surgery.fold(Net(), variables_of(Net(), X), X)
    assert done.layers == ("CheckpointBlock_0/BatchNorm_0",) and done.difference <= 1e-5 * done.scale


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_kernel_that_is_not_used_as_it_is_stored_is_refused(dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.WeightNorm(nn.Dense(4, dtype=dtype))
            return nn.BatchNorm(use_running_average=True, dtype=dtype)(layer(x))

    with pytest.raises(ValueError, match=r"Dense_0 does not use its kernel as it is stored.* Nothing was changed"):
        surgery.fold(Net(), variables_of(Net(), X), X)


def test_a_kernel_that_is_also_used_elsewhere_is_refused():
    class Net(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(FEATURES, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.dense(x)) @ self.dense.kernel[...].T

    with pytest.raises(ValueError, match="dense does not use its kernel as it is stored"):
        surgery.fold(Net(), None, X)


def test_an_operation_with_several_inputs_stands_in_between():
    def function(net, x):
        first, _ = jax.lax.optimization_barrier((nn.Dense(FEATURES, name="other")(x), net.dense(x)))
        return net.norm(first, "norm")

    net = net_of(function)
    with pytest.raises(ValueError, match="optimization_barrier stands between it and"):
        surgery.fold(net, variables_of(net, X), X)


def test_a_kernel_for_each_entry_of_an_axis_is_refused():
    net = net_of(lambda net, x: net.norm(nn.DenseGeneral(5, batch_dims=(0,), name="general")(x), "norm"))
    with pytest.raises(ValueError, match="general has a kernel for each entry of an axis"):
        surgery.fold(net, variables_of(net, X), X)


def test_a_layer_under_vmap_is_refused():
    def function(net, x):
        lifted = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)
        return net.norm(lifted(4, name="dense_of_each")(x), "norm")

    net = net_of(function)
    with pytest.raises(ValueError, match="dense_of_each runs in a loop or under vmap, with a kernel for each turn"):
        surgery.fold(net, variables_of(net, X), X)


def test_a_batch_norm_in_a_branch_is_refused():
    def function(net, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        return nn.cond(x.sum() > 0, lambda norm, x: norm(x), lambda norm, x: 2 * norm(x), norm, net.dense(x))

    net = net_of(function)
    with pytest.raises(ValueError, match="a loop or a branch keeps its input"):
        surgery.fold(net, variables_of(net, X), X)


def test_inputs_may_be_keyword_arguments_in_any_order():
    net = net_of(lambda net, x: nn.BatchNorm(name="norm")(use_running_average=True, x=net.dense(inputs=x)))
    done = surgery.fold(net, variables_of(net, X), X)
    assert done.layers == ("norm",) and done.difference <= 1e-5 * done.scale


def test_layers_that_share_a_kernel_are_refused():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first, self.second = (nnx.Linear(FEATURES, FEATURES, rngs=rngs) for _ in range(2))
            self.second.kernel = self.first.kernel
            self.norm = nnx.BatchNorm(FEATURES, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.second(self.first(x)))

    with pytest.raises(ValueError, match="second shares its arrays with first"):
        surgery.fold(Net(), None, X)


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

    with pytest.raises(ValueError, match="it runs in a loop or under vmap"):
        surgery.fold(Net(), variables_of(Net(), X), X)


@pytest.mark.slow
def test_a_batch_norm_under_vmap_is_refused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            lifted = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            return nn.vmap(Block, in_axes=0, **lifted)()(x)

    with pytest.raises(ValueError, match="it runs in a loop or under vmap"):
        surgery.fold(Net(), variables_of(Net(), X), X)
