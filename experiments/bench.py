"""What batch norm adds to a training step of ResNet-20: time and memory, this library's layer beside Flax's.

Convention: all arms are timed in one run, in shuffled order, each once just before it is timed; the numbers to quote
are ratios of what the norms add to the net without a norm, since the machine's speed cancels in them.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from experiments import blocks, models
from experiments.config import Config

ARMS = {
    "none": None,
    "flax": nn.BatchNorm,
    "flax, use_fast_variance=False": lambda **options: nn.BatchNorm(use_fast_variance=False, **options),
    "jaxbn": jaxbn.linen.BatchNorm,
}


class Step(NamedTuple):
    """A compiled training step and what it works on."""

    compiled: Callable
    state: tuple
    batch: tuple
    temporaries: int  # bytes
    compile_seconds: float


def compile_step(layer: Callable[..., nn.Module] | None, batch_size: int) -> Step:
    """Compiles a step of ResNet-20 whose batch norm is `layer`; None for no norm."""
    norm = "none" if layer is None else "batch"
    net = models.build(Config(net="resnet20", norm=norm), num_classes=10)
    images = jax.random.uniform(jax.random.key(0), (batch_size, 32, 32, 3))
    labels = jnp.arange(batch_size) % 10
    sgd = optax.sgd(0.01, 0.9)

    def step(params, batch_stats, momenta, images, labels):
        def loss_of(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updated.get("batch_stats", {})

        gradients, batch_stats_new = jax.grad(loss_of, has_aux=True)(params)
        updates, momenta = sgd.update(gradients, momenta)
        return optax.apply_updates(params, updates), batch_stats_new, momenta

    # The nets take their batch norm from the name in `blocks`: what a user changes is that import.
    with mock.patch.object(blocks, "BatchNorm", layer):
        variables = net.init(jax.random.key(1), images, train=False)
        state = (variables["params"], variables.get("batch_stats", {}), sgd.init(variables["params"]))
        lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, images, labels)
    clock = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - clock
    return Step(compiled, state, (images, labels), compiled.memory_analysis().temp_size_in_bytes, seconds)


def time_steps(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Returns seconds per step for every arm, `rounds` of them, as :func:`time_calls` takes them."""
    states = {name: step.state for name, step in steps.items()}

    def step(name):
        states[name] = steps[name].compiled(*states[name], *steps[name].batch)
        return states[name]

    return time_calls({name: functools.partial(step, name) for name in steps}, rounds)


def time_calls(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds per call for every arm, `rounds` of them, taken in shuffled order."""
    seconds = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(calls), len(calls)):
            for timed in (False, True):
                clock = time.perf_counter()
                jax.block_until_ready(calls[name]())
                if timed:
                    seconds[name].append(time.perf_counter() - clock)
    return seconds


def run(*, batch_size: int, rounds: int) -> None:
    """Compiles and times all arms, and prints the table.

    Args:
      batch_size: images per step.
      rounds: timings of each arm.
    """
    steps = {name: compile_step(layer, batch_size) for name, layer in ARMS.items()}
    medians = {name: statistics.median(values) for name, values in time_steps(steps, rounds).items()}
    device = jax.devices()[0]
    table = Table(
        "norm",
        title=f"A training step of ResNet-20, batch {batch_size}, float32, {device.device_kind}, jax {jax.__version__}",
    )
    for column in ("ms per step", "ms added", "added / Flax's", "temporaries, MB", "/ no norm", "compile, s"):
        table.add_column(column, justify="right")
    flax_added = medians["flax"] - medians["none"]
    for name, step in steps.items():
        added = medians[name] - medians["none"]
        table.add_row(
            name,
            f"{medians[name] * 1e3:.0f}",
            f"{added * 1e3:.0f}",
            f"{added / flax_added:.2f}" if flax_added > 0 else "Flax's adds none",
            f"{step.temporaries / 1e6:.0f}",
            f"{step.temporaries / steps['none'].temporaries:.3f}",
            f"{step.compile_seconds:.1f}",
        )
    Console(width=120).print(table)
