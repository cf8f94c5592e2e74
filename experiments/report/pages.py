"""Measurements in README.md and the guides: blocks between `<!-- measured: NAME -->` and `<!-- end -->`.

Conventions: a block is generated from a single file of measurements, and ends with the command that measures it again.
Text outside of the blocks is left alone.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks import (
    accelerators,
    calibration,
    collectives,
    compiled,
    folding,
    layers,
    numerics,
    steps,
    throughput,
)
from experiments.evidence import files
from experiments.evidence.text import PYTHON, origin, wrapped
from experiments.scoreboard import board

_BLOCK = re.compile(r"(?P<start><!-- measured: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(?P<end><!-- end -->)", re.DOTALL)
_MARKER = "<!-- measured:"
COMPILED = Path("docs/bench/accelerators.md")
MORE = f"[Batch norm as compiled for TPUs and GPUs]({COMPILED.name}).\n\n"


class Shown(NamedTuple):
    """How a block is made.

    Attributes:
      file: of its numbers, in the folder of measurements; without the suffix.
      command: makes that file.
      text: writes the block from the contents of the file.
    """

    file: str | Path
    command: str
    text: Callable[[dict], str]


BLOCKS = {
    "numerics": Shown(numerics.NAME, "bench numerics", numerics.block),
    "layers": Shown(layers.NAME, "bench layers", layers.block),
    "steps": Shown(steps.NAME, "bench steps", steps.block),
    "collectives": Shown(collectives.NAME, "bench collectives", collectives.block),
    "scoreboard": Shown(board.FOLDER / board.NAME, "scoreboard", board.summary),  # its file is next to its page
    "throughput": Shown(throughput.NAME, "bench throughput", throughput.block),
    "folding": Shown(folding.NAME, "bench folding", folding.block),
    "calibration": Shown(calibration.NAME, "bench calibration", calibration.block),
    "accelerators": Shown(accelerators.NAME, "bench accelerators", compiled.block),
}


def write(folder: Path, project: Path) -> list[Path]:
    """Writes measurements into README.md, the guides and docs/bench; returns the files written.

    Args:
      folder: the measurements.
      project: the folder with README.md and docs; docs/bench is written there.

    Raises:
      ValueError: see `rewrite`.
    """
    written = pages(project)
    for page in written:
        page.write_text(rewrite(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    layer_times, compiled_programs = (folder / f"{module.NAME}.jsonl" for module in (layers, accelerators))
    if layer_times.is_file():
        run = files.read_records(layer_times)
        text = layers.page(run, MORE if compiled_programs.is_file() else "")
        written += [_write(project / layers.PAGE, text), layers.figure(run, project / layers.FIGURE)]
    if compiled_programs.is_file():
        text = compiled_page(files.read_records(compiled_programs))
        written.append(_write(project / COMPILED, text))
    return written


def _write(page: Path, text: str) -> Path:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page


def pages(project: Path) -> list[Path]:
    """Lists the pages with blocks: README.md, and guides in docs.

    Args:
      project: the folder with README.md and docs.
    """
    candidates = [*project.glob("README.md"), *sorted((project / "docs").glob("*.md"))]
    return [page for page in candidates if _MARKER in page.read_text(encoding="utf-8")]


def rewrite(text: str, folder: Path) -> str:
    """Generates all blocks of a text again.

    Args:
      text: Markdown.
      folder: the measurements.

    Raises:
      ValueError: a block has no end or an unknown name, or there are no measurements for it.
    """
    blocks = list(_BLOCK.finditer(text))
    # A block without an end takes the end of the next one, so that it has the marker of that one in its text.
    if len(blocks) != text.count(_MARKER) or any(_MARKER in match["text"] for match in blocks):
        raise ValueError("a block `<!-- measured: NAME -->` has no `<!-- end -->`; add it, on a separate line.")
    return _BLOCK.sub(lambda match: f"{match['start']}\n{block(match['name'], folder)}\n\n{match['end']}", text)


def block(name: str, folder: Path) -> str:
    """Writes the text of a block.

    Raises:
      ValueError: the name is unknown, or there are no measurements for it.
    """
    if name not in BLOCKS:
        raise ValueError(f"the name of a block must be one of {', '.join(BLOCKS)}, got `<!-- measured: {name} -->`.")
    shown = BLOCKS[name]
    path = folder / f"{shown.file}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist, but a block shows it; `{PYTHON} {shown.command}` writes it.")
    run = files.read_records(path)
    return wrapped(f"{shown.text(run)} From `{PYTHON} {shown.command}`, {origin(run['header'])}.")


def compiled_page(run: dict) -> str:
    """Writes the text of docs/bench/accelerators.md from the measurements of compiled programs."""
    header = run["header"]
    versions = {name: header["versions"][name] for name in ("jax", "jaxlib", "flax")} | header["compilers"]
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = f"{PYTHON} {BLOCKS['accelerators'].command}"
    return wrapped(compiled.page(run, command=command, origin=f"with {with_what}, at commit {header['commit']}")) + "\n"
