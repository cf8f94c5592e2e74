"""Numbers and tables as text in Markdown, and what they were measured with.

Tables of the README stay small: geometric means with the worst row in brackets; every row is in docs/bench.
"""

import textwrap
from collections.abc import Sequence

PYTHON = ".venv/bin/python -m experiments"
WIDTH = 120

STABLE = "Flax, stable: `use_fast_variance=False`."


def short(text: str) -> str:
    """Returns a number without the zeros that Python writes into exponents: 1e-5 for 1e-05."""
    return text.replace("e+0", "e").replace("e-0", "e-")


def select(records: Sequence[dict], **fields: object) -> list[dict]:
    """Returns the records whose fields have these values."""
    return [record for record in records if all(record.get(key) == value for key, value in fields.items())]


def with_quartiles(ratio: dict[str, float]) -> str:
    """Returns a median with its quartiles, as `timing.quartiles` gives them: 0.98 (0.95 to 1.02)."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"


def wrapped(text: str) -> str:
    """Returns Markdown whose paragraphs have lines of at most 120 letters; tables, which cannot, stay as they are."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(each if each.startswith("|") else textwrap.fill(each, WIDTH) for each in paragraphs)


def origin(header: dict) -> str:
    """Returns on what, and with which versions, something was measured, in words."""
    compilers = header.get("compilers", {})
    versions = {name: header["versions"][name] for name in ("jax", "flax")} | compilers
    with_what = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"compiled with {with_what}" if compilers else f"on {hardware(header['hardware'])}, with {with_what}"


def made_with(headers: Sequence[dict]) -> str:
    """Returns in words with what something was made: hardware, versions and commits, each once."""
    machines = {hardware(header["hardware"]) for header in headers}
    versions = {", ".join(f"{k} {v}" for k, v in header["versions"].items()) for header in headers}
    commits = {header["commit"] or "unknown" for header in headers}
    return (
        f"on {'; '.join(sorted(machines))}, with {'; '.join(sorted(versions))}, "
        f"at commit {', '.join(c[:12] + ('-modified' if c.endswith('-modified') else '') for c in sorted(commits))}"
    )


def hardware(found: dict) -> str:
    """Returns the hardware of a header in words."""
    cpu = f"{found['cpu_count']} cores of {found['cpu']}"
    return cpu if found["platform"] == "cpu" else f"{found['devices']} x {found['device']}, {cpu}"


def markdown(lines: list[dict[str, str]]) -> str:
    """Returns a table in Markdown: one dict per line, whose keys are the columns."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
