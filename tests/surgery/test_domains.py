"""A trained model with domain norms: the same model in every domain, until the domains are trained."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import calibrate, diagnose, surgery

X = np.random.default_rng(0).normal(1, 2, (8, 3)).astype(np.float32)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Net(nn.Module):
    """Flax's norm and ours, which a train flag makes train; a model of two domains does not know them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(4)(x))
        return nn.Dense(2)(jaxbn.linen.BatchNorm(momentum=0.8, axis=-1)(x, not train))


class NnxNet(nnx.Module):
    """The same in nnx."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.ours = jaxbn.nnx.BatchNorm(4, momentum=0.8, rngs=rngs)

    def __call__(self, x):
        return self.last(self.ours(self.norm(self.first(x))))


def filled(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype), tree)


@pytest.fixture(scope="module")
def linen():
    net = Net()
    return net, filled(jax.eval_shape(net.init, jax.random.key(0), X))


@pytest.mark.slow
def test_each_domain_of_a_linen_model_starts_as_the_old_one_and_trains_alone(linen):
    net, variables = linen
    done = surgery.replace_by_domain_norm(net, variables, X, num_domains=2)
    assert done.layers == ("BatchNorm_0", "BatchNorm_1") and done.kept == {}
    assert done.difference <= 1e-5 * done.scale
    chex.assert_trees_all_equal(done.variables["params"], variables["params"])
    old_y, old = net.apply(variables, X, train=True, mutable=["batch_stats"])
    for d in (0, 1):
        with jaxbn.domain(d):
            np.testing.assert_allclose(done.model.apply(done.variables, X), net.apply(variables, X), **CLOSE)
            y, new = done.model.apply(done.variables, X, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(y, old_y, **CLOSE)
        moved, kept = (jax.tree.map(lambda rows, i=i: rows[i], new["batch_stats"]) for i in (d, 1 - d))
        chex.assert_trees_all_close(moved, old["batch_stats"], **CLOSE)
        chex.assert_trees_all_equal(kept, variables["batch_stats"])
    with pytest.raises(ValueError, match=r"with jaxbn\.domain\(index\)"):
        done.model.apply(done.variables, X)


@pytest.mark.slow
def test_each_domain_of_an_nnx_model_starts_as_the_old_one_and_trains_alone():
    model = NnxNet()
    nnx.update(model, filled(nnx.state(model)))
    done = surgery.replace_by_domain_norm(model, None, X, num_domains=3, separate_scale_and_bias=True)
    assert done.difference <= 1e-5 * done.scale and done.model.ours.scale.shape == (3, 4)
    before = done.model.ours.mean[...]
    expected, old = model(X), nnx.state(model, nnx.BatchStat)
    with jaxbn.domain(2):
        y, grads = done.model(X), nnx.grad(lambda m: m(X)[:, 0].sum())(nnx.clone(done.model))
    np.testing.assert_allclose(y, expected, **CLOSE)
    np.testing.assert_allclose(done.model.ours.mean[2], old["ours"]["mean"][...], **CLOSE)
    np.testing.assert_allclose(done.model.norm.var[2], old["norm"]["var"][...], **CLOSE)
    np.testing.assert_array_equal(done.model.ours.mean[:2], before[:2])
    bias = grads["ours"]["bias"][...]
    assert (bias[2] != 0).all() and (bias[:2] == 0).all()


@pytest.mark.slow
def test_layers_that_train_or_are_stacked_in_a_scan_become_domain_norms_too():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(3)(x)), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
            return nn.scan(Block, length=2, **axes)(name="block")(x, None)[0]

    net = Scanned()
    variables = filled(jax.eval_shape(net.init, jax.random.key(0), X))
    done = surgery.replace_by_domain_norm(net, variables, X, num_domains=3)
    assert done.difference <= 1e-5 * done.scale
    assert done.variables["batch_stats"]["block"]["BatchNorm_0"]["mean"].shape == (2, 3, 3)
    y, old = net.apply(variables, X, mutable=["batch_stats"])

    @functools.partial(jax.jit, static_argnums=0)
    def train(model, d):
        with jaxbn.domain(d):
            return model.apply(done.variables, X, mutable=["batch_stats"])

    for d in (0, 2):
        new_y, new = train(done.model, d)
        np.testing.assert_allclose(new_y, y, **CLOSE)
        chex.assert_trees_all_close(jax.tree.map(lambda s, d=d: s[:, d], new), old, **CLOSE)


def test_errors_name_the_argument(linen):
    net, variables = linen
    with pytest.raises(ValueError, match="num_domains must be at least 1, got 0"):
        surgery.replace_by_domain_norm(net, variables, X, num_domains=0)
    with pytest.raises(ValueError, match="the model has no batch norm at 'Dense_0'"):
        surgery.replace_by_domain_norm(net, variables, X, num_domains=2, layers="Dense_0")


class Mixed(nn.Module):
    """A domain norm beside a batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(x)
        return jaxbn.linen.DomainBatchNorm(num_domains=2, use_running_average=True)(x)


@pytest.mark.slow
def test_operations_on_other_norms_leave_domain_norms_and_say_why():
    model = Mixed()
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), X))
    with jaxbn.domain(1):
        done = surgery.to_affine(model, variables, X, check=False)
        assert done.layers == ("BatchNorm_0",)
        assert "DomainBatchNorm has statistics for each domain" in done.kept["DomainBatchNorm_0"]
        y = done.model.apply(done.variables, X)
        np.testing.assert_allclose(y, model.apply(variables, X), **CLOSE)


@pytest.mark.slow
def test_calibration_refuses_domain_norms_and_the_diagnosis_names_them():
    model = Mixed()
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), X))
    with jaxbn.domain(1):
        with pytest.raises(ValueError, match="DomainBatchNorm_0 cannot be measured: DomainBatchNorm is not known"):
            calibrate.one_pass(model, variables, [X])
        assert "layers not diagnosed: DomainBatchNorm_0" in str(diagnose.diagnose(model, variables, [X]))
