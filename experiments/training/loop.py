"""The training loop: every run of every study goes through `fit`.

Conventions: the loop is Python. Between two rows it never waits for the device, except on CPUs in several processes
(see `distributed.one_at_a_time`). All randomness derives from `Config.seed`, the epoch and the step, so a run can
continue from its state alone. Accuracies are fractions, losses are mean cross-entropies in nats, times are seconds.
Every process runs the same loop on the same data. Decisions they must take alike (where to continue, whether the run
has diverged) depend only on arrays that all of them hold.
"""

import dataclasses
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.evidence import provenance
from experiments.processes import distributed
from experiments.training import transfer
from experiments.training.checkpoints import Checkpoints
from experiments.training.programs import State, compile_programs, evaluate

CHECKPOINT_STEPS = 500  # in addition to the checkpoint at every row
PROGRESS_SECONDS = 0.1  # shortest time between two calls of `on_progress`


class Progress(NamedTuple):
    """The argument of `on_progress`.

    Attributes:
      step: newest finished step.
      steps: number of steps of the whole run.
      loss: loss of that step's batch; at a row, the row's training loss.
      row: the row that just ended, or None between rows.
    """

    step: int
    steps: int
    loss: float
    row: dict | None


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      rows: one dict per evaluation, `Config.evaluations` of them per epoch; see `fit`.
      variables: `params` and `batch_stats` of the trained network, for `module.apply`.
      seconds: total time of the run, including compilation and evaluation, without interruptions.
      measured: further measurements of a study, dicts of numbers and names; `fit` itself adds none.
    """

    rows: list[dict]
    variables: dict
    seconds: float
    measured: Sequence[dict] = ()

    def measure(self, function: Callable[[dict], Sequence[dict]]) -> "Trained":
        """Measures the trained network, and adds the measurements and their time to this run.

        Args:
          function: maps the variables, on the host, to the entries of `measured`.
        """
        began = time.perf_counter()
        measured = function(jax.device_get(self.variables))
        return self._replace(measured=measured, seconds=self.seconds + time.perf_counter() - began)


def fit(
    config: Config,
    dataset: Dataset,
    *,
    checkpoint_dir: Path | None = None,
    checkpoint_steps: int = CHECKPOINT_STEPS,
    on_progress: Callable[[Progress], None] | None = None,
    start: dict | None = None,
    probe: Callable[[State, float], dict] | None = None,
    mesh: Mesh | None = None,
) -> Trained:
    """Trains the network of `config` on `dataset`, starting from the newest checkpoint if there is one.

    Every image counts once per epoch: if batch_size does not divide their number, the last batch is smaller. A run
    whose training or test loss is not finite ends at the next row, which has `diverged` true.

    Each batch is split over the devices of the mesh, and batch norm uses the statistics of the whole batch. The number
    of devices and processes changes only the rounding of sums.

    Each row holds: `step` and `epoch` (a fraction between whole epochs); `learning_rate`; `train_loss` and
    `train_accuracy`, averaged over the training steps since the last row; `test_loss` and `test_accuracy` of the whole
    test set in evaluation mode; `seconds` of training and `compile_seconds` since the last row; `diverged`.

    Args:
      config: the run.
      dataset: its images and labels.
      checkpoint_dir: folder of the checkpoints, written at every row and every `checkpoint_steps` steps; shared by all
        processes. None: no checkpoints.
      checkpoint_steps: steps between checkpoints.
      on_progress: called at every row, and at most ten times a second between rows; in process 0 only.
      start: variables trained by the run `config.start`.
      probe: called at every row with the state and the learning rate; the dict it returns is added to the row. Its time
        does not count as training.
      mesh: the devices, on one axis. None: all devices of all processes.

    Returns:
      The rows, the trained variables and the seconds. Rows and variables have the same bits however often the run was
      interrupted (tested on CPU only).

    Raises:
      ValueError: the batch is larger than the data set; more evaluations than steps; the checkpoints belong to another
        run; the processes do not all train the same; `start` is missing or superfluous.
    """
    began = time.perf_counter()
    _check_start(config, start)
    mesh = distributed.mesh() if mesh is None else mesh
    steps_per_epoch = _steps_per_epoch(config, dataset)
    row_ends, stops = _schedule(config, steps_per_epoch, checkpoint_steps)
    reporter = _Reporter(on_progress if distributed.is_primary() else None, row_ends[-1])
    _agree_on_the_run(config, dataset)
    train_set = distributed.replicate((dataset.train_images, dataset.train_labels), mesh)
    test_set = distributed.replicate((dataset.test_images, dataset.test_labels), mesh)

    def images_until(step: int) -> int:
        """Returns the number of images in the steps up to this one; the last batch of an epoch may be smaller."""
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        return epoch * len(dataset.train_images) + step_in_epoch * config.batch_size

    clock = time.perf_counter()
    shapes = dataset.train_images.shape, dataset.test_images.shape
    programs = compile_programs(config, len(dataset.class_names), *shapes, mesh)
    compile_seconds = time.perf_counter() - clock
    with Checkpoints(checkpoint_dir, config) as checkpoints:
        state, order_key, augment_key = programs.init(distributed.replicate(np.uint32(config.seed), mesh))
        if start is not None:
            state = _start_from(config, start, state, dataset, mesh)
        rows, train_seconds, earlier_seconds = [], 0.0, 0.0
        if restored := checkpoints.restore(state):
            state, saved = restored
            rows, train_seconds, earlier_seconds = saved["rows"], saved["training"], saved["total"]
            compile_seconds += saved["compiling"]
            if rows:
                # A run that was killed after its last step has no other row to report.
                reporter.row(rows[-1])
        step = int(state.step)

        # A stop is the end of a row, a checkpoint, or both. An epoch ends at a stop, so each stretch between two stops
        # has a single order of the images and a single learning rate.
        for stop in stops:
            if stop <= step or (rows and rows[-1]["diverged"]):
                continue  # done before the interruption, or not worth doing
            epoch = step // steps_per_epoch
            clock = time.perf_counter()
            order = programs.order(train_set[1], order_key, distributed.replicate(np.int32(epoch), mesh))
            rate = distributed.replicate(np.float32(learning_rate(config, epoch)), mesh)
            while step < stop:
                step += 1
                train = programs.train if step % steps_per_epoch else programs.train_last
                state, loss = distributed.one_at_a_time(train(state, train_set, order, augment_key, rate), mesh)
                reporter.step(step, loss)
            jax.block_until_ready(state)
            train_seconds += time.perf_counter() - clock

            if stop in row_ends:
                images = images_until(step) - images_until(rows[-1]["step"] if rows else 0)
                test_loss, test_accuracy = evaluate(programs, state, test_set, mesh)
                row = {
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "learning_rate": learning_rate(config, epoch),
                    # `state.loss` counts a whole batch as 1 and a smaller one as a fraction.
                    "train_loss": float(state.loss) / (images / config.batch_size),
                    "train_accuracy": int(state.correct) / images,
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "seconds": train_seconds,
                    "compile_seconds": compile_seconds,
                    "diverged": not (math.isfinite(float(state.loss)) and math.isfinite(test_loss)),
                }
                if probe is not None:
                    row |= probe(state, row["learning_rate"])
                rows.append(row)
                reporter.row(row)
                # The sums and the seconds of the next row start at zero.
                zero_loss, zero_correct = distributed.replicate((np.float32(0), np.int32(0)), mesh)
                state = state._replace(loss=zero_loss, correct=zero_correct)
                train_seconds = compile_seconds = 0.0
            total_seconds = earlier_seconds + time.perf_counter() - began
            seconds = {"training": train_seconds, "compiling": compile_seconds, "total": total_seconds}
            checkpoints.save(step, state, {"rows": rows, **seconds})
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Trained(rows, variables, earlier_seconds + time.perf_counter() - began)


def initial_variables(config: Config, dataset: Dataset) -> dict:
    """Returns the initial `params` and `batch_stats` of a run that starts from random weights."""
    shapes = dataset.train_images.shape, dataset.test_images.shape
    mesh = distributed.mesh()
    programs = compile_programs(config, len(dataset.class_names), *shapes, mesh)
    state, _, _ = programs.init(distributed.replicate(np.uint32(config.seed), mesh))
    return {"params": state.params, "batch_stats": state.batch_stats}


def learning_rate(config: Config, epoch: int) -> float:
    """Returns the rate of the published schedule: initial rate * 0.1^floor((1 + epoch) / decay), epochs from 0."""
    return config.learning_rate * 0.1 ** ((1 + epoch) // config.lr_decay_epochs)


def _check_start(config: Config, start: dict | None) -> None:
    """Refuses a run that has a start where it needs none, or the other way round."""
    if (config.start is None) != (start is None):
        raise ValueError(
            f"start={'None' if start is None else 'variables'}, but config.start is "
            f"{'None' if config.start is None else 'a run'}; pass the variables trained by config.start if and only if "
            "the config has one."
        )


def _start_from(config: Config, start: dict, state: State, dataset: Dataset, mesh: Mesh) -> State:
    """Replaces random initial variables with those of a trained network."""
    sample = dataset.train_images[:1].astype(np.float32) / 255
    fresh = {"params": state.params, "batch_stats": state.batch_stats}
    moved = transfer.transplant(config, start, fresh, sample)
    return state._replace(**distributed.replicate(jax.device_get(moved), mesh))


def _agree_on_the_run(config: Config, dataset: Dataset) -> None:
    """Refuses processes that would train different runs; `compile_programs` compares their programs."""
    if jax.process_count() == 1:
        return  # saves the time of hashing all images
    images = hashlib.sha256()
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        images.update(np.ascontiguousarray(array))
    facts = dataclasses.asdict(config) | {"images": f"{dataset.name} {images.hexdigest()[:16]}"}
    distributed.agree(facts, remedy="start all processes with the same command, and the same images.")
    distributed.agree(provenance.versions(), remedy="start all processes in the same environment.")


def _steps_per_epoch(config: Config, dataset: Dataset) -> int:
    """Returns the number of batches in the training set; the last one may be smaller."""
    n = len(dataset.train_images)
    if n < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {n} training images of {dataset.name}; "
            "lower it, since a step needs a whole batch."
        )
    if config.group_size is not None and n % config.batch_size % config.group_size:
        raise ValueError(
            f"group_size={config.group_size} does not divide the last batch of an epoch, which has "
            f"{n % config.batch_size} images; set train_images to {n - n % config.batch_size}, or choose another "
            "group_size."
        )
    steps = -(-n // config.batch_size)
    if config.evaluations > steps:
        raise ValueError(
            f"evaluations={config.evaluations} per epoch, but an epoch has only {steps} steps; "
            f"choose at most {steps} evaluations, or lower batch_size."
        )
    return steps


def _schedule(config: Config, steps_per_epoch: int, checkpoint_steps: int) -> tuple[list[int], list[int]]:
    """Returns the steps after which a row ends, and all steps after which the loop stops to evaluate or to save."""
    per_epoch = [k * steps_per_epoch // config.evaluations for k in range(1, config.evaluations + 1)]
    row_ends = [epoch * steps_per_epoch + end for epoch in range(config.epochs) for end in per_epoch]
    return row_ends, sorted({*row_ends, *range(checkpoint_steps, row_ends[-1], checkpoint_steps)})


class _Reporter:
    """Calls `on_progress` for steps that have already finished, so that the loop never waits for the device."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, steps: int):
        self._on_progress = on_progress
        self._steps = steps
        self._running = deque()  # steps that were dispatched, with their losses
        self._last = 0.0  # time of the last call

    def step(self, step: int, loss: jax.Array) -> None:
        """Adds a step that was dispatched, and reports the newest one that has finished."""
        self._running.append((step, loss))
        finished = None
        while self._running and self._running[0][1].is_ready():
            finished = self._running.popleft()
        if finished and self._on_progress and time.perf_counter() - self._last >= PROGRESS_SECONDS:
            self._last = time.perf_counter()
            self._on_progress(Progress(finished[0], self._steps, float(finished[1]), None))

    def row(self, row: dict[str, Any]) -> None:
        """Reports a row, and with it all steps before."""
        self._running.clear()
        if self._on_progress is not None:
            self._on_progress(Progress(row["step"], self._steps, row["train_loss"], row))
