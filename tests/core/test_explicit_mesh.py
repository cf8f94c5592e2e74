"""Models mapped by vmap on a mesh with explicit axes, where the types of arrays hold their shardings.

The values are those of vmap on one device, and of the oracle.
"""

import functools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
from tests import reference

MODELS, EXAMPLES, FEATURES = 4, 8, 6
RNG = np.random.default_rng(0)
# In half of the models the mean is large enough for the sums to cancel.
X = RNG.normal(np.array([0, 3, 3, 0])[:, None, None], 1, (MODELS, EXAMPLES, FEATURES)).astype(np.float32)
MASK = RNG.random(X.shape) < 0.7
STATS = jaxbn.init_stats(FEATURES)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("e", "d"), axis_types=(AxisType.Explicit,) * 2)


def layer(x, mask=None):
    norm = jaxbn.linen.BatchNorm(use_running_average=False)
    y, updates = norm.apply(norm.init(jax.random.key(0), x), x, mask=mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]["mean"], updates["batch_stats"]["var"]


def accumulate(x, mask=None):
    stats = jaxbn.init_stats(FEATURES, counted=True, accumulate=2)
    y, stats = jaxbn.batch_norm(x, stats, use_running_average=False, momentum=None, mask=mask)
    return y, stats.pending.mean, stats.running.var


METHODS = {
    "batch": jaxbn.batch_normalize,
    "ghost": functools.partial(jaxbn.ghost_normalize, group_size=4),
    "renorm": functools.partial(jaxbn.batch_renormalize, stats=STATS),
    "shifted": functools.partial(jaxbn.shifted_normalize, stats=STATS._replace(mean=STATS.mean + 1.5)),
}
SPECS = [P("e", "d"), P(None, "d"), P(None, "e", "d")]


def differentiate(function):
    """Returns all results of a function, and the gradient of the sum of their cubes."""

    def cubes(x, *rest):
        results = jax.tree.leaves(function(x, *rest))
        return sum((result**3).sum() for result in results), results

    return jax.grad(cubes, has_aux=True)


def place(mesh, array, spec):
    return jax.device_put(array, NamedSharding(mesh, spec))


def run(mesh, function, *placed):
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, jax.jit(function)(*placed))


def require_same(mesh, function, *placed):
    """Compares the function of arrays that are placed on the mesh with that of the same on one device."""
    expected = jax.jit(function)(*map(np.asarray, placed))
    chex.assert_trees_all_close(run(mesh, function, *placed), jax.tree.map(np.asarray, expected), **CLOSE)


@pytest.mark.parametrize("spec", SPECS[:2], ids=str)
def test_moments_of_mapped_batches_are_those_of_the_oracle(mesh, spec):
    found = run(mesh, jax.vmap(jaxbn.moments), place(mesh, X, spec))
    for model, x in enumerate(X):
        mean, var, _ = reference.moments(x)
        np.testing.assert_allclose(found.mean[model], mean, **CLOSE)
        np.testing.assert_allclose(found.var[model], var, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_mapped_method_and_its_gradient_do_not_depend_on_the_sharding(mesh, method, spec):
    require_same(mesh, jax.vmap(differentiate(METHODS[method])), place(mesh, X, spec))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "spec"), [(layer, P("e", "d")), (layer, P("e", None, "d")), (accumulate, P(None, "e", "d"))]
)
def test_mapped_statistics_do_not_depend_on_the_sharding_of_batch_and_mask(mesh, function, spec):
    require_same(mesh, jax.vmap(differentiate(function)), place(mesh, X, spec), place(mesh, MASK, spec))
    require_same(mesh, jax.vmap(function, (None, 0)), place(mesh, X[0], P()), place(mesh, MASK, spec))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batch", "renorm"])
def test_models_that_share_a_sharded_batch(mesh, method):
    def norm_of_product(w, x):
        return METHODS[method](x @ w)[0]

    w = RNG.normal(size=(MODELS, FEATURES, FEATURES)).astype(np.float32)
    x = place(mesh, X[0], P("d"))
    require_same(mesh, jax.vmap(differentiate(norm_of_product), (0, None)), place(mesh, w, P("e")), x)
    require_same(mesh, jax.vmap(differentiate(norm_of_product), (0, None)), place(mesh, w, P()), x)


def test_the_mapped_axis_may_be_named_for_the_mesh(mesh):
    mapped = jax.vmap(lambda x: jaxbn.batch_normalize(x)[0], spmd_axis_name="e")
    y = run(mesh, mapped, place(mesh, X, P("e", "d")))
    np.testing.assert_allclose(y, np.stack([reference.batch_norm(x)[0] for x in X]), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["batch", "ghost"])
@pytest.mark.parametrize("spec", [P("e"), P("e", "d")], ids=str)
def test_models_whose_batches_are_spread_over_a_second_mapped_axis(mesh, method, spec):
    parts = X.reshape(MODELS, 2, 4, FEATURES)
    normalize = jax.vmap(functools.partial(METHODS[method], axis_name="b"), axis_name="b")
    require_same(mesh, jax.vmap(normalize), place(mesh, parts, spec))


@pytest.mark.slow
def test_models_whose_features_and_examples_are_spread_under_shard_map(mesh):
    def normalize(x):
        return jaxbn.batch_normalize(x, axis_name="d")[0]

    mapped = jax.shard_map(normalize, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})
    x = X[..., :4]
    y = run(mesh, jax.vmap(mapped), place(mesh, x, P(None, "d", "e")))
    np.testing.assert_allclose(y, np.stack([reference.batch_norm(x)[0] for x in x]), **CLOSE)
