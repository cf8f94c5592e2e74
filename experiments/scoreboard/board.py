"""The scoreboard: implementations of batch norm tested against the laws, with a command to reproduce each failure.

Conventions: each peer runs in its own process, since libraries interfere with each other, and a crash must not affect
the other peers. The file has a header, one line for each peer and law, and one for each script in
`experiments/scoreboard/faults`. The README next to it is made from the file alone.
"""

import ast
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
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
WIDTH = 150  # columns for the table of all peers
COMMAND = "python -m experiments scoreboard"
STATEMENTS = {law.name: law.statement for law in testing.LAWS}
HOLDS, BROKEN, NOT_DECLARED, NOT_INSTALLED = "holds", "broken", "not declared", "not installed"
NOT_MADE = "could not be made"
STYLED = {HOLDS: "[green]holds[/]", BROKEN: "[bold red]broken[/]", NOT_DECLARED: "–", NOT_INSTALLED: "", NOT_MADE: ""}
CELLS = {HOLDS: "holds", BROKEN: "**broken**", NOT_DECLARED: "–"}
HEAD = f"""# Scoreboard

Written by `{COMMAND}`, which tests this library and its peers against the laws of batch norm
([jaxbn/testing](../../jaxbn/testing/__init__.py)), each through a small adapter
([peers](../../experiments/scoreboard/peers/__init__.py)). The oracle is NumPy in float64. Install the libraries with
`pip install -e '.[peers]'`. Adapters declare conventions, such as the factor m/(m - 1) in the running variance; these
are not failures. Each library is tested only on the features it declares, such as masks. Options have their defaults,
except for epsilon (1e-5) and momentum (0.9); `flax-linen-stable` has `use_fast_variance=False`, and `jaxbn` is the
function behind the two layers. Failing a law is not necessarily a bug: no peer promises, for example, that training
survives a batch with NaN in it.
"""


def run(*, peers: str | None = None, laws: str | None = None, out: Path | None = None) -> bool:
    """Tests the peers and prints the table and every failure; returns whether this library passes all laws.

    Args:
      peers: names, separated by commas; None for all.
      laws: names, separated by commas; None for all.
      out: folder to write to; None for `FOLDER`, or for no folder if peers or laws are chosen.

    Raises:
      ValueError: a name is unknown.
    """
    if out is None and peers is None and laws is None:
        out = FOLDER
    peers, laws = _chosen("peer", peers, PEERS), _chosen("law", laws, STATEMENTS)
    provenance.commit()  # cached for the header, since the sources may change during the run
    console, lines = Console(width=WIDTH), []
    for peer in peers:
        with console.status(f"{peer}: {len(laws)} laws"):
            lines += judge(peer, laws)
    show(lines, console)
    if out is not None:
        # The header starts JAX's backend in this process, so it waits until the peers no longer need the memory.
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
    """Tests a peer in its own process.

    A law that crashes the process counts as broken, and a new process continues with the next law. If the process ends
    before the adapter is made, no law is broken: the peer could not be made.

    Returns:
      A dict for each law, with "peer", "law", "outcome" and "detail".
    """
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.jsonl"
        while remaining := laws[len(lines) :]:
            path.unlink(missing_ok=True)  # of a process that crashed
            command = [sys.executable, "-m", __name__, str(path), peer, *remaining]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            ending = _ending(done.returncode, done.stderr)
            if not path.exists():
                return lines + [_line(peer, testing.Finding(law, NOT_MADE, ending)) for law in remaining]
            lines += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if len(lines) < len(laws):
                crashed = laws[len(lines)]  # the first law without a line
                lines.append(_line(peer, testing.Finding(crashed, BROKEN, ending)))
    return lines


def judge_here(path: Path, peer: str, laws: Sequence[str]) -> None:
    """Tests a peer in this process; writes a line after each law, so that a crash does not lose the earlier ones.

    The file exists as soon as the adapter is made, or its library is known to be missing.
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
    """Returns the scripts that show a peer's fault without this library, for the peers that are installed."""
    return [path for path in sorted(FAULTS.glob("*.py")) if importlib.util.find_spec(path.stem.partition("_")[0])]


def run_fault(path: Path) -> dict[str, str]:
    """Runs a script; returns its name, text and output as "fault", "text" and "printed".

    If it fails, "failed" tells how it ended.
    """
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, errors="replace")
    fault = {"fault": path.stem, "text": path.read_text(encoding="utf-8"), "printed": done.stdout}
    return fault | ({"failed": _ending(done.returncode, done.stderr)} if done.returncode else {})


def load(folder: Path = FOLDER) -> dict:
    """Reads the file in a folder: "header", "lines" for each peer and law, and "faults".

    Raises:
      ValueError: it is not a file of measurements.
    """
    run = files.read_records(folder / f"{NAME}.jsonl")
    lines, faults = ([record for record in run["records"] if key in record] for key in ("law", "fault"))
    return {"header": run["header"], "lines": lines, "faults": faults}


def table(folder: Path = FOLDER) -> str:
    """Returns the table in Markdown: a row for each law, a column for each tested peer."""
    outcomes_by_peer = by_peer(load(folder)["lines"])
    laws = dict.fromkeys(law for outcomes in outcomes_by_peer.values() for law in outcomes)
    rows = []
    for law in laws:
        cells = {peer: CELLS.get(outcomes.get(law), "") for peer, outcomes in outcomes_by_peer.items()}
        rows.append({"law": f"`{law}`"} | cells)
    totals = {peer: passed(outcomes) for peer, outcomes in outcomes_by_peer.items()}
    return text.markdown([*rows, {"law": "laws passed, of those tested"} | totals])


def summary(run: dict) -> str:
    """Returns the block for README.md: a row for each peer, with the laws that it passes and breaks.

    Args:
      run: from `files.read_records`.
    """
    rows = []
    for peer, outcomes in by_peer(record for record in run["records"] if "law" in record).items():
        broken = [law.replace("_", " ") for law, outcome in outcomes.items() if outcome == BROKEN]
        row = {"peer": peer, "laws passed, of those tested": passed(outcomes), "laws broken": ", ".join(broken) or "–"}
        rows.append(row)
    return (
        f"{text.markdown(rows)}\n\nEach library is tested only on the features it declares, such as masks. Failing a "
        "law is not necessarily a bug: some libraries never promise it. `flax-linen-stable` has "
        "`use_fast_variance=False`; `jaxbn` is the function behind the two layers."
    )


def by_peer(lines: Iterable[dict]) -> dict[str, dict[str, str]]:
    """Groups the lines: peer -> law -> outcome, without peers that could not be tested."""
    outcomes_by_peer = {}
    for line in lines:
        if line["outcome"] not in (NOT_INSTALLED, NOT_MADE):
            outcomes_by_peer.setdefault(line["peer"], {})[line["law"]] = line["outcome"]
    return outcomes_by_peer


def passed(outcomes: dict[str, str]) -> str:
    """Formats how many laws a peer passes, of those it was tested on."""
    tested = [outcome for outcome in outcomes.values() if outcome != NOT_DECLARED]
    return f"{tested.count(HOLDS)} of {len(tested)}"


def readme(folder: Path = FOLDER) -> str:
    """Returns the text of the README for the file in a folder."""
    run = load(folder)
    header = run["header"]
    tested = f"Tested {text.made_with([header])}, {header['date']}."
    laws = [f"- `{law}`: {statement}" for law, statement in header["settings"]["laws"].items()]
    parts = [HEAD.rstrip(), table(folder), f"{_missing(run['lines'])}–: not declared. {tested}"]
    parts += ["## Laws", "\n".join(laws)]
    parts += ["## Failures", "Each with the first case that fails, and the command that reproduces it."]
    broken = [line for line in run["lines"] if line["outcome"] == BROKEN]
    for peer in dict.fromkeys(line["peer"] for line in broken):
        of_peer = [line for line in broken if line["peer"] == peer]
        items = [f"- `{line['law']}`: {line['detail']}  \n  `{reproduce(line)}`" for line in of_peer]
        parts += [f"### {peer}", "\n".join(items)]
    if not broken:
        parts.append("None.")
    if run["faults"]:
        parts += ["## Faults without this library", "Each is a script that uses the peer alone."]
    for fault in run["faults"]:
        parts += _fault(fault)
    return "\n\n".join(parts) + "\n"


def reproduce(line: dict) -> str:
    """Returns the command that tests a peer against a law again."""
    return f"{COMMAND} --peers {line['peer']} --laws {line['law']}"


def show(lines: list[dict], console: Console) -> None:
    """Prints the table, then each failure."""
    peers, laws = (list(dict.fromkeys(line[key] for line in lines)) for key in ("peer", "law"))
    outcomes = {(line["law"], line["peer"]): line["outcome"] for line in lines}
    printed = Table("law", *(peer.replace("-", "\n") for peer in peers), caption="–: not declared")
    for law in laws:
        printed.add_row(law, *(STYLED[outcomes[law, peer]] for peer in peers))
    console.print(printed)
    for line in lines:
        if line["outcome"] == BROKEN:
            text = f"{line['peer']} breaks {line['law']}: {line['detail']}\n    {reproduce(line)}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    remarks = [line["detail"] for line in lines if line["outcome"] == NOT_INSTALLED]
    remarks += [f"{peer} could not be made: {detail}" for peer, detail in _not_made(lines)]
    for sentence in dict.fromkeys(remarks):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _chosen(kind: str, names: str | None, known: Collection[str]) -> list[str]:
    """Parses the names that a user chose; None means all."""
    chosen = list(known) if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"Unknown {kind} {name!r}; choose from {', '.join(known)}, separated by commas.")
    return chosen


def _line(peer: str, outcome: testing.Finding) -> dict:
    return {"peer": peer, **outcome._asdict()}


def _ending(status: int, stderr: str) -> str:
    """Describes how a process ended, with the last line of its errors."""
    last_line = (stderr.strip().splitlines() or ["no message"])[-1]
    cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return f"the process {cause}: {last_line}"


def _missing(lines: list[dict]) -> str:
    """Names the peers that are not in the table."""
    missing = dict.fromkeys(line["peer"] for line in lines if line["outcome"] == NOT_INSTALLED)
    sentences = [f"Not installed: {', '.join(missing)}. "] if missing else []
    sentences += [f"{peer} could not be made: {detail.removesuffix('.')}. " for peer, detail in _not_made(lines)]
    return "".join(sentences)


def _not_made(lines: list[dict]) -> list[tuple[str, str]]:
    """Returns the peers whose adapters could not be made, each once, with the reason."""
    return list(dict.fromkeys((line["peer"], line["detail"]) for line in lines if line["outcome"] == NOT_MADE))


def _fault(fault: dict) -> Iterator[str]:
    """Yields the section about a script: its docstring, its code, and its output."""
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
