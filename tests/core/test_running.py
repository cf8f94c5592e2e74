"""Running statistics: half precision, unknown numbers of batches, and schedules."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import reference

X = np.random.default_rng(0).normal([0.0, 5.0, -3.0], [0.2, 3.0, 1.0], (16, 3))
EPS = 1e-5


def averaged(stats, batch, *, steps, momentum):
    """Updates statistics many times with the moments of one batch."""

    @jax.jit
    def run(stats):
        def step(_, stats):
            return jaxbn.update_stats(stats, batch, momentum=momentum)

        # The first update may widen the statistics, which a loop's carry must not do.
        return jax.lax.fori_loop(1, steps, step, step(0, stats))

    return run(stats)


@pytest.mark.parametrize("kind", [jaxbn.BatchStats, jaxbn.CountedStats])
@pytest.mark.parametrize(("dtype", "momentum"), [(jnp.bfloat16, 0.99), (jnp.bfloat16, 0.999), (jnp.float16, 0.99)])
def test_averages_that_were_cast_to_half_precision_still_reach_the_batch(kind, dtype, momentum):
    batch = jaxbn.Moments(jnp.array([10.02]), jnp.array([137_790.0]), jnp.array([16.0]))
    stats = jaxbn.init_stats(1, counted=kind is jaxbn.CountedStats)
    stats = jax.tree.map(lambda v: v.astype(dtype) if v.dtype == jnp.float32 else v, stats)
    steps = round(20 / (1 - momentum))  # exp(-20) of the start is left
    stats = averaged(stats, batch, steps=steps, momentum=momentum)
    np.testing.assert_allclose(stats.mean, 10.02, rtol=1e-4)
    np.testing.assert_allclose(stats.var, 137_790.0, rtol=1e-4)  # above the largest float16


def loaded(mean=5.0, var=4.0):
    """Statistics of a layer that does not count, in one that does."""
    return jaxbn.CountedStats(jnp.full(3, mean), jnp.full(3, var), jnp.full(3, -1))


def test_a_debiased_average_of_unknown_length_goes_on_as_a_long_one():
    batch = jaxbn.moments(X)
    expected = jaxbn.BatchStats(*loaded()[:2])
    stats = loaded()
    for _ in range(2):
        expected = jaxbn.update_stats(expected, batch, momentum=0.9)
        stats = jaxbn.update_stats(stats, batch, momentum=0.9)
        chex.assert_trees_all_close(stats[:2], tuple(expected), rtol=1e-6)


def test_a_plain_average_of_unknown_length_becomes_nan_instead_of_the_last_batch():
    stats = jaxbn.update_stats(loaded(), jaxbn.moments(X), momentum=None)
    assert jnp.isnan(stats.mean).all() and jnp.isnan(stats.var).all()


def test_new_statistics_of_unknown_length_start_at_zero():
    fresh = jaxbn.init_stats(3, counted=True)
    batch = jaxbn.moments(X)
    unknown = fresh._replace(steps=fresh.steps - 1)
    for momentum in (0.9, None):
        chex.assert_trees_all_equal(
            jaxbn.update_stats(unknown, batch, momentum=momentum), jaxbn.update_stats(fresh, batch, momentum=momentum)
        )


def test_a_schedule_of_the_momentum_gets_the_number_of_earlier_updates():
    rates = jnp.array([0.0, 0.5, 0.75, 0.9])
    stats, seen = jaxbn.init_stats(3, counted=True), (np.zeros(3), np.ones(3))
    step = jax.jit(functools.partial(jaxbn.update_stats, momentum=lambda t: rates[t], debias=False))
    for t in range(4):
        batch = X * (t + 1)
        stats = step(stats, jaxbn.moments(jnp.asarray(batch)))
        seen = reference.update(*seen, *reference.moments(batch), momentum=float(rates[t]))
    np.testing.assert_allclose(stats.mean, seen[0], rtol=1e-5)
    np.testing.assert_allclose(stats.var, seen[1], rtol=1e-5)
    np.testing.assert_array_equal(stats.steps, 4)


def test_a_schedule_needs_a_count():
    with pytest.raises(ValueError, match="momentum is a schedule, which needs the number of updates, but stats are Ba"):
        jaxbn.update_stats(jaxbn.init_stats(3), jaxbn.moments(X), momentum=lambda t: 0.9)
    with pytest.raises(ValueError, match="r_max is a schedule, which needs the number of updates"):
        jaxbn.batch_renormalize(X, stats=jaxbn.init_stats(3), r_max=lambda t: 3.0)


def test_counting_without_correction_is_the_plain_recursion():
    batch = jaxbn.moments(X)
    counted = jaxbn.update_stats(jaxbn.init_stats(3, counted=True), batch, momentum=0.9, debias=False)
    chex.assert_trees_all_equal(counted[:2], tuple(jaxbn.update_stats(jaxbn.init_stats(3), batch, momentum=0.9)))


def test_statistics_stay_where_they_are_if_asked():
    for stats in (jaxbn.init_stats(3), jaxbn.init_stats(3, counted=True), jaxbn.init_stats(3, accumulate=2)):
        y, same = jaxbn.batch_norm(X, stats, use_running_average=False, update_stats=False)
        chex.assert_trees_all_equal(same, stats)
        np.testing.assert_array_equal(y, jaxbn.batch_normalize(X)[0])


def renorm_reference(batches, warm_up):
    """Batch norm for some steps and then batch renorm, in float64: Ioffe 2017, algorithm 1, with a warm-up."""
    mean, var, outputs = np.zeros(3), np.ones(3), []
    for t, x in enumerate(batches):
        mu, v = x.mean(0), x.var(0)
        sigma, running = np.sqrt(v + EPS), np.sqrt(var + EPS)
        r_max, d_max = (3.0, 5.0) if t >= warm_up else (1.0, 0.0)
        r, d = np.clip(sigma / running, 1 / r_max, r_max), np.clip((mu - mean) / running, -d_max, d_max)
        outputs.append((x - mu) / sigma * r + d)
        mean, var = 0.9 * mean + 0.1 * mu, 0.9 * var + 0.1 * v
    return np.stack(outputs), mean, var


def test_renorm_warms_up_by_schedules_of_its_limits():
    batches = np.random.default_rng(1).normal([0, 5, -3], [0.2, 3, 1], (12, 16, 3))
    method = functools.partial(
        jaxbn.batch_renormalize,
        r_max=lambda step: jnp.where(step < 5, 1.0, 3.0),
        d_max=lambda step: jnp.where(step < 5, 0.0, 5.0),
    )

    @jax.jit
    def run(stats, batches):
        def step(stats, x):
            y, stats = jaxbn.batch_norm(
                x, stats, use_running_average=False, momentum=0.9, method=method, debias=False, epsilon=EPS
            )
            return stats, y

        return jax.lax.scan(step, stats, batches)

    stats, y = run(jaxbn.init_stats(3, counted=True), jnp.asarray(batches, jnp.float32))
    expected, mean, var = renorm_reference(batches, warm_up=5)
    np.testing.assert_allclose(y, expected, atol=2e-4)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_statistics_are_pickled_with_every_protocol(protocol):
    stats = jaxbn.init_stats(3, counted=True, accumulate=2)
    restored = pickle.loads(pickle.dumps(stats, protocol))
    assert type(restored) is type(stats) and type(restored.pending) is jaxbn.Moments
    chex.assert_trees_all_equal(restored, stats)
