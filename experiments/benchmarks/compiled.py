"""The page of compiled programs, docs/bench/accelerators.md, and the block of README.md with some of its rows.

Conventions: both are made from the records of `experiments.benchmarks.accelerators`, and work with any subset of them.
MB are millions of bytes in device memory, moved by kernels or by asynchronous copies to and from the chip.
"""

from collections.abc import Callable

from experiments.benchmarks import programs, steps
from experiments.evidence.text import markdown, select

HEAD = """# Batch norm as compiled for TPUs and GPUs

**These programs were compiled, and their kernels and bytes counted. They were not run: this page shows no times.**
Each was compiled ahead of time by the compiler that is used on the chip itself, {origin}. Written by
`python -m experiments table` from the file that `{command}` writes.

A row is a program. MB: millions of bytes that its kernels read and write in device memory, and that asynchronous copies
move between device memory and a TPU's on-chip memory, on one chip; in parentheses, relative to Flax. Kernels: those
that execute; fused operations are one kernel. Temporaries: device memory besides arguments and results. Of a
conditional, the usual branch is counted; jaxbn's layer takes the other one only where features cancel. Collectives in
that branch are in parentheses with a plus sign. Inputs have the dtype of the row; parameters and statistics are
float32. Training steps use SGD with momentum, in bfloat16 with mixed precision. For inputs with two axes, "conv" is a
matrix product. Flax, stable: `use_fast_variance=False`. jaxbn, shifted: `method=jaxbn.shifted_normalize`. Affine only:
a scale and bias instead of each norm. None: the ReLU or the network without a norm. Folded: a convolution with bias,
and no norm.

"""
TITLES = {
    "layer": "The layer alone, and with ReLU",
    "block": "Between convolutions",
    "inference": "Evaluation",
    "step": "Training steps",
}
DEAD = "not compiled"
SHOWN_TARGETS = {"v6e": "TPU v6e", "h100": "H100"}
SHOWN_SHAPE = [256, 56, 56, 64]


def page(run: dict, *, command: str, origin: str) -> str:
    """Returns the text of the page.

    Args:
      run: the measurements.
      command: the command that makes them.
      origin: the versions they were made with, in words.
    """
    parts, records = [], run["records"]
    for target in dict.fromkeys(record["target"] for record in records):
        parts.append(f"## {target}")
        for kind, title in TITLES.items():
            if of_kind := select(records, target=target, kind=kind):
                parts.append(f"### {title}, {target}\n\n{markdown(rows(of_kind))}")
    if failed := failures(records):
        parts.append(f"## Not compiled\n\n{markdown(failed)}")
    return HEAD.format(command=command, origin=origin) + "\n\n".join(parts)


def rows(records: list[dict]) -> list[dict]:
    """Returns the rows of a table: one for each program, with all its arms."""
    # Records of the same program differ only in their arm, and become the columns of a row.
    by_program = {}
    for record in records:
        by_program.setdefault(_title(record), {})[record["arm"]] = record
    arms = list(dict.fromkeys(record["arm"] for record in records))
    has_collectives = any(record["chips"] > 1 for record in records)
    table = []
    for title, by_arm in by_program.items():
        ours, flax = by_arm.get(steps.OURS), by_arm.get(steps.FLAX)
        row = dict(title)
        row |= {f"{arm}, MB": _moved_relative(by_arm.get(arm), flax) for arm in arms}
        row["kernels, jaxbn / Flax"] = _both(ours, flax, lambda record: f"{record['kernels']}")
        row["temporaries, jaxbn / Flax, MB"] = _both(ours, flax, lambda record: megabytes(record["temporaries"]))
        if has_collectives:
            row["collectives, jaxbn / Flax"] = _both(ours, flax, collectives)
            row["bytes in them"] = _both(ours, flax, lambda record: f"{record['collective_bytes']:,}")
        table.append(row)
    return table


def failures(records: list[dict]) -> list[dict]:
    """Returns the rows of a table of programs that were not compiled, grouped by reason."""
    subjects_by_reason = {}
    for record in records:
        if not record["compiled"]:
            title = dict(_title(record))
            subject = f"{title.pop('program')}, {', '.join(title.values())}"
            reason = (record["target"], record["arm"], record["error"])
            subjects_by_reason.setdefault(reason, []).append(subject)
    return [
        {"target": target, "arm": arm, "programs": "; ".join(subjects), "reason": error.replace("|", "\\|")}
        for (target, arm, error), subjects in subjects_by_reason.items()
    ]


def block(run: dict) -> str:
    """Returns the rows that README.md shows: the usual networks and a large layer, on a TPU and a GPU."""
    by_program = {}
    for record in run["records"]:
        if subject := _subject_in_block(record):
            program = (_SUBJECTS.index(subject), subject, record["target"], record["dtype"])
            by_program.setdefault(program, {})[record["arm"]] = record
    table = []
    for (_, subject, target, dtype), by_arm in sorted(by_program.items(), key=lambda item: item[0][0]):
        none, flax, ours = (by_arm.get(arm) for arm in (steps.NONE, steps.FLAX, steps.OURS))
        table.append(
            {
                "program": subject,
                "compiled for": f"{SHOWN_TARGETS[target]}, {dtype}",
                "no norm, MB": _moved(none),
                "Flax, MB": _moved(flax),
                "jaxbn, MB": _moved(ours),
                "kernels, none / Flax / jaxbn": " / ".join(
                    f"{record['kernels']}" if _compiled(record) else "-" for record in (none, flax, ours)
                ),
            }
        )
    shape = "x".join(map(str, SHOWN_SHAPE))
    return (
        f"{markdown(table) if table else 'These programs are not measured yet.'}\n\nCompiled ahead of time and "
        "counted, not run: bytes that one step or pass reads and writes in device memory. Steps of ResNet-50 and "
        f"ResNet-20 at batch 128, and the layer with ReLU on {shape}."
    )


_SUBJECTS = ("ResNet-50, step", "ResNet-20, step", "norm and ReLU, forward+backward", "norm and ReLU, forward")


def _subject_in_block(record: dict) -> str | None:
    """Returns the name of a record in the block, or None for a record that the block leaves out."""
    if record["target"] not in SHOWN_TARGETS or record["chips"] != 1:
        return None
    if record["kind"] == "layer" and record["shape"] == SHOWN_SHAPE and record["what"] == programs.NORM_RELU:
        return f"norm and ReLU, {record['pass']}"
    subject = f"{record.get('net')}, step"
    return subject if subject in _SUBJECTS else None


def collectives(record: dict) -> str:
    """Formats the collectives of a record, such as "39 (+19)"."""
    rare = record["rare_collectives"]
    return f"{record['collectives']}" + (f" (+{rare})" if rare else "")


def moved(record: dict) -> int:
    """Returns the bytes that a program moves in device memory."""
    return record["bytes"] + record["copied"]


def megabytes(size: float) -> str:
    """Formats bytes in millions, with a decimal below 100."""
    millions = size / 1e6
    return f"{millions:,.0f}" if millions >= 99.95 else f"{millions:.1f}"


def _title(record: dict) -> tuple[tuple[str, str], ...]:
    """Identifies the program of a record: pairs of a column and its cell."""
    if "net" in record:
        title = {
            "program": f"{record['net']}, batch {record['batch_size']}",
            "dtype": record["dtype"],
            "chips": f"{record['chips']}, `{record['api']}`",
        }
    else:
        title = {
            "program": record["what"],
            "pass": record["pass"],
            "shape": "x".join(map(str, record["shape"])),
            "dtype": record["dtype"],
        }
    return tuple(title.items())


def _compiled(record: dict | None) -> bool:
    return record is not None and record["compiled"]


def _moved(record: dict | None) -> str:
    if record is None:
        return "-"
    return megabytes(moved(record)) if record["compiled"] else DEAD


def _moved_relative(record: dict | None, flax: dict | None) -> str:
    """Formats the bytes of a record, and in parentheses their ratio to Flax's."""
    if not _compiled(record) or not _compiled(flax) or record is flax:
        return _moved(record)
    return f"{_moved(record)} ({moved(record) / moved(flax):.2f})"


def _both(ours: dict | None, flax: dict | None, cell: Callable[[dict], str]) -> str:
    """Formats a count of both layers."""
    return " / ".join(cell(record) if _compiled(record) else "-" for record in (ours, flax))
