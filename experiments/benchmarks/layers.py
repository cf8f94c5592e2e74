"""Batch norm alone, with and without ReLU: every layer in turns, and how near it comes to the limit.

Conventions: a row is a pass, an activation, a dtype and a shape; a record is what one arm did in one row. `ratio` is
the time of this library's layer over that of the arm, the median of the ratios within the rounds. `limit` is the part
of the arm's time that the bytes that must move would take, at the bandwidth of a copy in the same rounds.
"""

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from experiments.benchmarks import (
    Settings,
    arms,
    limit,
    pytorch,
)
from experiments.evidence import files, plots, text, timing
from experiments.evidence.text import PYTHON, STABLE, markdown, select, with_quartiles, wrapped

COLORS = {"float32": plots.PALETTE["blue"], "bfloat16": plots.PALETTE["vermilion"]}
PAGE, FIGURE = Path("docs/bench/README.md"), Path("docs/bench/layers.png")
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

LARGE_ARRAY = 4 * 2**20  # bytes; a copy of a smaller one times mostly the call

NAME = "bench-layers"
OURS, COPY, PYTORCH = "jaxbn", "copy", "PyTorch"
AT_LEAST = 2e-3  # seconds of a sample
TOGETHER = {"cpu": 1}  # calls between two waits; elsewhere 10


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns the pieces of this part: one for each dtype and shape."""
    return {
        f"{dtype} {'x'.join(map(str, shape))}": functools.partial(measure, shape, dtype, settings.rounds)
        for shape in settings.shapes
        for dtype in settings.dtypes
    }


def measure(shape: tuple[int, ...], dtype: str, rounds: int) -> list[dict]:
    """Returns the records of all passes on inputs of a shape and dtype."""
    platform = jax.devices()[0].platform
    how = {"at_least": AT_LEAST, "together": TOGETHER.get(platform, 10)}
    x, dy = arms.inputs(shape, dtype)
    layers, records = available(), []
    copy = timing.sampler(limit.copy(shape, dtype), wait=jax.block_until_ready, **how)
    device = "cpu" if platform == "cpu" else "cuda"
    with contextlib.ExitStack() as stack:
        workers = {
            waiting: stack.enter_context(pytorch.Worker(device=device, waiting=waiting, **how))
            for waiting in pytorch.WAITING
        }
        for row in rows(shape, dtype):
            samples = {COPY: copy}
            for name, arm in layers.items():
                call = arms.compiled(arm, row["pass"], row["activation"], x, dy)
                samples[name] = timing.sampler(call, wait=jax.block_until_ready, **how)
            for waiting, worker in workers.items():
                try:
                    samples[f"{PYTORCH}, {waiting}"] = worker.prepare(row)
                except RuntimeError as error:
                    left_out(PYTORCH, error)
            records += summarize(row, faster_of_pytorch(timing.in_rounds(samples, rounds)))
    return records


def rows(shape: tuple[int, ...], dtype: str) -> Iterator[dict]:
    """Yields what is measured on inputs of a shape and dtype."""
    for name in arms.PASSES:
        for activation in arms.ACTIVATIONS:
            yield {"pass": name, "activation": activation, "dtype": dtype, "shape": list(shape)}


def available() -> dict[str, arms.Arm]:
    """Returns the layers whose libraries are installed, and says which are not."""
    found = {}
    for name, make in arms.ARMS.items():
        try:
            found[name] = make()
        except ImportError as error:
            left_out(name, error)
    return found


def left_out(name: str, error: Exception) -> None:
    """Says, once for all pieces, that an arm is left out."""
    hint = "; pip install 'jaxbn[peers]' brings it" if "No module named" in str(error) else ""
    _say(f"{name} is left out: {error}{hint}.")


@functools.cache
def _say(line):
    print(line, file=sys.stderr)


def faster_of_pytorch(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Returns the seconds by arm, with those of PyTorch that are the faster by their median, whichever way it waits."""
    names = [name for name in seconds if name.startswith(PYTORCH)]
    others = {name: values for name, values in seconds.items() if name not in names}
    if not names:
        return others
    return others | {PYTORCH: min((seconds[name] for name in names), key=statistics.median)}


def summarize(row: dict, seconds: dict[str, list[float]]) -> list[dict]:
    """Returns the records of a row: one for each arm, and one for the copy.

    Args:
      row: what was measured.
      seconds: by arm, one for each round; with those of the copy.
    """
    moved = limit.ARRAYS_MOVED[row["pass"]] / limit.ARRAYS_COPIED
    shape, dtype = row["shape"], row["dtype"]
    records = [
        {
            **row,
            "arm": COPY,
            "seconds": timing.quartiles(seconds[COPY]),
            "bandwidth": limit.bandwidth(timing.quartiles(seconds[COPY])["median"], shape, dtype),
        }
    ]
    for name, values in seconds.items():
        if name != COPY:
            fraction = timing.ratio([moved * each for each in seconds[COPY]], values)
            ratio = timing.ratio(seconds[OURS], values)
            records.append({**row, "arm": name, "seconds": timing.quartiles(values), "ratio": ratio, "limit": fraction})
    return records


def block(run: dict) -> str:
    """Returns the geometric means of the ratios by arm, pass and dtype, and the part of the limit that is reached."""
    records = run["records"]
    columns = {(record["dtype"], record["pass"]): None for record in records}
    lines = []
    for arm in arms_of(records):
        line = {"time of jaxbn over that of": arm}
        for dtype, name in columns:
            line[f"{name}, {dtype}"] = _mean_and_worst(select(records, arm=arm, dtype=dtype, **{"pass": name}))
        lines.append(line)
    reached = {"time of jaxbn over that of": "*part of the limit that jaxbn reaches*"}
    for dtype, name in columns:
        ours = select(records, arm=OURS, dtype=dtype, **{"pass": name})
        parts = [record["limit"]["median"] for record in ours if array_bytes(record) >= LARGE_ARRAY]
        reached[f"{name}, {dtype}"] = f"{timing.geometric_mean(parts):.2f}" if parts else "-"
    shapes = len({tuple(record["shape"]) for record in records})
    return (
        f"{markdown([*lines, reached])}\n\nGeometric means over batch norm alone and with ReLU on {shapes} shapes (in "
        f"brackets the worst of these rows). {STABLE} PyTorch: channels last. Limit: the bytes that must move, at the "
        f"bandwidth of a copy, for arrays of {LARGE_ARRAY // 2**20} MiB and more."
    )


def all_rows(run: dict) -> str:
    """Returns all rows, one table for each pass and dtype, with quartiles."""
    parts, records = [], run["records"]
    for dtype, name in {(record["dtype"], record["pass"]): None for record in records}:
        chosen = select(records, dtype=dtype, **{"pass": name})
        lines = []
        for ours in select(chosen, arm=OURS):
            row = {key: ours[key] for key in ("shape", "activation")}
            line = {"shape": "x".join(map(str, row["shape"])), "activation": row["activation"]}
            line["jaxbn, ms"] = f"{1e3 * ours['seconds']['median']:.3f}"
            line["of the limit"] = f"{ours['limit']['median']:.2f}"
            (copy,) = select(chosen, arm=COPY, **row)
            line["copy, GB/s"] = f"{copy['bandwidth'] / 1e9:.1f}"
            for arm in arms_of(chosen):
                found = select(chosen, arm=arm, **row)
                line[arm] = with_quartiles(found[0]["ratio"]) if found else "-"
            lines.append(line)
        parts.append(f"## {name}, {dtype}\n\n{markdown(lines)}")
    return "\n\n".join(parts)


def arms_of(records: Sequence[dict]) -> list[str]:
    """Returns the layers that jaxbn is compared with, in their order."""
    return list(dict.fromkeys(r["arm"] for r in records if r["arm"] not in (OURS, COPY)))


def array_bytes(record: dict) -> float:
    """Returns the size of the inputs of a row."""
    return limit.bytes_moved("eval", tuple(record["shape"]), record["dtype"]) / limit.ARRAYS_MOVED["eval"]


def _mean_and_worst(records):
    if not records:
        return "-"
    ratios = [record["ratio"]["median"] for record in records]
    return f"{timing.geometric_mean(ratios):.2f} ({max(ratios):.2f})"


def page(run: dict, more: str) -> str:
    """Returns the text of docs/bench/README.md.

    Args:
      run: the measurements of the layers.
      more: Markdown below the figure, such as links to other pages; may be empty.
    """
    header = run["header"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    measured = (
        f"Measured on {text.hardware(header['hardware'])}, last cache {header['hardware']['largest_cache']}, which "
        f"copies large arrays at {header['copy_bandwidth'] / 1e9:.1f} GB/s, with {versions}, at commit "
        f"{header['commit']}."
    )
    head = HEAD.format(
        python=PYTHON,
        origin=measured,
        rounds=header["settings"]["rounds"],
        milliseconds=1e3 * AT_LEAST,
        figure=FIGURE.name,
        more=more,
    )
    return wrapped(head + all_rows(run)) + "\n"


def figure(run: dict, path: Path) -> Path:
    """Draws the ratios of all rows, one panel for each pass; returns the file written."""
    records = run["records"]
    names = arms_of(records)
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
    return files.digest({NAME: [run]})
