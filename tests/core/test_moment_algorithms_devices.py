"""Every algorithm for the moments of a batch that is spread over devices."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from experiments.benchmarks import hlo
from experiments.benchmarks.numerics import ours, sample
from tests.core import test_parallel
from tests.core.exactness import (
    normal,
    require_step,
    step,
)
from tests.testing import test_testing

DEVICES = 8
SPREAD = 64, 24, 24, 2  # 4608 positions on each device


@pytest.fixture(scope="module")
def sharding():
    return NamedSharding(jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,)), P("d"))


def on_devices(shape, mean, shift):
    """Returns a batch whose parts on the devices have different means."""
    x, *rest = sample(shape, mean)
    return x + np.repeat(np.float32(shift) * normal(DEVICES, seed=5), shape[0] // DEVICES)[:, None, None, None], *rest


@pytest.mark.parametrize("shift", [0, 3, 100])
@pytest.mark.parametrize("mean", [0, 3, 1e4])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(SPREAD, id="large"),
        pytest.param((16, 3, 3, 6), id="small", marks=pytest.mark.slow_but_on_cpu),
    ],
)
def test_a_batch_over_devices_under_jit_equals_the_oracle(platform, sharding, shape, mean, shift):
    x, scale, bias, dy = on_devices(shape, mean, shift)
    found = ours(jax.device_put(x, sharding), scale, bias, jax.device_put(dy, sharding))
    require_step(jax.device_get(found), x, scale, bias, dy)


def test_a_batch_that_devices_cannot_share_evenly_equals_the_oracle_under_jit(platform, sharding):
    x, scale, bias, dy = sample((20, 14, 14, 2), 10)

    @functools.partial(jax.jit, in_shardings=NamedSharding(sharding.mesh, P()))
    def replicated(x, scale, bias, dy):
        return step(x, scale, bias, dy)

    require_step(jax.device_get(replicated(x, scale, bias, dy)), x, scale, bias, dy)


def collectives(function, *arguments):
    """Returns the collectives of a compiled program; those in loops, of no turn or one, are conditional."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    loop = r"condition=%?([\w.-]+), body=%?([\w.-]+)"
    assert not re.search(r"body=%?([\w.-]+), condition=", text)
    return hlo.collectives(re.sub(loop, r"branch_computations={\1, \2}", text))


@pytest.mark.parametrize("shape", [SPREAD, (16, 3, 3, 6)], ids=["large", "small"])
def test_the_moments_of_a_batch_under_jit_take_one_collective(platform, sharding, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    assert len(hlo.executed(collectives(jaxbn.moments, x))) == 1


def test_the_moments_of_a_batch_under_shard_map_take_one_collective_and_seldom_a_second_one(platform, sharding):
    moments = jax.shard_map(
        functools.partial(jaxbn.moments, axis_name="d"), mesh=sharding.mesh, in_specs=P("d"), out_specs=P()
    )
    found = collectives(moments, jax.ShapeDtypeStruct(SPREAD, jnp.float32, sharding=sharding))
    assert sorted(collective.conditional for collective in found) == [False, True]


# Not those of a CPU, which other tests use anyway.
ON_ACCELERATORS = pytest.mark.parametrize("platform", ["tpu", "cuda"], indirect=True, scope="module")


@pytest.mark.slow
@ON_ACCELERATORS
@pytest.mark.parametrize(("api", "case"), test_parallel.MATRIX)
def test_on_every_api_a_batch_over_devices_is_normalized_as_if_in_one_piece(platform, api, case):
    found = test_parallel.errors(api, case)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= test_parallel.TOLERANCE}
    assert not wrong, f"relative errors above {test_parallel.TOLERANCE:.1e}: {wrong}"


# Laws


@pytest.mark.slow
@ON_ACCELERATORS
@pytest.mark.parametrize("law", test_testing.LAWS, ids=lambda law: law.name)
def test_our_batch_norm_keeps_the_law(platform, law):
    # The function; the layers give its bits, which is tested elsewhere.
    test_testing.check_batch_norm(test_testing.OURS["function"], [law])
