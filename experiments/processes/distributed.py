"""Training over several processes: who takes part, the mesh of all their devices, agreement before the first step.

Conventions: `initialize` comes before any use of JAX. Every function works in a single process too, where it waits for
nothing. Processes agree, and follow process 0, through the key-value store of JAX's coordinator and not by collectives:
a collective that one process does not enter, or enters with another shape, hangs, and the store says who is missing.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed as runtime  # the coordinator's client is nowhere else
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.processes.watch import CONTINUES, Watch, say_last_words

AXIS = "data"
INITIALIZATION_SECONDS = 300  # until all processes must have been started
HEARTBEAT_SECONDS = 60  # when JAX itself aborts; `Watch` is faster, and says which process is lost
SHUTDOWN_SECONDS = 60
WAIT_SECONDS = 3600  # for a process that is alive, but still loads its images or compiles

_watch: Watch | None = None
_turn = itertools.count()


class Launcher(NamedTuple):
    """Environment variables that say how many processes there are, which one this is, and where process 0 listens."""

    name: str
    address: str
    port: str | None  # None: it is part of the address
    count: str
    number: str

    def variables(self) -> tuple[str, ...]:
        """Returns the names of the variables, all of which are needed."""
        return tuple(name for name in self[1:] if name)


LAUNCHERS = (
    Launcher("JAX", "JAX_COORDINATOR_ADDRESS", None, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    Launcher("Kubeflow's JAXJob", "COORDINATOR_ADDRESS", "COORDINATOR_PORT", "NUM_PROCESSES", "PROCESS_ID"),
    Launcher("torchrun and PyTorchJob", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"),
)


def initialize(devices: int | None = None) -> None:
    """Joins the other processes of this run, where there are any; call it before any use of JAX.

    The environment names them: by the variables of one of `LAUNCHERS`, or as Slurm, Open MPI, Kubernetes and TPUs do,
    which JAX detects. Where it names none, there is one process, and nothing happens.

    Args:
      devices: number of CPU devices in all, shared out among the processes. None: whatever the machines have.

    Raises:
      ValueError: the variables are incomplete or wrong, or the devices cannot be shared out evenly.
    """
    global _watch
    joining = from_environment(os.environ)
    if joining is not None and runtime.global_state.client is None:
        _join(joining)
        signal.signal(signal.SIGABRT, signal.SIG_DFL)  # what it would have printed is not true any more
    count = runtime.global_state.num_processes
    if devices is not None:
        _set_cpu_devices(devices, count)
    if count > 1 and _watch is None:
        number = runtime.global_state.process_id
        say_last_words(
            f"Process {number} ends: JAX's runtime has aborted it; see above. Mostly another one is lost. {CONTINUES}"
        )
        _watch = Watch(runtime.global_state.client, number, count)


def from_environment(environment: dict[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`, empty where JAX detects them; None for one process.

    `JAX_NUM_PROCESSES=1` is one process, whatever else is set.

    Raises:
      ValueError: variables of a launcher are missing or wrong.
    """
    if environment.get(LAUNCHERS[0].count) == "1":
        return None
    detected = cluster(environment)
    for launcher in LAUNCHERS:
        names = launcher.variables()
        found = [name for name in names if environment.get(name)]
        if environment.get(launcher.count) == "1":
            continue
        if len(found) == len(names):
            return _arguments(launcher, environment)
        # The other names are in use for other things too; a number of processes and an address are meant.
        meant = launcher is LAUNCHERS[0] or {launcher.address, launcher.count} <= {*found}
        if found and meant and not detected:
            missing = ", ".join(name for name in names if name not in found)
            raise ValueError(
                f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} set, but not {missing}; {launcher.name} sets "
                f"all of {', '.join(names)}; set them to join other processes, or none of them to train alone."
            )
    return {} if detected else None


def cluster(environment: dict[str, str]) -> str | None:
    """Returns the name of the cluster whose processes JAX is to detect, or None."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_NODELIST" in environment and tasks != "1":
        return "Slurm"
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    platforms, hosts = environment.get("JAX_PLATFORMS"), environment.get("TPU_WORKER_HOSTNAMES")
    alone = (platforms and "tpu" not in platforms) or (hosts and "," not in hosts)
    return "TPU" if running_in_cloud_tpu_vm and not alone else None


def _arguments(launcher, environment):
    """The arguments of `jax.distributed.initialize` that the variables of a launcher stand for."""
    values = {}
    for name in (launcher.count, launcher.number):
        try:
            values[name] = int(environment[name])
        except ValueError:
            raise ValueError(f"{name}={environment[name]!r}; a whole number is accepted; correct it.") from None
    count, number = values[launcher.count], values[launcher.number]
    if not 0 <= number < count:
        raise ValueError(
            f"{launcher.number}={number} with {launcher.count}={count}; the processes are numbered from 0 to "
            f"{launcher.count} - 1; correct them."
        )
    address = environment[launcher.address]
    if launcher.port:
        port = environment[launcher.port]
        # The agent of torchrun keeps listening on its own port: JAX's coordinator takes the next one.
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and port.isdigit():
            port = str(int(port) + 1)
        address = f"{address}:{port}"
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"{launcher.address}={address!r} has no port; accepted is host:port; append one.")
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if launcher.name.startswith("torchrun") and environment.get("LOCAL_WORLD_SIZE", "1") != "1":
        arguments["local_device_ids"] = int(environment["LOCAL_RANK"])  # several on a machine: one device for each
    return arguments | {"cluster_detection_method": "deactivate"}


def _join(arguments):
    # JAX's runtime would keep a process alive after SIGTERM, for a last checkpoint; the newest one is never far.
    jax.config.update("jax_enable_preemption_service", False)
    address = arguments.get("coordinator_address", "its address")
    say_last_words(
        f"Process 0 of this run was not reached at {address}, or others did not come within {INITIALIZATION_SECONDS} s;"
        " start all processes, with the same address, and see that they reach one another."
    )
    with _no_proxies():
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=INITIALIZATION_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{cluster(os.environ) or 'A launcher'} has started this process, but JAX has not found the others "
                f"({error}); set {', '.join(LAUNCHERS[0].variables())} in each of them, or {LAUNCHERS[0].count}=1 to "
                "train alone."
            ) from error


@contextlib.contextmanager
def _no_proxies() -> Iterator[None]:
    """Hides the `*_proxy` variables: gRPC would ask the proxy for the coordinator, and wait until its time is up.

    Only while the connection is made, since a download of CIFAR-10 may need them.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _set_cpu_devices(devices, count):
    if devices < 1 or devices % count:
        raise ValueError(
            f"devices={devices} cannot be shared out evenly among {count} process{'es' if count > 1 else ''}; "
            f"a multiple of {count} is accepted; choose one."
        )
    if jax.config.jax_num_cpu_devices != devices // count:
        jax.config.update("jax_num_cpu_devices", devices // count)
    if jax.config.jax_platforms != "cpu":
        jax.config.update("jax_platforms", "cpu")
    # A thread for each collective that a device may wait in; by default, two at once can hang for want of a thread.
    os.environ.setdefault("PJRT_NPROC", str(4 * devices // count))


def is_primary() -> bool:
    """Says whether this is process 0, the one that prints and writes."""
    return runtime.global_state.process_id == 0


def process_count() -> int:
    """Returns the number of processes; unlike `jax.process_count`, without starting JAX's backend."""
    return runtime.global_state.num_processes


@functools.cache
def mesh() -> Mesh:
    """Returns the mesh of all devices of all processes, one axis named `AXIS`.

    Raises:
      ValueError: the processes have unequal numbers of devices.
    """
    devices = jax.devices()
    counts = [sum(device.process_index == number for device in devices) for number in range(jax.process_count())]
    if len(set(counts)) > 1:
        shown = ", ".join(f"process {number} has {count}" for number, count in enumerate(counts))
        raise ValueError(f"The processes have unequal numbers of devices: {shown}; give each the same number.")
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns host arrays, the same in every process, as arrays that every device of the mesh holds.

    `jax.device_put` would send them to the other processes, to compare them; `agree` compares a digest.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def one_at_a_time(result: Any, mesh: Mesh) -> Any:
    """Returns the result of a program, but on several CPU devices of one process only once it is there.

    With several programs under way, they take the threads that a collective of the first one waits for, and all hang.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(result) if on_cpu and len(mesh.local_devices) > 1 else result


def agree(facts: dict[str, Any], *, remedy: str) -> None:
    """Compares what every process knows with what process 0 knows, before a step that hangs where they differ.

    Args:
      facts: name -> value; compared as text.
      remedy: what to do about a difference.

    Raises:
      ValueError: in every process: a process differs from process 0; names it and the difference.
    """
    if process_count() == 1:
        return
    client, key = runtime.global_state.client, f"jaxbn/facts/{next(_turn)}/"
    client.key_value_set(f"{key}{runtime.global_state.process_id}", json.dumps({k: str(v) for k, v in facts.items()}))
    client.wait_at_barrier(key, WAIT_SECONDS * 1000)
    known = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(key)}
    for number in range(1, process_count()):
        mine, first = known[number], known[0]
        if differing := [name for name in {**first, **mine} if first.get(name) != mine.get(name)]:
            shown, expected = (", ".join(f"{name}={of.get(name)}" for name in differing) for of in (mine, first))
            raise ValueError(f"process {number} has {shown}, process 0 has {expected}; {remedy}")


def from_primary(answer: Callable[[], Any]) -> Any:
    """Returns process 0's `answer()` in every process; the others' own is not asked for. It must be plain JSON."""
    if process_count() == 1:
        return answer()
    client, key = runtime.global_state.client, f"jaxbn/answer/{next(_turn)}"
    if is_primary():
        client.key_value_set(key, json.dumps(answer()))
    return json.loads(client.blocking_key_value_get(key, WAIT_SECONDS * 1000))


def primary_first(work: Callable[[], Any]) -> Any:
    """Returns `work()`, done by process 0 before the others begin, so that they find what it has downloaded."""
    if process_count() == 1:
        return work()
    done = work() if is_primary() else None
    from_primary(lambda: True)
    return done if is_primary() else work()


def training() -> contextlib.AbstractContextManager:
    """Returns a context in which the process ends if `moved` is not called for too long; see `Watch`."""
    return contextlib.nullcontext() if _watch is None else _watch.training()


def moved() -> None:
    """Notes that training has moved."""
    if _watch is not None:
        _watch.moved()


def wait_for_the_cause(error: Exception) -> None:
    """After an error of JAX's runtime: gives the watch the time to find a lost process, and to end this one."""
    if _watch is not None and isinstance(error, jax.errors.JaxRuntimeError):
        _watch.wait_for_the_cause()


def finish(status: int, reason: str) -> None:
    """Leaves the other processes: with status 0 when all are done, else at once, telling them the reason.

    Args:
      status: exit status of this process.
      reason: why it ends, where that is not 0.
    """
    global _watch
    if _watch is None:
        return
    if status:
        say_last_words(reason, status)
        _watch.announce(reason)
        sys.stdout.flush()
        os._exit(status)
    try:
        runtime.global_state.client.wait_at_barrier("jaxbn/finish", WAIT_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        wait_for_the_cause(error)
        raise
    _watch.stop()
    _watch = None
    time.sleep(0.1)  # for an answer that the watch may still be waiting for
    jax.distributed.shutdown()
