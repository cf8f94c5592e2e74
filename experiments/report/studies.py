"""The report on the studies: experiments/README.md, the figures and the list of studies, from result files alone."""

from pathlib import Path
from types import ModuleType

from experiments.config import PRESETS
from experiments.evidence import files, plots
from experiments.evidence.text import made_with, markdown
from experiments.evidence.verdicts import VERDICTS
from experiments.studies import protocol

CLAIM = {"holds": "holds", "partly": "holds in part", "fails": "not shown", "unknown": "one seed: undecided"}
# How "Agreement" must begin for a verdict. A single seed has no verdict, and thus no agreement.
OPENINGS = {"holds": "Agrees: ", "partly": "Agrees in part ({claims}): ", "fails": "Not shown: "}
COMPARED = "small"  # the preset whose results "Agreement" is about
HEAD = """# Experiments

`python -m experiments table` writes this page from the files in `results/`; to change it, change a study or its
results. Numbers are mean ± standard deviation over seeds, or the value of a single seed where the text says so.
Accuracies are on the test set, and times depend on the hardware. We call a difference real if it exceeds two standard
deviations over seeds, and call two arms equal if that whole interval lies within a stated margin; differences are taken
between runs with the same seed. With three seeds this is weak evidence (t = 3.5, p = 0.07), and there are many claims.
"Refuted if" numbers the claims of a study, and says for each what would count against it. "Not shown" can mean three
things: the opposite came out, a bound was missed, or the seeds differ too much to tell.

`python -m experiments list` names the studies, `run` trains the runs that have no result yet (and continues after an
interruption), `plot` draws the figures, `train` trains a single network of your choice, and `demo` shows batch norm at
work in less than two minutes. `make demo` sets up the Python for it, `.venv/bin/python`.
"""


def readme(folder: Path) -> str:
    """Writes the text of experiments/README.md for the results in `folder`."""
    modules = protocol.select("all")
    return "\n".join([HEAD, _overview(modules, folder), *(_chapter(module, folder) for module in modules)])


def figures(module: ModuleType, folder: Path, out: Path) -> list[Path]:
    """Draws the figure of every preset for which a study is finished; returns the files written."""
    written = []
    for preset in PRESETS:
        if results := protocol.collect(module, preset, folder):
            figure, path = module.plot(results), out / _figure_name(module, preset)
            written.append(plots.save(figure, path, digest=files.digest(results)))
    return written


def state(module: ModuleType, folder: Path) -> str:
    """Says how far a study is, for each preset."""
    return "; ".join(f"{preset}: {_state(module, preset, folder)}" for preset in PRESETS)


def text(module: ModuleType, folder: Path, section: str) -> str:
    """Returns a section of a study's docstring other than the finding, with the measured time filled in."""
    words = protocol.sections(module)[section]
    return words.replace("{time}", _times(module, folder)) if "{time}" in words else words


def claim(module: ModuleType, preset: str, folder: Path) -> str:
    """Says in few words whether the claims of a study hold."""
    results = protocol.collect(module, preset, folder)
    return CLAIM[module.summary(results)["verdict"]] if results else "no results yet"


def agreement(module: ModuleType, fields: dict[str, str]) -> str | None:
    """Returns the text under "Agreement", or None if it was written for results with another verdict."""
    written, opening = protocol.sections(module)["Agreement"], OPENINGS.get(fields["verdict"])
    return written if opening and written.startswith(opening.format(**fields)) else None


def _overview(modules: list[ModuleType], folder: Path) -> str:
    """Writes the table of all studies: the question, and whether the claims hold."""
    lines = []
    for module in modules:
        name = protocol.short_name(module)
        line = {"study": f"[{name}](#{name})", "question": text(module, folder, "Question")}
        for preset in PRESETS:
            line[f"claim, {preset}"] = claim(module, preset, folder)
        lines.append(line)
    return markdown(lines) + "\n"


def _chapter(module: ModuleType, folder: Path) -> str:
    """Writes the chapter about one study."""
    name = protocol.short_name(module)
    parts = [
        f"## {name}",
        f"**{text(module, folder, 'Question')}**",
        f"`{text(module, folder, 'Command')}`",
        f"Time: {text(module, folder, 'Time')}.",
        f"Refuted if {text(module, folder, 'Refuted if')}",
        f"Published: {text(module, folder, 'Published')}",
    ]
    for preset in PRESETS:
        parts += [f"### {name}, {preset}", *_results(module, preset, folder)]
    return "\n\n".join(parts) + "\n"


def _results(module: ModuleType, preset: str, folder: Path) -> list[str]:
    """Writes the paragraphs about the results of one preset."""
    results = protocol.collect(module, preset, folder)
    if results is None:
        return [f"{module.SETUP[preset]} {_state(module, preset, folder).capitalize()}."]
    fields = module.summary(results)
    finding = protocol.sections(module)["Finding"].format(**fields | {"verdict": _verdict(fields)})
    parts = [module.SETUP[preset], markdown(module.table(results, preset)), finding]
    if preset == COMPARED and (comparison := agreement(module, fields)):
        parts.append(f"Compared with what was published: {comparison}")
    title = f"{protocol.short_name(module)}, {preset}"
    return [*parts, f"![{title}](figures/{_figure_name(module, preset)})", _origin(results)]


def _verdict(fields: dict[str, str]) -> str:
    """Says in words whether the claims hold."""
    verdict = VERDICTS[fields["verdict"]]
    return f"{verdict}: {fields['claims']}" if fields["claims"] else verdict


def _state(module: ModuleType, preset: str, folder: Path) -> str:
    stored = files.read_study(folder, protocol.short_name(module), preset)
    if not stored:
        return "not run yet"
    n = sum(map(len, stored.values()))
    count = f"{n} run{'s' if n > 1 else ''}"
    return count if protocol.collect(module, preset, folder) is not None else f"{count}, unfinished"


def _times(module: ModuleType, folder: Path) -> str:
    """Says how long a study has taken, for each preset, including the runs that others start from."""
    times = []
    for preset in PRESETS:
        if protocol.collect(module, preset, folder) is None:
            times.append(f"{preset} not run yet")
            continue
        by_label = files.read_study(folder, protocol.short_name(module), preset)
        seconds = [run["header"]["seconds"] for group in by_label.values() for run in group]
        times.append(f"{preset} {sum(seconds) / 60:.1f} min for {len(seconds)} runs")
    return ", ".join(times)


def _origin(results: dict[str, list[dict]]) -> str:
    """Says which images, hardware, versions and commits results come from, each of them once."""
    headers = [run["header"] for group in results.values() for run in group]
    images = {header.get("images", "images of unknown origin") for header in headers}
    return f"Images: {'; '.join(sorted(images))}. Measured {made_with(headers)}."


def _figure_name(module: ModuleType, preset: str) -> str:
    return f"{protocol.short_name(module)}-{preset}.png"
