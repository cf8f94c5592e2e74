"""Headers of result files: what was run, with which versions, on what hardware and from which commit."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.config import Config

PACKAGES = ("jax", "jaxlib", "flax", "optax")
PEER_PACKAGES = ("dm-haiku", "equinox", "keras", "torch")  # compared with by `bench` and `scoreboard`, if installed
ROOT = Path(__file__).parents[2]
SOURCES = ("jaxbn/*.py", "experiments/*.py", "pyproject.toml")  # a run depends on these; git's * includes subfolders


def run_header(config: Config, *, images: str, parameters: int, seconds: float) -> dict:
    """Builds the header of a run.

    Args:
      config: the run.
      images: where the images come from, as in `Dataset.provenance`.
      parameters: number of trained parameters.
      seconds: duration of the whole run, including compilation and evaluation.
    """
    return {
        "config": dataclasses.asdict(config),
        "images": images,
        "parameters": parameters,
        "seconds": seconds,
        **origin(),
    }


def measurement_header(settings: dict) -> dict:
    """Builds the header of a file of measurements, such as those of `bench`.

    Args:
      settings: what the numbers depend on, besides versions and hardware; plain values.
    """
    common = origin()
    peers = {name: version for name in PEER_PACKAGES if (version := _version(name))}
    return {
        "settings": settings,
        "date": datetime.date.today().isoformat(),
        **common,
        "versions": common["versions"] | peers,
        "hardware": common["hardware"] | {"largest_cache": _largest_cache()},
    }


def origin() -> dict:
    """Returns the fields that all headers share: versions, hardware and commit."""
    return {"versions": versions(), "hardware": hardware(), "commit": commit()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware() -> dict:
    """Describes the accelerators and the processor; no host name, and no path."""
    # Imported here, because text.py and timing.py are also used by processes that must not load JAX.
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu_model(),
        # The cores that this process may use, which a container or a batch system can restrict. Linux only.
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


@functools.cache
def commit(root: Path = ROOT) -> str | None:
    """Returns the commit of the sources, with "-modified" if they differ from it, or None outside a repository.

    The result is cached. Call this before the first run: the sources may be edited while runs are in progress.
    """
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", *SOURCES]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-modified" if changed else head


def refuse_other(header: dict, config: Config, settings: dict | None, *, where: str) -> None:
    """Raises ValueError if a stored header belongs to another config or to other settings."""
    settings = json.loads(json.dumps(settings or {}))  # with lists for tuples, as in the file
    stored = header.get("settings", {})
    changed = differences(header["config"], config)
    if not changed and stored != settings:
        keys = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
        changed = ", ".join(f"{key} was {stored.get(key)!r} and is now {settings.get(key)!r}" for key in keys)
    if changed:
        raise ValueError(
            f"{where} is the result of another run: {changed}. It is not overwritten; delete it to run again, or write "
            "to another folder."
        )


def differences(stored: dict, config: Config) -> str:
    """Says in words which settings of a stored config differ from `config`; empty if none do.

    A setting that did not exist when the config was stored counts as having had its default value.
    """
    return ", ".join(_differences(stored, json.loads(json.dumps(dataclasses.asdict(config))), ""))


def _differences(stored: dict, wanted: dict, prefix: str) -> Iterator[str]:
    stored = {field.name: field.default for field in dataclasses.fields(Config)} | stored
    for key in {**wanted, **stored}:
        was, now = stored.get(key), wanted.get(key)
        if key == "start" and was is not None and now is not None:
            yield from _differences(was, now, "start.")
        elif was != now:
            yield f"{prefix}{key} was {was!r} and is now {now!r}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _largest_cache() -> str | None:
    """Returns the size of the last-level cache as Linux reports it, such as "32768K"."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else None


def _cpu_model() -> str:
    if sys.platform == "linux":
        # platform.processor() is empty or just "x86_64" on Linux.
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return match[1] if match else platform.machine()
    return platform.processor() or platform.machine()
