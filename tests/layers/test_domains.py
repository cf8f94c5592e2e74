"""Domain norms as layers: linen and nnx give what the function gives, however a model is transformed."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx

RNG = np.random.default_rng(0)
X = RNG.normal(1, 2, (8, 2, 3)).astype(np.float32)
DOMAINS = np.array([0, 1, 1, 0, 0, 0, 0, 1])
MASK = RNG.random((8, 2, 1)) < 0.7
KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
linen_layer = functools.partial(jaxbn.linen.DomainBatchNorm, num_domains=2, momentum=0.9)
OPTIONS = [{}, {"separate_scale_and_bias": True, "debias": True, "accumulate": 2}]


def filled(tree):
    """Arrays of these shapes that are not the initial ones; counts stay as they are."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        tree,
    )


def linen(options, domain, x=X, **call):
    """Output, and variables by name, after a training call of the linen layer."""
    layer = linen_layer(use_running_average=False, **options)
    variables = filled(layer.init(KEY, x))
    y, updates = jax.jit(functools.partial(layer.apply, mutable=["batch_stats"]))(variables, x, domain=domain, **call)
    return y, variables["params"] | updates["batch_stats"]


def nnx_(options, domain, x=X, **call):
    layer = jaxbn.nnx.DomainBatchNorm(x.shape[-1], 2, momentum=0.9, rngs=nnx.Rngs(0), **options)
    variables = filled(linen_layer(use_running_average=False, **options).init(KEY, x))
    for name, value in (variables["params"] | variables["batch_stats"]).items():
        assert getattr(layer, name).shape == value.shape
        getattr(layer, name).set_value(value)
    y = nnx.jit(lambda layer, x, domain: layer(x, domain=domain, **call))(layer, x, domain)
    return y, nnx.to_pure_dict(nnx.state(layer))


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_both_layers_give_the_bits_of_the_function(options):
    y, arrays = linen(options, DOMAINS, mask=MASK)
    nnx_y, nnx_arrays = nnx_(options, DOMAINS, mask=MASK)
    chex.assert_trees_all_equal((y, arrays), (nnx_y, nnx_arrays))
    before = filled(linen_layer(use_running_average=False, **options).init(KEY, X))
    counted, accumulate = options.get("debias", False), options.get("accumulate", 1)
    stats = jaxbn._core.variables.from_variables(before["batch_stats"], accumulate=accumulate)
    assert counted == ("steps" in arrays)
    step = jax.jit(functools.partial(jaxbn.domain_batch_norm, use_running_average=False, momentum=0.9))
    expected, stats = step(X, stats, DOMAINS, before["params"]["scale"], before["params"]["bias"], mask=MASK)
    np.testing.assert_array_equal(y, expected)
    after = jaxbn._core.variables.to_variables(stats)
    chex.assert_trees_all_equal({name: arrays[name] for name in after}, after)


class Block(nn.Module):
    """Dense and a domain norm; as a model calls a batch norm, without a domain."""

    train: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(linen_layer(use_running_average=not self.train)(nn.Dense(3)(x)))


class Net(nn.Module):
    """Blocks under a lifted transformation."""

    lift: str

    @nn.compact
    def __call__(self, x):
        if self.lift == "scan":
            scanned = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return scanned(Block(name="block"), x, None)[0]
        return getattr(nn, self.lift)(Block)(name="block")(x)


@pytest.mark.slow
@pytest.mark.parametrize("lift", ["remat", "jit", "scan"])
def test_the_context_reaches_lifted_linen_layers_whose_traces_are_cached(lift):
    net = Net(lift)
    variables = net.init(KEY, X)

    @jax.jit
    def step(variables, d):
        def loss(params):
            with jaxbn.domain(d):
                y, updates = net.apply(variables | {"params": params}, X, mutable=["batch_stats"])
            return (y**2).sum(), updates["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    def static(d):
        with jaxbn.domain(d):
            return net.apply(variables, X, mutable=["batch_stats"])[1]["batch_stats"]

    for d in (0, 1, 0):
        (_, stats), grads = step(variables, d)
        mean = stats["block"]["DomainBatchNorm_0"]["mean"]
        assert (mean[..., d, :] != 0).all() and (mean[..., 1 - d, :] == 0).all()
        chex.assert_trees_all_close(stats, static(d), **CLOSE)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


class NnxNet(nnx.Module):
    """Linear and a domain norm."""

    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.norm = jaxbn.nnx.DomainBatchNorm(3, 2, momentum=0.9, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


@pytest.mark.slow
def test_the_context_reaches_nnx_layers_under_jit_remat_and_grad():
    model = NnxNet()

    @nnx.jit
    def step(model, d):
        def loss(model):
            with jaxbn.domain(d):
                return (nnx.remat(lambda model: model(X))(model) ** 2).sum()

        return nnx.grad(loss)(model)

    step(model, 1)
    np.testing.assert_allclose(model.norm.mean[1], 0.1 * np.asarray(model.linear(X)).mean((0, 1)), **CLOSE)
    np.testing.assert_array_equal(model.norm.mean[0], 0)
    step(model, 0)
    np.testing.assert_allclose(model.norm.mean[0], model.norm.mean[1], **CLOSE)
    evaluating = nnx.view(model, use_running_average=True)
    with jaxbn.domain(0):
        np.testing.assert_array_equal(evaluating(X), evaluating.norm(model.linear(X), domain=0))


@pytest.mark.slow
def test_training_without_updates_normalizes_with_the_batch_and_moves_nothing():
    layer = linen_layer(use_running_average=False)
    variables = filled(layer.init(KEY, X))
    expected, _ = layer.apply(variables, X, domain=1, mutable=["batch_stats"])
    np.testing.assert_array_equal(layer.apply(variables, X, domain=1, update_stats=False), expected)
    np.testing.assert_array_equal(layer.clone(update_stats=False).apply(variables, X, domain=1), expected)
    norm = NnxNet().norm
    expected = NnxNet().norm(X, domain=DOMAINS)
    still = nnx.view(norm, update_stats=False)
    for y in (norm(X, domain=DOMAINS, update_stats=False), still(X, domain=DOMAINS)):
        np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(norm.mean[...], 0)


@pytest.mark.slow
def test_a_partitioned_scale_of_each_domain_is_spread_over_its_features():
    scale_init = nn.with_partitioning(nn.initializers.ones, ("model",))
    layer = linen_layer(use_running_average=True, separate_scale_and_bias=True, scale_init=scale_init)
    specs = nn.get_partition_spec(jax.eval_shape(layer.init, KEY, X))
    assert specs["params"]["scale"] == P(None, "model")
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        metadata = {"scale_metadata": {"out_sharding": (None, "model")}}
        norm = jaxbn.nnx.DomainBatchNorm(3, 2, separate_scale_and_bias=True, rngs=nnx.Rngs(0), **metadata)
        assert norm.scale.sharding.spec == P(None, "model")


def test_models_that_ask_for_batch_norm_find_it():
    assert issubclass(jaxbn.linen.DomainBatchNorm, nn.BatchNorm)
    assert isinstance(NnxNet().norm, nnx.BatchNorm)


@pytest.mark.slow
def test_layers_round_trip_through_checkpoints_and_pickle():
    layer = linen_layer(use_running_average=True)
    variables = filled(layer.init(KEY, X))
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, variables), serialization.to_bytes(variables))
    chex.assert_trees_all_equal(restored, variables)
    again = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(again.apply(restored, X, domain=1), layer.apply(variables, X, domain=1))
    model = NnxNet().norm
    nnx.update(model, filled(nnx.state(model)))
    other = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(other(X, True, domain=1), model(X, True, domain=1))


def test_errors_of_the_layers():
    layer = linen_layer(use_running_average=False)
    variables = layer.init(KEY, X)
    with pytest.raises(ValueError, match=r"domain must be passed to the call of the layer, or chosen around"):
        layer.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"domain must be passed to the call of the layer, or chosen around"):
        NnxNet().norm(X)
    with pytest.raises(ValueError, match=r"num_domains must be at least 1, got 0"):
        linen_layer(use_running_average=False, num_domains=0).init(KEY, X)
    with pytest.raises(ValueError, match=r"num_domains must be at least 1, got 0"):
        jaxbn.nnx.DomainBatchNorm(3, 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"num_features must be 3 .* got 4"):
        jaxbn.nnx.DomainBatchNorm(4, 2, rngs=nnx.Rngs(0))(X, domain=0)
    with pytest.raises(ValueError, match=r"must include 'steps'"):
        linen_layer(use_running_average=False, debias=True).apply(variables, X, domain=0, mutable=["batch_stats"])
    # Evaluation needs no counts.
    evaluated = linen_layer(use_running_average=True, debias=True).apply(variables, X, domain=0)
    np.testing.assert_array_equal(evaluated, linen_layer(use_running_average=True).apply(variables, X, domain=0))
