"""Checkpoints of one training run: a killed run continues from the newest one.

Conventions: a checkpoint holds the arrays of the training state and, as JSON, the run's Config and its progress (rows
and seconds so far). Orbax writes it in the background and renames it when it is complete, so a run killed during the
write continues from the previous checkpoint. Several processes write one checkpoint together, to a shared folder.
"""

import copy
import dataclasses
import uuid
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from experiments.config import Config
from experiments.evidence.provenance import differences
from experiments.processes import distributed

KEPT = 2  # the newest one and the previous one


class Checkpoints:
    """The checkpoints of the run `config` in `folder`; with `folder=None`, nothing is saved or restored.

    Use it in a `with` statement; leaving it waits until the last checkpoint is on disk.
    """

    def __init__(self, folder: Path | None, config: Config):
        self._folder = folder
        self._config = config
        self._manager = None
        if folder is not None:
            _must_be_shared(folder)
            options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        if self._manager is not None:
            self._manager.close()

    def restore(self, state: Any) -> tuple[Any, dict] | None:
        """Returns the newest state and its progress, or None if there is no checkpoint yet.

        Args:
          state: gives the structure, shapes, dtypes and devices of the restored state.

        Raises:
          ValueError: the checkpoints belong to a run with a different Config.
        """
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
        if changed := differences(saved["config"], self._config):
            raise ValueError(
                f"The checkpoints in {self._folder} are of another run: {changed}. Only a run with the same settings "
                "can continue from them; delete that folder to start over, or choose another folder for this run."
            )
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return restored.state, saved["progress"]

    def save(self, step: int, state: Any, progress: dict) -> None:
        """Copies the state to the host and writes it in the background; `progress` must be JSON-serializable."""
        if self._manager is None:
            return
        # Copied, since the run appends to its rows while Orbax still writes in the background.
        saved = {"config": dataclasses.asdict(self._config), "progress": copy.deepcopy(progress)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(saved))
        self._manager.save(step, args=arguments)


def _holds_checkpoints(folder: Path) -> bool:
    """Tells whether a folder holds a complete checkpoint of a run."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return any((step / "state").is_dir() and (step / "progress").is_dir() for step in steps)


def load(folder: Path) -> tuple[Config, dict]:
    """Loads a run and the newest `params` and `batch_stats` of its network.

    The arrays are placed on a single device, even if several devices saved them.

    Raises:
      ValueError: the folder holds no checkpoint of a run.
    """
    handlers = {"progress": ocp.JsonCheckpointHandler(), "state": ocp.StandardCheckpointHandler()}
    if not _holds_checkpoints(folder):
        here = folder.absolute()
        places = (here.parent, here / "result.checkpoint", here.parent / f"{here.stem}.checkpoint")
        near = next((place for place in places if _holds_checkpoints(place)), None)
        raise ValueError(
            f"{folder} holds no checkpoint; pass the folder that `train --keep-checkpoint` prints at the end, or the "
            f"*.unfinished folder of an interrupted run{f'; there is one in {near}' if near else ''}."
        )
    with ocp.CheckpointManager(folder.absolute(), item_handlers=handlers) as manager:
        step = manager.latest_step()
        # Without a sharding of ours, Orbax would ask for the devices that saved the arrays.
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(
            lambda saved: jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=device),
            manager.item_metadata(step).state.tree,
        )
        parts = ocp.args.Composite(progress=ocp.args.JsonRestore(), state=ocp.args.StandardRestore(like))
        restored = manager.restore(step, args=parts)
    return Config.from_json(restored.progress["config"]), {
        name: restored.state[name] for name in ("params", "batch_stats")
    }


def _must_be_shared(folder: Path) -> None:
    """Refuses a folder in which the other processes cannot see the files of process 0."""
    if jax.process_count() == 1:
        return

    def create_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".mark-{uuid.uuid4().hex}"
        mark.touch()
        return mark.name

    mark = folder / distributed.from_primary(create_mark)
    remedy = f"{folder} must be on a disk shared by all processes; choose another folder for this run."
    distributed.agree({"sees the folder of process 0": mark.exists()}, remedy=remedy)
    if distributed.is_primary():
        mark.unlink()
