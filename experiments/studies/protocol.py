"""What a study is, and how its runs become result files.

A study is a module in `experiments.studies`, named after its question, with

- a docstring: the question in its first line, then paragraphs that begin with the words of `SECTIONS`; their fields in
  braces are filled in from results, so that no finding is typed by hand. "Agreement" alone is: a sentence, without
  measured numbers, on what the results of `small` say beside what was published. It begins with what became of the
  claims, as `report.OPENINGS` has it, and is left out where that does not fit the results any more;
- `SETUP[preset]`: a sentence that says what is trained, and how that differs from what was published;
- `runs(preset) -> dict[label, Config]`: with seed 0; the other seeds are added here;
- `summary(results) -> dict[field, text]`: the fields of the finding, and those of `measures.judge`, whose claims come
  in the order in which "Refuted if" numbers them;
- `table(results, preset) -> list[dict[column, text]]`;
- `plot(results) -> Figure`;
- where it measures more than `train.fit` does: `fit(config, dataset, **options) -> Trained`, which calls that one, with
  a `probe` or not, and adds what `Trained.measure` finds; and `SETTINGS`, a dict of all that this depends on besides
  the config, which is kept in the results: those made with other settings are refused as those of another config are.

`results` is always label -> runs over seeds, as `results.read_study` returns them.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import pkgutil
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
from rich.console import Console

from experiments import studies
from experiments.config import PRESETS, Config
from experiments.data import datasets
from experiments.evidence import files
from experiments.processes import distributed
from experiments.training import loop, programs
from experiments.training.progress import Display

SECTIONS = ("Command", "Time", "Published", "Finding", "Agreement", "Refuted if")
START = "start-"  # begins the names of the files of a net that other runs start from
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


def train_missing(
    plan: list[tuple[str, Path, Config]],
    *,
    data_dir: Path | None,
    fit: Callable[..., loop.Trained] = loop.fit,
    settings: dict | None = None,
    keep_checkpoints: bool = False,
) -> None:
    """Trains the runs that have no result yet.

    Args:
      plan: the runs, each with the name by which it is shown, the file of its result, and its Config.
      data_dir: where CIFAR-10 is.
      fit: trains a run, and is called as `train.fit` is.
      settings: of `fit`, kept in the results.
      keep_checkpoints: whether the last ones of a run stay, at `kept_checkpoints`; otherwise they go once it is done.

    Raises:
      ValueError: a result of another config is in the way.
    """
    files.commit()  # of the sources as they are now; it is kept for the headers
    for _, path, config in plan:
        _finished(path, config, settings)  # refuses a stale file before the first second of training
    with Display(len(plan), None if distributed.is_primary() else Console(quiet=True)) as display:
        for name, path, config in plan:
            if _finished(path, config, settings):
                display.skip(name)
                if distributed.is_primary():
                    _put_away(path, keep_checkpoints)
            else:
                shown = display.run(name)
                options = {"data_dir": data_dir, "on_progress": shown, "keep_checkpoints": keep_checkpoints}
                train_to_file(config, path, fit=fit, settings=settings, **options)


def train_to_file(
    config: Config,
    path: Path,
    *,
    data_dir: Path | None,
    fit: Callable[..., loop.Trained] = loop.fit,
    settings: dict | None = None,
    on_progress: Callable | None = None,
    keep_checkpoints: bool = False,
) -> None:
    """Trains one run and writes its result. Killed at any moment, the same call continues from the last checkpoint.

    Every process calls it; process 0 writes.
    """
    options = {} if config.start is None else {"start": _trained(config.start, path.parent, data_dir)}
    dataset = load_data(config, data_dir)
    trained = fit(config, dataset, checkpoint_dir=_checkpoints(path), on_progress=on_progress, **options)
    _write(path, config, dataset, trained, settings)
    if distributed.is_primary():
        _put_away(path, keep_checkpoints)


def _write(path, config, dataset, trained, settings=None):
    """Writes the result of a run, in process 0."""
    if not distributed.is_primary():
        return
    parameters = sum(a.size for a in jax.tree.leaves(trained.variables["params"]))
    head = files.header(config, images=dataset.provenance, parameters=parameters, seconds=trained.seconds)
    files.write(path, head | {"settings": settings or {}}, trained.rows, trained.measured)


def load_data(config: Config, data_dir: Path | None) -> datasets.Dataset:
    """Returns the images that a run learns. All processes call it; the first one downloads them, if need be."""
    channels = 3 if config.start is not None and config.start.data == "cifar10" else None
    what = (config.data, config.image_size, config.train_images, config.classes, channels, data_dir)
    return distributed.primary_first(lambda: _load(*what))


@functools.lru_cache(maxsize=2)
def _trained(config, folder, data_dir):
    """The variables of the net that other runs start from, kept for the next one of them; its rows are a result too.

    Its checkpoints stay until the study is done, so that an interrupted one does not train it again.

    Raises:
      ValueError: its training diverged.
    """
    defaults = dataclasses.asdict(Config())
    changes = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    name = f"{START}{hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:16]}-seed{config.seed}"
    dataset = load_data(config, data_dir)
    trained = loop.fit(config, dataset, checkpoint_dir=folder / f"{name}.unfinished")
    _write(folder / f"{name}.jsonl", config, dataset, trained)
    if trained.rows[-1]["diverged"]:
        raise ValueError(
            f"The run that others of {folder} start from has diverged, see {name}.jsonl; lower its learning rate."
        )
    return trained.variables


def _finished(path, config, settings):
    """What process 0 finds, so that all processes train, or none."""
    return distributed.from_primary(lambda: files.finished(path, config, settings))


@functools.lru_cache(maxsize=4)
def _load(name, image_size, train_images, classes, channels, data_dir):
    """The data set, kept for the next run, which mostly has the same."""
    options = {"train_images": train_images, "classes": classes, "channels": channels}
    return datasets.load(name, image_size=image_size, data_dir=data_dir, **options)


def kept_checkpoints(path: Path) -> Path:
    """Returns where the last checkpoints of the run that was written to `path` are, if they were to be kept."""
    return path.with_suffix(".checkpoint")


def _put_away(path, keep):
    """Removes the checkpoints of a finished run, or gives them the name of what stays."""
    if not _checkpoints(path).exists():
        return
    shutil.rmtree(kept_checkpoints(path), ignore_errors=True)  # of a run whose result was deleted
    if not keep:
        shutil.rmtree(_checkpoints(path), ignore_errors=True)
        return
    _checkpoints(path).rename(kept_checkpoints(path))


def _checkpoints(path):
    """Where the checkpoints of the run that will be written to `path` are kept until then."""
    return path.with_suffix(".unfinished")
