"""Whether training here is as fast as a plain loop in Flax and Optax, and what data and augmentation add to a step.

Convention: all arms are timed in one run, in shuffled order, each once just before it is timed; the numbers to quote
are ratios, since the machine's speed cancels in them. The images are noise, whose values do not matter for the time.
"""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from experiments.config import PRESETS, Config
from experiments.data.datasets import Dataset
from experiments.evidence import files, provenance, timing
from experiments.nets import linen as linen_nets
from experiments.processes import distributed
from experiments.training import loop, programs

NAME = "throughput"
CLASSES = 10
STEPS = 10  # timed together
TEST_IMAGES = 100  # so few that their evaluation takes no time beside an epoch
FIT, PLAIN = "fit", "plain Flax and Optax"
BARE, AT_HAND = "fit, without augmentation", "fit, with a batch that is at hand"
CROPPED = "plain Flax and Optax, with flips and crops in NumPy"


class PlainCNN7(nn.Module):
    """The net of the studies as one writes it in Flax alone."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns the logits of the images x."""
        for features, strides in ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 1)):
            x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    """Flax's state of a training, with the running statistics."""

    batch_stats: Any


def plain_state(config: Config) -> TrainState:
    """Returns the initial state of the plain loop."""
    net = PlainCNN7()
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(config.seed), images)
    sgd = optax.sgd(config.learning_rate, programs.MOMENTUM)
    return TrainState.create(apply_fn=net.apply, tx=sgd, **variables)


@jax.jit
def plain_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    """Returns the state after a step on images, float32 in [0, 1], and their labels."""

    def loss_of(params):
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
      rng: of the order and the augmentation.
      augment: gets it and the images of a batch, and returns others. None: they stay.
    """
    for batch in rng.permutation(len(images)).reshape(-1, batch_size):
        x = images[batch]
        yield (x if augment is None else augment(rng, x)), labels[batch]


def flip_and_crop(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Returns images, half of them mirrored, each moved by up to an eighth of its sides, zeros where it ends."""
    n, height, width, _ = images.shape
    rows, columns = (
        rng.integers(0, 2 * (size // 8) + 1, (n, 1)) + np.arange(size) for size in (height, width)
    )  # of the padded image
    columns = np.where(rng.random((n, 1)) < 0.5, columns, columns[:, ::-1])
    padded = np.pad(images, ((0, 0), (height // 8,) * 2, (width // 8,) * 2, (0, 0)))
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def made_up(config: Config) -> Dataset:
    """Returns as many images of noise as the run trains on, and a few to test with."""
    rng = np.random.default_rng(0)

    def images_of(n):
        shape = (n, config.image_size, config.image_size, 3)
        return rng.integers(0, 256, shape, dtype=np.uint8), rng.integers(0, CLASSES, n, dtype=np.int32)

    names = tuple(map(str, range(CLASSES)))
    return Dataset("noise", "noise", "noise", *images_of(config.train_images), *images_of(TEST_IMAGES), names)


def floats(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the training images as float32 in [0, 1], and their labels."""
    return dataset.train_images.astype(np.float32) / 255, dataset.train_labels


def step_calls(config: Config, dataset: Dataset, state: TrainState, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """Returns, for every arm, a call that takes `STEPS` steps.

    Args:
      config: the run.
      dataset: its images.
      state: of the plain loop, to begin with.
      mesh: the devices of the others.
    """

    def of_fit(compiled):
        state, order_key, key = compiled.init(np.uint32(config.seed))
        order = compiled.order(train_set[1], order_key, np.int32(0))
        return repeated(lambda state: compiled.train(state, train_set, order, key, rate)[0], state)

    def with_batch_at_hand(compiled):
        state, _, key = compiled.init(np.uint32(config.seed))
        net, size = linen_nets.build(config, CLASSES), config.batch_size
        update = jax.jit(functools.partial(programs.update, net, config, size), donate_argnums=0)
        batch = (train_set[0][:size].astype(np.float32) / 255, train_set[1][:size], None)
        return repeated(lambda state: update(state, batch, key, rate)[0], state)

    def plain(augment=None):
        rng = np.random.default_rng(config.seed)
        epochs = (batches(*floats(dataset), config.batch_size, rng, augment) for _ in itertools.count())
        endless = itertools.chain.from_iterable(epochs)
        return repeated(lambda state: plain_step(state, *next(endless)), state)

    train_set = distributed.replicate((dataset.train_images, dataset.train_labels), mesh)
    rate = distributed.replicate(np.float32(config.learning_rate), mesh)
    shapes = dataset.train_images.shape, dataset.test_images.shape
    whole, bare = (
        programs.compile_programs(config.replace(augment=augment), CLASSES, *shapes, mesh) for augment in (True, False)
    )
    return {
        FIT: of_fit(whole),
        BARE: of_fit(bare),
        AT_HAND: with_batch_at_hand(bare),
        PLAIN: plain(),
        CROPPED: plain(flip_and_crop),
    }


def repeated(step: Callable[[Any], Any], state: Any) -> Callable[[], Any]:
    """Returns a call that takes the next `STEPS` steps, and returns the state after them."""

    def call():
        nonlocal state
        for _ in range(STEPS):
            state = step(state)
        return state

    return call


def epoch_calls(config: Config, dataset: Dataset, state: TrainState, mesh: Mesh) -> dict[str, Callable[[], Any]]:
    """Returns a call that does all that `fit` does for a run of one epoch, and one for the plain loop; see above."""
    rng = np.random.default_rng(config.seed)
    images, labels = floats(dataset)

    def plain():
        trained = state
        for batch in batches(images, labels, config.batch_size, rng):
            trained = plain_step(trained, *batch)
        return trained

    return {FIT: lambda: loop.fit(config.replace(epochs=1), dataset, mesh=mesh).variables, PLAIN: plain}


def measure(config: Config, rounds: int) -> list[dict]:
    """Returns a record for each arm: median seconds of a step, and of an epoch where the arm has one.

    Args:
      config: the run; batch_size divides train_images.
      rounds: timings of `STEPS` steps of each arm; there is one of an epoch for two of these.

    Raises:
      ValueError: batch_size does not divide train_images.
    """
    if config.train_images % config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide the {config.train_images} training images, "
            "and the loops treat what is left over differently; choose a divisor."
        )
    dataset, mesh = made_up(config), Mesh(np.array(jax.devices()[:1]), (distributed.AXIS,))
    where = (config, dataset, plain_state(config), mesh)
    timed = (
        ("step", config.batch_size, timing.time_calls(step_calls(*where), rounds), STEPS),
        ("run", config.train_images, timing.time_calls(epoch_calls(*where), -(-rounds // 2)), 1),
    )
    return [
        {
            "timed": what,
            "arm": arm,
            "images": images,
            "seconds": statistics.median(seconds) / times,
            "images_over_plain": timing.ratio(by_arm[PLAIN], seconds),
            **({"seconds_over_at_hand": timing.ratio(seconds, by_arm[AT_HAND])} if AT_HAND in by_arm else {}),
        }
        for what, images, by_arm, times in timed
        for arm, seconds in by_arm.items()
    ]


def run(*, batch_size: int, rounds: int, out: Path) -> None:
    """Measures a small run of the 7-layer CNN, writes the file, and prints the tables.

    Args:
      batch_size: images per step; divides the number of training images.
      rounds: see `measure`.
      out: folder of the file.
    """
    config = PRESETS["small"].replace(batch_size=batch_size)
    settings = {"rounds": rounds, "config": dataclasses.asdict(config)}
    path = out / f"{NAME}.jsonl"
    pieces = {"cnn7": functools.partial(measure, config, rounds)}
    files.measure_in_pieces(path, provenance.measurement_header(settings), pieces)
    records = files.read_records(path)["records"]
    console = Console(width=120)
    console.print(
        f"Training cnn7 on {config.image_size} x {config.image_size} images, batch {batch_size}, float32, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}."
    )
    console.print(table("A training step", [record for record in records if record["timed"] == "step"]))
    title = f"A run of {config.train_images:,} images"
    console.print(table(title, [record for record in records if record["timed"] == "run"]))
    console.print(f"Gathering and augmenting the images adds {augmentation(records):.1f} % to a step.")


def augmentation(records: list[dict]) -> float:
    """Returns what gathering and augmenting the images adds to a step, in %."""
    (fit,) = (record for record in records if record["timed"] == "step" and record["arm"] == FIT)
    return 100 * (fit["seconds_over_at_hand"]["median"] - 1)


def table(title: str, records: list[dict]) -> Table:
    """Returns a table of the arms: milliseconds, and images per second."""
    made = Table("loop", title=title)
    for column in ("ms", "images/s", "images/s / plain"):
        made.add_column(column, justify="right")
    for record in records:
        made.add_row(
            record["arm"],
            f"{record['seconds'] * 1e3:.1f}",
            f"{record['images'] / record['seconds']:,.0f}",
            f"{record['images_over_plain']['median']:.2f}",
        )
    return made


def block(run: dict) -> str:
    """Returns how the training loop compares with a plain one."""
    fit = {record["timed"]: record for record in run["records"] if record["arm"] == FIT}
    faster = fit["run"]["images_over_plain"]["median"]
    return (
        f"The training loop trains {faster:.2f} times as many images per second as a plain loop in Flax and Optax over "
        "the same net, and gathering and augmenting the images adds "
        f"{augmentation(run['records']):.1f} % to a step."
    )
