"""What is measured, where README.md and the guides show it: between `<!-- measured: NAME -->` and `<!-- end -->`.

Conventions: such a block is made from one file of measurements alone, and ends with the command that measures it anew.
What stands outside of the blocks is left as it is.
"""

import re
import textwrap
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
from experiments.evidence import files, plots, tables
from experiments.report import studies
from experiments.scoreboard import judge

PYTHON = ".venv/bin/python -m experiments"
WIDTH = 120
_BLOCK = re.compile(r"(?P<start><!-- measured: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(?P<end><!-- end -->)", re.DOTALL)
_MARKER = "<!-- measured:"
COLORS = {"float32": plots.PALETTE["blue"], "bfloat16": plots.PALETTE["vermilion"]}
PAGE, FIGURE = Path("docs/bench/README.md"), Path("docs/bench/layers.png")
COMPILED = Path("docs/bench/accelerators.md")
HEAD = """# Batch norm alone, row by row

Written by `python -m experiments table` from the file that `{python} bench --only layers` writes.
{origin}

A row is a pass, an activation, a shape and a dtype. The columns of other layers hold the time of jaxbn over theirs: the
median of the ratios within {rounds} rounds, and their quartiles. In a round, each arm is timed once, in shuffled order,
for at least {milliseconds:g} ms, and runs once just before. "Of the limit" is the part of the time that the bytes that
must move would take at the bandwidth of a copy of an array of that size, timed in the same rounds: x read twice and y
written forward; backward, x and dy read twice and dx written; in evaluation, x read and y written; with ReLU as
without. Of arrays that fit into the caches it can exceed 1, and for small ones a call takes longer than the bytes.
Inputs, outputs and gradients have the dtype, parameters and statistics are float32. Layers are called as their users
call them: Equinox's takes channels first, under `vmap`; PyTorch's channels last, eagerly, in a process of its own,
whose threads wait actively, or in another one passively: the faster of both counts in each row.

![Time of jaxbn over that of other layers]({figure})

{more}"""
MORE = f"[Batch norm as compiled for TPUs and GPUs]({COMPILED.name}).\n\n"


class Shown(NamedTuple):
    """A block: the file of its numbers in the folder of measurements, their command, and what makes its text."""

    file: str | Path
    command: str
    text: Callable[[dict], str]


BLOCKS = {
    "numerics": Shown(numerics.NAME, "numerics", tables.numerics_table),
    "layers": Shown(layers.NAME, "bench --only layers", tables.layers_table),
    "steps": Shown(steps.NAME, "bench --only steps", tables.steps_table),
    "collectives": Shown(collectives.NAME, "collectives", tables.collectives_table),
    "scoreboard": Shown(judge.FOLDER / judge.NAME, "scoreboard", judge.summary),  # beside its page
    "throughput": Shown(throughput.NAME, "throughput", tables.throughput_sentence),
    "folding": Shown(folding.NAME, "folding", tables.folding_table),
    "calibration": Shown(calibration.NAME, "calibration", tables.calibration_table),
    "accelerators": Shown(accelerators.NAME, "bench --only accelerators", compiled.block),
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
    if (path := folder / f"{layers.NAME}.jsonl").is_file():
        run, page, figure = files.read_records(path), project / PAGE, project / FIGURE
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(layers_page(run, folder), encoding="utf-8")
        written += [page, layers_figure(run, figure)]
    if (path := folder / f"{accelerators.NAME}.jsonl").is_file():
        page = project / COMPILED
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(compiled_page(files.read_records(path)), encoding="utf-8")
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


def wrapped(text: str) -> str:
    """Returns Markdown whose paragraphs have lines of at most 120 letters; tables, which cannot, stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if each.startswith("|") else textwrap.fill(each, WIDTH) for each in paragraphs)


def origin(header: dict) -> str:
    """Returns on what, and with which versions, something was measured, in words."""
    compilers = header.get("compilers", {})
    versions = {name: header["versions"][name] for name in ("jax", "flax")} | compilers
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"compiled with {with_what}" if compilers else f"on {studies.hardware(header['hardware'])}, with {with_what}"


def compiled_page(run: dict) -> str:
    """Returns the text of docs/bench/accelerators.md, from the measurements of compiled programs."""
    header = run["header"]
    versions = {name: header["versions"][name] for name in ("jax", "jaxlib", "flax")} | header["compilers"]
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = f"{PYTHON} {BLOCKS['accelerators'].command}"
    return wrapped(compiled.page(run, command=command, origin=f"with {with_what}, at commit {header['commit']}")) + "\n"


def layers_page(run: dict, folder: Path) -> str:
    """Returns the text of docs/bench/README.md.

    Args:
      run: the measurements of the layers.
      folder: of all measurements; the page links to those that have a page of their own.
    """
    header = run["header"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    measured = (
        f"Measured on {studies.hardware(header['hardware'])}, last cache {header['hardware']['largest_cache']}, which "
        f"copies large arrays at {header['copy_bandwidth'] / 1e9:.1f} GB/s, with {versions}, at commit "
        f"{header['commit']}."
    )
    head = HEAD.format(
        python=PYTHON,
        origin=measured,
        rounds=header["settings"]["rounds"],
        milliseconds=1e3 * layers.AT_LEAST,
        figure=FIGURE.name,
        more=MORE if (folder / f"{accelerators.NAME}.jsonl").is_file() else "",
    )
    return wrapped(head + tables.layers_pages(run)) + "\n"


def layers_figure(run: dict, path: Path) -> Path:
    """Draws the ratios of all rows, one panel for each pass; returns the file written."""
    records = run["records"]
    names = tables.arms_of(records)
    panels = []
    for name in dict.fromkeys(record["pass"] for record in records):
        chosen = [record for record in records if record["pass"] == name]
        series = []
        for dtype in dict.fromkeys(record["dtype"] for record in chosen):
            of_dtype = [record for record in chosen if record["dtype"] == dtype]
            values = [[r["ratio"]["median"] for r in of_dtype if r["arm"] == arm] for arm in names]
            series.append(plots.Series(dtype, values, COLORS.get(dtype, plots.PALETTE["black"])))
        panels.append(plots.Dots("time of jaxbn / time of the other", names, series, title=name))
    return plots.save(plots.draw(panels), path, digest=digest(run))


def digest(run: dict) -> str:
    """Returns a short name for the measurements, which the figure keeps."""
    return files.digest({layers.NAME: [run]})
