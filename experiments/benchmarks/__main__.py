"""One part of the benchmark, in the process that `experiments.benchmarks.parts` has started for it."""

import importlib
import json
import sys
from pathlib import Path

from experiments.benchmarks import Settings, limit
from experiments.evidence import files, provenance


def main(part: str, out: str, settings: str) -> None:
    """Measures a part and writes its file.

    Args:
      part: a module of this package.
      out: folder of the file.
      settings: as JSON.
    """
    module, settings = importlib.import_module(f"experiments.benchmarks.{part}"), json.loads(settings)
    chosen = Settings.from_json(settings)
    header = provenance.measurement_header(settings)
    header |= module.header(chosen) if hasattr(module, "header") else {"copy_bandwidth": limit.memory_bandwidth()}
    files.measure_in_pieces(Path(out) / f"{module.NAME}.jsonl", header, module.pieces(chosen))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:  # which the terminal has sent to the parent too, who says so
        sys.exit(130)
    except ModuleNotFoundError as error:
        sys.exit(f"Error: {error}")
