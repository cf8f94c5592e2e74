"""TPUs and GPUs that programs can be compiled for without having one.

Conventions: a target is a kind of chip, and a topology is the arrangement of several. A file next to this module
describes each GPU in the text format of XLA's GpuTargetConfigProto, with the numbers of its data sheet.
"""

import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
# Packages that XLA loads to compile for a platform.
PACKAGES = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
}
HINT = "install the compilers with pip install 'jaxbn[aot]'"


class Target(NamedTuple):
    """A kind of chip.

    Attributes:
      platform: JAX's name of the platform.
      topologies: number of chips -> XLA's name of the topology. A topology may have more chips than that, since the
        smallest one of a TPU has four; a program for one chip uses one of them.
    """

    platform: str
    topologies: dict[int, str]


TARGETS = {
    "v5e": Target("tpu", {1: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}),
    "v5p": Target("tpu", {1: "v5p:2x2x1"}),
    "v6e": Target("tpu", {1: "v6e:2x2"}),
    "tpu7x": Target("tpu", {1: "tpu7x:2x2x1"}),
    # Partitions x hosts per partition x GPUs per host.
    "h100": Target("cuda", {1: "1x1x1", 8: "1x1x8", 16: "1x2x8"}),
    "a100": Target("cuda", {1: "1x1x1"}),
    "b200": Target("cuda", {1: "1x1x1"}),
}


def devices(name: str, chips: int = 1) -> list[Any]:
    """Returns devices that programs can be lowered for, but not run on; loads the platform's compiler.

    Args:
      name: key of `TARGETS`.
      chips: key of the target's topologies.

    Raises:
      ValueError: there is no such target, or no topology with this number of chips.
    """
    from jax.experimental import topologies

    if name not in TARGETS or chips not in TARGETS[name].topologies:
        known = "; ".join(f"{key} on {', '.join(map(str, target.topologies))}" for key, target in TARGETS.items())
        raise ValueError(f"Unknown target {name} on {chips} chips; choose one of: {known}.")
    target = TARGETS[name]
    topology = target.topologies[chips]
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:chips]
    description = (HERE / f"{name}.txtpb").read_text(encoding="utf-8")
    gpus = topologies.get_topology_desc(platform="cuda", target_config=description, topology=topology)
    return gpus.devices[:chips]


def missing(name: str) -> str | None:
    """Returns the reason why this machine cannot compile for a target, without `HINT`; None if it can."""
    absent = [package for package in PACKAGES[TARGETS[name].platform] if _version(package) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed"


def versions() -> dict[str, str]:
    """Returns the versions of the compilers that are installed."""
    packages = [package for needed in PACKAGES.values() for package in needed]
    return {package: version for package in packages if (version := _version(package))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
