"""The scoreboard: which implementation of batch norm keeps which law, and a line that repeats every failure.

Conventions: each peer is judged in a process of its own, since libraries disturb each other, and one that crashes must
not take the others along.  The file has a header, then a line for each peer and law, and one for each script of
`experiments/scoreboard/faults`; the README beside it is made from the file alone.
"""

import ast
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.evidence import files, provenance, text
from experiments.scoreboard.peers import LIBRARIES, OURS, PEERS
from jaxbn import testing

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "scoreboard"
NAME = "scoreboard"
FAULTS = Path(__file__).parent / "faults"
WIDTH = 150  # of the table with all peers
COMMAND = "python -m experiments scoreboard"
STATEMENTS = {law.name: law.statement for law in testing.LAWS}
HOLDS, BROKEN, NOT_DECLARED, NOT_INSTALLED = "holds", "broken", "not declared", "not installed"
NOT_MADE = "could not be made"
STYLED = {HOLDS: "[green]holds[/]", BROKEN: "[bold red]broken[/]", NOT_DECLARED: "–", NOT_INSTALLED: "", NOT_MADE: ""}
CELLS = {HOLDS: "holds", BROKEN: "**broken**", NOT_DECLARED: "–"}
HEAD = f"""# Scoreboard

Written by `{COMMAND}`, which puts this library and its peers to the laws of batch norm
([jaxbn/testing](../../jaxbn/testing/__init__.py)), each through a small adapter
([peers](../../experiments/scoreboard/peers/__init__.py)); the oracle is NumPy in float64. `pip install -e '.[peers]'`
brings the libraries. Conventions, such as the factor m/(m - 1) in the running variance, are declared, and no failure. A
law is asked only of those that declare what it is about, such as masks. Options are at their defaults but epsilon
(1e-5) and momentum (0.9); `flax-linen-stable` has `use_fast_variance=False`, and `jaxbn` is the function behind the two
layers. A broken law is not always a broken promise: that training survives a batch with NaN in it, for one, no peer
says.
"""


def run(*, peers: str | None = None, laws: str | None = None, out: Path | None = None) -> bool:
    """Judges the peers, prints the table and every failure; returns whether this library breaks no law.

    Args:
      peers: names with commas between them; None for all.
      laws: names with commas between them; None for all.
      out: folder to write to; None for `FOLDER`, or for none where peers or laws are chosen.

    Raises:
      ValueError: for an unknown name.
    """
    if out is None and peers is None and laws is None:
        out = FOLDER
    peers, laws = _chosen("peer", peers, PEERS), _chosen("law", laws, STATEMENTS)
    provenance.commit()  # before anything is measured
    console, lines = Console(width=WIDTH), []
    for peer in peers:
        with console.status(f"{peer}: {len(laws)} laws"):
            lines += judge(peer, laws)
    show(lines, console)
    if out is not None:
        # The header asks for JAX's devices, and so is made after the peers, which need the memory.
        header = provenance.measurement_header({"laws": {law: STATEMENTS[law] for law in laws}})
        faults = [run_fault(path) for path in fault_scripts()]
        files.write(out / f"{NAME}.jsonl", header, [*lines, *faults])
        (out / "README.md").write_text(readme(out), encoding="utf-8")
        for fault in faults:
            if "failed" in fault:
                console.print(f"{fault['fault']}: {fault['failed']}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"Written to {out}", soft_wrap=True)
    return not any(line["outcome"] in (BROKEN, NOT_MADE) and line["peer"] in OURS for line in lines)


def judge(peer: str, laws: Sequence[str]) -> list[dict]:
    """Judges a peer in a process of its own; a law that ends the process is broken, and another process goes on.

    A process that ends before there is an adapter breaks no law: the peer could not be made.

    Returns:
      A dict for each law, with "peer", "law", "outcome" and "detail".
    """
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.jsonl"
        while left := laws[len(lines) :]:
            path.unlink(missing_ok=True)
            command = [sys.executable, "-m", __name__, str(path), peer, *left]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            ending = _ending(done.returncode, done.stderr)
            if not path.exists():
                return lines + [_line(peer, testing.Finding(law, NOT_MADE, ending)) for law in left]
            lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if len(lines) < len(laws):
                lines.append(_line(peer, testing.Finding(laws[len(lines)], BROKEN, ending)))
    return lines


def judge_here(path: Path, peer: str, laws: Sequence[str]) -> None:
    """Judges a peer in this process; writes a line after each law, so that a crash leaves those before it.

    The file is there as soon as the adapter is, or is known to be missing.
    """
    try:
        adapter = PEERS[peer]()
    except ModuleNotFoundError as error:
        if error.name not in LIBRARIES:
            raise
        findings = [testing.Finding(law, NOT_INSTALLED, str(error)) for law in laws]
    else:
        findings = (testing.judge(adapter, [law]).findings[0] for law in laws)
    with path.open("a", encoding="utf-8") as file:
        for finding in findings:
            print(json.dumps(_line(peer, finding)), file=file, flush=True)


def fault_scripts() -> list[Path]:
    """Returns the scripts that show a fault of a peer in its own terms, as far as the peers are installed."""
    return [path for path in sorted(FAULTS.glob("*.py")) if importlib.util.find_spec(path.stem.partition("_")[0])]


def run_fault(path: Path) -> dict[str, str]:
    """Runs a script in a process of its own; returns its name, text and output as "fault", "text" and "printed".

    Of one that fails, "failed" says how it ended.
    """
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, errors="replace")
    found = {"fault": path.stem, "text": path.read_text(encoding="utf-8"), "printed": done.stdout}
    return found | ({"failed": _ending(done.returncode, done.stderr)} if done.returncode else {})


def load(folder: Path = FOLDER) -> dict:
    """Returns what the file in a folder holds: "header", "lines" by peer and law, and "faults".

    Raises:
      ValueError: it is not a file of measurements.
    """
    found = files.read_records(folder / f"{NAME}.jsonl")
    lines, faults = ([record for record in found["records"] if key in record] for key in ("law", "fault"))
    return {"header": found["header"], "lines": lines, "faults": faults}


def table(folder: Path = FOLDER) -> str:
    """Returns the table in Markdown: a row for each law, a column for each peer that was judged."""
    found = by_peer(load(folder)["lines"])
    laws = dict.fromkeys(law for of in found.values() for law in of)
    lines = [{"law": f"`{law}`"} | {peer: CELLS.get(of.get(law), "") for peer, of in found.items()} for law in laws]
    return text.markdown([*lines, {"law": "holds, of those asked"} | {peer: kept(of) for peer, of in found.items()}])


def summary(run: dict) -> str:
    """Returns a table with a row for each peer: how many laws it keeps, and which it breaks; and a word on the peers.

    Args:
      run: as `files.read_records` returns it.
    """
    lines = []
    for peer, of in by_peer(record for record in run["records"] if "law" in record).items():
        broken = [law.replace("_", " ") for law, outcome in of.items() if outcome == BROKEN]
        lines.append({"": peer, "laws held, of those asked": kept(of), "laws broken": ", ".join(broken) or "–"})
    return (
        f"{text.markdown(lines)}\n\nAsked is what a peer declares, such as masks; a broken law is not always a "
        "broken promise. `flax-linen-stable` has `use_fast_variance=False`; `jaxbn` is the function behind the two "
        "layers."
    )


def by_peer(lines: Iterable[dict]) -> dict[str, dict[str, str]]:
    """Returns peer -> law -> outcome, for the peers that were judged."""
    found = {}
    for line in lines:
        if line["outcome"] not in (NOT_INSTALLED, NOT_MADE):
            found.setdefault(line["peer"], {})[line["law"]] = line["outcome"]
    return found


def kept(of: dict[str, str]) -> str:
    """Returns in words how many laws a peer keeps, of those that it was asked."""
    asked = [outcome for outcome in of.values() if outcome != NOT_DECLARED]
    return f"{asked.count(HOLDS)} of {len(asked)}"


def readme(folder: Path = FOLDER) -> str:
    """Returns the text of the README for the file in a folder."""
    found = load(folder)
    judged = f"Judged {text.made_with([found['header']])}, {found['header']['date']}."
    parts = [HEAD.rstrip(), table(folder), f"{_missing(found)}–: not declared. {judged}", "## Laws"]
    parts.append("\n".join(f"- `{law}`: {statement}" for law, statement in found["header"]["settings"]["laws"].items()))
    parts += ["## Failures", "Each with the first case that showed it, and the line that repeats it."]
    broken = [line for line in found["lines"] if line["outcome"] == BROKEN]
    for peer in dict.fromkeys(line["peer"] for line in broken):
        mine = [line for line in broken if line["peer"] == peer]
        said = [f"- `{line['law']}`: {line['detail']}  \n  `{again(line)}`" for line in mine]
        parts += [f"### {peer}", "\n".join(said)]
    if not broken:
        parts.append("None.")
    if found["faults"]:
        parts += ["## Faults in the peers' own terms", "Without this library, each a script of its own."]
    for fault in found["faults"]:
        parts += _fault(fault)
    return "\n\n".join(parts) + "\n"


def again(line: dict) -> str:
    """Returns the command that puts a peer to a law once more."""
    return f"{COMMAND} --peers {line['peer']} --laws {line['law']}"


def show(lines: list[dict], console: Console) -> None:
    """Prints the table, then each failure."""
    peers, laws = (list(dict.fromkeys(line[key] for line in lines)) for key in ("peer", "law"))
    outcomes = {(line["law"], line["peer"]): line["outcome"] for line in lines}
    found = Table("law", *(peer.replace("-", "\n") for peer in peers), caption="–: not declared")
    for law in laws:
        found.add_row(law, *(STYLED[outcomes[law, peer]] for peer in peers))
    console.print(found)
    for line in lines:
        if line["outcome"] == BROKEN:
            text = f"{line['peer']} breaks {line['law']}: {line['detail']}\n    {again(line)}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    said = [line["detail"] for line in lines if line["outcome"] == NOT_INSTALLED]
    said += [f"{peer} could not be made: {detail}" for peer, detail in _not_made(lines)]
    for sentence in dict.fromkeys(said):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _chosen(kind: str, names: str | None, known: Collection[str]) -> list[str]:
    """The names that a user gave, or all."""
    found = list(known) if names is None else [name.strip() for name in names.split(",")]
    for name in found:
        if name not in known:
            raise ValueError(f"{kind}={name!r}; the {kind}s are {', '.join(known)}; choose some, commas between them.")
    return found


def _line(peer, finding):
    return {"peer": peer, **finding._asdict()}


def _ending(status, stderr):
    """How a process has ended, and its last words."""
    words = (stderr.strip().splitlines() or ["it said nothing"])[-1]
    cause = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"has ended with exit status {status}"
    return f"the process {cause}: {words}"


def _missing(found):
    """What is said of the peers that are not in the table."""
    missing = dict.fromkeys(line["peer"] for line in found["lines"] if line["outcome"] == NOT_INSTALLED)
    said = [f"Not installed: {', '.join(missing)}. "] if missing else []
    said += [f"{peer} could not be made: {detail.removesuffix('.')}. " for peer, detail in _not_made(found["lines"])]
    return "".join(said)


def _not_made(lines):
    """The peers whose adapters could not be made, each once, and why."""
    return list(dict.fromkeys((line["peer"], line["detail"]) for line in lines if line["outcome"] == NOT_MADE))


def _fault(fault):
    """The part of the README about a script: what it says of itself, its code, and what it prints."""
    module = ast.parse(fault["text"])
    code = "\n".join(fault["text"].splitlines()[module.body[0].end_lineno :]).strip()
    heading, _, rest = ast.get_docstring(module).partition("\n\n")
    yield f"### {heading.removesuffix('.')}"
    if rest:
        yield rest
    yield f"`python experiments/scoreboard/faults/{fault['fault']}.py`"
    yield f"```python\n{code}\n```"
    yield f"prints\n\n```\n{fault['printed'].strip()}\n```"
    if "failed" in fault:
        yield f"It failed: {fault['failed']}"


if __name__ == "__main__":
    judge_here(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
