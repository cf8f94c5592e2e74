"""No batch norm goes unmentioned: those that are not operated on are in ``kept``, with the reason."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxbn import surgery
from tests.surgery.nets import OPERATIONS, linen_net, nnx_net, variables_of
from tests.surgery.nets import X as IMAGES

X = IMAGES[:, 0, 0]


class Copied(nn.Module):
    """A batch norm of its own, as packages have them: no subclass of Flax's."""

    @nn.compact
    def __call__(self, x):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1]).value
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1]).value
        return (x - mean) / jnp.sqrt(var + 1e-5)


class NnxCopied(nnx.Module):
    def __init__(self, features):
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))

    def __call__(self, x):
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-5)


class Net(nn.Module):
    """One batch norm of Flax's, one of its own, and one that evaluation does not call."""

    @nn.compact
    def __call__(self, x, auxiliary=False):
        x = nn.BatchNorm(use_running_average=True, name="known")(nn.Dense(4)(x))
        if auxiliary:
            x = nn.BatchNorm(use_running_average=True, name="auxiliary")(x)
        return Copied(name="copied")(x)


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense, self.known, self.copied = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), NnxCopied(4)
        self.auxiliary = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.copied(self.known(self.dense(x)))


@pytest.mark.parametrize("operation", ["freeze", "to_affine", "fold", "group norm"])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_whatever_has_statistics_is_changed_or_kept_with_the_reason(framework, operation):
    if framework == "linen":
        net, variables = Net(), variables_of(Net(), X)
        extra = {"auxiliary": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
        variables = variables | {"batch_stats": variables["batch_stats"] | extra}
    else:
        net, variables = NnxNet(), None
    done = OPERATIONS[operation](net, variables, X, check=False)
    assert done.layers == ("known",)
    name = "Copied" if framework == "linen" else "NnxCopied"
    assert done.kept == {
        "auxiliary": "it was not called on the sample",
        "copied": f"{name} is no batch norm that is known here",
    }


@pytest.mark.parametrize("make", [linen_net, nnx_net])
def test_layers_that_were_not_named_are_kept(make):
    done = surgery.freeze(*make(), IMAGES, layers=["rest", "second"][:1] if make is nnx_net else "second", check=False)
    (other,) = done.kept
    assert done.kept[other] == "it is not among the layers that were named" and "first" in other


def test_fixed_affine_layers_are_no_batch_norms_that_are_left():
    done = surgery.to_affine(*linen_net(), IMAGES, layers="first", learnable=False, check=False)
    done = surgery.freeze(done.model, done.variables, IMAGES, check=False)
    assert done.layers == ("second",) and done.kept == {}


def test_the_refusal_of_a_model_names_what_has_statistics():
    variables = variables_of(Copied(), X)
    with pytest.raises(ValueError, match="no batch norm was called.* The model has batch_stats: Copied is no"):
        surgery.freeze(Copied(), variables, X)
