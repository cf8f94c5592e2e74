"""Runs that become result files: trained once, continued after an interruption, put away when done."""

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
from rich.console import Console

from experiments.config import Config
from experiments.data import datasets
from experiments.evidence import files
from experiments.processes import distributed
from experiments.training import loop
from experiments.training.progress import Display

START = "start-"  # begins the names of the files of a net that other runs start from


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
      fit: trains a run, and is called as `loop.fit` is.
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
