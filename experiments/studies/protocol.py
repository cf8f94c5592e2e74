"""Defines studies, and trains and collects their runs.

A study is a module in `experiments.studies`, named after its question. It has

- a docstring: the question in its first line, then paragraphs that begin with the words of `SECTIONS`. The fields in
  braces are filled in from results, so that no finding is typed by hand. Only "Agreement" is: a sentence, without
  measured numbers, that compares the results of the `small` preset with what was published. It begins with the verdict
  on the claims, in the words of `report.studies.OPENINGS`, and is left out once the results no longer fit it;
- `SETUP[preset]`: what is trained, and how that differs from what was published;
- `runs(preset) -> dict[label, Config]`: with seed 0; the other seeds are added here;
- `summary(results) -> dict[field, text]`: the fields of the finding, and those of `verdicts.judge`, whose claims are in
  the order in which "Refuted if" numbers them;
- `table(results, preset) -> list[dict[column, text]]`;
- `plot(results) -> Figure`;
- if it measures more than `loop.fit` does: `fit(config, dataset, **options) -> Trained`, which calls `loop.fit`, with a
  `probe` or without, and adds measurements with `Trained.measure`; and `SETTINGS`, a dict of everything that these
  depend on besides the config. The settings are kept in the results, and results made with other settings are refused.

`results` is always label -> runs over seeds, as `files.read_study` returns them.
"""

import contextlib
import difflib
import importlib
import pkgutil
import re
import shutil
from pathlib import Path
from types import ModuleType

from experiments import studies
from experiments.config import PRESETS
from experiments.evidence import files, provenance
from experiments.processes import distributed
from experiments.training import loop, programs
from experiments.training.runs import START, train_missing

SECTIONS = ("Command", "Time", "Published", "Finding", "Agreement", "Refuted if")
MIN_SEEDS = {"small": 3, "full": 1}  # three give a spread; a run of `full` is long, and may be reported alone


def names() -> list[str]:
    """Lists the names of all studies."""
    modules = {module.name for module in pkgutil.iter_modules(studies.__path__)}
    return sorted(modules - {"protocol"})


def load(name: str) -> ModuleType:
    """Imports a study by its name.

    Raises:
      ValueError: there is no such study.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of these."
        raise ValueError(f"study must be one of {', '.join(names())}, got {name!r}; {hint}")
    return importlib.import_module(f"experiments.studies.{name}")


def select(name: str) -> list[ModuleType]:
    """Imports the studies that a name on the command line stands for; "all" stands for all of them."""
    return [load(study) for study in (names() if name == "all" else [name])]


def short_name(module: ModuleType) -> str:
    """Returns the name of a study, as `load` takes it."""
    return module.__name__.rpartition(".")[2]


def sections(module: ModuleType) -> dict[str, str]:
    """Splits the docstring of a study into "Question" and one entry for each of `SECTIONS`, each on one line.

    Raises:
      ValueError: a section is missing.
    """
    text = " ".join((module.__doc__ or "").split())
    # The pattern has a group, so that re.split also returns the headings, at odd positions.
    question, *parts = re.split(rf"(?:^| )({'|'.join(SECTIONS)}): ", text)
    by_heading = {"Question": question, **dict(zip(parts[::2], parts[1::2], strict=True))}
    if missing := [section for section in SECTIONS if section not in by_heading]:
        raise ValueError(
            f"The docstring of the study {short_name(module)} has no {', '.join(missing)}; it must have the question "
            f"and paragraphs that begin with {', '.join(f'{section}:' for section in SECTIONS)}; write them."
        )
    return by_heading


def collect(module: ModuleType, preset: str, folder: Path) -> dict[str, list[dict]] | None:
    """Returns the results of a study in the order of its arms, or None if it is unfinished.

    A study is finished if all arms have the same seeds, and at least `MIN_SEEDS` of them.

    Raises:
      ValueError: the folder holds the result of another config, or a run with a wrong name.
    """
    study, configs = short_name(module), module.runs(preset)
    stored = files.read_study(folder, study, preset)
    seeds = {label: [run["header"]["config"]["seed"] for run in stored.get(label, [])] for label in configs}
    for label, config in configs.items():
        for seed, run in zip(seeds[label], stored.get(label, []), strict=True):
            where = str(files.place_in_study(folder, study, preset, label, seed))
            provenance.refuse_other(run["header"], config.with_seed(seed), settings_of(module), where=where)
    first, *rest = seeds.values()
    if len(first) < MIN_SEEDS[preset] or any(seeds_of_arm != first for seeds_of_arm in rest):
        return None
    return {label: stored[label] for label in configs}


def settings_of(module: ModuleType) -> dict:
    """Returns what the measurements of a study depend on, besides the config of a run."""
    return getattr(module, "SETTINGS", {})


def train_study(module: ModuleType, *, preset: str, seeds: int, data_dir: Path | None, folder: Path) -> None:
    """Trains the runs of a study that have no result yet: every arm with the seeds 0, 1, ..., seeds - 1.

    Raises:
      ValueError: unknown preset, no seeds, or there is already a result of another config.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}; three give a spread.")
    study = short_name(module)
    plan = [
        (
            f"{study} {label}-seed{seed}",
            files.place_in_study(folder, study, preset, label, seed),
            config.with_seed(seed),
        )
        for seed in range(seeds)  # in the outer loop, so that an unfinished study has the same seeds of most arms
        for label, config in module.runs(preset).items()
    ]
    train_missing(plan, data_dir=data_dir, fit=getattr(module, "fit", loop.fit), settings=settings_of(module))
    if distributed.is_primary():
        _clean_up(folder / study / preset)
    programs.release()  # the next study compiles others


def _clean_up(folder: Path) -> None:
    """Deletes the checkpoints that the runs of a study have shared, and their folder if nothing else is in it."""
    for start in folder.glob(f"{START}*.unfinished"):
        shutil.rmtree(start, ignore_errors=True)
    with contextlib.suppress(OSError):  # does not exist, or holds the checkpoints of another command
        folder.rmdir()
