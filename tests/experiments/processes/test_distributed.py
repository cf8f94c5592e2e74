"""A process joins the others that its environment names, and they agree before the first step."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.processes import distributed
from tests.experiments.conftest import mesh_of

THIRD_OF_FOUR = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


@pytest.fixture
def join(monkeypatch):
    """Returns a function that joins in an environment; it returns what JAX was asked for, or raises JAX's `error`."""

    def join(environment, error=None):
        calls = []

        def initialize(**arguments):
            calls.append(arguments)
            if error is not None:
                raise error

        for name in distributed.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        distributed.initialize()
        return [(call["num_processes"], call["process_id"]) for call in calls]

    return join


def test_variables_say_which_process_this_is(join):
    assert join(THIRD_OF_FOUR) == [(4, 2)]


def test_cluster_is_left_to_jax(join):
    assert join({}) == [(None, None)]
    assert join({"JAX_COORDINATOR_ADDRESS": "host:1234"}) == [(None, None)]  # the rest may come from a cluster


def test_without_variables_or_a_cluster_a_process_trains_alone():
    program = "import jax; from experiments.processes import distributed; distributed.initialize(3)"
    program += "; assert not jax.distributed.is_initialized() and len(jax.devices()) == 3 and distributed.is_primary()"
    subprocess.run([sys.executable, "-c", program], check=True, env=_environment_without_variables())


def test_message_of_jax_without_a_cluster_means_to_train_alone(join):
    assert join({}, error=ValueError("coordinator_address should be defined.")) == [(None, None)]


@pytest.mark.parametrize(
    "error", [ValueError("invalid literal for int() with base 10: 'four'"), KeyError("SLURM_PROCID")], ids=str
)
def test_mistake_of_a_cluster_is_an_error(join, error):
    with pytest.raises(ValueError, match="could not join the other processes: .*(four|SLURM_PROCID).* Got a cluster"):
        join({}, error=error)


def _environment_without_variables():
    return {name: value for name, value in distributed.os.environ.items() if name not in distributed.VARIABLES}


def test_one_process_joins_nobody(join):
    assert join(THIRD_OF_FOUR | {"JAX_NUM_PROCESSES": "1"}) == []


@pytest.mark.parametrize("missing", THIRD_OF_FOUR)
def test_incomplete_variables_are_refused(join, missing):
    incomplete = {name: value for name, value in THIRD_OF_FOUR.items() if name != missing}
    with pytest.raises(ValueError, match="JAX could not join .*: no address.* Set all of .*, or JAX_NUM_PROCESSES=1"):
        join(incomplete, error=ValueError("no address."))


def test_wrong_number_is_refused(join):
    with pytest.raises(ValueError, match="could not join .* 'three'.* Set all of JAX_COORDINATOR_ADDRESS"):
        join(THIRD_OF_FOUR | {"JAX_PROCESS_ID": "three"})


def test_cluster_whose_processes_jax_does_not_find_is_an_error(join):
    with pytest.raises(ValueError, match="could not join the other processes: Forbidden. Got a cluster"):
        join({}, error=RuntimeError("Forbidden."))


@pytest.mark.parametrize("devices", [0, -2, 3])
def test_devices_that_two_processes_cannot_share_are_refused(monkeypatch, devices):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match=f"--devices must be a positive multiple .* processes, 2, got {devices}"):
        distributed._set_cpu_devices(devices)


def test_unequal_numbers_of_devices_are_refused(monkeypatch, request):
    monkeypatch.undo()  # of the mesh that the tests of training use
    distributed.mesh.cache_clear()
    request.addfinalizer(distributed.mesh.cache_clear)

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
    with pytest.raises(ValueError, match="must have the same number of devices; processes 0, 1, … have 2, 1"):
        distributed.mesh()


def test_replicated_arrays_are_whole_on_every_device():
    tree = distributed.replicate((np.arange(6).reshape(2, 3), np.float32(2)), mesh_of(8))
    assert all(leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8 for leaf in tree)
    np.testing.assert_array_equal(tree[0], [[0, 1, 2], [3, 4, 5]])


def test_single_process_agrees_with_itself():
    distributed.agree({"batch_size": 1}, remedy="")
    assert distributed.from_primary(lambda: {"é": [7]}) == {"é": [7]}
    assert distributed.primary_first(lambda: 7) == 7
    distributed.leave(2)  # in several processes, it would end this one


def test_process_that_differs_is_named_with_the_difference(monkeypatch):
    theirs = {"batch_size": "32", "seed": "0"}
    monkeypatch.setattr(distributed, "_all_gather", lambda mine: [mine, mine, theirs])
    with pytest.raises(ValueError, match="^process 2 has batch_size=32, process 0 has batch_size=16; same command$"):
        distributed.agree({"batch_size": 16, "seed": 0}, remedy="same command")
