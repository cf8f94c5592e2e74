"""The demo of synchronized batch norm: a network on many devices, with statistics per device or over all devices.

With few images per device, each device's mean and variance are noisy estimates, and differ from device to device.
Synchronized statistics are those of the whole batch, and equal on all devices. Nothing is downloaded.
"""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import jaxbn
from experiments.benchmarks import collectives, hlo
from experiments.data.datasets import Dataset
from experiments.evidence import files, plots, provenance
from experiments.evidence.verdicts import spread
from experiments.processes import distributed
from experiments.training import small_run
from jaxbn.linen import BatchNorm
from jaxbn.parallel import value_and_grad_of_psum

AXIS = distributed.AXIS
ARMS = {"per device": None, "synchronised": AXIS}  # axis_name of the layers
SHOWN = {"per device": "per device", "synchronised": "synchronized"}  # stored measurements have the British spelling
COLORS = {"per device": "#D55E00", "synchronised": "#0072B2"}
PER_DEVICE = (2, 4, 8, 32)  # images
CHANNELS = (8, 16, 32)
# At most. Collectives between processes are slow on one CPU, so several processes train on a quarter, with one seed.
TRAIN_IMAGES = 4096
EPOCHS = 4
RATE = 0.02  # for one image per step; scaled by the square root of the batch size, with a cosine decay to 0
SEEDS = 3
PROBES = 8  # batches for measuring the spread over devices after training


class Net(nn.Module):
    """Three convolutions, each with batch norm and ReLU, a global average and a dense layer.

    Attributes:
      num_classes: number of logits.
      axis_name: axis of the devices that share their statistics; None for statistics per device.
      momentum: weight of the old running statistics.
    """

    num_classes: int
    axis_name: str | None
    momentum: float = 0.9

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Returns the logits of uint8 images, shape [n, num_classes]."""
        x = images.astype(jnp.float32) / 255
        for features in CHANNELS:
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = BatchNorm(use_running_average=not train, momentum=self.momentum, axis_name=self.axis_name)(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class State(NamedTuple):
    """Everything that training changes; equal on all devices."""

    params: Any
    batch_stats: Any
    optimizer: optax.OptState


class Programs(NamedTuple):
    """The compiled functions of an arm. A set is the pair (images, labels).

    Attributes:
      step: State, training set, order of the images [steps, images], step -> State.
      correct: State, test set, mask -> number of correctly classified test images.
      spread: State, training set, order, step -> spread of that batch's statistics over the devices, see `apart`.
    """

    step: Callable
    correct: Callable
    spread: Callable


def run(*, data_dir: Path | None, out: Path) -> None:
    """Trains both arms with few and many images per device, prints two tables and writes a figure to the folder `out`.

    Call `distributed.initialize` first. In several processes, the first one prints and writes.
    """
    began = time.perf_counter()
    console = Console(width=120, quiet=not distributed.is_primary())
    dataset, reason = small_run.choose_data(data_dir)
    mesh = distributed.mesh()
    console.print(
        f"A network of {len(CHANNELS)} convolutions on {mesh.size} devices of {jax.process_count()} "
        f"process(es), with statistics per device and with synchronized ones.\nData: {dataset.source}. {reason}",
        soft_wrap=True,
        highlight=False,
    )
    n, seeds = _size(dataset)
    if n < max(PER_DEVICE) * mesh.size:
        raise ValueError(
            f"{n} training images are too few for {mesh.size} devices with {max(PER_DEVICE)} images each; choose at "
            f"most {n // max(PER_DEVICE)} devices."
        )
    distributed.agree({"images": dataset.provenance}, remedy="start all processes with the same images.")
    rows = [row for size in PER_DEVICE for arm in ARMS for row in measure(arm, size, dataset, mesh, console)]
    if distributed.is_primary():
        path = out / "measured.jsonl"
        config = {"per_device": PER_DEVICE, "epochs": EPOCHS, "rate": RATE, "channels": CHANNELS, "devices": mesh.size}
        config |= {"train_images": n, "seeds": seeds}
        head = {"config": config, "images": dataset.provenance, **provenance.origin()}
        files.write(path, head, rows)
        measured = files.read(path)
        console.print(table(measured))
        # The errors are for unequal numbers of examples on four devices, and in several processes pmap cannot compile
        # for the devices of one process alone.
        if mesh.size % 4 == 0 and jax.process_count() == 1:
            console.print(collectives.table_of_apis(collectives.measure_apis(mesh.size)))
        figure = plots.save(plot(measured), out / "sync_demo.png", digest=files.digest({"": [measured]}))
        console.print(f"Figure: {figure}\nTotal time: {time.perf_counter() - began:.0f} s", highlight=False)


def measure(arm: str, per_device: int, dataset: Dataset, mesh: Mesh, console: Console) -> list[dict]:
    """Trains one arm with every seed; returns one row per seed."""
    n, seeds = _size(dataset)
    images, labels = dataset.train_images[:n], dataset.train_labels[:n]
    batch = per_device * mesh.size
    steps = len(images) // batch
    net = Net(len(dataset.class_names), ARMS[arm])
    optimizer = optax.sgd(optax.cosine_decay_schedule(RATE * math.sqrt(batch), EPOCHS * steps), 0.9)
    train_set = distributed.replicate((images, labels), mesh)
    tested = mesh.size * math.ceil(len(dataset.test_labels) / mesh.size)
    padded, mask = jaxbn.pad_batch((dataset.test_images, dataset.test_labels), tested)
    test_set, mask = distributed.replicate((padded, mask), mesh)
    programs, rows, compiled = make_programs(net, optimizer, mesh), [], None
    # Initialization in evaluation mode does not use axis_name, so it runs outside of shard_map.
    init = jax.jit(functools.partial(net.init, train=False))
    for seed in range(seeds):
        variables = jax.device_get(init(jax.random.key(seed), images[:1]))
        state = State(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
        state = distributed.replicate(state, mesh)
        generator = np.random.default_rng(seed)
        epochs = [generator.permutation(len(images))[: steps * batch] for _ in range(EPOCHS)]
        order = distributed.replicate(np.concatenate(epochs).reshape(-1, batch), mesh)
        compiled = compiled or programs.step.lower(state, train_set, order, np.int32(0)).compile()
        clock = time.perf_counter()
        for i in range(len(order)):
            state = distributed.one_at_a_time(compiled(state, train_set, order, np.int32(i)), mesh)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - clock
        batches = range(min(PROBES, len(order)))
        spreads = [jax.device_get(programs.spread(state, train_set, order, np.int32(i))) for i in batches]
        spread_of_mean, spread_of_var = np.mean(spreads, axis=0).tolist()
        row = {
            "arm": arm,
            "per_device": per_device,
            "seed": seed,
            "steps": len(order),
            "test_accuracy": int(programs.correct(state, test_set, mask)) / len(dataset.test_labels),
            "spread_of_mean": spread_of_mean,
            "spread_of_var": spread_of_var,
            "collectives": len(hlo.executed(hlo.collectives(compiled.as_text()))),
            "milliseconds": 1000 * seconds / len(order),
        }
        rows.append(row)
        console.print(
            f"{per_device} images per device, {SHOWN[arm]}, seed {seed}: "
            f"test accuracy {100 * row['test_accuracy']:.1f} %",
            highlight=False,
        )
    return rows


def _size(dataset: Dataset) -> tuple[int, int]:
    """Returns the number of training images and the number of seeds."""
    n, seeds = (TRAIN_IMAGES, SEEDS) if jax.process_count() == 1 else (TRAIN_IMAGES // 4, 1)
    return min(n, len(dataset.train_images)), seeds


def make_programs(net: Net, optimizer: optax.GradientTransformation, mesh: Mesh) -> Programs:
    """Makes the functions of an arm; each device works on its part of every batch."""

    def step(state: State, train_set: tuple, rows: jax.Array) -> State:
        images, labels = (array[rows] for array in train_set)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean() / lax.axis_size(AXIS), updated["batch_stats"]

        (_, batch_stats), gradients = value_and_grad_of_psum(loss_of, AXIS, has_aux=True)(state.params)
        if net.axis_name is None:
            # Each device has its own running statistics, but evaluation needs a single set.
            batch_stats = lax.pmean(batch_stats, AXIS)
        updates, momenta = optimizer.update(gradients, state.optimizer)
        return State(optax.apply_updates(state.params, updates), batch_stats, momenta)

    def spread(state: State, train_set: tuple, rows: jax.Array) -> jax.Array:
        probe = net.clone(momentum=0.0)  # The running statistics become those of this batch.
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        _, updated = probe.apply(variables, train_set[0][rows], train=True, mutable=["batch_stats"])
        layers = updated["batch_stats"].values()
        return jnp.mean(jnp.array([apart(layer["mean"], layer["var"]) for layer in layers]), axis=0)

    def correct(state: State, test_set: tuple, mask: jax.Array) -> jax.Array:
        images, labels = lax.with_sharding_constraint(test_set, NamedSharding(mesh, P(AXIS)))
        logits = net.apply({"params": state.params, "batch_stats": state.batch_stats}, images, train=False)
        return jnp.sum((logits.argmax(-1) == labels) & mask)

    def over_devices(function: Callable) -> Callable:
        sharded = jax.shard_map(function, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P())
        return lambda state, train_set, order, i: sharded(state, train_set, order[i])

    return Programs(jax.jit(over_devices(step), donate_argnums=0), jax.jit(correct), jax.jit(over_devices(spread)))


def apart(mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Measures how much statistics of shape [C] differ between devices, averaged over the features.

    Returns:
      The standard deviation of the mean over the devices, in standard deviations of the feature; and the standard
      deviation of the variance over the devices, relative to the variance.
    """
    typical = lax.pmean(var, AXIS)
    return (_deviation(mean) / jnp.sqrt(typical)).mean(), (_deviation(var) / typical).mean()


def _deviation(value: jax.Array) -> jax.Array:
    """Returns the standard deviation over the devices."""
    return jnp.sqrt(lax.pmean(jnp.square(value - lax.pmean(value, AXIS)), AXIS))


def table(measured: dict) -> Table:
    """Returns the table of means over the seeds."""
    config = measured["header"]["config"]
    subject = f"{config['devices']} devices, {config['epochs']} epochs of {config['train_images']:,} images"
    printed = Table(title=f"{subject}; mean ± std over {config['seeds']} seed(s)")
    columns = ("images per device", "statistics", "test accuracy, %", "spread of means, std", "spread of variances, %")
    for column in (*columns, "collectives per step", "ms per step"):
        printed.add_column(column, justify="left" if column == "statistics" else "right")
    for n in config["per_device"]:
        for arm in ARMS:
            printed.add_row(
                str(n),
                SHOWN[arm],
                spread(100 * values(measured, arm, n, "test_accuracy")).text(),
                spread(values(measured, arm, n, "spread_of_mean")).text(3),
                spread(100 * values(measured, arm, n, "spread_of_var")).text(),
                f"{values(measured, arm, n, 'collectives')[0]:.0f}",
                f"{np.median(values(measured, arm, n, 'milliseconds')):.1f}",
                end_section=arm == list(ARMS)[-1],
            )
    return printed


def values(measured: dict, arm: str, per_device: int, name: str) -> np.ndarray:
    """Returns one field of the rows of an arm, by seed."""
    rows = [row for row in measured["rows"] if (row["arm"], row["per_device"]) == (arm, per_device)]
    return np.array([row[name] for row in rows])


def plot(measured: dict) -> Figure:
    """Draws accuracy and the spread of the statistics, against images per device."""

    def lines(name: str, factor: float) -> list[plots.Line]:
        x = np.array(measured["header"]["config"]["per_device"])
        by_arm = {arm: np.stack([factor * values(measured, arm, n, name) for n in x], axis=1) for arm in ARMS}
        return [plots.Line(SHOWN[arm], x, y, COLORS[arm]) for arm, y in by_arm.items()]

    label = "images per device"
    return plots.draw(
        [
            plots.Lines(label, "test accuracy (%)", lines("test_accuracy", 100), xscale="log"),
            plots.Lines(
                label, "spread of the mean over devices\n(standard deviations)", lines("spread_of_mean", 1), "log"
            ),
            plots.Lines(label, "spread of the variance\nover devices (%)", lines("spread_of_var", 100), xscale="log"),
        ]
    )
