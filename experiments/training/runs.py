"""Training runs whose results are files: each is trained once, and continues after an interruption."""

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
from experiments.evidence import files, provenance
from experiments.evidence.files import Place
from experiments.processes import distributed
from experiments.training import loop
from experiments.training.progress import Display

START = "start-"  # prefix of the names of pre-training runs, which other runs start from


def train_missing(
    plan: list[tuple[str, Place, Config]],
    *,
    data_dir: Path | None,
    fit: Callable[..., loop.Trained] = loop.fit,
    settings: dict | None = None,
    keep_checkpoints: bool = False,
) -> None:
    """Trains the runs that have no result yet.

    Args:
      plan: for each run, the name shown while it trains, the place of its result, and its Config.
      data_dir: where CIFAR-10 is.
      fit: trains a run; has the signature of `loop.fit`.
      settings: what the measurements of `fit` depend on, besides the config; kept in the results.
      keep_checkpoints: keep the last checkpoints of a run, at `kept_checkpoints`, instead of deleting them.

    Raises:
      ValueError: there is already a result of another config.
    """
    provenance.commit()  # cached for the headers: the sources may change while the runs train
    for _, place, config in plan:
        _finished(place, config, settings)  # refuses a stale result before the first second of training
    console = None if distributed.is_primary() else Console(quiet=True)
    with Display(len(plan), console) as display:
        for name, place, config in plan:
            if not _finished(place, config, settings):
                train_to_file(
                    config,
                    place,
                    data_dir=data_dir,
                    fit=fit,
                    settings=settings,
                    on_progress=display.run(name),
                    keep_checkpoints=keep_checkpoints,
                )
                continue
            display.skip(name)
            if distributed.is_primary():
                _put_away(place, keep_checkpoints)  # in case the run was killed just before it did


def train_to_file(
    config: Config,
    place: Place,
    *,
    data_dir: Path | None,
    fit: Callable[..., loop.Trained] = loop.fit,
    settings: dict | None = None,
    on_progress: Callable | None = None,
    keep_checkpoints: bool = False,
) -> None:
    """Trains one run and writes its result. If killed, the same call continues from the last checkpoint.

    Every process calls it; process 0 writes.
    """
    options = {}
    if config.start is not None:
        options["start_variables"] = _pretrained(config.start, place.sibling(_start_name(config.start)), data_dir)
    dataset = load_data(config, data_dir)
    trained = fit(config, dataset, checkpoint_dir=_checkpoints(place), on_progress=on_progress, **options)
    _save(place, config, dataset, trained, settings)
    if distributed.is_primary():
        _put_away(place, keep_checkpoints)


def load_data(config: Config, data_dir: Path | None) -> datasets.Dataset:
    """Loads the images of a run. Every process calls it; process 0 downloads them if necessary."""
    # A model pre-trained on CIFAR-10 expects three channels of other images, too.
    channels = 3 if config.start is not None and config.start.data == "cifar10" else None
    arguments = (config.data, config.image_size, config.train_images, config.classes, channels, data_dir)
    return distributed.primary_first(lambda: _load(*arguments))


@functools.lru_cache(maxsize=4)  # consecutive runs mostly have the same data
def _load(
    name: str,
    image_size: int,
    train_images: int | None,
    classes: tuple[int, ...] | None,
    channels: int | None,
    data_dir: Path | None,
) -> datasets.Dataset:
    options = {"train_images": train_images, "classes": classes, "channels": channels}
    return datasets.load(name, image_size=image_size, data_dir=data_dir, **options)


@functools.lru_cache(maxsize=2)
def _pretrained(config: Config, place: Place, data_dir: Path | None) -> dict:
    """Trains the model that other runs start from, and returns its variables; its rows become a result, too.

    A result has no weights. The checkpoints therefore stay until the study is done: an interrupted study finds the
    weights there, and does not train the model again.

    Raises:
      ValueError: training diverged.
    """
    dataset = load_data(config, data_dir)
    # Not the `fit` of the study, which would also measure this network: runs need only its weights, and a result
    # without measurements stays valid if the study's settings change. Without `on_progress`, since the variables are
    # cached for all runs that start from them, while each of these runs has another `on_progress`.
    trained = loop.fit(config, dataset, checkpoint_dir=_checkpoints(place))
    _save(place, config, dataset, trained)
    if trained.rows[-1]["diverged"]:
        raise ValueError(f"The pre-training run diverged, see {place}; lower its learning rate.")
    return trained.variables


def _start_name(config: Config) -> str:
    """Returns the name of a pre-training run, which is the same as long as new settings have their defaults."""
    defaults = dataclasses.asdict(Config())
    changes = {name: value for name, value in dataclasses.asdict(config).items() if value != defaults[name]}
    name_hash = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:16]
    return f"{START}{name_hash}-seed{config.seed}"


def _save(
    place: Place, config: Config, dataset: datasets.Dataset, trained: loop.Trained, settings: dict | None = None
) -> None:
    if not distributed.is_primary():
        return
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"]))
    header = provenance.run_header(config, images=dataset.provenance, parameters=parameters, seconds=trained.seconds)
    files.save(place, header | {"settings": settings or {}}, trained.rows, trained.measured)


def _finished(place: Place, config: Config, settings: dict | None) -> bool:
    """Asks process 0 for `files.finished`, so that all processes train the run or none does; refuses a stale result."""
    return distributed.from_primary(lambda: files.finished(place, config, settings))


def kept_checkpoints(place: Place) -> Path:
    """Returns the folder of the last checkpoints of a finished run, which exists if they were to be kept."""
    return place.working_path(".checkpoint")


def _checkpoints(place: Place) -> Path:
    """Returns the folder of the checkpoints of a run in progress."""
    return place.working_path(".unfinished")


def _put_away(place: Place, keep: bool) -> None:
    """Deletes the checkpoints of a finished run, or renames their folder to the one that stays."""
    folder = _checkpoints(place)
    if not folder.exists():
        return
    shutil.rmtree(kept_checkpoints(place), ignore_errors=True)  # left by a run whose result was deleted
    if keep:
        folder.rename(kept_checkpoints(place))
    else:
        shutil.rmtree(folder, ignore_errors=True)
