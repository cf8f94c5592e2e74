"""What batch norm adds to a training step of a whole net: time, memory, and time to compile.

Conventions: all arms are timed in one run, in shuffled order, each once just before it is timed. What is quoted is the
time that a norm adds to the net without a norm over the time that Flax's adds, since the machine's speed cancels in it.
Steps in bfloat16 are those of mixed precision: parameters and statistics are float32; kernels and biases of the
convolutions and the dense layer are rounded to bfloat16 in each step, like the images, so that all activations are
bfloat16. The norms get their float32 parameters, and `dtype=bfloat16` for their outputs, all arms alike. So no net has
an option for it.
"""

import functools
import math
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn.linen
from experiments import blocks, models, timing
from experiments.benchmarks import Settings
from experiments.config import Config

NAME = "bench-steps"
NONE, OURS, FLAX = "none", "jaxbn", "Flax"
ARMS = {
    NONE: None,
    FLAX: nn.BatchNorm,
    "Flax, stable": functools.partial(nn.BatchNorm, use_fast_variance=False),
    OURS: jaxbn.linen.BatchNorm,
}
CLASSES = 10


class Step(NamedTuple):
    """A training step, not yet compiled, and what it works on."""

    lower: Callable[[], jax.stages.Lowered]
    state: tuple
    batch: tuple


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns the pieces of this part: one for each net and dtype."""
    resnet = Config(net="resnet20", width=settings.width, batch_size=settings.batch_size)
    inception = Config(width=settings.inception_width, batch_size=settings.inception_batch_size)
    # To compile the four steps of the Inception net once takes longer than to time them.
    nets = {"ResNet-20": (resnet, settings.compilations), "Inception": (inception, 1)}
    return {
        f"{name} {dtype}": functools.partial(
            measure,
            name,
            config,
            dtype,
            image_size=settings.image_size,
            rounds=settings.step_rounds,
            compilations=compilations,
        )
        for name, (config, compilations) in nets.items()
        for dtype in settings.dtypes
    }


def measure(name: str, config: Config, dtype: str, *, image_size: int, rounds: int, compilations: int) -> list[dict]:
    """Returns the records of a net: one for each arm, with its seconds in each round.

    Args:
      name: the net's name in the records.
      config: says which net, and the batch.
      dtype: of images, activations and products.
      image_size: pixels per side.
      rounds: timings of each arm.
      compilations: of this library's arm and of Flax's, in turns; the others are compiled once.
    """
    images = jax.random.uniform(jax.random.key(0), (config.batch_size, image_size, image_size, 3))
    images = images.astype(dtype)
    steps = {arm: training_step(layer, config, images) for arm, layer in ARMS.items()}
    compiled, compile_seconds = compile_in_turns(steps, compilations)
    seconds = timing.time_calls(calls(steps, compiled), rounds)
    return [
        {
            "net": name,
            "width": config.width,
            "batch_size": config.batch_size,
            "image_size": image_size,
            "dtype": dtype,
            "arm": arm,
            "seconds": seconds[arm],
            "compile_seconds": compile_seconds[arm],
            "temporaries": compiled[arm].memory_analysis().temp_size_in_bytes,
        }
        for arm in steps
    ]


def training_step(layer: Callable[..., nn.Module] | None, config: Config, images: jax.Array) -> Step:
    """Returns a step of SGD with momentum.

    Args:
      layer: the net's batch norm; None for no norm.
      config: the net.
      images: shape [n, height, width, 3]; their dtype is that of the activations.
    """
    net = models.build(config.replace(norm="none" if layer is None else "batch"), CLASSES)
    labels = jnp.arange(len(images)) % CLASSES
    sgd = optax.sgd(0.01, 0.9)
    norm = layer and functools.partial(layer, dtype=images.dtype)
    # The nets take their batch norm from the name in `blocks`: what a user changes is that import.
    patched = functools.partial(mock.patch.object, blocks, "BatchNorm", norm)

    def step(params, batch_stats, momenta, images, labels):
        def loss_of(params):
            variables = {"params": rounded(params, images.dtype), "batch_stats": batch_stats}
            logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return losses.mean(), updated.get("batch_stats", {})

        gradients, batch_stats_new = jax.grad(loss_of, has_aux=True)(params)
        updates, momenta = sgd.update(gradients, momenta)
        return optax.apply_updates(params, updates), batch_stats_new, momenta

    with patched():
        variables = random_variables(net, images)
    state = (variables["params"], variables.get("batch_stats", {}), sgd.init(variables["params"]))
    shapes = jax.eval_shape(lambda: (*state, images, labels))

    def lower():
        with patched():
            return jax.jit(step, donate_argnums=(0, 1, 2)).lower(*shapes)

    return Step(lower, state, (images, labels))


def random_variables(net: nn.Module, images: jax.Array) -> dict:
    """Returns variables as at the start; the initializers themselves would take longer to compile than the step."""
    rng = np.random.default_rng(0)

    def variable(path, leaf):
        name = path[-1].key
        if name == "kernel":
            values = rng.normal(0, math.sqrt(2 / math.prod(leaf.shape[:-1])), leaf.shape)
        else:
            values = np.full(leaf.shape, 1.0 if name in ("scale", "var") else 0.0)
        return jnp.asarray(values, leaf.dtype)

    shapes = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), images)
    return jax.tree.map_with_path(variable, shapes)


def rounded(params: dict, dtype: Any) -> dict:
    """Returns parameters with those of the norms as they are, and all others in a dtype."""

    def leaf(path, value):
        in_norm = any(str(entry.key).startswith("BatchNorm") for entry in path)
        return value if in_norm else value.astype(dtype)

    return jax.tree.map_with_path(leaf, params)


def compile_in_turns(steps: dict[str, Step], repeats: int) -> tuple[dict[str, jax.stages.Compiled], dict[str, list]]:
    """Compiles all arms in shuffled order, and those that are compared more often.

    Only the compilation counts, not what comes before it: Python that traces and lowers the step.

    Args:
      steps: by arm.
      repeats: of this library's arm and of Flax's; the others are compiled once.

    Returns:
      The programs, and the seconds of all compilations, by arm.
    """
    compiled, seconds = {}, {arm: [] for arm in steps}
    shuffled = random.Random(0)
    for repeat in range(repeats):
        arms = list(steps) if repeat == 0 else [FLAX, OURS]
        for arm in shuffled.sample(arms, len(arms)):
            jax.clear_caches()  # or what was lowered before would give its program again
            lowered = steps[arm].lower()
            start = time.perf_counter()
            compiled[arm] = lowered.compile()
            seconds[arm].append(time.perf_counter() - start)
    return compiled, seconds


def calls(steps: dict[str, Step], compiled: dict[str, Callable]) -> dict[str, Callable[[], Any]]:
    """Returns, for every arm, a call that takes the next step; it owns the state, which a step overwrites."""
    states = {arm: step.state for arm, step in steps.items()}

    def advance(arm):
        states[arm] = compiled[arm](*states[arm], *steps[arm].batch)
        return states[arm]

    return {arm: functools.partial(advance, arm) for arm in steps}


def summarize(records: list[dict]) -> list[dict]:
    """Returns what the records of a net and dtype say: one dict for each arm.

    Returns:
      By arm: median `seconds`; `added`, the share of what Flax's norm adds, with its interval; `temporaries` over
      those without a norm; `compile`, the seconds of the compilation over Flax's, the median of the ratios in turns.
    """
    by_arm = {record["arm"]: record for record in records}
    none, flax = by_arm[NONE], by_arm[FLAX]
    return [
        {
            "arm": arm,
            "seconds": timing.spread(record["seconds"])["median"],
            "added": timing.share(record["seconds"], flax["seconds"], none["seconds"]),
            "temporaries": record["temporaries"] / none["temporaries"],
            "compile": _compile_ratio(record["compile_seconds"], flax["compile_seconds"]),
        }
        for arm, record in by_arm.items()
    ]


def _compile_ratio(ours, theirs):
    return timing.ratio(ours, theirs[: len(ours)])  # the first one is that of all arms
