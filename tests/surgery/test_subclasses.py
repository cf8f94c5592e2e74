"""A subclass of a batch norm may do more than its parent: the parent's call is operated on, and the rest stays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import surgery
from tests.surgery.nets import OPERATIONS, X, assert_equal, randomized, refused, variables_of


def linen_class(parent):
    class WithActivation(parent):
        """Named for its train flag, its activation and its own parameter."""

        slope: float = 0.5

        @nn.compact
        def __call__(self, x, train=False):
            y = super().__call__(x, use_running_average=not train)
            return nn.leaky_relu(y, self.slope) * self.param("gain", nn.initializers.ones, (x.shape[-1],))

    return WithActivation


def nnx_class(parent):
    class WithActivation(parent):
        def __init__(self, features, *, rngs):
            super().__init__(features, rngs=rngs)
            self.slope, self.gain = 0.5, nnx.Param(jnp.ones(features))

        def __call__(self, x, train=False):
            y = super().__call__(x, use_running_average=not train)
            return nnx.leaky_relu(y, self.slope) * self.gain[...]

    return WithActivation


class LinenNet(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train=False):
        return self.norm(name="norm")(nn.Dense(4, name="dense")(x), train=train)


class NnxNet(nnx.Module):
    def __init__(self, norm):
        self.dense, self.norm = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), norm(4, rngs=nnx.Rngs(0))

    def __call__(self, x, train=False):
        return self.norm(self.dense(x), train=train)


PARENTS = {
    "linen, Flax": nn.BatchNorm,
    "linen, ours": jaxbn.linen.BatchNorm,
    "nnx, Flax": nnx.BatchNorm,
    "nnx, ours": jaxbn.nnx.BatchNorm,
}


def make(parent):
    """Returns a net with a layer of a subclass, and its variables."""
    if issubclass(PARENTS[parent], nn.Module):
        net = LinenNet(linen_class(PARENTS[parent]))
        return net, variables_of(net, X)
    net = NnxNet(nnx_class(PARENTS[parent]))
    nnx.update(net, randomized(nnx.state(net)))
    return net, None


def run(net, variables, train):
    """Returns the output, and all arrays after it."""
    if variables is not None:
        y, updates = net.apply(variables, X, train, mutable=["batch_stats"])
        return y, variables | updates
    net = nnx.clone(net)
    return net(X, train), nnx.to_pure_dict(nnx.state(net))


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("operation", ["replace", "freeze", "to_affine", "fold", "group norm"])
def test_a_subclass_is_operated_on_and_keeps_what_is_its_own(operation, parent):
    net, variables = make(parent)
    done = OPERATIONS[operation](net, variables, X)
    assert done.layers == ("norm",) and done.kept == {} and done.scale > 0.1
    assert operation == "group norm" or done.difference <= 1e-5 * done.scale
    expected, _ = run(net, variables, False)
    actual, _ = run(done.model, done.variables, False)
    assert float(abs(actual - expected).max()) == pytest.approx(done.difference, abs=1e-5 * done.scale)
    if operation == "replace":  # trains as before
        (expected, expected_arrays), (actual, arrays) = (run(*model, True) for model in ((net, variables), done[:2]))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())
        after, before = ({str(k): v for k, v in jax.tree.leaves_with_path(each)} for each in (arrays, expected_arrays))
        assert after.keys() == before.keys()
        for name in after:
            np.testing.assert_allclose(after[name], before[name], rtol=1e-5, atol=1e-6)
    elif operation != "group norm":  # evaluates for ever
        trained, arrays = run(done.model, done.variables, True)
        np.testing.assert_array_equal(trained, actual)
        assert_equal(arrays, run(done.model, done.variables, False)[1])


@pytest.mark.parametrize("parent", PARENTS)
def test_operations_on_a_subclass_follow_one_another(parent):
    net, variables = make(parent)
    done = surgery.freeze(net, variables, X, check=False)
    done = surgery.replace(done.model, done.variables, X, frozen=False, check=False)
    done = surgery.fold(done.model, done.variables, X)
    assert done.layers == ("norm",)
    expected, actual = (run(*model, False)[0] for model in ((net, variables), done[:2]))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())
    refused("no batch norm was called|a model without batch norm needs no change", surgery.freeze, *done[:2])


def test_the_graphs_of_two_models_with_new_layers_are_equal():
    net, _ = make("nnx, Flax")
    for operation in ("freeze", "to_affine"):
        first, second = (nnx.graphdef(OPERATIONS[operation](net, None, X, check=False).model) for _ in range(2))
        assert first == second and hash(first) == hash(second)


def test_a_linear_layer_of_a_subclass_takes_in_a_batch_norm():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="before")(nn.relu(x))
            return nn.BatchNorm(use_running_average=True, name="after")(Doubled(4, use_bias=False)(x))

    done = surgery.fold(Net(), variables_of(Net(), X), X)
    assert done.layers == ("before",) and done.difference <= 1e-5 * done.scale
    assert done.kept == {"after": "before it, mul stands between it and Doubled_0; after it, its output is the model's"}
