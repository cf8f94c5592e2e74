"""The page of compiled programs, docs/bench/accelerators.md, and the block of README.md that shows some of its rows.

Conventions: both are made from the records of `experiments.benchmarks.accelerators`, and work with any part of them. MB
are millions of bytes in device memory, those of kernels and of asynchronous copies to and from the chip together.
"""

from experiments.benchmarks import accelerators, programs
from experiments.evidence.text import markdown

HEAD = """# Batch norm as compiled for TPUs and GPUs

**These programs were compiled, and their kernels and bytes counted. They were not run: there is no time on this page.**
Each was compiled ahead of time by the compiler that compiles it on the chip itself, {origin}. Written by
`python -m experiments table` from the file that `{command}` writes.

A row is a program. MB: what its kernels read and write in device memory, and what asynchronous copies move between it
and a TPU's memory on the chip, in millions of bytes on one chip; in brackets, over Flax's. Kernels: those that execute,
fused operations being one. Temporaries: device memory besides arguments and results. Of a conditional, the usual branch
is counted; jaxbn's layer takes the other one only where features cancel. Collectives in such a branch are in brackets
with a plus sign. Inputs have the dtype, parameters and statistics are float32; steps in bfloat16 are those of mixed
precision, SGD with momentum. Where inputs have two axes, "conv" is a product with a matrix. Flax, stable:
`use_fast_variance=False`. jaxbn, shifted: `method=jaxbn.shifted_normalize`. Affine only: a scale and bias in place of
each norm. None: the ReLU, or the net, without a norm. Folded: the convolution has a bias, and there is no norm.

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
      command: makes them.
      origin: with which versions they were made, in words.
    """
    parts, records = [], run["records"]
    for target in dict.fromkeys(record["target"] for record in records):
        parts.append(f"## {target}")
        for kind, title in TITLES.items():
            chosen = [record for record in records if (record["target"], record["kind"]) == (target, kind)]
            if chosen:
                parts.append(f"### {title}, {target}\n\n{markdown(lines(chosen))}")
    if failed := failures(records):
        parts.append(f"## Not compiled\n\n{markdown(failed)}")
    return HEAD.format(command=command, origin=origin) + "\n\n".join(parts)


def lines(records: list[dict]) -> list[dict]:
    """Returns the lines of a table: one for each program, with all its arms."""
    by_row = {}
    for record in records:
        by_row.setdefault(_title(record), {})[record["arm"]] = record
    arms = list(dict.fromkeys(record["arm"] for record in records))
    several = any(record["chips"] > 1 for record in records)
    table = []
    for title, found in by_row.items():
        ours, flax = found.get(accelerators.OURS), found.get(accelerators.FLAX)
        line = dict(title)
        line |= {f"{arm}, MB": _moved_over(found.get(arm), flax) for arm in arms}
        line["kernels, jaxbn / Flax"] = _both(ours, flax, lambda record: f"{record['kernels']}")
        line["temporaries, jaxbn / Flax, MB"] = _both(ours, flax, lambda record: megabytes(record["temporaries"]))
        if several:
            line["collectives, jaxbn / Flax"] = _both(ours, flax, collectives)
            line["bytes in them"] = _both(ours, flax, lambda record: f"{record['collective_bytes']:,}")
        table.append(line)
    return table


def failures(records: list[dict]) -> list[dict]:
    """Returns the lines of a table of what was not compiled, and why; those with the same reason together."""
    grouped = {}
    for record in records:
        if not record["compiled"]:
            title = dict(_title(record))
            subject = f"{title.pop('of')}, {', '.join(title.values())}"
            grouped.setdefault((record["target"], record["arm"], record["error"]), []).append(subject)
    return [
        {"target": target, "arm": arm, "programs": "; ".join(subjects), "reason": error.replace("|", "\\|")}
        for (target, arm, error), subjects in grouped.items()
    ]


def block(run: dict) -> str:
    """Returns the rows that README.md shows: the usual nets and a large layer, on a TPU and a GPU."""
    found = {}
    for record in run["records"]:
        if subject := _shown(record):
            found.setdefault((subject, record["target"], record["dtype"]), {})[record["arm"]] = record
    table = [
        {
            "program": subject,
            "compiled for": f"{SHOWN_TARGETS[target]}, {dtype}",
            "no norm, MB": _moved(arms.get("none")),
            "Flax, MB": _moved(arms.get(accelerators.FLAX)),
            "jaxbn, MB": _moved(arms.get(accelerators.OURS)),
            "kernels, none / Flax / jaxbn": " / ".join(
                f"{record['kernels']}" if _compiled(record := arms.get(name)) else "-"
                for name in ("none", accelerators.FLAX, accelerators.OURS)
            ),
        }
        for (subject, target, dtype), arms in sorted(found.items(), key=lambda item: _SUBJECTS.index(item[0][0]))
    ]
    shape = "x".join(map(str, SHOWN_SHAPE))
    return (
        f"{markdown(table) if table else 'The rows that belong here are not measured yet.'}\n\nCompiled ahead of time "
        "and counted, not run: what one step or pass reads and writes in device memory. Steps of ResNet-50 and "
        f"ResNet-20 at batch 128, and the layer with ReLU on {shape}."
    )


_SUBJECTS = ("ResNet-50, step", "ResNet-20, step", "norm and ReLU, forward+backward", "norm and ReLU, forward")


def _shown(record):
    """The name of a record in the block, or None for one that is not there."""
    if record["target"] not in SHOWN_TARGETS or record["chips"] != 1:
        return None
    if record["kind"] == "layer" and record["shape"] == SHOWN_SHAPE and record["what"] == programs.NORM_RELU:
        return f"norm and ReLU, {record['pass']}"
    subject = f"{record.get('net')}, step"
    return subject if subject in _SUBJECTS else None


def collectives(record: dict) -> str:
    """Returns the collectives of a record, such as "39 (+19)"."""
    rare = record["rare_collectives"]
    return f"{record['collectives']}" + (f" (+{rare})" if rare else "")


def moved(record: dict) -> int:
    """Returns the bytes that a program moves in device memory."""
    return record["bytes"] + record["copied"]


def megabytes(size: float) -> str:
    """Returns bytes in millions, with a decimal where there are few."""
    millions = size / 1e6
    return f"{millions:,.0f}" if millions >= 99.95 else f"{millions:.1f}"


def _title(record):
    """What says which program a record is of, as pairs of a column and its cell."""
    if "net" in record:
        of = {"of": f"{record['net']}, batch {record['batch_size']}", "dtype": record["dtype"]}
        return tuple((of | {"chips": f"{record['chips']}, `{record['api']}`"}).items())
    shape = "x".join(map(str, record["shape"]))
    return tuple({"of": record["what"], "pass": record["pass"], "shape": shape, "dtype": record["dtype"]}.items())


def _compiled(record):
    return record is not None and record["compiled"]


def _moved(record):
    if record is None:
        return "-"
    return megabytes(moved(record)) if record["compiled"] else DEAD


def _moved_over(record, flax):
    """The bytes of a record, and in brackets those over Flax's."""
    if not _compiled(record) or not _compiled(flax) or record is flax:
        return _moved(record)
    return f"{_moved(record)} ({moved(record) / moved(flax):.2f})"


def _both(ours, flax, text):
    """A text about both layers."""
    return " / ".join(text(record) if _compiled(record) else "-" for record in (ours, flax))
