"""The results of runs as files: one JSONL per run, a header, then one line per row and per further measurement.

Conventions: only this module writes results. A run is the dict {"header": ..., "rows": [...], "measured": [...]}; the
header says what was run, on which images, with which versions, on what hardware, from which commit. A number that is
not finite is null in the file and NaN when read. Paths are <folder>/<study>/<preset>/<label>-seed<k>.jsonl.
Measurements of another kind, such as those of `bench`, are a header and one record per line.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.config import Config

PACKAGES = ("jax", "jaxlib", "flax", "optax")
PEER_PACKAGES = ("dm-haiku", "equinox", "keras", "torch")  # what `bench` and `scoreboard` compare with, where installed
VARYING = ("date", "copy_bandwidth")  # of a header, from one run of the same measurement to the next
ROOT = Path(__file__).parents[2]
SOURCES = ("jaxbn/*.py", "experiments/*.py", "pyproject.toml")  # what a run depends on; * includes subfolders
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")


def run_path(folder: Path, study: str, preset: str, label: str, seed: int) -> Path:
    """Returns where the result of one run of a study is kept.

    Raises:
      ValueError: the label cannot be part of a file's name.
    """
    if not LABEL.fullmatch(label):
        raise ValueError(
            f"label={label!r}; letters, digits and . _ + = , - are accepted, since it names a file; rename it."
        )
    return folder / study / preset / f"{label}-seed{seed}.jsonl"


def write(path: Path, header: dict, rows: list[dict], measured: Sequence[dict] = ()) -> None:
    """Writes a finished run in one go: the file is there completely or not at all."""
    lines = [header, *rows, *({"measured": each} for each in measured)]
    lines = [json.dumps(_finite(line), allow_nan=False) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read(path: Path) -> dict:
    """Returns the run in a file: {"header": dict, "rows": list of dicts, "measured": list of dicts}.

    Raises:
      ValueError: the file is not a result file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        header, rows = lines[0], [line for line in lines[1:] if "measured" not in line]
        if not (rows and isinstance(header["config"], dict) and all(isinstance(row, dict) for row in rows)):
            raise ValueError("no config or no rows")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is not a result file ({error}); a line with the header and one per row is expected; "
            "delete it, and the same command makes it anew."
        ) from None
    measured = [line["measured"] for line in lines[1:] if "measured" in line]
    return {"header": header, "rows": _numbers(rows), "measured": _numbers(measured)}


def finished(path: Path, config: Config, settings: dict | None = None) -> bool:
    """Says whether the run `config` has already been written to `path`.

    Args:
      path: the file.
      config: the run.
      settings: what its measurements depend on besides.

    Raises:
      ValueError: the file is the result of another config, or was measured with other settings.
    """
    if not path.exists():
        return False
    header, settings = read(path)["header"], json.loads(json.dumps(settings or {}))
    changed = differences(header["config"], config)
    if not changed and (was := header.get("settings", {})) != settings:
        other = [key for key in {**was, **settings} if was.get(key) != settings.get(key)]
        changed = ", ".join(f"{key} was {was.get(key)!r} and is now {settings.get(key)!r}" for key in other)
    if changed:
        raise ValueError(
            f"{path} is the result of another run: {changed}. It is not overwritten; delete it to run anew, "
            "or write to another folder."
        )
    return True


def differences(stored: dict, config: Config) -> str:
    """Says which settings of a stored config differ from `config`, in words; empty where none does.

    A setting that was not there yet when the config was stored had its default value.
    """
    return ", ".join(_differences(stored, json.loads(json.dumps(dataclasses.asdict(config))), ""))


def _differences(stored, wanted, prefix):
    """The differences, one by one. With lists for tuples, as they are stored."""
    stored = {field.name: field.default for field in dataclasses.fields(Config)} | stored
    for key in {**wanted, **stored}:
        was, now = stored.get(key), wanted.get(key)
        if key == "start" and was is not None and now is not None:
            yield from _differences(was, now, "start.")
        elif was != now:
            yield f"{prefix}{key} was {was!r} and is now {now!r}"


def read_study(folder: Path, study: str, preset: str) -> dict[str, list[dict]]:
    """Returns all finished runs of a study: label -> runs by seed. The labels are in alphabetical order.

    Raises:
      ValueError: a file is no result file, or its name gives another seed than its header.
    """
    runs = {}
    for path in sorted((folder / study / preset).glob("*-seed*.jsonl")):
        label, run = path.stem.rpartition("-seed")[0], read(path)
        if path != run_path(folder, study, preset, label, seed := run["header"]["config"].get("seed")):
            raise ValueError(
                f"{path} is named after another run: its header has seed={seed}; a file is named "
                "<label>-seed<k>.jsonl after its own seed; delete it, or give it back its name."
            )
        runs.setdefault(label, []).append(run)
    return {label: sorted(group, key=lambda run: run["header"]["config"]["seed"]) for label, group in runs.items()}


def read_records(path: Path) -> dict:
    """Returns the measurements in a file: {"header": dict, "records": list of dicts}.

    Raises:
      ValueError: the file is not a file of measurements.
    """
    try:
        header, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not (isinstance(header["settings"], dict) and all(isinstance(record, dict) for record in records)):
            raise ValueError("no settings, or a line that is no record")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of measurements ({error}); a line with the header and one per record is expected; "
            "delete it, and the command that made it makes it anew."
        ) from None
    return {"header": header, "records": _numbers(records)}


def measure(path: Path, header: dict, pieces: dict[str, Callable[[], list[dict]]], say: Callable = print) -> None:
    """Does all pieces of a measurement and writes their records; interrupted, it continues with the next piece.

    Args:
      path: the file. What was in it is replaced when all pieces are done.
      header: its first line, as `measurement_header` makes it.
      pieces: does the work of each piece, by name; returns its records.
      say: is told how far it is.
    """
    folder = path.with_suffix(".unfinished")
    unfinished = folder / path.name
    done = {}
    if unfinished.exists():
        begun = read_records(unfinished)
        if changed := [key for key in header if key not in VARYING and header[key] != begun["header"].get(key)]:
            say(f"{path.name}: begun with another {', '.join(changed)}; begins anew")
        else:
            header, done = begun["header"], {line["piece"]: line["records"] for line in begun["records"]}
    for number, (name, work) in enumerate(pieces.items(), start=1):
        if name not in done:
            say(f"{path.name}: {name} ({number} of {len(pieces)})")
            done[name] = work()
            write(unfinished, header, [{"piece": name, "records": done[name]} for name in done])
    write(path, header, [record for name in pieces for record in done[name]])
    shutil.rmtree(folder)
    say(f"Written to {path}")


def measurement_header(settings: dict) -> dict:
    """Returns the first line of a file of measurements: what was measured, and when, and with what.

    Args:
      settings: what the numbers depend on besides; plain values.
    """
    with_what = origin()
    peers = {name: version for name in PEER_PACKAGES if (version := _version(name))}
    return {
        "settings": settings,
        "date": datetime.date.today().isoformat(),
        **with_what,
        "versions": with_what["versions"] | peers,
        "hardware": with_what["hardware"] | {"largest_cache": _largest_cache()},
    }


def header(config: Config, *, images: str, parameters: int, seconds: float) -> dict:
    """Returns the first line of a result file: what was run, and with what.

    Args:
      config: the run.
      images: where they come from, `Dataset.provenance`.
      parameters: number of trained parameters.
      seconds: that the run took in all, compilation and evaluation included.
    """
    return {
        "config": dataclasses.asdict(config),
        "images": images,
        "parameters": parameters,
        "seconds": seconds,
        **origin(),
    }


def origin() -> dict:
    """Returns the part of a header that says with what a run was made: versions, hardware and commit."""
    return {"versions": versions(), "hardware": hardware(), "commit": commit()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what a run's numbers depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware() -> dict:
    """Returns what the run's seconds depend on: the accelerators, and the processor's model and number of cores."""
    import jax

    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


@functools.cache
def commit(root: Path = ROOT) -> str | None:
    """Returns the commit of the sources, with "-modified" where they differ from it; None outside a repository.

    It is looked up once: call it before the first run, since the sources may change while the runs last.
    """
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = [*git, "status", "--porcelain", "--", *SOURCES]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-modified" if changed else head


def digest(runs: dict[str, list[dict]]) -> str:
    """Returns a short name for the contents of results, written into the figures that are drawn from them."""
    text = json.dumps({label: [_finite(run) for run in group] for label, group in runs.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _numbers(value):
    """The value with NaN for every None: the inverse of `_finite`, but for infinities."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def _finite(value):
    """The value with None for every number that is not finite, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _largest_cache():
    """The size of the processor's last cache, as Linux tells it, such as "32768K"."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return sizes[-1].read_text().strip() if sizes else None


def _cpu_model():
    """The processor's model, as Linux and macOS tell it."""
    if sys.platform == "linux":
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[1] if found else platform.machine()
    return platform.processor() or platform.machine()
