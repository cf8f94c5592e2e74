"""How often the data are read, and how often a program is compiled."""

import gc
import weakref

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import calibrate
from jaxbn._models import passes
from tests.calibrate.models import (
    BATCHES,
    CHAIN,
    CHAIN_VARIABLES,
    FEATURES,
    NET,
    VARIABLES,
    layer_variables,
    random_variables,
)


class Offset(nn.Module):
    """A model that cannot be hashed, of two levels."""

    offset: np.ndarray

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, name="first")(x + self.offset)
        return nn.BatchNorm(True, name="second")(x)


def traced_call():
    """Returns a call of a model, and the list that gets an entry whenever it is traced."""
    traces = []

    def call(module, x):
        traces.append(x.shape)
        return module(x)

    return call, traces


def test_the_data_are_read_once_for_each_level():
    reads = []
    calibrate.layer_by_layer(NET, VARIABLES, lambda: reads.append(1) or iter(BATCHES))
    assert len(reads) == 4


def test_a_program_is_compiled_once_for_equal_models():
    call, traces = traced_call()
    for _ in range(2):
        calibrate.one_pass(nn.BatchNorm(True), layer_variables(), BATCHES, call=call)
    assert len(traces) == 3  # twice to find the layers


def test_a_model_that_cannot_be_hashed_is_compiled_once_for_all_levels():
    model = Offset(np.ones(FEATURES))
    call, traces = traced_call()
    calibrate.layer_by_layer(model, random_variables(model), BATCHES, call=call)
    assert len(traces) == 2  # once to find the layers


def test_a_model_that_cannot_be_hashed_is_compiled_again_as_it_may_have_changed_in_place():
    model = Offset(np.zeros(FEATURES, np.float32))
    variables = random_variables(model)
    means = []
    for offset in (1, 2):
        model.offset[:] = offset
        means.append(calibrate.one_pass(model, variables, BATCHES)["batch_stats"]["first"]["mean"])
    np.testing.assert_allclose(means[1] - means[0], 1, rtol=1e-5)


def test_programs_of_models_that_cannot_be_hashed_are_freed():
    def function(offset, x):
        return x + offset

    compiled = passes.compiled(function, np.ones(3))
    assert passes.compiled(function, 1.0) is passes.compiled(function, 1.0)
    reference = weakref.ref(compiled)
    compiled(np.ones(3))
    del compiled
    gc.collect()
    assert reference() is None


def test_all_levels_share_a_program_wherever_the_arrays_are():
    variables = jax.device_put(CHAIN_VARIABLES, NamedSharding(Mesh(jax.devices(), ("batch",)), P()))
    call, _ = traced_call()
    calibrate.layer_by_layer(CHAIN, variables, BATCHES, call=call)
    options = {"use_running_average": True, "by_call": True}
    assert passes.compiled(passes.measure_calls, CHAIN, call, None, **options)._cache_size() == 1
