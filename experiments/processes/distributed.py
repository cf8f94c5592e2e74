"""Training in several processes: joining them, the mesh of all their devices, and agreement before the first step.

Conventions: `initialize` comes before any use of JAX. Every function also works in a single process, where it waits for
nobody. Every process calls the same functions in the same order: most of them are collectives, in which a process waits
until the others arrive. When one is lost, the others end: its connections break, or JAX's heartbeats miss it.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

AXIS = "data"
HEARTBEAT_SECONDS = 30  # a process not heard from for this long is lost; JAX's default is 100
NO_CLUSTER = "^coordinator_address should be defined"  # JAX's message if it has neither an address nor a cluster
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(devices: int | None = None) -> None:
    """Joins the other processes of this run, if there are any; call it before any use of JAX.

    The environment variables `VARIABLES`, or a cluster that JAX detects, describe the processes. With neither, or with
    JAX_NUM_PROCESSES=1, this process trains alone.

    Args:
      devices: number of CPU devices of all processes together. None: the devices that the machines have.

    Raises:
      ValueError: the variables are incomplete or wrong, or the processes would have unequal numbers of devices.
    """
    if os.environ.get("JAX_NUM_PROCESSES") != "1" and not jax.distributed.is_initialized():
        _join()
    if devices is not None:
        _set_cpu_devices(devices)
    if jax.distributed.is_initialized():
        mesh()  # its check comes first: unequal numbers of devices would make the first collective hang
        if devices not in (None, jax.device_count()):
            raise ValueError(
                f"--devices is {devices}, but the {jax.process_count()} processes have {jax.device_count()} devices. "
                "Set JAX_NUM_PROCESSES in every process, so that each takes its share."
            )


def _join() -> None:
    """Joins the processes of the environment or of a cluster; does nothing if there is neither."""
    # With this service, SIGTERM would not end a process but ask it for a last checkpoint. The newest one is recent.
    jax.config.update("jax_enable_preemption_service", False)
    if "no_grpc_proxy" in os.environ:  # the proxies that JAX would warn of are then taken care of
        jax.config.update("jax_check_proxy_envs", False)
    settings = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    try:
        # JAX reads the address from the environment itself, and asks the cluster for what is None.
        count, index = (int(settings[name]) if name in settings else None for name in VARIABLES[1:])
        jax.distributed.initialize(num_processes=count, process_id=index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, IndexError, KeyError, RuntimeError, OSError) as error:
        # A variable of a broken cluster gives a ValueError too, so only the message tells that there is no cluster.
        if not settings and re.search(NO_CLUSTER, str(error)):
            return
        raise ValueError(
            f"JAX could not join the other processes: {error} Got {settings or 'a cluster'}. Set all of "
            f"{', '.join(VARIABLES)} (see docs/several_machines.md), or JAX_NUM_PROCESSES=1 to train alone."
        ) from error


def _set_cpu_devices(devices: int) -> None:
    # `jax.process_count` would start the backend, whose number of devices is then fixed.
    processes = int(os.environ.get("JAX_NUM_PROCESSES", 1))
    if devices < 1 or devices % processes:
        raise ValueError(
            f"--devices must be a positive multiple of the number of processes, {processes}, got {devices}."
        )
    # Only if they differ: once the backend has started, any update is an error.
    if jax.config.jax_num_cpu_devices != devices // processes:
        jax.config.update("jax_num_cpu_devices", devices // processes)
    if jax.config.jax_platforms != "cpu":
        jax.config.update("jax_platforms", "cpu")
    # Each device may wait in a collective, which takes a thread. With JAX's default of one thread per core, two
    # collectives under way can hang because neither gets all of its threads.
    os.environ.setdefault("PJRT_NPROC", str(4 * devices // processes))


def leave(status: int) -> None:
    """Leaves the run: waits for the other processes if this one succeeded, and exits at once if it failed.

    At exit, JAX would wait until all processes are done. After a failure they never are: they wait for this process in
    a collective. So it must be gone for them to end.
    """
    if not jax.distributed.is_initialized():
        return
    if status == 0:
        jax.distributed.shutdown()
    else:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_primary() -> bool:
    """Returns whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


@functools.cache
def mesh() -> Mesh:
    """Returns the mesh of all devices of all processes, with one axis named `AXIS`.

    Raises:
      ValueError: the processes have unequal numbers of devices.
    """
    devices = jax.devices()
    counts = np.bincount([device.process_index for device in devices])
    if len(set(counts)) > 1:
        listed = ", ".join(map(str, counts))
        raise ValueError(f"Every process must have the same number of devices; processes 0, 1, … have {listed}.")
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies host arrays, the same in every process, to every device of the mesh.

    Unlike `jax.device_put`, it does not send them to the other processes to compare them; `agree` compares a digest.
    """
    return multihost_utils.host_local_array_to_global_array(tree, mesh, PartitionSpec())


def one_at_a_time(result: Any, mesh: Mesh) -> Any:
    """Returns the result of a program, after waiting for it if the mesh has several CPU devices of this process.

    With several programs under way, the later ones take the threads that a collective of the first waits for: all hang.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return jax.block_until_ready(result) if on_cpu and len(mesh.local_devices) > 1 else result


def agree(facts: dict[str, Any], *, remedy: str) -> None:
    """Compares the facts of every process with those of process 0, before a step that would hang where they differ.

    Args:
      facts: name -> value; compared as text.
      remedy: what to do about a difference.

    Raises:
      ValueError: in every process, if one differs from process 0; names that process and the difference.
    """
    primary, *others = _all_gather({name: str(value) for name, value in facts.items()})
    for index, theirs in enumerate(others, start=1):
        if different := [name for name in primary | theirs if primary.get(name) != theirs.get(name)]:
            got, expected = (", ".join(f"{n}={known.get(n)}" for n in different) for known in (theirs, primary))
            raise ValueError(f"process {index} has {got}, process 0 has {expected}; {remedy}")


def from_primary(answer: Callable[[], Any]) -> Any:
    """Returns process 0's `answer()`, plain JSON, in every process; the other processes do not call it."""
    return _all_gather(answer() if is_primary() else None)[0]


def primary_first(work: Callable[[], Any]) -> Any:
    """Returns `work()`, which process 0 finishes before the others begin: they find the files that it downloads."""
    result = work() if is_primary() else None
    multihost_utils.sync_global_devices("process 0 is done")
    return result if is_primary() else work()


def _all_gather(value: Any) -> list[Any]:
    """Returns the value of every process, which must be plain JSON."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # Arrays of unequal shapes cannot be gathered: first the lengths, then the texts, padded to the longest.
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, lengths.max() - len(text))))
    return [json.loads(bytes(text[:length])) for text, length in zip(texts, lengths, strict=True)]
