"""Time of batch norm alone, with and without ReLU, compared with other libraries and with the memory bandwidth.

Conventions: a row is a pass, an activation, a dtype and a shape; a record holds the times of one arm in one row.
`ratio` is the time of this library's layer divided by the arm's, the median of the ratios within the rounds. `limit` is
the fraction of the arm's time needed to move the bytes at the bandwidth of a copy in the same rounds.
"""

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from experiments.benchmarks import Settings, arms, limit, pytorch
from experiments.evidence import files, plots, provenance, text, timing
from experiments.evidence.text import PYTHON, STABLE, markdown, select, with_quartiles, wrapped

COLORS = {"float32": plots.PALETTE["blue"], "bfloat16": plots.PALETTE["vermilion"]}
PAGE, FIGURE = Path("docs/bench/README.md"), Path("docs/bench/layers.png")
HEAD = """# Batch norm alone, row by row

Written by `python -m experiments table` from the file that `{python} bench layers` writes.
{origin}

A row is a pass, an activation, a shape and a dtype. The columns of the other libraries hold the time of jaxbn divided
by theirs: the median of the ratios within {rounds} rounds, and their quartiles. Each round times every arm once, in
shuffled order, for at least {milliseconds:g} ms, right after a warm-up call. "Fraction of the limit" is the time needed
to move the bytes divided by jaxbn's time, at the bandwidth of a copy of an array of that size in the same rounds. The
bytes are: forward, x read twice and y written; backward, x and dy read twice and dx written; in evaluation, x read and
y written; the same with ReLU. The fraction can exceed 1 for arrays that fit into the caches; for small arrays, a call
takes longer than moving the bytes. Inputs, outputs and gradients have the dtype of the row; parameters and statistics
are float32. Layers are called the way their users call them: Equinox channels first, under `vmap`; PyTorch channels
last, eagerly, in two separate processes, whose threads wait actively or passively; each row shows the faster one.

![Time of jaxbn over that of other layers]({figure})

{more}"""

NAME = "bench-layers"
LARGE_ARRAY = 4 * 2**20  # bytes; for a smaller array, the overhead of a call dominates the copy
OURS, COPY, PYTORCH = "jaxbn", "copy", "PyTorch"
AT_LEAST = 2e-3  # seconds of a sample
TOGETHER = {"cpu": 1}  # calls between two waits; 10 on other platforms


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    plain = settings.to_json("rounds", "shapes", "dtypes")
    return provenance.measurement_header(plain) | {"copy_bandwidth": limit.memory_bandwidth()}


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns one piece for each shape and dtype."""
    return {
        f"{dtype} {'x'.join(map(str, shape))}": functools.partial(measure, shape, dtype, settings.rounds)
        for shape in settings.shapes
        for dtype in settings.dtypes
    }


def measure(shape: tuple[int, ...], dtype: str, rounds: int) -> list[dict]:
    """Returns the records of all passes on inputs of this shape and dtype."""
    platform = jax.devices()[0].platform
    sampling = {"at_least": AT_LEAST, "together": TOGETHER.get(platform, 10)}
    x, dy = arms.inputs(shape, dtype)
    layers, records = available(), []
    copy = timing.sampler(limit.copy(shape, dtype), wait=jax.block_until_ready, **sampling)
    device = "cpu" if platform == "cpu" else "cuda"
    with contextlib.ExitStack() as stack:
        workers = {
            waiting: stack.enter_context(pytorch.Worker(device=device, waiting=waiting, **sampling))
            for waiting in pytorch.WAITING
        }
        for row in rows(shape, dtype):
            # All arms of a row are ready before the first one is timed, so that the rounds can alternate between them.
            samples = {COPY: copy}
            for name, arm in layers.items():
                call = arms.compiled(arm, row["pass"], row["activation"], x, dy)
                samples[name] = timing.sampler(call, wait=jax.block_until_ready, **sampling)
            for waiting, worker in workers.items():
                # PyTorch may not be installed, or not support a dtype on this device.
                try:
                    samples[f"{PYTORCH}, {waiting}"] = worker.prepare(row)
                except RuntimeError as error:
                    left_out(PYTORCH, error)
            records += summarize(row, faster_of_pytorch(timing.in_rounds(samples, rounds)))
    return records


def rows(shape: tuple[int, ...], dtype: str) -> Iterator[dict]:
    """Yields the rows for inputs of this shape and dtype."""
    for name in arms.PASSES:
        for activation in arms.ACTIVATIONS:
            yield {"pass": name, "activation": activation, "dtype": dtype, "shape": list(shape)}


def available() -> dict[str, arms.Arm]:
    """Returns the layers whose libraries are installed, and prints which are missing."""
    layers = {}
    for name, make in arms.ARMS.items():
        try:
            layers[name] = make()
        except ImportError as error:
            left_out(name, error)
    return layers


def left_out(name: str, error: Exception) -> None:
    """Prints that an arm is left out, once for all pieces."""
    hint = "; install it with pip install 'jaxbn[peers]'" if "No module named" in str(error) else ""
    _print_once(f"{name} is left out: {error}{hint}.")


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)


def faster_of_pytorch(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Replaces PyTorch's two ways of waiting with the one with the smaller median."""
    of_pytorch = [values for name, values in seconds.items() if name.startswith(PYTORCH)]
    others = {name: values for name, values in seconds.items() if not name.startswith(PYTORCH)}
    return others | ({PYTORCH: min(of_pytorch, key=statistics.median)} if of_pytorch else {})


def summarize(row: dict, seconds: dict[str, list[float]]) -> list[dict]:
    """Returns the records of a row: one for the copy, and one for each arm.

    Args:
      row: from `rows`.
      seconds: by arm, one number for each round; includes the copy.
    """
    copied = timing.quartiles(seconds[COPY])
    bandwidth = limit.bandwidth(copied["median"], row["shape"], row["dtype"])
    records = [{**row, "arm": COPY, "seconds": copied, "bandwidth": bandwidth}]
    # A pass that moves three arrays takes at least 3 / 2 of the time of a copy, which moves two.
    moved = limit.ARRAYS_MOVED[row["pass"]] / limit.ARRAYS_COPIED
    shortest = [moved * copy_seconds for copy_seconds in seconds[COPY]]
    for name, values in seconds.items():
        if name != COPY:
            records.append(
                {
                    **row,
                    "arm": name,
                    "seconds": timing.quartiles(values),
                    "ratio": timing.ratio(seconds[OURS], values),
                    "limit": timing.ratio(shortest, values),
                }
            )
    return records


def block(run: dict) -> str:
    """Returns the geometric means of the ratios by arm, pass and dtype, and the fraction of the limit."""
    records = run["records"]
    columns = dict.fromkeys((record["dtype"], record["pass"]) for record in records)
    table = []
    for arm in arms_of(records):
        line = {"time of jaxbn / time of": arm}
        for dtype, name in columns:
            line[f"{name}, {dtype}"] = _mean_and_worst(select(records, arm=arm, dtype=dtype, **{"pass": name}))
        table.append(line)
    last_line = {"time of jaxbn / time of": "*fraction of the limit*"}
    for dtype, name in columns:
        ours = select(records, arm=OURS, dtype=dtype, **{"pass": name})
        fractions = [record["limit"]["median"] for record in ours if array_bytes(record) >= LARGE_ARRAY]
        last_line[f"{name}, {dtype}"] = f"{timing.geometric_mean(fractions):.2f}" if fractions else "-"
    shapes = len({tuple(record["shape"]) for record in records})
    return (
        f"{markdown([*table, last_line])}\n\nGeometric means over batch norm alone and with ReLU on {shapes} shapes; "
        f"in parentheses, the worst of these rows. {STABLE} PyTorch: channels last. Fraction of the limit: time to "
        "move the bytes at the bandwidth of a copy, divided by the time of jaxbn, for arrays of at least "
        f"{LARGE_ARRAY // 2**20} MiB."
    )


def all_rows(run: dict) -> str:
    """Returns all rows with quartiles, one table for each pass and dtype."""
    parts, records = [], run["records"]
    for dtype, name in dict.fromkeys((record["dtype"], record["pass"]) for record in records):
        of_table = select(records, dtype=dtype, **{"pass": name})
        table = []
        for ours in select(of_table, arm=OURS):
            row = {key: ours[key] for key in ("shape", "activation")}
            (copy,) = select(of_table, arm=COPY, **row)
            line = {
                "shape": "x".join(map(str, row["shape"])),
                "activation": row["activation"],
                "jaxbn, ms": f"{1e3 * ours['seconds']['median']:.3f}",
                "fraction of the limit": f"{ours['limit']['median']:.2f}",
                "copy, GB/s": f"{copy['bandwidth'] / 1e9:.1f}",
            }
            for arm in arms_of(of_table):
                of_arm = select(of_table, arm=arm, **row)
                line[arm] = with_quartiles(of_arm[0]["ratio"]) if of_arm else "-"
            table.append(line)
        parts.append(f"## {name}, {dtype}\n\n{markdown(table)}")
    return "\n\n".join(parts)


def arms_of(records: Sequence[dict]) -> list[str]:
    """Returns the layers that jaxbn is compared with, in their order."""
    return list(dict.fromkeys(record["arm"] for record in records if record["arm"] not in (OURS, COPY)))


def array_bytes(record: dict) -> float:
    """Returns the size of one array of a row: its inputs, outputs or gradients."""
    return limit.bytes_moved("eval", tuple(record["shape"]), record["dtype"]) / limit.ARRAYS_MOVED["eval"]


def _mean_and_worst(records: list[dict]) -> str:
    if not records:
        return "-"
    ratios = [record["ratio"]["median"] for record in records]
    return f"{timing.geometric_mean(ratios):.2f} ({max(ratios):.2f})"


def page(run: dict, more: str) -> str:
    """Returns the text of docs/bench/README.md.

    Args:
      run: the measurements.
      more: Markdown below the figure, such as links to other pages; may be empty.
    """
    header = run["header"]
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    measured = (
        f"Measured on {text.hardware(header['hardware'])}, last-level cache {header['hardware']['largest_cache']}, "
        f"which copies large arrays at {header['copy_bandwidth'] / 1e9:.1f} GB/s, with {versions}, at commit "
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
    """Draws the ratios of all rows, one panel for each pass, and returns the path of the figure."""
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
    """Returns a digest of the measurements, which the figure stores."""
    return files.digest({NAME: [run]})
