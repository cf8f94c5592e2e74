"""The training loop: every run of every study goes through `fit`.

Conventions: the loop is Python. Between two rows it never waits for the device, except on CPUs in several processes
(see `distributed.one_at_a_time`). All randomness derives from `Config.seed`, the epoch and the step, so a run can
continue from its state alone. Accuracies are fractions, losses are mean cross-entropies in nats, times are seconds.
Every process runs the same loop on the same data. Decisions they must take alike (where to continue, whether the run
has diverged) depend only on arrays that all of them hold.
"""

import bisect
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.processes import distributed
from experiments.training import checks, transfer
from experiments.training.checkpoints import Checkpoints
from experiments.training.programs import Programs, State, compile_programs, evaluate, steps_per_epoch

CHECKPOINT_STEPS = 500  # in addition to the checkpoint at every row
PROGRESS_SECONDS = 0.1  # shortest time between two calls of `on_progress`


class Row(TypedDict):
    """One evaluation. The probe of a study may add keys."""

    step: int  # steps finished
    epoch: float  # epochs finished, with a fraction if the row is not the last one of its epoch
    learning_rate: float  # of the epoch that the row is in
    train_loss: float  # average over the training images since the last row, in training mode
    train_accuracy: float  # over the same images
    test_loss: float  # average over the whole test set, in evaluation mode
    test_accuracy: float  # over the same images
    seconds: float  # of training since the last row, without compilation and evaluation
    compile_seconds: float  # of compilation since the last row
    diverged: bool  # whether the training or the test loss is not finite, which ends the run


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
    row: Row | None


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      rows: one per evaluation, `Config.evaluations` of them per epoch.
      variables: `params` and `batch_stats` of the trained network, for `module.apply`.
      seconds: total time of the run, including compilation and evaluation, without interruptions.
      measured: further measurements of a study, dicts of numbers and names; `fit` itself adds none.
    """

    rows: list[Row]
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
    start_variables: dict | None = None,
    probe: Callable[[State, float], dict] | None = None,
    mesh: Mesh | None = None,
) -> Trained:
    """Trains the network of `config` on `dataset`, starting from the newest checkpoint if there is one.

    Every image counts once per epoch: if batch_size does not divide their number, the last batch is smaller. A run
    whose training or test loss is not finite ends at the next row, which has `diverged` true.

    Each batch is split over the devices of the mesh, and batch norm uses the statistics of the whole batch. The number
    of devices and processes changes only the rounding of sums.

    Args:
      config: the run.
      dataset: its images and labels.
      checkpoint_dir: folder of the checkpoints, written at every row and every `checkpoint_steps` steps; shared by all
        processes. None: no checkpoints.
      checkpoint_steps: steps between checkpoints.
      on_progress: called at every row, and at most ten times a second between rows; in process 0 only.
      start_variables: variables trained by the run `config.start`.
      probe: called at every row with the state and the learning rate; the dict it returns is added to the row. Its time
        does not count as training.
      mesh: the devices, on one axis. None: all devices of all processes.

    Returns:
      The rows, the trained variables and the seconds. Rows and variables have the same bits however often the run was
      interrupted (tested on CPU only).

    Raises:
      ValueError: the batch is larger than the data set; more evaluations than steps; the checkpoints belong to another
        run; the processes do not all train the same; `start_variables` is missing or superfluous.
    """
    seconds = _Seconds()
    mesh = distributed.mesh() if mesh is None else mesh
    checks.check_start(config, start_variables)
    checks.check_sizes(config, dataset)
    checks.agree_on_the_run(config, dataset)
    train_set = distributed.replicate((dataset.train_images, dataset.train_labels), mesh)
    test_set = distributed.replicate((dataset.test_images, dataset.test_labels), mesh)
    with seconds.add_to("compiling"):
        programs = _compile(config, dataset, mesh)
    run = _Run(config, mesh, programs, train_set, test_set)
    row_ends, stops = _schedule(config, run.steps_per_epoch, checkpoint_steps)
    reporter = _Reporter(on_progress if distributed.is_primary() else None, row_ends[-1])

    with Checkpoints(checkpoint_dir, config) as checkpoints:
        state, keys, rows = _restore_or_init(run, dataset, start_variables, checkpoints, seconds)
        if rows:
            # If the run was killed after its last step, no step is left to produce a row, so report the last one again.
            reporter.row(rows[-1])
        # A stop is the end of a row, a checkpoint, or both. An epoch ends at a stop, so each stretch between two stops
        # has a single order of the images and a single learning rate.
        for stop in stops[bisect.bisect_right(stops, int(state.step)) :]:
            if rows and rows[-1]["diverged"]:
                break
            with seconds.add_to("training"):
                state = _train_until(stop, run, state, keys, reporter)
            if stop in row_ends:
                row = _evaluate_row(run, state, rows[-1]["step"] if rows else 0, seconds)
                if probe is not None:
                    row = cast(Row, {**row, **probe(state, row["learning_rate"])})
                rows.append(row)
                reporter.row(row)
                # The sums and the seconds of the next row start at zero.
                loss, correct = distributed.replicate((np.float32(0), np.int32(0)), mesh)
                state = state._replace(loss=loss, correct=correct)
                seconds.start_row()
            checkpoints.save(stop, state, {"rows": rows, **seconds.to_json()})
    return Trained(rows, state.variables, seconds.total())


def initial_variables(config: Config, dataset: Dataset) -> dict:
    """Returns the initial `params` and `batch_stats` of a run that starts from random weights."""
    mesh = distributed.mesh()
    programs = _compile(config, dataset, mesh)
    state, _, _ = programs.init(distributed.replicate(np.uint32(config.seed), mesh))
    return state.variables


def learning_rate(config: Config, epoch: int) -> float:
    """Returns the rate of the published schedule: initial rate * 0.1^floor((1 + epoch) / decay), epochs from 0."""
    return config.learning_rate * 0.1 ** ((1 + epoch) // config.lr_decay_epochs)


class _Run(NamedTuple):
    """What stays the same throughout a run. The sets are pairs (images, labels) on the devices."""

    config: Config
    mesh: Mesh
    programs: Programs
    train_set: tuple[jax.Array, jax.Array]
    test_set: tuple[jax.Array, jax.Array]

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.config, len(self.train_set[0]))

    def images_until(self, step: int) -> int:
        """Returns the number of images in the steps up to this one; the last batch of an epoch may be smaller."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch * len(self.train_set[0]) + step_in_epoch * self.config.batch_size


class _Seconds:
    """Measures the time of training and compilation since the last row, and of the whole run with its earlier parts."""

    def __init__(self):
        self._began = time.perf_counter()
        self._earlier = 0.0  # total of the parts before the last interruption
        self._since_row = {"training": 0.0, "compiling": 0.0}

    @contextlib.contextmanager
    def add_to(self, name: str) -> Iterator[None]:
        """Adds the time of the `with` block to "training" or "compiling"."""
        began = time.perf_counter()
        yield
        self._since_row[name] += time.perf_counter() - began

    def since_row(self, name: str) -> float:
        """Returns the seconds of "training" or "compiling" since the last row."""
        return self._since_row[name]

    def start_row(self) -> None:
        """Sets the times since the last row to zero."""
        self._since_row = dict.fromkeys(self._since_row, 0.0)

    def total(self) -> float:
        """Returns the seconds of the whole run, without interruptions."""
        return self._earlier + time.perf_counter() - self._began

    def to_json(self) -> dict[str, float]:
        """Returns what a checkpoint keeps."""
        return {**self._since_row, "total": self.total()}

    def resume(self, saved: dict[str, float]) -> None:
        """Adds the times of a checkpoint."""
        self._earlier = saved["total"]
        for name in self._since_row:
            self._since_row[name] += saved[name]


def _compile(config: Config, dataset: Dataset, mesh: Mesh) -> Programs:
    """Compiles the programs for the shapes of these images, or returns those of an earlier run that shares them."""
    shapes = dataset.train_images.shape, dataset.test_images.shape
    return compile_programs(config, len(dataset.class_names), *shapes, mesh)


def _restore_or_init(
    run: _Run, dataset: Dataset, start_variables: dict | None, checkpoints: Checkpoints, seconds: _Seconds
) -> tuple[State, tuple[jax.Array, jax.Array], list[Row]]:
    """Returns the state of the newest checkpoint or the initial one, the keys of order and augmentation, and the rows.

    Also adds the seconds of the checkpoint to `seconds`.
    """
    state, *keys = run.programs.init(distributed.replicate(np.uint32(run.config.seed), run.mesh))
    if start_variables is not None:
        sample = dataset.train_images[:1].astype(np.float32) / 255
        moved = transfer.transplant(run.config, start_variables, state.variables, sample)
        state = state._replace(**distributed.replicate(jax.device_get(moved), run.mesh))
    rows = []
    # The initial state gives Orbax the structure and the devices of the restored one.
    if restored := checkpoints.restore(state):
        state, saved = restored
        rows = saved["rows"]
        seconds.resume(saved)
    return state, tuple(keys), rows


def _train_until(stop: int, run: _Run, state: State, keys: tuple[jax.Array, jax.Array], reporter: "_Reporter") -> State:
    """Trains up to and including the step `stop`, which must not be beyond the end of the epoch."""
    order_key, augment_key = keys
    step, programs = int(state.step), run.programs
    epoch = step // run.steps_per_epoch
    order = programs.order(run.train_set[1], order_key, distributed.replicate(np.int32(epoch), run.mesh))
    rate = distributed.replicate(np.float32(learning_rate(run.config, epoch)), run.mesh)
    while step < stop:
        step += 1
        train = programs.train if step % run.steps_per_epoch else programs.train_last
        state, loss = distributed.one_at_a_time(train(state, run.train_set, order, augment_key, rate), run.mesh)
        reporter.step(step, loss)
    return jax.block_until_ready(state)


def _evaluate_row(run: _Run, state: State, last_step: int, seconds: _Seconds) -> Row:
    """Evaluates the network on the test set, and reports on the training since the step `last_step`."""
    step = int(state.step)
    images = run.images_until(step) - run.images_until(last_step)
    # `state.loss` counts a whole batch as 1 and a smaller one as a fraction.
    train_loss = float(state.loss) / (images / run.config.batch_size)
    test_loss, test_accuracy = evaluate(run.programs, state, run.test_set, run.mesh)
    return {
        "step": step,
        "epoch": step / run.steps_per_epoch,
        "learning_rate": learning_rate(run.config, (step - 1) // run.steps_per_epoch),
        "train_loss": train_loss,
        "train_accuracy": int(state.correct) / images,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "seconds": seconds.since_row("training"),
        "compile_seconds": seconds.since_row("compiling"),
        "diverged": not (math.isfinite(train_loss) and math.isfinite(test_loss)),
    }


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
        self._running: deque[tuple[int, jax.Array]] = deque()  # steps that were dispatched, with their losses
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

    def row(self, row: Row) -> None:
        """Reports a row, and with it all steps before."""
        self._running.clear()
        if self._on_progress is not None:
            self._on_progress(Progress(row["step"], self._steps, row["train_loss"], row))
