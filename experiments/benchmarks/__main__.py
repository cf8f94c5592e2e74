"""Measures one benchmark, in the process that `experiments.benchmarks.parts` started for it."""

import importlib
import json
import sys
import traceback
from pathlib import Path

from rich.console import Console

from experiments.benchmarks import Settings, parts
from experiments.evidence import files, provenance


def main(name: str, out: str, settings: str) -> None:
    """Measures a benchmark and writes its file.

    Args:
      name: a module of this package.
      out: folder of the file.
      settings: `Settings.to_json` as text.
    """
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    chosen = Settings.from_json(json.loads(settings))
    path = Path(out) / f"{module.NAME}.jsonl"
    files.measure_in_pieces(path, module.header(chosen), module.pieces(chosen))
    if name in parts.SHOWN_AS_TABLES:
        Console(width=120).print(*module.tables(files.read_records(path)), sep="\n")


def _is_bug(error: Exception) -> bool:
    """Tells the errors of other libraries, whose traceback we need, from our own checks of the user's input."""
    if not isinstance(error, ValueError):
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return provenance.ROOT / "experiments" not in raised_in.parents


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:  # The terminal sent it to the parent too, which reports it.
        sys.exit(130)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        if _is_bug(error):
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
