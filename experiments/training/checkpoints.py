"""Checkpoints of one training run: a killed run continues from the newest one.

Conventions: a checkpoint holds the arrays of the training state and, as JSON, the run's Config and its progress (the
rows so far, the seconds so far). Orbax writes it beside the training and gives it its name only once it is complete, so
a run killed while it writes continues from the checkpoint before. Several processes keep one checkpoint together, in a
folder that all of them see.
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

KEPT = 2  # the newest, and the one before


class Checkpoints:
    """The checkpoints of the run `config` in `folder`. With `folder=None`: none are kept, and none found.

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
        """Returns the newest state and its progress, or None where there is no checkpoint yet.

        Args:
          state: a state of the same structure, whose shapes, dtypes and devices the restored one gets.

        Raises:
          ValueError: the checkpoints belong to a run with another Config.
        """
        if self._manager is None or (step := self._manager.latest_step()) is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
        if changed := differences(saved["config"], self._config):
            raise ValueError(
                f"The checkpoints in {self._folder} are of another run: {changed}. Only a run with the same settings "
                "continues from them; delete that folder to start anew, or choose another place for this run."
            )
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like)))
        return restored.state, saved["progress"]

    def save(self, step: int, state: Any, progress: dict) -> None:
        """Copies the state to the host and writes it in the background; `progress` must be plain JSON."""
        if self._manager is None:
            return
        # A copy, since it is written in the background, while the run goes on and adds to its rows.
        saved = {"config": dataclasses.asdict(self._config), "progress": copy.deepcopy(progress)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(saved))
        self._manager.save(step, args=arguments)


def _holds_checkpoints(folder: Path) -> bool:
    steps = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return any((step / "state").is_dir() and (step / "progress").is_dir() for step in steps)


def load(folder: Path) -> tuple[Config, dict]:
    """Returns the run whose checkpoints are in `folder`, and the newest `params` and `batch_stats` of its net.

    They come on one device, wherever they were saved.

    Raises:
      ValueError: the folder holds no checkpoint of a run.
    """
    handlers = {"progress": ocp.JsonCheckpointHandler(), "state": ocp.StandardCheckpointHandler()}
    if not _holds_checkpoints(folder):
        here = folder.absolute()
        places = (here.parent, here / "result.checkpoint", here.parent / f"{here.stem}.checkpoint")
        near = next((place for place in places if _holds_checkpoints(place)), None)
        raise ValueError(
            f"{folder} holds no checkpoint; accepted is the folder that `train --keep-checkpoint` names in the end, or "
            "that of a run that was interrupted, *.unfinished; "
            + (f"there is one in {near}." if near else "train with that option, or name such a folder.")
        )
    with ocp.CheckpointManager(folder.absolute(), item_handlers=handlers) as manager:
        step = manager.latest_step()
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


def _must_be_shared(folder):
    """Refuses a folder in which the other processes do not see what process 0 has written."""
    if jax.process_count() == 1:
        return

    def leave_a_mark():
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / f".mark-{uuid.uuid4().hex}"
        mark.touch()
        return mark.name

    mark = folder / distributed.from_primary(leave_a_mark)
    remedy = f"{folder} must be on a disk that all processes share; choose another place for this run."
    distributed.agree({"sees the folder of process 0": mark.exists()}, remedy=remedy)
    if distributed.is_primary():
        mark.unlink()
