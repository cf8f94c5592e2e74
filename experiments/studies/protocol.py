"""What a study is, and how its runs become result files.

A study is a module in `experiments.studies`, named after its question, with

- a docstring: the question in its first line, then paragraphs that begin with the words of `SECTIONS`; their fields in
  braces are filled in from results, so that no finding is typed by hand. "Agreement" alone is: a sentence, without
  measured numbers, on what the results of `small` say beside what was published. It begins with what became of the
  claims, as `report.studies.OPENINGS` has it, and is left out where that does not fit the results any more;
- `SETUP[preset]`: a sentence that says what is trained, and how that differs from what was published;
- `runs(preset) -> dict[label, Config]`: with seed 0; the other seeds are added here;
- `summary(results) -> dict[field, text]`: the fields of the finding, and those of `verdicts.judge`, whose claims come
  in the order in which "Refuted if" numbers them;
- `table(results, preset) -> list[dict[column, text]]`;
- `plot(results) -> Figure`;
- where it measures more than `loop.fit` does: `fit(config, dataset, **options) -> Trained`, which calls that one, with
  a `probe` or not, and adds what `Trained.measure` finds; and `SETTINGS`, a dict of all that this depends on besides
  the config, which is kept in the results: those made with other settings are refused as those of another config are.

`results` is always label -> runs over seeds, as `files.read_study` returns them.
"""

import difflib
import importlib
import pkgutil
import re
import shutil
from pathlib import Path
from types import ModuleType

from experiments import studies
from experiments.config import PRESETS
from experiments.evidence import files
from experiments.processes import distributed
from experiments.training import loop, programs
from experiments.training.runs import START, train_missing

SECTIONS = ("Command", "Time", "Published", "Finding", "Agreement", "Refuted if")
MIN_SEEDS = {"small": 3, "full": 1}  # three give a spread; a run of `full` is long, and one seed is quoted as one


def names() -> list[str]:
    """Returns the names of all studies."""
    found = {module.name for module in pkgutil.iter_modules(studies.__path__)}
    return sorted(found - {"protocol"})


def load(name: str) -> ModuleType:
    """Returns the module of a study.

    Raises:
      ValueError: there is no such study.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "choose one of those."
        raise ValueError(f"study={name!r}; the studies are {', '.join(names())}; {hint}")
    return importlib.import_module(f"experiments.studies.{name}")


def select(name: str) -> list[ModuleType]:
    """Returns the studies that a name on the command line stands for; "all" stands for all of them."""
    return [load(each) for each in (names() if name == "all" else [name])]


def short_name(module: ModuleType) -> str:
    """Returns the name by which a study is called."""
    return module.__name__.rpartition(".")[2]


def sections(module: ModuleType) -> dict[str, str]:
    """Returns the docstring in parts: "Question" and one entry for each of `SECTIONS`, each on one line.

    Raises:
      ValueError: a section is missing.
    """
    text = " ".join((module.__doc__ or "").split())
    parts = re.split(rf"(?:^| )({'|'.join(SECTIONS)}): ", text)
    found = {"Question": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    if missing := [section for section in SECTIONS if section not in found]:
        raise ValueError(
            f"The docstring of the study {short_name(module)} has no {', '.join(missing)}; it must hold the question "
            f"and paragraphs that begin with {', '.join(s + ':' for s in SECTIONS)}; write them."
        )
    return found


def collect(module: ModuleType, preset: str, folder: Path) -> dict[str, list[dict]] | None:
    """Returns the results of a study in the order of its runs; None where it is unfinished.

    It is finished when every label has the same seeds, and at least `MIN_SEEDS` of them.

    Raises:
      ValueError: a file in the folder is the result of another config, or named after another run.
    """
    name, configs = short_name(module), module.runs(preset)
    found = files.read_study(folder, name, preset)
    seeds = {label: [run["header"]["config"]["seed"] for run in found.get(label, [])] for label in configs}
    for label, config in configs.items():
        for seed in seeds[label]:
            path = files.run_path(folder, name, preset, label, seed)
            files.finished(path, config.with_seed(seed), settings_of(module))
    first, *others = seeds.values()
    if len(first) < MIN_SEEDS[preset] or any(other != first for other in others):
        return None
    return {label: found[label] for label in configs}


def settings_of(module: ModuleType) -> dict:
    """Returns what the measurements of a study depend on besides the config of a run."""
    return getattr(module, "SETTINGS", {})


def run(module: ModuleType, *, preset: str, seeds: int, data_dir: Path | None, folder: Path) -> None:
    """Trains whatever a study has no result of yet: every label with the seeds 0 .. seeds - 1.

    The seeds go round in the outer loop, so that a study stopped half-way compares like with like.

    Raises:
      ValueError: unknown preset, no seeds, or a result of another config is in the way.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}; the presets are {', '.join(PRESETS)}; choose one of those.")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}; at least 1 is accepted; 3 give a spread.")
    plan = [
        (
            f"{short_name(module)} {label}-seed{seed}",
            files.run_path(folder, short_name(module), preset, label, seed),
            config.with_seed(seed),
        )
        for seed in range(seeds)
        for label, config in module.runs(preset).items()
    ]
    train_missing(plan, data_dir=data_dir, fit=getattr(module, "fit", loop.fit), settings=settings_of(module))
    if distributed.is_primary():
        for started in folder.glob(f"{short_name(module)}/{preset}/{START}*.unfinished"):
            shutil.rmtree(started, ignore_errors=True)
    programs.release()  # the next study has others
