"""How often the data are read, and how often a program is compiled."""

import gc
import weakref

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import calibrate
from jaxbn._models import passes
from jaxbn._models.model import split
from tests.calibrate.models import (
    BATCHES,
    CHAIN,
    CHAIN_VARIABLES,
    FEATURES,
    NET,
    VARIABLES,
    Net,
    X,
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


@pytest.mark.parametrize("wrap", [lambda block: block, nn.remat, nn.jit])
def test_a_level_is_the_number_of_batch_norms_on_the_longest_path(wrap):
    calls = passes.find_calls(split(Net(wrap=wrap), VARIABLES), X, lambda module, x: module(x))
    levels = {path.removesuffix("/norm"): [call.level for call in of_layer] for path, of_layer in calls.items()}
    assert levels == {"first": [1], "left": [2], "right": [2], "twice": [3, 4]}


def test_a_program_is_compiled_once_for_equal_models():
    call, traces = traced_call()
    for _ in range(2):
        calibrate.one_pass(nn.BatchNorm(True), layer_variables(), BATCHES, call=call)
    assert len(traces) == 3  # twice to find the layers


def test_a_model_that_cannot_be_hashed_is_compiled_once_in_each_call_as_it_may_have_changed_in_place():
    model = Offset(np.zeros(FEATURES, np.float32))
    variables = random_variables(model)
    call, traces = traced_call()
    means = []
    for calls, offset in enumerate((1, 2), start=1):
        model.offset[:] = offset
        means.append(calibrate.layer_by_layer(model, variables, BATCHES, call=call)["batch_stats"]["first"]["mean"])
        assert len(traces) == 2 * calls  # once to find the layers, and once for all levels
    np.testing.assert_allclose(np.subtract(*means), -1, rtol=1e-5)


def test_programs_of_models_that_cannot_be_hashed_are_freed():
    def function(offset, x):
        return x + offset

    compiled = passes.jit_partial(function, np.ones(3))
    assert passes.jit_partial(function, 1.0) is passes.jit_partial(function, 1.0)
    reference = weakref.ref(compiled)
    compiled(np.ones(3))
    del compiled
    gc.collect()
    assert reference() is None


def test_all_levels_share_a_program_wherever_the_arrays_are():
    variables = jax.device_put(CHAIN_VARIABLES, NamedSharding(Mesh(jax.devices()[:2], ("batch",)), P()))
    call, _ = traced_call()
    calibrate.layer_by_layer(CHAIN, variables, BATCHES, call=call)
    options = {"use_running_average": True, "by_call": True}
    assert passes.jit_partial(passes.measure_calls, CHAIN, call, None, **options)._cache_size() == 1
