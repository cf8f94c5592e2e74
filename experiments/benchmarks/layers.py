"""Batch norm alone, with and without ReLU: every layer in turns, and how near it comes to the limit.

Conventions: a row is a pass, an activation, a dtype and a shape; a record is what one arm did in one row. `ratio` is
the time of this library's layer over that of the arm, the median of the ratios within the rounds. `limit` is the part
of the arm's time that the bytes that must move would take, at the bandwidth of a copy in the same rounds.
"""

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable, Iterator

import jax

from experiments.benchmarks import Settings, arms, limit, pytorch
from experiments.evidence import timing

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
