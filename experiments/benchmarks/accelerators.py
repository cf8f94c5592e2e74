"""Batch norm compiled for TPUs and GPUs: kernels, bytes, memory and collectives, counted without running anything.

Conventions: a row is a program and an arm, compiled for a target; a record adds the counts of `kernels.py` on one chip.
If the compiler rejects a program, or crashes on it, the record has `compiled` False and `error`. Few targets get the
`LARGE` networks and several chips, since compiling them takes long.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from experiments.benchmarks import Settings, aot, arms, compiled, kernels, programs, steps, targets
from experiments.evidence import provenance

NAME = "bench-accelerators"
OURS, FLAX, STABLE = steps.OURS, steps.FLAX, "Flax, stable"
NORMS = (OURS, programs.SHIFTED, FLAX, STABLE)
IMAGE_SIZE = 32  # except for ResNet-50
LARGE = {"ResNet-50": ("v6e", "h100"), "Inception": ("v6e", "h100")}  # targets of networks that compile slowly
PARALLEL = {"v5e": (16, 256), "h100": (8, 16)}  # numbers of chips
APIS = ("jit", "shard_map")
PER_CHIP = 8  # smallest number of images
block = compiled.block


def header(settings: Settings) -> dict:
    """Returns the first line of the file, with the compilers and the targets they support.

    Raises:
      ModuleNotFoundError: no target has a compiler here.
    """
    compilers = {"compilers": targets.versions(), "targets": list(available(settings.targets))}
    names = ("dtypes", "kinds", "nets", "arms", "compiled_shapes", "batch_size", "width", "large_image_size")
    return provenance.measurement_header(settings.to_json(*names)) | compilers


def available(names: tuple[str, ...]) -> list[str]:
    """Returns the targets whose compilers are installed, and prints which are missing.

    Raises:
      ModuleNotFoundError: no target is left.
    """
    reasons = {name: reason for name in names if (reason := targets.missing(name))}
    if len(reasons) == len(names):
        raise ModuleNotFoundError(
            f"no compiler for any target: {'; '.join(sorted(set(reasons.values())))}; {targets.HINT}."
        )
    for name, reason in reasons.items():
        _print_once(f"{name} is left out: {reason}; {targets.HINT}.")
    return [name for name in names if name not in reasons]


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns one piece for each target, kind, dtype, and shape or network."""
    rows_by_piece = {}
    for target in available(settings.targets):
        for row in rows(target, settings):
            subject = f"{row['net']} on {row['chips']}" if "net" in row else "x".join(map(str, row["shape"]))
            rows_by_piece.setdefault(f"{target} {row['kind']} {subject} {row['dtype']}", []).append(row)
    return {name: functools.partial(measure, piece, settings.jobs) for name, piece in rows_by_piece.items()}


def rows(target: str, settings: Settings) -> Iterator[dict]:
    """Yields the rows of a target: layers and blocks by shape, then training steps."""
    for dtype in settings.dtypes:
        for shape in settings.compiled_shapes:
            for kind in settings.kinds:
                for what, name, arms_of_program in _layers(kind):
                    for arm in arms_of_program:
                        # Folding is what jaxbn offers for evaluation, so it is chosen with jaxbn.
                        if arm in settings.arms or (arm == programs.FOLDED and OURS in settings.arms):
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


def _layers(kind: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """Returns the programs of a kind that has shapes: their content, pass and arms."""
    training = [name for name in arms.PASSES if name != "eval"]
    if kind == "layer":
        alone = {programs.NORM: NORMS, programs.NORM_RELU: (*NORMS, steps.NONE)}
        return [(what, name, norms) for name in training for what, norms in alone.items()]
    if kind == "block":
        return [(programs.BLOCK, name, NORMS) for name in training]
    if kind == "inference":
        return [
            (programs.NORM_RELU, "eval", (OURS, FLAX, programs.AFFINE)),
            (programs.PAIR, "eval", (OURS, FLAX, programs.AFFINE, programs.FOLDED)),
        ]
    return []


def _steps(target: str, settings: Settings) -> Iterator[tuple[str, int, str]]:
    """Yields the training steps of a target: network, number of chips, and API."""
    if "step" in settings.kinds:
        for net in settings.nets:
            if target in LARGE.get(net, (target,)):
                yield net, 1, "jit"
    if "parallel" in settings.kinds and "ResNet-20" in settings.nets:
        for chips in PARALLEL.get(target, ()):
            for api in APIS:
                yield "ResNet-20", chips, api


def sizes(net: str, chips: int, settings: Settings) -> dict:
    """Returns the fields of a row that give the size of a network."""
    return {
        "net": net,
        "batch_size": max(settings.batch_size, PER_CHIP * chips),
        "image_size": settings.large_image_size if net == "ResNet-50" else IMAGE_SIZE,
        "width": 1.0 if net == "ResNet-50" else settings.width,
    }


def measure(piece: list[dict], jobs: int = 1) -> list[dict]:
    """Compiles the rows of a piece and returns their records.

    Args:
      piece: the rows.
      jobs: number of programs compiled at the same time.
    """
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(measure_row, piece))
        except KeyboardInterrupt:
            # Leaving the pool waits for its threads, and they wait for their compilers.
            aot.end_all()
            raise


def measure_row(row: dict) -> dict:
    """Returns the record of a row: the counts of its program, or the reason why there is none."""
    try:
        program = aot.compile_apart(functools.partial(programs.lower, row), row["target"], chips=row["chips"])
    except aot.CompilationError as error:
        return {**row, "compiled": False, "error": str(error)}
    count = kernels.count(program.hlo)
    return {
        **row,
        "compiled": True,
        "bytes": count.bytes,
        "kernels": count.kernels,
        "temporaries": program.temporaries,
        "peak": program.peak,
        "copied": count.copied,
        "conditionals": count.conditionals,
        "whiles": count.whiles,
        "rare_bytes": count.rare.bytes,
        "rare_kernels": count.rare.kernels,
        "collectives": count.collectives,
        "rare_collectives": count.rare.collectives,
        "collective_bytes": count.collective_bytes,
    }
