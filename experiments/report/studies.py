"""The report: experiments/README.md, the figures and the list of studies, made from the result files alone."""

from pathlib import Path
from types import ModuleType

from experiments.config import PRESETS
from experiments.evidence import files, plots
from experiments.evidence.text import made_with, markdown
from experiments.evidence.verdicts import VERDICTS
from experiments.studies import protocol

CLAIM = {"holds": "holds", "partly": "holds in part", "fails": "not shown", "unknown": "one seed: undecided"}
OPENINGS = {"holds": "Agrees: ", "partly": "Agrees in part ({claims}): ", "fails": "Not shown: "}  # of "Agreement"
COMPARED = "small"  # the preset whose results it is about
HEAD = """# Experiments

Written by `python -m experiments table` from the files in `results/`; to change it, change a study or its results.
Every number is mean ± standard deviation over seeds, or that of a single seed where it says so; accuracies are on the
test set; times depend on the hardware. A difference counts where it is more than twice its standard deviation over
seeds, and there is none where all of that range is within a margin; differences are taken between runs of the same
seed. With three seeds that is weak evidence (a t of 3.5, p = 0.07), and the claims are many. "Refuted if" numbers the
claims of a study, and says for each what would speak against it. "Not shown" stands for three things: the opposite
came out, a bound was missed, or the seeds differ too much to tell.

`python -m experiments list` names the studies, `run` trains what has no result yet (it continues after an
interruption), `plot` draws the figures, `train` trains a single net of your choice, and `demo` shows batch norm at work
within two minutes. `make demo` sets up the Python for it, `.venv/bin/python`.
"""


def readme(folder: Path) -> str:
    """Returns the text of experiments/README.md for the results in `folder`."""
    modules = protocol.select("all")
    return "\n".join([HEAD, _overview(modules, folder), *(_chapter(module, folder) for module in modules)])


def figures(module: ModuleType, folder: Path, out: Path) -> list[Path]:
    """Draws the figure of every preset of a study that has all its results; returns the files written."""
    return [
        plots.save(module.plot(found), out / _figure_name(module, preset), digest=files.digest(found))
        for preset in PRESETS
        if (found := protocol.collect(module, preset, folder))
    ]


def state(module: ModuleType, folder: Path) -> str:
    """Returns how far a study is, in words."""
    return "; ".join(f"{preset}: {_state(module, preset, folder)}" for preset in PRESETS)


def text(module: ModuleType, folder: Path, section: str) -> str:
    """Returns a section of a study's docstring that holds no finding, with the measured time filled in."""
    words = protocol.sections(module)[section]
    return words.replace("{time}", _times(module, folder)) if "{time}" in words else words


def claim(module: ModuleType, preset: str, folder: Path) -> str:
    """Returns in few words what became of the claims of a study."""
    found = protocol.collect(module, preset, folder)
    return CLAIM[module.summary(found)["verdict"]] if found else "no results yet"


def agreement(module: ModuleType, fields: dict[str, str]) -> str | None:
    """Returns the sentence under "Agreement"; None where it was not written for a summary with these fields."""
    said, opening = protocol.sections(module)["Agreement"], OPENINGS.get(fields["verdict"])
    return said if opening and said.startswith(opening.format(**fields)) else None


def _overview(modules, folder):
    """The table of all studies: what was asked, and whether the claim held."""
    lines = []
    for module in modules:
        name = protocol.short_name(module)
        line = {"study": f"[{name}](#{name})", "question": text(module, folder, "Question")}
        for preset in PRESETS:
            line[f"claim, {preset}"] = claim(module, preset, folder)
        lines.append(line)
    return markdown(lines) + "\n"


def _chapter(module, folder):
    """The part of the README about one study."""
    name = protocol.short_name(module)
    parts = [f"## {name}", f"**{text(module, folder, 'Question')}**", f"`{text(module, folder, 'Command')}`"]
    parts += [f"Time: {text(module, folder, 'Time')}.", f"Refuted if {text(module, folder, 'Refuted if')}"]
    parts.append(f"Published: {text(module, folder, 'Published')}")
    for preset in PRESETS:
        parts.append(f"### {name}, {preset}")
        found = protocol.collect(module, preset, folder)
        if found is None:
            parts.append(f"{module.SETUP[preset]} {_state(module, preset, folder).capitalize()}.")
            continue
        fields = module.summary(found)
        finding = protocol.sections(module)["Finding"].format(**fields | {"verdict": _verdict(fields)})
        parts += [module.SETUP[preset], markdown(module.table(found, preset)), finding]
        if preset == COMPARED and (said := agreement(module, fields)):
            parts.append(f"Beside what was published: {said}")
        parts += [f"![{name}, {preset}](figures/{_figure_name(module, preset)})", _origin(found)]
    return "\n\n".join(parts) + "\n"


def _verdict(fields):
    """What became of the claims, in words."""
    said = VERDICTS[fields["verdict"]]
    return f"{said}: {fields['claims']}" if fields["claims"] else said


def _state(module, preset, folder):
    found = files.read_study(folder, protocol.short_name(module), preset)
    if not found:
        return "not run yet"
    done = protocol.collect(module, preset, folder) is not None
    n = sum(map(len, found.values()))
    return f"{n} run{'s' * (n > 1)}" + ("" if done else ", unfinished")


def _times(module, folder):
    """The time a study has taken, by preset, with the nets that its runs start from."""
    times = []
    for preset in PRESETS:
        if protocol.collect(module, preset, folder):
            every = files.read_study(folder, protocol.short_name(module), preset).values()
            runs = [run for group in every for run in group]
            minutes = sum(run["header"]["seconds"] for run in runs) / 60
            times.append(f"{preset} {minutes:.1f} min for {len(runs)} runs")
        else:
            times.append(f"{preset} not run yet")
    return ", ".join(times)


def _origin(found):
    """Where results come from: images, hardware, versions and commits, each once."""
    headers = [run["header"] for group in found.values() for run in group]
    images = {header.get("images", "images of unknown origin") for header in headers}
    return f"Images: {'; '.join(sorted(images))}. Measured {made_with(headers)}."


def _figure_name(module, preset):
    return f"{protocol.short_name(module)}-{preset}.png"
