"""Speed of the training loop compared with a plain one in Flax and Optax, and the cost of data and augmentation.

Conventions: all arms are timed in one run, in shuffled order, with one warm-up call right before each timing. Quote
ratios: the machine's speed cancels in them. The images are noise, since their values do not affect the time.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import Mesh
from rich.table import Table

from experiments.benchmarks import Settings
from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import provenance, timing
from experiments.nets import linen as linen_nets
from experiments.processes import distributed
from experiments.training import loop, programs

NAME = "throughput"
CLASSES = 10
STEPS = 10  # in one timing
TEST_IMAGES = 100  # few enough that evaluation takes negligible time compared with an epoch
FIT, PLAIN = "fit", "plain Flax and Optax"
BARE, FIXED = "fit, without augmentation", "fit, with a fixed batch"
CROPPED = "plain Flax and Optax, with flips and crops in NumPy"


class PlainCNN7(nn.Module):
    """The studies' 7-layer network, written in Flax alone."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the logits of the images x, shape [n, num_classes]."""
        for features, strides in ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 1)):
            x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    """Flax's training state plus the running statistics."""

    batch_stats: Any


def plain_state(config: Config) -> TrainState:
    """Initializes the plain loop."""
    net = PlainCNN7()
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(config.seed), images)
    sgd = optax.sgd(config.learning_rate, programs.MOMENTUM)
    return TrainState.create(apply_fn=net.apply, tx=sgd, **variables)


@jax.jit
def plain_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """Takes a step on images, float32 in [0, 1], and their labels."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

    gradients, updated = jax.grad(loss_of, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=updated["batch_stats"])


def batches(
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
    augment: Callable[[np.random.Generator, np.ndarray], np.ndarray] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the batches of an epoch in random order, as NumPy arrays.

    Args:
      images: float32 [n, height, width, channels].
      labels: int32 [n].
      batch_size: divides n.
      rng: draws the order and the augmentation.
      augment: maps it and the images of a batch to augmented ones. None: no augmentation.
    """
    for batch in rng.permutation(len(images)).reshape(-1, batch_size):
        x = images[batch]
        yield (x if augment is None else augment(rng, x)), labels[batch]


def flip_and_crop(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Mirrors half of the images, and shifts each by up to an eighth of its sides, padding with zeros."""
    n, height, width, _ = images.shape
    # Positions in the padded image.
    rows, columns = (rng.integers(0, 2 * (size // 8) + 1, (n, 1)) + np.arange(size) for size in (height, width))
    columns = np.where(rng.random((n, 1)) < 0.5, columns, columns[:, ::-1])
    padded = np.pad(images, ((0, 0), (height // 8,) * 2, (width // 8,) * 2, (0, 0)))
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def noise_images(config: Config) -> Dataset:
    """Makes a data set of noise, with the run's number of training images and a few test images."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        shape = (n, config.image_size, config.image_size, 3)
        return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, CLASSES, n, dtype=np.int32)

    names = tuple(map(str, range(CLASSES)))
    return Dataset("noise", "noise", "noise", *draw(config.train_images), *draw(TEST_IMAGES), names)


def floats(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training images as float32 in [0, 1], and their labels."""
    return dataset.train_images.astype(np.float32) / 255, dataset.train_labels


def step_calls(config: Config, dataset: Dataset, state: TrainState, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """Returns a call for each arm that takes `STEPS` steps.

    Args:
      config: the run.
      dataset: its images.
      state: initial state of the plain loop.
      mesh: devices of the other arms.
    """

    def of_fit(compiled: programs.Programs) -> Callable[[], Any]:
        state, order_key, key = compiled.init(np.uint32(config.seed))
        order = compiled.order(train_set[1], order_key, np.int32(0))
        return repeated(lambda state: compiled.train(state, train_set, order, key, rate)[0], state)

    def with_fixed_batch(compiled: programs.Programs) -> Callable[[], Any]:
        # The step of `fit` without gathering and augmenting its images.
        state, _, key = compiled.init(np.uint32(config.seed))
        net, size = linen_nets.build(config, CLASSES), config.batch_size
        update = jax.jit(functools.partial(programs.update, net, config, size), donate_argnums=0)
        batch = (train_set[0][:size].astype(np.float32) / 255, train_set[1][:size], None)
        return repeated(lambda state: update(state, batch, key, rate)[0], state)

    def plain(augment: Callable | None = None) -> Callable[[], Any]:
        rng = np.random.default_rng(config.seed)
        epochs = (batches(*floats(dataset), config.batch_size, rng, augment) for _ in itertools.count())
        endless_batches = itertools.chain.from_iterable(epochs)
        return repeated(lambda state: plain_step(state, *next(endless_batches)), state)

    train_set = distributed.replicate((dataset.train_images, dataset.train_labels), mesh)
    rate = distributed.replicate(np.float32(config.learning_rate), mesh)
    shapes = dataset.train_images.shape, dataset.test_images.shape
    augmented, bare = (
        programs.compile_programs(config.replace(augment=augment), CLASSES, *shapes, mesh) for augment in (True, False)
    )
    return {
        FIT: of_fit(augmented),
        BARE: of_fit(bare),
        FIXED: with_fixed_batch(bare),
        PLAIN: plain(),
        CROPPED: plain(flip_and_crop),
    }


def repeated(step: Callable[[Any], Any], state: Any) -> Callable[[], Any]:
    """Returns a call that takes the next `STEPS` steps and returns the state after them."""

    def call() -> Any:
        nonlocal state
        for _ in range(STEPS):
            state = step(state)
        return state

    return call


def epoch_calls(config: Config, dataset: Dataset, state: TrainState, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """Returns two calls that train one epoch, all of `fit` and the plain loop; for the arguments, see `step_calls`."""
    rng = np.random.default_rng(config.seed)
    images, labels = floats(dataset)

    def plain() -> TrainState:
        trained = state
        for batch in batches(images, labels, config.batch_size, rng):
            trained = plain_step(trained, *batch)
        return trained

    return {FIT: lambda: loop.fit(config.replace(epochs=1), dataset, mesh=mesh).variables, PLAIN: plain}


def measure(config: Config, rounds: int) -> list[dict]:
    """Returns one record for each arm: median seconds of a step, and also of an epoch for two of the arms.

    Args:
      config: the run; batch_size divides train_images.
      rounds: timings of `STEPS` steps of each arm; an epoch is timed half as often.

    Raises:
      ValueError: batch_size does not divide train_images.
    """
    if config.train_images % config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide the {config.train_images} training images, "
            "and the loops treat the remainder differently; choose a divisor."
        )
    dataset, mesh = noise_images(config), Mesh(np.array(jax.devices()[:1]), (distributed.AXIS,))
    arguments = (config, dataset, plain_state(config), mesh)
    timings = (
        ("step", config.batch_size, STEPS, timing.time_calls(step_calls(*arguments), rounds)),
        ("run", config.train_images, 1, timing.time_calls(epoch_calls(*arguments), -(-rounds // 2))),
    )
    records = []
    for timed, images, repeats, seconds_by_arm in timings:
        for arm, seconds in seconds_by_arm.items():
            record = {
                "timed": timed,
                "arm": arm,
                "images": images,
                "seconds": statistics.median(seconds) / repeats,
                "images_over_plain": timing.ratio(seconds_by_arm[PLAIN], seconds),
            }
            if FIXED in seconds_by_arm:
                record["seconds_over_at_hand"] = timing.ratio(seconds, seconds_by_arm[FIXED])
            records.append(record)
    return records


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    return provenance.measurement_header({"rounds": settings.rounds, "config": dataclasses.asdict(_config(settings))})


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns a single piece."""
    return {"cnn7": functools.partial(measure, _config(settings), settings.rounds)}


def _config(settings: Settings) -> Config:
    return PRESETS["small"].replace(batch_size=settings.throughput_batch_size)


def tables(run: dict) -> list[str | Table]:
    """Returns what the terminal shows: every arm, between two sentences."""
    records, header = run["records"], run["header"]
    config = header["settings"]["config"]
    size = config["image_size"]
    steps, runs = ([record for record in records if record["timed"] == timed] for timed in ("step", "run"))
    return [
        f"Training {config['net']} on {size} x {size} images, batch {config['batch_size']}, float32, "
        f"{header['hardware']['device']}, jax {header['versions']['jax']}.",
        table("A training step", steps),
        table(f"A run of {config['train_images']:,} images", runs),
        f"Gathering and augmenting the images adds {augmentation(records):.1f} % to a step.",
    ]


def augmentation(records: list[dict]) -> float:
    """Returns the time that gathering and augmenting the images adds to a step, in %."""
    (fit,) = (record for record in records if record["timed"] == "step" and record["arm"] == FIT)
    return 100 * (fit["seconds_over_at_hand"]["median"] - 1)


def table(title: str, records: list[dict]) -> Table:
    """Returns a table of the arms: milliseconds, and images per second."""
    printed = Table("loop", title=title)
    for column in ("ms", "images/s", "images/s / plain"):
        printed.add_column(column, justify="right")
    for record in records:
        printed.add_row(
            record["arm"],
            f"{record['seconds'] * 1e3:.1f}",
            f"{record['images'] / record['seconds']:,.0f}",
            f"{record['images_over_plain']['median']:.2f}",
        )
    return printed


def block(run: dict) -> str:
    """Returns a sentence that compares the training loop with a plain one."""
    fit = {record["timed"]: record for record in run["records"] if record["arm"] == FIT}
    faster = fit["run"]["images_over_plain"]["median"]
    return (
        f"The training loop processes {faster:.2f} times as many images per second as a plain loop in Flax and Optax "
        "with the same network, and gathering and augmenting the images adds "
        f"{augmentation(run['records']):.1f} % to a step."
    )
