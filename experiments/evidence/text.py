"""Numbers, tables and headers as Markdown."""

import textwrap
from collections.abc import Sequence

PYTHON = ".venv/bin/python -m experiments"
WIDTH = 120

STABLE = "Flax, stable: `use_fast_variance=False`."


def short(text: str) -> str:
    """Shortens an exponent: 1e-05, as Python formats it, becomes 1e-5."""
    return text.replace("e+0", "e").replace("e-0", "e-")


def select(records: Sequence[dict], **fields: object) -> list[dict]:
    """Selects the records whose fields have these values."""
    return [record for record in records if all(record.get(key) == value for key, value in fields.items())]


def with_quartiles(ratio: dict[str, float]) -> str:
    """Formats a median and its quartiles, as `timing.quartiles` returns them: 0.98 (0.95 to 1.02)."""
    return f"{ratio['median']:.2f} ({ratio['lower']:.2f} to {ratio['upper']:.2f})"


def wrapped(text: str) -> str:
    """Wraps the paragraphs of Markdown at `WIDTH`; tables, whose rows must stay on one line, are left alone."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith("|") else textwrap.fill(paragraph, WIDTH) for paragraph in paragraphs
    )


def origin(header: dict) -> str:
    """Says on what hardware, or with which compilers, and with which versions a measurement was made."""
    compilers = header.get("compilers", {})  # of programs that were compiled for accelerators, but not run
    versions = {name: header["versions"][name] for name in ("jax", "flax")} | compilers
    version_text = _versions(versions)
    return f"compiled with {version_text}" if compilers else f"on {hardware(header['hardware'])}, with {version_text}"


def made_with(headers: Sequence[dict]) -> str:
    """Says with which hardware, versions and commits several results were made, each of them once."""
    machines = {hardware(header["hardware"]) for header in headers}
    versions = {_versions(header["versions"]) for header in headers}
    commits = {_short_commit(header["commit"] or "unknown") for header in headers}
    return (
        f"on {'; '.join(sorted(machines))}, with {'; '.join(sorted(versions))}, at commit {', '.join(sorted(commits))}"
    )


def hardware(fields: dict) -> str:
    """Describes the hardware in a header: the accelerators, if there are any, and the processor."""
    cpu = f"{fields['cpu_count']} cores of {fields['cpu']}"
    return cpu if fields["platform"] == "cpu" else f"{fields['devices']} x {fields['device']}, {cpu}"


def markdown(lines: list[dict[str, str]]) -> str:
    """Formats a table; each line is a dict whose keys are the columns."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _short_commit(commit: str) -> str:
    return commit[:12] + ("-modified" if commit.endswith("-modified") else "")
