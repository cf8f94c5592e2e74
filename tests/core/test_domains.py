"""A domain norm is one batch norm for each domain, with the examples of that domain alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn

RNG = np.random.default_rng(0)
D, C, N = 3, 4, 16
X = RNG.normal(1, 2, (N, 2, C)).astype(np.float32)
DOMAINS = np.array([0, 2, 0, 0, 2, 2, 0, 0, 2, 0, 0, 2, 0, 0, 0, 0])  # unequal counts, and no example of domain 1
STATS = jaxbn.BatchStats(RNG.normal(size=(D, C)).astype(np.float32), RNG.uniform(1, 2, (D, C)).astype(np.float32))
SCALE, BIAS = RNG.uniform(1, 2, (D, C)).astype(np.float32), RNG.normal(size=(D, C)).astype(np.float32)
MASK = RNG.random((N, 2, 1)) < 0.7
train = functools.partial(jaxbn.domain_batch_norm, use_running_average=False, momentum=0.9)
evaluate = functools.partial(jaxbn.domain_batch_norm, use_running_average=True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def row(tree, d):
    return jax.tree.map(lambda array: array[d], tree)


def alone(d, x, mask=None, stats=STATS, **options):
    """The batch norm of a domain, with its own parameters, on its own examples."""
    options = {"use_running_average": False, "momentum": 0.9} | options
    return jaxbn.batch_norm(x, row(stats, d), SCALE[d], BIAS[d], mask=mask, **options)


def test_each_domain_is_normalized_with_the_moments_of_its_own_examples_in_float64():
    y, stats = jax.jit(train)(X, STATS, DOMAINS, SCALE, BIAS, mask=MASK)
    for d in (0, 2):
        own = DOMAINS == d
        x, valid = X[own].astype(np.float64), np.broadcast_to(MASK[own], X[own].shape)
        mean = np.array([x[..., c][valid[..., c]].mean() for c in range(C)])
        var = np.array([x[..., c][valid[..., c]].var() for c in range(C)])
        np.testing.assert_allclose(y[own], SCALE[d] * (x - mean) / np.sqrt(var + 1e-5) + BIAS[d], **CLOSE)
        np.testing.assert_allclose(stats.mean[d], 0.9 * STATS.mean[d] + 0.1 * mean, **CLOSE)
        np.testing.assert_allclose(stats.var[d], 0.9 * STATS.var[d] + 0.1 * var, **CLOSE)
    chex.assert_trees_all_equal(row(stats, 1), row(STATS, 1))  # a domain without examples


def test_one_index_static_or_traced_gives_one_batch_norm_and_moves_one_row():
    expected, new = alone(1, X, MASK)
    for step, domain in ((train, 1), (jax.jit(train), 1)):
        y, stats = step(X, STATS, domain, SCALE, BIAS, mask=MASK)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(row(stats, 1), new, rtol=1e-6)
        chex.assert_trees_all_equal(row(stats, np.array([0, 2])), row(STATS, np.array([0, 2])))


@pytest.mark.slow
def test_evaluation_reads_the_statistics_of_each_example_and_changes_none():
    y, stats = evaluate(X, STATS, DOMAINS, SCALE, BIAS)
    chex.assert_trees_all_equal(stats, STATS)
    exact = SCALE[DOMAINS, None] * (X - STATS.mean[DOMAINS, None].astype(np.float64))
    exact = exact / np.sqrt(STATS.var[DOMAINS, None].astype(np.float64) + 1e-5) + BIAS[DOMAINS, None]
    np.testing.assert_allclose(y, exact, **CLOSE)
    np.testing.assert_allclose(evaluate(X, STATS, 2, SCALE, BIAS)[0][DOMAINS == 2], exact[DOMAINS == 2], **CLOSE)
    first = np.moveaxis(X, -1, 1)  # features on another axis
    y = evaluate(first, STATS, DOMAINS, SCALE, BIAS, axis=1, mask=MASK[:, None, :, 0])[0]
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), exact, **CLOSE)


@pytest.mark.slow
def test_gradients_are_those_of_one_batch_norm_for_each_domain():
    weights = RNG.normal(size=X.shape).astype(np.float32)

    def joint(x, scale, bias):
        return (weights * jnp.sin(train(x, STATS, DOMAINS, scale, bias)[0])).sum()

    def separate(x, scale, bias):
        total = 0.0
        for d in (0, 2):
            own = DOMAINS == d
            total += (weights[own] * jnp.sin(jaxbn.batch_normalize(x[own], scale[d], bias[d])[0])).sum()
        return total

    got, expected = (jax.grad(f, argnums=(0, 1, 2))(X, SCALE, BIAS) for f in (joint, separate))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)
    traced = jax.jit(jax.grad(lambda x, d: (weights * jnp.sin(train(x, STATS, d)[0])).sum()))(X, 1)
    plain = jax.grad(lambda x: (weights * jnp.sin(jaxbn.batch_normalize(x)[0])).sum())(X)
    np.testing.assert_allclose(traced, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("index", [-1, D])
def test_an_index_that_no_domain_has_gives_nan_and_moves_no_statistics(index):
    y, stats = jax.jit(train)(X, STATS, index)
    assert np.isnan(y).all()
    chex.assert_trees_all_equal(stats, STATS)
    some = DOMAINS.copy()
    some[0] = index
    y, stats = jax.jit(train)(X, STATS, some)
    right, new = train(X[1:], STATS, DOMAINS[1:])
    assert np.isnan(y[0]).all()
    np.testing.assert_allclose(y[1:], right, **CLOSE)
    chex.assert_trees_all_close(stats, new, **CLOSE)
    y, _ = jax.jit(evaluate)(X, STATS, some)
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


@pytest.mark.slow
def test_counted_and_accumulated_statistics_count_for_each_domain():
    stats = jaxbn.init_stats(C, counted=True, accumulate=2)
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * D), stats)
    step = functools.partial(jaxbn.domain_batch_norm, use_running_average=False, momentum=None)
    for x, d in ((X[:8], 0), (X[8:], 2), (X[8:], 0)):
        _, stats = step(x, stats, d)
    np.testing.assert_array_equal(stats.batches, [0, 0, 1])
    np.testing.assert_array_equal(stats.running.steps[:, 0], [1, 0, 0])
    np.testing.assert_allclose(stats.mean[0], X.astype(np.float64).mean((0, 1)), **CLOSE)
    np.testing.assert_allclose(stats.var[0], X.astype(np.float64).var((0, 1)), **CLOSE)
    np.testing.assert_array_equal(stats.var[1:], 1)


@pytest.mark.slow
def test_a_scan_over_the_steps_of_an_inner_loop_has_statistics_for_each_step():
    def step(stats, d):
        y, stats = train(X + d, stats, d, SCALE, BIAS)
        return stats, y

    stats, ys = jax.jit(lambda: jax.lax.scan(step, STATS, jnp.arange(D)))()
    for d in range(D):
        y, own = alone(d, X + d)
        np.testing.assert_allclose(ys[d], y, **CLOSE)
        chex.assert_trees_all_close(row(stats, d), own, **CLOSE)


@pytest.mark.slow
def test_vmap_over_models_with_domains_of_their_own():
    domains = jnp.array([2, 0])
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), STATS)
    _, new = jax.vmap(lambda s, d: train(X, s, d))(stats, domains)
    for model, d in enumerate((2, 0)):
        expected = train(X, row(stats, model), d)[1]
        chex.assert_trees_all_close(row(new, model), expected, **CLOSE)


def over_devices(function, in_specs, out_specs, **options):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options))


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_with_unequal_numbers_of_examples_of_a_domain_are_one_batch(check_vma):
    synced = functools.partial(train, axis_name="d")
    mapped = over_devices(lambda x, d: synced(x, STATS, d, SCALE, BIAS), P("d"), (P("d"), P()), check_vma=check_vma)
    chex.assert_trees_all_close(mapped(X, DOMAINS), train(X, STATS, DOMAINS, SCALE, BIAS), **CLOSE)
    traced = over_devices(
        lambda x, d: synced(x, STATS, d, SCALE, BIAS), (P("d"), P()), (P("d"), P()), check_vma=check_vma
    )
    chex.assert_trees_all_close(traced(X, 1), train(X, STATS, 1, SCALE, BIAS), **CLOSE)


@pytest.mark.slow
def test_one_index_that_differs_between_devices_is_refused_or_gives_nan():
    def part(x, d):
        return train(x, STATS, d[0], axis_name="d")

    indices = np.arange(8) % 2
    with pytest.raises(ValueError, match=r"domain must be the same on all devices of axis_name='d'.*jnp.full"):
        over_devices(part, P("d"), P("d"))(X, indices)
    y, stats = over_devices(part, P("d"), (P("d"), P()), check_vma=False)(X, indices)
    assert np.isnan(y).all()
    chex.assert_trees_all_equal(stats, STATS)
    y, _ = jax.vmap(part, axis_name="d")(X.reshape(8, 2, 2, C), indices[:, None])
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"domain": D}, r"domain must be from 0 to 2, because the statistics have 3 rows, got 3\."),
        ({"domain": -1}, r"domain must be from 0 to 2"),
        ({"domain": np.full(N, D)}, r"domain must be from 0 to 2"),
        ({"domain": jnp.full(N, D)}, r"domain must be from 0 to 2"),
        ({"domain": 1.0}, r"domain must hold integers, got dtype float.*convert a boolean with \.astype\(int\)"),
        ({"domain": np.arange(N) < 8}, r"domain must hold integers, got dtype bool"),
        ({"domain": np.zeros(N - 1, int)}, r"one for each example .* of shape \(16, 2, 4\), got shape \(15,\)"),
        ({"domain": np.zeros((N, 1), int)}, r"one for each example .* got shape \(16, 1\)"),
        ({"x": X[:C, 0].T, "axis": 0, "domain": np.zeros(C, int)}, r"with features on axis \(0,\)"),
        ({"stats": row(STATS, 0)}, r"stats must have shape \(domains, 4\), got \(4,\)"),
        ({"scale": SCALE[:2]}, r"scale must have shape \(4,\), .* or \(3, 4\), one row .* got \(2, 4\)"),
        ({"mask": np.ones(3, bool)}, r"mask of shape \(3,\) does not broadcast"),
    ],
)
def test_errors_say_what_was_given_and_what_is_accepted(changed, message):
    arguments = {"x": X, "stats": STATS, "domain": 0} | changed
    for function in (train, evaluate):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_the_context_chooses_for_compiled_functions_too():
    @jax.jit
    def chosen(x):
        return x + jaxbn._core.domains.chosen_domain(None)

    for d in (1, 2, 1):
        with jaxbn.domain(d):
            assert chosen(0) == d
            with jaxbn.domain(jnp.array(d + 1)):
                assert chosen(0) == d + 1
    programs = chosen._cache_size()

    @jax.jit
    def traced(x, d):
        with jaxbn.domain(d):
            first = chosen(x)
        with jaxbn.domain(2 * d):
            return first, chosen(x)

    assert traced(0, 3) == (3, 6) and traced(0, 5) == (5, 10)
    assert programs == 3  # one for each integer
    with pytest.raises(ValueError, match=r"domain must be passed .* with jaxbn\.domain\(index\)"):
        chosen(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("d"), P("d", None, "e"), P(None, None, "e")])
def test_a_batch_on_a_mesh_with_explicit_axes_gives_what_it_gives_on_one_device(spec):
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        domains = jax.device_put(DOMAINS, NamedSharding(mesh, P(spec[0])))
        for function in (train, evaluate):
            for on_mesh, plain in ((domains, DOMAINS), (DOMAINS, DOMAINS), (1, 1)):
                y, stats = jax.jit(function)(x, STATS, on_mesh, SCALE, BIAS)
                expected = function(X, STATS, plain, SCALE, BIAS)
                np.testing.assert_allclose(jax.device_get(y), expected[0], **CLOSE)
                chex.assert_trees_all_close(jax.device_get(stats), jax.device_get(expected[1]), **CLOSE)
