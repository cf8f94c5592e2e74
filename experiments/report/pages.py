"""What is measured, where README.md and the guides show it: between `<!-- measured: NAME -->` and `<!-- end -->`.

Conventions: such a block is made from one file of measurements alone, and ends with the command that measures it anew.
What stands outside of the blocks is left as it is.
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
    """A block: the file of its numbers in the folder of measurements, their command, and what makes its text."""

    file: str | Path
    command: str
    text: Callable[[dict], str]


BLOCKS = {
    "numerics": Shown(numerics.NAME, "bench numerics", numerics.block),
    "layers": Shown(layers.NAME, "bench layers", layers.block),
    "steps": Shown(steps.NAME, "bench steps", steps.block),
    "collectives": Shown(collectives.NAME, "bench collectives", collectives.block),
    "scoreboard": Shown(board.FOLDER / board.NAME, "scoreboard", board.summary),  # beside its page
    "throughput": Shown(throughput.NAME, "bench throughput", throughput.block),
    "folding": Shown(folding.NAME, "bench folding", folding.block),
    "calibration": Shown(calibration.NAME, "bench calibration", calibration.block),
    "accelerators": Shown(accelerators.NAME, "bench accelerators", compiled.block),
}


def write(folder: Path, project: Path) -> list[Path]:
    """Writes what was measured into README.md, the guides and docs/bench; returns the files written.

    Args:
      folder: of the measurements.
      project: that holds README.md and docs, and gets docs/bench.

    Raises:
      ValueError: see `rewrite`.
    """
    written = pages(project)
    for page in written:
        page.write_text(rewrite(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    compiled_programs = folder / f"{accelerators.NAME}.jsonl"
    if (path := folder / f"{layers.NAME}.jsonl").is_file():
        run, page, figure = files.read_records(path), project / layers.PAGE, project / layers.FIGURE
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(layers.page(run, MORE if compiled_programs.is_file() else ""), encoding="utf-8")
        written += [page, layers.figure(run, figure)]
    if compiled_programs.is_file():
        page = project / COMPILED
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(compiled_page(files.read_records(compiled_programs)), encoding="utf-8")
        written.append(page)
    return written


def pages(project: Path) -> list[Path]:
    """Returns the pages that have blocks: README.md, and guides in docs.

    Args:
      project: that holds README.md and docs.
    """
    candidates = [*project.glob("README.md"), *sorted((project / "docs").glob("*.md"))]
    return [page for page in candidates if _MARKER in page.read_text(encoding="utf-8")]


def rewrite(text: str, folder: Path) -> str:
    """Returns a text with all its blocks made anew.

    Args:
      text: in Markdown.
      folder: of the measurements.

    Raises:
      ValueError: a block has no end, or an unknown name, or nothing was measured for it.
    """
    found = list(_BLOCK.finditer(text))
    if len(found) != text.count(_MARKER) or any(_MARKER in match["text"] for match in found):
        raise ValueError("a block `<!-- measured: NAME -->` has no `<!-- end -->`; add it, on a line of its own.")
    return _BLOCK.sub(lambda match: f"{match['start']}\n{block(match['name'], folder)}\n\n{match['end']}", text)


def block(name: str, folder: Path) -> str:
    """Returns the text of a block.

    Raises:
      ValueError: the name is unknown, or nothing was measured for it.
    """
    if name not in BLOCKS:
        raise ValueError(f"`<!-- measured: {name} -->`; the blocks are {', '.join(BLOCKS)}; name one of those.")
    shown = BLOCKS[name]
    path = folder / f"{shown.file}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is not there, but a block shows it; `{PYTHON} {shown.command}` measures it.")
    run = files.read_records(path)
    return wrapped(f"{shown.text(run)} From `{PYTHON} {shown.command}`, {origin(run['header'])}.")


def compiled_page(run: dict) -> str:
    """Returns the text of docs/bench/accelerators.md, from the measurements of compiled programs."""
    header = run["header"]
    versions = {name: header["versions"][name] for name in ("jax", "jaxlib", "flax")} | header["compilers"]
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = f"{PYTHON} {BLOCKS['accelerators'].command}"
    return wrapped(compiled.page(run, command=command, origin=f"with {with_what}, at commit {header['commit']}")) + "\n"
