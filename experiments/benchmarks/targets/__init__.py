"""TPUs and GPUs for which programs are compiled without having one.

Conventions: a target is a kind of chip, and a topology says how many of them there are. A GPU is described by a file
beside this module, in the text format of XLA's GpuTargetConfigProto; the numbers are those of its data sheet.
"""

import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
# What XLA loads to compile for a platform.
PACKAGES = {
    "tpu": ("libtpu",),
    "cuda": ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12"),
}
HINT = "pip install 'jaxbn[aot]' brings the compilers"


class Target(NamedTuple):
    """A kind of chip.

    Attributes:
      platform: JAX's name for it.
      topologies: by number of chips, XLA's name for so many; a program for one chip uses one of the first.
    """

    platform: str
    topologies: dict[int, str]


TARGETS = {
    "v5e": Target("tpu", {1: "v5e:2x2", 16: "v5e:4x4", 256: "v5e:16x16"}),
    "v5p": Target("tpu", {1: "v5p:2x2x1"}),
    "v6e": Target("tpu", {1: "v6e:2x2"}),
    "tpu7x": Target("tpu", {1: "tpu7x:2x2x1"}),
    # Partitions x hosts in each x GPUs of each.
    "h100": Target("cuda", {1: "1x1x1", 8: "1x1x8", 16: "1x2x8"}),
    "a100": Target("cuda", {1: "1x1x1"}),
    "b200": Target("cuda", {1: "1x1x1"}),
}


def devices(name: str, chips: int = 1) -> list[Any]:
    """Returns devices that programs can be lowered for, but not run on; loads the platform's compiler.

    Args:
      name: one of `TARGETS`.
      chips: a key of the target's topologies.

    Raises:
      ValueError: there is no such target, or no topology of so many chips.
    """
    from jax.experimental import topologies

    if name not in TARGETS or chips not in TARGETS[name].topologies:
        known = "; ".join(f"{each} on {', '.join(map(str, of.topologies))}" for each, of in TARGETS.items())
        raise ValueError(f"target {name} on {chips} chips is not known; choose one of: {known}.")
    target = TARGETS[name]
    topology = target.topologies[chips]
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:chips]
    described = (HERE / f"{name}.txtpb").read_text(encoding="utf-8")
    found = topologies.get_topology_desc(platform="cuda", target_config=described, topology=topology)
    return found.devices[:chips]


def missing(name: str) -> str | None:
    """Returns why a target cannot be compiled for, without `HINT`; None where it can."""
    absent = [package for package in PACKAGES[TARGETS[name].platform] if _version(package) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed"


def versions() -> dict[str, str]:
    """Returns the versions of the compilers that are installed."""
    packages = [package for needed in PACKAGES.values() for package in needed]
    return {package: version for package in packages if (version := _version(package))}


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
