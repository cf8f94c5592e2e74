"""The training loop: every run of every study goes through `fit`.

Conventions: the loop is Python, and between two rows it never waits for the device (but see
`distributed.one_at_a_time`). All randomness comes from
`Config.seed`, the epoch and the step, so that a continued run needs nothing but the state. Accuracies are fractions,
losses are mean cross-entropies in nats, times are seconds. Every process runs the same loop on the same data; what they
decide alike (where to continue, whether the run has diverged) they take from arrays that all of them hold.
"""

import dataclasses
import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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

CHECKPOINT_STEPS = 500  # besides the checkpoint at every row
PROGRESS_SECONDS = 0.1  # shortest time between two calls of on_progress


class Progress(NamedTuple):
    """What `on_progress` is told.

    Attributes:
      step: the newest step that has finished.
      steps: of the whole run.
      loss: of that step's batch; at a row, the row's training loss.
      row: the row that has just ended, or None in between.
    """

    step: int
    steps: int
    loss: float
    row: dict | None


class Trained(NamedTuple):
    """What `fit` returns.

    Attributes:
      rows: one dict per evaluation, `Config.evaluations` of them per epoch.
      variables: the trained net's `params` and `batch_stats`, for `module.apply`.
      seconds: that the run took in all, compilation and evaluation included, interruptions left out.
      measured: what a study measured besides, dicts of numbers and names; `fit` itself measures nothing.
    """

    rows: list[dict]
    variables: dict
    seconds: float
    measured: Sequence[dict] = ()

    def measure(self, function: Callable[[dict], Sequence[dict]]) -> "Trained":
        """Returns this run with what a function measures of the trained net, and with the time that it takes.

        Args:
          function: of the variables, on the host; returns the entries of `measured`.
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
    """Trains the net of `config` on `dataset`, from the newest checkpoint where there is one.

    Every image counts once per epoch: where batch_size does not divide their number, the last batch is smaller. A run
    whose training or test loss is not finite ends at the next row, which has `diverged` true.

    Each batch is split over the devices of the mesh, and the statistics of batch norm are those of the whole batch: the
    number of devices and processes changes the rounding of sums, and nothing else.

    Each row holds: `step` and `epoch` reached (a fraction between whole epochs); `learning_rate`; `train_loss` and
    `train_accuracy` as met while training since the last row; `test_loss` and `test_accuracy` of the whole test set in
    evaluation mode; `seconds` of training and `compile_seconds` since the last row; `diverged`.

    Args:
      config: the run.
      dataset: its images and labels.
      checkpoint_dir: where checkpoints are kept, at every row and every `checkpoint_steps` steps; several processes
        share it. None: nowhere.
      checkpoint_steps: steps between checkpoints.
      on_progress: called at every row, and in between at most ten times a second; in process 0 alone.
      start: variables of the net that `config.start` has trained.
      probe: called at every row with the state and the learning rate; the dict it returns is added to the row. Its time
        does not count as training.
      mesh: the devices, on one axis. None: all devices of all processes.

    Returns:
      The rows and the trained variables, the same bits however often the run was interrupted (tested on CPU only);
      and the seconds.

    Raises:
      ValueError: the batch is larger than the data set; more evaluations than steps; the checkpoints are another run's;
        the processes do not all train the same; `start` is missing, or not wanted.
    """
    began = time.perf_counter()
    if (config.start is None) != (start is None):
        raise ValueError(
            f"start={'None' if start is None else 'variables'}, but config.start is "
            f"{'None' if config.start is None else 'a run'}; a run that starts from another one wants the variables "
            "which that one has trained, and no other run does; give both or neither."
        )
    mesh = distributed.mesh() if mesh is None else mesh
    steps_per_epoch = _steps_per_epoch(config, dataset)
    row_ends, stops = _schedule(config, steps_per_epoch, checkpoint_steps)
    reporter = _Reporter(on_progress if distributed.is_primary() else None, row_ends[-1])
    _agree_on_the_run(config, dataset)
    train_set = distributed.replicate((dataset.train_images, dataset.train_labels), mesh)
    test_set = distributed.replicate((dataset.test_images, dataset.test_labels), mesh)

    def images(step):
        return step // steps_per_epoch * len(dataset.train_images) + step % steps_per_epoch * config.batch_size

    clock = time.perf_counter()
    shapes = dataset.train_images.shape, dataset.test_images.shape
    programs = compile_programs(config, len(dataset.class_names), *shapes, mesh)
    compiling = time.perf_counter() - clock
    with Checkpoints(checkpoint_dir, config) as checkpoints:
        state, order_key, augment_key = programs.init(distributed.replicate(np.uint32(config.seed), mesh))
        if start is not None:
            sample = dataset.train_images[:1].astype(np.float32) / 255
            fresh = {"params": state.params, "batch_stats": state.batch_stats}
            moved = distributed.replicate(jax.device_get(transfer.transplant(config, start, fresh, sample)), mesh)
            state = state._replace(**moved)
        rows, training, earlier = [], 0.0, 0.0
        if restored := checkpoints.restore(state):
            state, progress = restored
            rows, training, earlier = progress["rows"], progress["training"], progress["total"]
            compiling += progress["compiling"]
            if rows:
                reporter.row(rows[-1])  # of a run that was killed after its last step, the only one
        step = int(state.step)

        for stop in stops:
            if stop <= step or (rows and rows[-1]["diverged"]):
                continue
            epoch = step // steps_per_epoch
            clock = time.perf_counter()
            order = programs.order(train_set[1], order_key, distributed.replicate(np.int32(epoch), mesh))
            rate = distributed.replicate(np.float32(learning_rate(config, epoch)), mesh)
            while step < stop:
                step += 1
                take = programs.train if step % steps_per_epoch else programs.train_last
                state, loss = distributed.one_at_a_time(take(state, train_set, order, augment_key, rate), mesh)
                reporter.step(step, loss)
            jax.block_until_ready(state)
            training += time.perf_counter() - clock
            if stop in row_ends:
                seen = images(step) - images(rows[-1]["step"] if rows else 0)
                test_loss, test_accuracy = evaluate(programs, state, test_set, mesh)
                row = {
                    "step": step,
                    "epoch": step / steps_per_epoch,
                    "learning_rate": learning_rate(config, epoch),
                    "train_loss": float(state.loss) / (seen / config.batch_size),
                    "train_accuracy": int(state.correct) / seen,
                    "test_loss": test_loss,
                    "test_accuracy": test_accuracy,
                    "seconds": training,
                    "compile_seconds": compiling,
                    "diverged": not (math.isfinite(float(state.loss)) and math.isfinite(test_loss)),
                }
                if probe is not None:
                    row |= probe(state, row["learning_rate"])
                rows.append(row)
                reporter.row(row)
                loss, correct = distributed.replicate((np.float32(0), np.int32(0)), mesh)
                state = state._replace(loss=loss, correct=correct)
                training = compiling = 0.0
            total = earlier + time.perf_counter() - began
            checkpoints.save(step, state, {"rows": rows, "training": training, "compiling": compiling, "total": total})
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return Trained(rows, variables, earlier + time.perf_counter() - began)


def initial_variables(config: Config, dataset: Dataset) -> dict:
    """Returns the `params` and `batch_stats` with which a run begins that starts from random weights."""
    shapes = dataset.train_images.shape, dataset.test_images.shape
    mesh = distributed.mesh()
    programs = compile_programs(config, len(dataset.class_names), *shapes, mesh)
    state, _, _ = programs.init(distributed.replicate(np.uint32(config.seed), mesh))
    return {"params": state.params, "batch_stats": state.batch_stats}


def learning_rate(config: Config, epoch: int) -> float:
    """The published schedule: the initial rate times 0.1^floor((1 + epoch) / decay), epochs counted from 0."""
    return config.learning_rate * 0.1 ** ((1 + epoch) // config.lr_decay_epochs)


def _agree_on_the_run(config, dataset):
    """Refuses processes that would train something else; what they compile is compared once it is there."""
    if jax.process_count() == 1:
        return  # the digest would take a while for nothing
    images = hashlib.sha256()
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        images.update(np.ascontiguousarray(array))
    facts = dataclasses.asdict(config) | {"images": f"{dataset.name} {images.hexdigest()[:16]}"}
    distributed.agree(facts, remedy="start all processes with the same command, and the same images.")
    distributed.agree(provenance.versions(), remedy="start all processes in the same environment.")


def _steps_per_epoch(config, dataset):
    """The number of batches in the training set, the last one perhaps smaller."""
    n = len(dataset.train_images)
    if n < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {n} training images of {dataset.name}; "
            "a step needs a whole batch; lower it."
        )
    if config.group_size is not None and n % config.batch_size % config.group_size:
        raise ValueError(
            f"group_size={config.group_size} does not divide the last batch of an epoch, of {n % config.batch_size} "
            f"images; set train_images to {n - n % config.batch_size}, or choose another group_size."
        )
    steps = -(-n // config.batch_size)
    if config.evaluations > steps:
        raise ValueError(
            f"evaluations={config.evaluations} per epoch, but an epoch has only {steps} steps; "
            f"choose evaluations up to {steps}, or lower batch_size."
        )
    return steps


def _schedule(config, steps_per_epoch, checkpoint_steps):
    """The steps after which a row ends, and all the steps at which the loop stops, to evaluate or to save."""
    per_epoch = [k * steps_per_epoch // config.evaluations for k in range(1, config.evaluations + 1)]
    row_ends = [epoch * steps_per_epoch + end for epoch in range(config.epochs) for end in per_epoch]
    return row_ends, sorted({*row_ends, *range(checkpoint_steps, row_ends[-1], checkpoint_steps)})


class _Reporter:
    """Tells of steps that have already finished, so that the loop never waits for the device."""

    def __init__(self, on_progress, steps):
        self._on_progress = on_progress
        self._steps = steps
        self._running = deque()
        self._last = 0.0

    def step(self, step, loss):
        self._running.append((step, loss))
        finished = None
        while self._running and self._running[0][1].is_ready():
            finished = self._running.popleft()
        if finished and self._on_progress and time.perf_counter() - self._last >= PROGRESS_SECONDS:
            self._last = time.perf_counter()
            self._on_progress(Progress(finished[0], self._steps, float(finished[1]), None))

    def row(self, row):
        self._running.clear()  # the row reports them
        if self._on_progress is not None:
            self._on_progress(Progress(row["step"], self._steps, row["train_loss"], row))
