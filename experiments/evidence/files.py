"""Results as files of JSON lines, which are written completely or not at all.

Conventions: only this module writes results. A run is the dict {"header": ..., "rows": [...], "measured": [...]}. In a
file it is one line for the header (see `provenance`), then one for each row, then one for each further measurement. A
number that is not finite is null in the file and NaN when read.

A file holds either a single run, as `train` writes it, or all runs of a study with one preset:
<folder>/<study>/<preset>.jsonl, where each header also has the name of its run, <label>-seed<k>. `Place` stands for
either. Measurements of another kind, such as those of `bench`, are a header and one record per line.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.config import Config
from experiments.evidence import provenance

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
VARYING = ("date", "copy_bandwidth")  # header fields that change each time the same measurement is made


class Place(NamedTuple):
    """Where the result of one run is kept.

    Attributes:
      file: the file.
      name: of the run, in the file of a study; None if the run has the file to itself.
    """

    file: Path
    name: str | None = None

    def __str__(self) -> str:
        return str(self.file) if self.name is None else f"{self.name} in {self.file}"

    def working_path(self, suffix: str) -> Path:
        """Returns the path of something that belongs to this run alone, such as its checkpoints."""
        if self.name is None:
            return self.file.with_suffix(suffix)
        return self.file.with_suffix("") / f"{self.name}{suffix}"  # in a folder next to the file, for all of its runs

    def sibling(self, name: str) -> "Place":
        """Returns the place of another run that is kept next to this one."""
        return Place(self.file.with_name(f"{name}.jsonl")) if self.name is None else Place(self.file, name)


def place_in_study(folder: Path, study: str, preset: str, label: str, seed: int) -> Place:
    """Returns where the result of one run of a study is kept.

    Raises:
      ValueError: the label contains characters that a file name should not have.
    """
    if not LABEL.fullmatch(label):
        raise ValueError(
            f"label must consist of letters, digits and . _ + = , - since it names files, got {label!r}; rename it."
        )
    return Place(folder / study / f"{preset}.jsonl", _run_name(label, seed))


def write(path: Path, header: dict, rows: list[dict], measured: Sequence[dict] = ()) -> None:
    """Writes a single run, or measurements, to a separate file."""
    _replace(path, _lines(header, rows, measured))


def read(path: Path) -> dict:
    """Reads a file that holds a single run.

    Raises:
      ValueError: the file does not hold exactly one run.
    """
    runs = _parse(path)
    if len(runs) != 1:
        raise ValueError(f"{path} is not a result file of one run: it holds {len(runs)}; delete it to run again.")
    return runs[0]


def save(place: Place, header: dict, rows: list[dict], measured: Sequence[dict] = ()) -> None:
    """Writes the result of one run to its place. Other runs in the file of a study stay as they are.

    Several commands may add runs to the same study at once: under a lock, each reads what the file holds by then, adds
    its run, and replaces the file.
    """
    if place.name is None:
        write(place.file, header, rows, measured)
        return
    with _locked(place.file):
        runs = read_runs(place.file)
        runs[place.name] = {"header": header, "rows": rows, "measured": measured}
        lines = []
        for name in sorted(runs, key=_label_and_seed):
            run = runs[name]
            lines += _lines({"run": name} | run["header"], run["rows"], run["measured"])
        _replace(place.file, lines)


def read_runs(path: Path) -> dict[str, dict]:
    """Reads the file of a study: name -> run. A file that does not exist holds no runs.

    Raises:
      ValueError: it is not a result file, or the name of a run does not fit its header.
    """
    if not path.exists():
        return {}
    runs = {}
    for run in _parse(path):
        name, seed = run["header"].pop("run", None), run["header"]["config"].get("seed")
        if name is None or name != _run_name(_label_and_seed(name)[0], seed):
            raise ValueError(
                f"{path} has a run with seed={seed} that is named {name!r}; the name must be <label>-seed<k> with the "
                "same seed; correct the name, or delete the lines of this run to train it again."
            )
        if name in runs:
            raise ValueError(f"{path} has two runs named {name!r}; delete the lines of one of them.")
        runs[name] = run
    return runs


def read_study(folder: Path, study: str, preset: str) -> dict[str, list[dict]]:
    """Reads all finished runs of a study: label -> runs, in the order of the labels and of the seeds.

    Raises:
      ValueError: as for `read_runs`.
    """
    runs = read_runs(folder / study / f"{preset}.jsonl")
    by_label = {}
    for name in sorted(runs, key=_label_and_seed):
        by_label.setdefault(_label_and_seed(name)[0], []).append(runs[name])
    return by_label


def finished(place: Place, config: Config, settings: dict | None = None) -> bool:
    """Says whether the result of the run `config` has already been written, and refuses one of another config.

    Args:
      place: where it would be.
      config: the run.
      settings: what its measurements depend on, besides the config.

    Raises:
      ValueError: there is a result, but of another config or with other settings.
    """
    if not place.file.exists():
        return False
    run = read(place.file) if place.name is None else read_runs(place.file).get(place.name)
    if run is None:
        return False
    provenance.refuse_other(run["header"], config, settings, where=str(place))
    return True


def measure_in_pieces(
    path: Path, header: dict, pieces: dict[str, Callable[[], list[dict]]], say: Callable = print
) -> None:
    """Makes a measurement piece by piece and writes the records; interrupted, it continues with the next piece.

    Args:
      path: the file. An older one is replaced only when all pieces are done.
      header: the first line, as `provenance.measurement_header` builds it.
      pieces: name -> function that does the work of one piece and returns its records.
      say: called with messages about the progress.
    """
    folder = path.with_suffix(".unfinished")
    unfinished = folder / path.name
    done = {}
    if unfinished.exists():
        begun = read_records(unfinished)
        if changed := [key for key in header if key not in VARYING and header[key] != begun["header"].get(key)]:
            say(f"{path.name}: begun with another {', '.join(changed)}; starts over")
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


def read_records(path: Path) -> dict:
    """Reads a file of measurements: {"header": dict, "records": list of dicts}.

    Raises:
      ValueError: the file is not a file of measurements.
    """
    try:
        header, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not (isinstance(header["settings"], dict) and all(isinstance(record, dict) for record in records)):
            raise ValueError("no settings, or a line that is not a record")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of measurements ({error}); it must hold a line with the header and one line per "
            "record; delete it and run the command that made it again."
        ) from None
    return {"header": header, "records": _numbers(records)}


def digest(runs: dict[str, list[dict]]) -> str:
    """Returns a hash of the contents of results, which is written into the figures drawn from them."""
    text = json.dumps({label: [_finite(run) for run in group] for label, group in runs.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run_name(label: str, seed: int) -> str:
    return f"{label}-seed{seed}"


def _label_and_seed(name: str) -> tuple[str, int]:
    """Splits the name of a run; the seed is -1 if it is not a number."""
    label, _, seed = name.rpartition("-seed")
    return label, int(seed) if seed.isdecimal() else -1


def _parse(path: Path) -> list[dict]:
    """Reads runs one after the other; each begins with the only line that has a config, its header."""
    runs = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"a line holds {entry!r}")
            if "config" in entry:
                runs.append({"header": entry, "rows": [], "measured": []})
            elif "measured" in entry:
                runs[-1]["measured"].append(_numbers(entry["measured"]))
            else:
                runs[-1]["rows"].append(_numbers(entry))
        if not (runs and all(run["rows"] and isinstance(run["header"]["config"], dict) for run in runs)):
            raise ValueError("no config or no rows")
    except (ValueError, IndexError) as error:  # IndexError: a row before the first header
        raise ValueError(
            f"{path} is not a result file ({error}); each run must be a line with its header and one line per row; "
            "restore it, or delete it and run the same command again."
        ) from None
    return runs


def _lines(header: dict, rows: Sequence[dict], measured: Sequence[dict]) -> list[str]:
    entries = [header, *rows, *({"measured": entry} for entry in measured)]
    return [json.dumps(_finite(entry), allow_nan=False) for entry in entries]


def _replace(path: Path, lines: list[str]) -> None:
    """Writes a file in one step: other processes see the old one or the new one, even if this process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process adds a run to the file, and keeps others waiting.

    The system releases the lock if the process is killed. The lock file stays: if it were deleted, one process could
    hold the lock of the deleted file and another that of a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        # Some network file systems have no locks. A run is worth more than the small risk that another one is written
        # within the same milliseconds.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _numbers(value):
    """Replaces None with NaN, everywhere in a value: the inverse of `_finite`, except that infinities become NaN."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


def _finite(value):
    """Replaces every number that is not finite with None, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
