"""Batch norm as it is compiled for TPUs and GPUs: kernels, bytes, memory and collectives, counted and not run.

Conventions: a record is one arm in one row, a program that is compiled for a target; `bytes` and the other counts are
those of `kernels.py`, on one chip. An arm that the compiler refuses, or dies of, is a record with `compiled`
False and `error`. What programs exist for a target is bounded: `LARGE` nets and several chips only where they tell
something new.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from experiments.benchmarks import Settings, aot, arms, kernels, programs, steps, targets

NAME = "bench-accelerators"
OURS, FLAX, STABLE = steps.OURS, steps.FLAX, "Flax, stable"
NORMS = (OURS, programs.SHIFTED, FLAX, STABLE)
IMAGE_SIZE = 32  # of all nets but ResNet-50
LARGE = {"ResNet-50": ("v6e", "h100"), "Inception": ("v6e", "h100")}  # targets of the nets that take long to compile
PARALLEL = {"v5e": (16, 256), "h100": (8, 16)}  # numbers of chips
APIS = ("jit", "shard_map")
PER_CHIP = 8  # images, at least


def header(settings: Settings) -> dict:
    """Returns what the numbers depend on besides: the compilers, and what they could compile for.

    Raises:
      ModuleNotFoundError: there is no compiler for any of the targets.
    """
    return {"compilers": targets.versions(), "targets": list(available(settings.targets))}


def available(names: tuple[str, ...]) -> list[str]:
    """Returns the targets whose compilers are installed, and says which are not.

    Raises:
      ModuleNotFoundError: no target is left.
    """
    reasons = {name: targets.missing(name) for name in names}
    found = [name for name in names if not reasons[name]]
    if not found:
        absent = "; ".join(sorted(set(reasons.values())))
        raise ModuleNotFoundError(f"there is no target to compile for: {absent}; {targets.HINT}.")
    for name in names:
        if reasons[name]:
            _say(f"{name} is left out: {reasons[name]}; {targets.HINT}.")
    return found


@functools.cache
def _say(line):
    print(line, file=sys.stderr)


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns the pieces of this part: one for each target, kind, dtype, and shape or net."""
    grouped = {}
    for target in available(settings.targets):
        for row in rows(target, settings):
            subject = f"{row['net']} on {row['chips']}" if "net" in row else "x".join(map(str, row["shape"]))
            grouped.setdefault(f"{target} {row['kind']} {subject} {row['dtype']}", []).append(row)
    return {name: functools.partial(measure, chosen, settings.jobs) for name, chosen in grouped.items()}


def rows(target: str, settings: Settings) -> Iterator[dict]:
    """Yields what is compiled for a target, with one arm each."""
    for dtype in settings.dtypes:
        for shape in settings.compiled_shapes:
            for kind in settings.kinds:
                for what, name, chosen in _layers(kind):
                    for arm in chosen:
                        if arm in settings.arms or arm == programs.FOLDED and OURS in settings.arms:
                            yield {
                                "target": target,
                                "kind": kind,
                                "what": what,
                                "shape": list(shape),
                                "dtype": dtype,
                                "pass": name,
                                "chips": 1,
                                "api": "jit",
                                "arm": arm,
                            }
        for net, chips, api in _steps(target, settings):
            for arm in settings.arms:
                yield {
                    "target": target,
                    "kind": "step",
                    "what": "training step",
                    **sizes(net, chips, settings),
                    "dtype": dtype,
                    "pass": "forward+backward",
                    "chips": chips,
                    "api": api,
                    "arm": arm,
                }


def _layers(kind):
    """The programs of a kind whose inputs have a shape: what, pass, and arms."""
    training = [name for name in arms.PASSES if name != "eval"]
    if kind == "layer":
        alone = {programs.NORM: NORMS, programs.NORM_RELU: (*NORMS, steps.NONE)}
        return [(what, name, chosen) for name in training for what, chosen in alone.items()]
    if kind == "block":
        return [(programs.BLOCK, name, NORMS) for name in training]
    if kind == "inference":
        return [
            (programs.NORM_RELU, "eval", (OURS, FLAX, programs.AFFINE)),
            (programs.PAIR, "eval", (OURS, FLAX, programs.AFFINE, programs.FOLDED)),
        ]
    return []


def _steps(target, settings):
    """The steps of a target: net, number of chips, and API."""
    if "step" in settings.kinds:
        for net in settings.nets:
            if target in LARGE.get(net, (target,)):
                yield net, 1, "jit"
    if "parallel" in settings.kinds and "ResNet-20" in settings.nets:
        for chips in PARALLEL.get(target, ()):
            for api in APIS:
                yield "ResNet-20", chips, api


def sizes(net: str, chips: int, settings: Settings) -> dict:
    """Returns the part of a row that says how large a net is."""
    return {
        "net": net,
        "batch_size": max(settings.batch_size, PER_CHIP * chips),
        "image_size": settings.large_image_size if net == "ResNet-50" else IMAGE_SIZE,
        "width": 1.0 if net == "ResNet-50" else settings.width,
    }


def measure(chosen: list[dict], jobs: int = 1) -> list[dict]:
    """Returns the records of rows.

    Args:
      chosen: the rows.
      jobs: programs that are compiled at once.
    """
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(measure_row, chosen))
        except KeyboardInterrupt:  # or the threads would wait for their compilers
            aot.end_all()
            raise


def measure_row(row: dict) -> dict:
    """Returns the record of a row: what is counted in its program, or why there is none."""
    try:
        compiled = aot.compile_apart(functools.partial(programs.lower, row), row["target"], chips=row["chips"])
    except aot.CompilationError as error:
        return {**row, "compiled": False, "error": str(error)}
    found = kernels.count(compiled.hlo)
    return {
        **row,
        "compiled": True,
        "bytes": found.bytes,
        "kernels": found.kernels,
        "temporaries": compiled.temporaries,
        "peak": compiled.peak,
        "copied": found.copied,
        "conditionals": found.conditionals,
        "whiles": found.whiles,
        "rare_bytes": found.rare.bytes,
        "rare_kernels": found.rare.kernels,
        "collectives": found.collectives,
        "rare_collectives": found.rare.collectives,
        "collective_bytes": found.collective_bytes,
    }
