"""How often the data are read, and how often a program is compiled."""

import contextlib
import gc
import weakref

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import calibrate
from jaxbn._models import program
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


@contextlib.contextmanager
def count_compilations():
    """Yields a list that gets the name of each function that is compiled."""
    names, counting = [], [True]

    def listen(event, duration, fun_name="", **_):
        if counting[0] and event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name.removeprefix("jit(").removesuffix(")").removeprefix("jit_"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        counting[0] = False


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
    levels = {}
    for call in program.trace(split(Net(wrap=wrap), VARIABLES), X, lambda module, x: module(x)).calls.values():
        levels.setdefault(call.path[0], []).append(call.levels)
    assert levels == {"first": [1], "left": [2], "right": [2], "twice": [3, 4]}


def test_a_program_is_compiled_once_for_equal_models():
    call, traces = traced_call()
    calibrate.one_pass(nn.BatchNorm(True), layer_variables(), BATCHES, call=call)
    with count_compilations() as compilations:
        calibrate.one_pass(nn.BatchNorm(True), layer_variables(), BATCHES, call=call)
    assert compilations == [] and len(traces) == 2


def test_a_model_that_cannot_be_hashed_is_compiled_once_though_it_may_change_in_place():
    model = Offset(np.zeros(FEATURES, np.float32))
    variables = random_variables(model)
    call, traces = traced_call()
    means = []
    for calls, offset in enumerate((1, 2), start=1):
        model.offset[:] = offset
        with count_compilations() as compilations:
            means.append(calibrate.layer_by_layer(model, variables, BATCHES, call=call)["batch_stats"]["first"]["mean"])
        assert len(traces) == calls and (calls == 1 or compilations == [])
    np.testing.assert_allclose(np.subtract(*means), -1, rtol=1e-5)


class Blocks(nn.Module):
    """A model with a list as attribute, which cannot be hashed, as Flax's ResNet18 has it."""

    sizes: list

    @nn.compact
    def __call__(self, x):
        for size in self.sizes:
            x = nn.relu(nn.BatchNorm(True)(nn.Dense(size)(x)))
        return x


@pytest.mark.parametrize("function", [calibrate.one_pass, calibrate.layer_by_layer])
def test_all_passes_share_one_program_and_a_second_call_compiles_nothing(function):
    model = Blocks([5, 6, 7])
    variables = random_variables(model)
    with count_compilations() as compilations:
        function(model, variables, [X])
    assert compilations.count("run") == 1
    with count_compilations() as compilations:
        function(Blocks([5, 6, 7]), variables, [X])
    assert compilations == []


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.12 keeps a model's arrays with a traced program")
def test_arrays_of_models_are_freed():
    model = Offset(np.zeros(FEATURES, np.float32))
    calibrate.one_pass(model, random_variables(model), [X])
    reference = weakref.ref(model.offset)
    del model
    gc.collect()
    assert reference() is None


def test_all_levels_share_a_program_wherever_the_arrays_are():
    variables = jax.device_put(CHAIN_VARIABLES, NamedSharding(Mesh(jax.devices()[:2], ("batch",)), P()))
    call, _ = traced_call()
    with count_compilations() as compilations:
        calibrate.layer_by_layer(CHAIN, variables, BATCHES, call=call)
    assert compilations.count("run") <= 1
