"""Processes find one another by their environment, agree before the first step, and miss one that is lost."""

import threading
import time

import jax
import numpy as np
import pytest

from experiments.processes import distributed, watch
from experiments.processes.distributed import from_environment
from tests.experiments.conftest import mesh_of

JAX = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
JAXJOB = {"COORDINATOR_ADDRESS": "host", "COORDINATOR_PORT": "1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
TORCH = {"MASTER_ADDR": "host", "MASTER_PORT": "1234", "WORLD_SIZE": "4", "RANK": "3"}
SLURM = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
EXPECTED = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3}


@pytest.mark.parametrize("environment", [JAX, JAXJOB, TORCH], ids=["JAX", "JAXJob", "torch"])
def test_processes_are_found_by_the_variables_of_every_launcher(environment):
    assert from_environment(environment) == EXPECTED | {"cluster_detection_method": "deactivate"}


@pytest.mark.parametrize("environment", [{}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {**SLURM, "SLURM_NTASKS": "1"}])
def test_without_company_a_process_trains_alone(environment):
    assert from_environment(environment) is None


@pytest.mark.parametrize("environment", [SLURM, KUBERNETES, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_clusters_that_jax_detects_are_left_to_it(environment):
    assert from_environment(environment) == {}


def test_variables_of_a_launcher_go_before_the_cluster():
    assert from_environment(KUBERNETES | JAX)["process_id"] == 3


def test_address_alone_is_for_jax_where_it_detects_the_rest():
    assert from_environment(SLURM | {"JAX_COORDINATOR_ADDRESS": "host:1"}) == {}


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"NUM_PROCESSES": "8"},
        {"MASTER_ADDR": "left.over"},
        TORCH | {"WORLD_SIZE": "1", "RANK": "0"},
        JAX | {"JAX_NUM_PROCESSES": "1"},
        KUBERNETES | {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_common_names_and_a_company_of_one_leave_a_process_alone(environment):
    assert from_environment(environment) is None


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_tpu_machine_has_company_unless_it_says_otherwise(monkeypatch, changed, expected):
    monkeypatch.setattr(distributed, "running_in_cloud_tpu_vm", True)
    assert distributed.cluster(changed) == expected


@pytest.mark.parametrize(
    ("environment", "needed"),
    [(JAX, JAX), (JAXJOB, ("COORDINATOR_PORT", "PROCESS_ID")), (TORCH, ("MASTER_PORT", "RANK"))],
    ids=["JAX", "JAXJob", "torch"],
)
def test_missing_variable_is_named(environment, needed):
    for name in needed:
        partly = {key: value for key, value in environment.items() if key != name}
        with pytest.raises(ValueError, match=rf"are set, but not {name};.* set them .* or none of them"):
            from_environment(partly)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one'; a whole number"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID=4 with JAX_NUM_PROCESSES=4; the processes are numbered from 0"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "JAX_COORDINATOR_ADDRESS='host' has no port; accepted is host:port"),
    ],
)
def test_wrong_variable_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        from_environment(JAX | changed)


def test_coordinator_leaves_torchrun_its_own_port():
    agent = TORCH | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert from_environment(agent)["coordinator_address"] == "host:1235"


def test_several_processes_of_torchrun_on_a_machine_take_one_device_each():
    assert from_environment(TORCH | {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"})["local_device_ids"] == 1


def test_processes_that_jax_does_not_find_are_an_error(monkeypatch):
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)

    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "say_last_words", lambda _: None)
    with pytest.raises(ValueError, match="Kubernetes has started this process, .* set JAX_COORDINATOR_ADDRESS"):
        distributed.initialize()


def test_proxies_are_hidden_from_the_connection_and_there_again_for_downloads(monkeypatch):
    monkeypatch.setenv("http_proxy", "a")
    monkeypatch.setenv("HTTPS_PROXY", "b")
    with distributed._no_proxies():
        assert not any(name.lower().endswith("_proxy") for name in distributed.os.environ)
    assert (distributed.os.environ["http_proxy"], distributed.os.environ["HTTPS_PROXY"]) == ("a", "b")


@pytest.mark.parametrize("devices", [0, 3, 5])
def test_devices_that_cannot_be_shared_out_are_refused(devices):
    with pytest.raises(
        ValueError, match=f"devices={devices} cannot be shared out evenly among 2 processes; a multiple"
    ):
        distributed._set_cpu_devices(devices, 2)


def test_unequal_numbers_of_devices_are_refused(monkeypatch, request):
    monkeypatch.undo()  # of the mesh that the tests of training use
    distributed.mesh.cache_clear()
    request.addfinalizer(distributed.mesh.cache_clear)

    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    monkeypatch.setattr(jax, "devices", lambda: [Device(0), Device(0), Device(1)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="process 0 has 2, process 1 has 1; give each the same number"):
        distributed.mesh()


def test_replicated_arrays_are_whole_on_every_device():
    tree = distributed.replicate((np.arange(6).reshape(2, 3), np.float32(2)), mesh_of(8))
    assert all(leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == 8 for leaf in tree)
    np.testing.assert_array_equal(tree[0], [[0, 1, 2], [3, 4, 5]])


def test_single_process_agrees_with_itself_and_asks_nobody():
    distributed.agree({"batch_size": 1}, remedy="")
    assert distributed.from_primary(lambda: 7) == distributed.primary_first(lambda: 7) == 7
    distributed.finish(2, "nobody is told")


class Coordinator:
    """The key-value store of JAX's coordinator, in this process."""

    def __init__(self):
        self.values = {}
        self.hangs = threading.Event()

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        if self.hangs.is_set():
            time.sleep(60)
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]

    def wait_at_barrier(self, *_):
        pass


def test_every_process_says_which_one_differs_and_how(monkeypatch):
    coordinator, state = Coordinator(), distributed.runtime.global_state
    monkeypatch.setattr(state, "client", coordinator)
    monkeypatch.setattr(state, "num_processes", 2)
    for number in (1, 0):
        monkeypatch.setattr(state, "process_id", number)
        monkeypatch.setattr(distributed, "_turn", iter(range(1)))
        if number == 1:
            distributed.runtime.global_state.client.values["jaxbn/facts/0/0"] = '{"batch_size": "16", "seed": "0"}'
        with pytest.raises(ValueError, match="process 1 has batch_size=32, process 0 has batch_size=16; same command"):
            distributed.agree({"batch_size": 32 if number else 16, "seed": 0}, remedy="same command")


@pytest.fixture
def watched(monkeypatch):
    """A function that starts a quick watch of process 0 of 2, and a list of what it ends this process with."""
    ended, watches = [], []
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(watch, "leave", lambda status, message: ended.append((status, message)))

    def start(number=0):
        coordinator = Coordinator()
        watches.append(watch.Watch(coordinator, number, 2))
        return coordinator, watches[0], ended

    yield start
    watches[0].stop()


def wait_for(ended):
    deadline = time.monotonic() + 30
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    status, message = ended[0]
    assert status == watch.LOST
    return message


def test_silent_process_ends_the_others_by_its_name(watched):
    *_, ended = watched()
    assert "Process 0 ends: nothing was heard of process 1 for 0.5 s" in (message := wait_for(ended))
    assert message.endswith(watch.CONTINUES)


def test_process_that_is_heard_of_ends_nothing(watched, monkeypatch):
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 60)
    coordinator, watching, ended = watched()
    heard = watching._heard[1][1]
    coordinator.values[f"{watch.ALIVE}1"] = "1"
    deadline = time.monotonic() + 30
    while watching._heard[1][1] == heard and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watching._heard[1][1] > heard and not ended
    assert f"{watch.ALIVE}0" in coordinator.values


def test_coordinator_that_does_not_answer_ends_the_others(watched):
    coordinator, _, ended = watched(number=1)
    coordinator.hangs.set()
    assert "nothing was heard of process 0" in wait_for(ended)


def test_process_that_ends_tells_the_others_why(watched):
    coordinator, _, ended = watched()
    coordinator.values[f"{watch.ENDED}1"] = "Error: no images."
    assert wait_for(ended) == "Process 0 ends: process 1 has ended. Error: no images."
    assert coordinator.values[f"{watch.ENDED}0"] == ""  # which no third process takes for a cause


def test_training_that_does_not_move_ends_the_process(watched, monkeypatch):
    monkeypatch.setattr(watch, "SILENCE_SECONDS", 60)
    monkeypatch.setattr(watch, "STALL_SECONDS", 0.2)
    _, watching, ended = watched()
    time.sleep(0.4)
    assert not ended  # it may compile for as long as it needs
    with watching.training():
        assert "no step, evaluation or checkpoint has ended for 0.2 s" in wait_for(ended)
