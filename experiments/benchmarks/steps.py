"""What batch norm adds to a training step of a whole net: time, memory, and time to compile.

Conventions: all arms are timed in one run, in shuffled order, each once just before it is timed. What is quoted is the
time that a norm adds to the net without a norm, as a part of that net's time or of what Flax's norm adds, since the
machine's speed cancels in both. It differs from process to process and from minute to minute, with where the arrays lie
and what else uses the memory, so several processes measure the same, and intervals say how much they differ.
Steps in bfloat16 are those of mixed precision: parameters and statistics are float32; kernels and biases of the
convolutions and the dense layer are rounded to bfloat16 in each step, like the images, so that all activations are
bfloat16. The norms get their float32 parameters, and `dtype=bfloat16` for their outputs, all arms alike. So no net has
an option for it.
"""

import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
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
from numpy.typing import ArrayLike

import jaxbn.linen
from experiments.benchmarks import Settings
from experiments.config import Config
from experiments.evidence import timing
from experiments.evidence.text import STABLE, markdown, select
from experiments.nets import blocks
from experiments.nets import linen as linen_nets

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
    """A training step, not yet compiled, and what it works on.

    Attributes:
      run: parameters, running statistics, momenta, images, labels -> the first three after the step.
      state: the first three.
      batch: images and labels.
    """

    run: Callable[..., tuple]
    state: tuple
    batch: tuple

    def lower(self) -> jax.stages.Lowered:
        """Returns the step for this machine, which overwrites the state, before compilation."""
        shapes = jax.eval_shape(lambda: (*self.state, *self.batch))
        return jax.jit(self.run, donate_argnums=(0, 1, 2)).lower(*shapes)


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns the pieces of this part: one for each net, dtype and process."""
    nets = {
        "ResNet-20": Config(net="resnet20", width=settings.width, batch_size=settings.batch_size),
        "Inception": Config(width=settings.inception_width, batch_size=settings.inception_batch_size),
    }
    return {
        f"{name}, {dtype}, process {process}": functools.partial(
            measure_apart,
            name,
            config,
            dtype,
            process,
            image_size=settings.image_size,
            rounds=settings.step_rounds,
        )
        for name, config in nets.items()
        for dtype in settings.dtypes
        for process in range(1, settings.step_processes + 1)
    }


def measure_apart(*arguments: Any, **options: Any) -> list[dict]:
    """Returns what `measure` does, in a process of its own."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(measure, *arguments, **options).result()


def measure(name: str, config: Config, dtype: str, process: int, *, image_size: int, rounds: int) -> list[dict]:
    """Returns the records of a net: one for each arm, with its seconds in each round.

    Args:
      name: the net's name in the records.
      config: says which net, and the batch.
      dtype: of images, activations and products.
      process: which of those that measure the same, from 1.
      image_size: pixels per side.
      rounds: timings of each arm.
    """
    images = jax.random.uniform(jax.random.key(0), (config.batch_size, image_size, image_size, 3))
    images = images.astype(dtype)
    steps = {arm: training_step(layer, config, images) for arm, layer in ARMS.items()}
    compiled, seconds_before = compile_in_turn(steps, random.Random(process))
    seconds = timing.time_calls(calls(steps, compiled), rounds)
    return [
        {
            "net": name,
            "width": config.width,
            "batch_size": config.batch_size,
            "image_size": image_size,
            "dtype": dtype,
            "arm": arm,
            "process": process,
            "seconds": seconds[arm],
            **seconds_before[arm],
            "temporaries": compiled[arm].memory_analysis().temp_size_in_bytes,
        }
        for arm in steps
    ]


def training_step(
    layer: Callable[..., nn.Module] | None, config: Config, images: jax.Array, axis_name: str | None = None
) -> Step:
    """Returns a step of SGD with momentum.

    Args:
      layer: the net's batch norm; None for no norm.
      config: the net.
      images: shape [n, height, width, 3]; their dtype is that of the activations.
      axis_name: of the devices that share a batch, where each of them runs the step on its part.
    """
    net = linen_nets.build(config.replace(norm="none" if layer is None else "batch"), CLASSES)
    options = {"axis_name": axis_name} if axis_name else {}
    norm = layer and functools.partial(layer, dtype=images.dtype, **options)
    # The nets take their batch norm from the name in `blocks`: what a user changes is that import.
    return step_of(net, images, CLASSES, axis_name, functools.partial(mock.patch.object, blocks, "BatchNorm", norm))


def step_of(
    net: nn.Module,
    images: jax.Array,
    classes: int,
    axis_name: str | None = None,
    patched: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Step:
    """Returns a step of SGD with momentum of a net, which is called as those in `models` are.

    Args:
      net: the net.
      images: see `training_step`.
      classes: number of logits.
      axis_name: see `training_step`.
      patched: the net is called within this context.
    """
    labels = jnp.arange(len(images)) % classes
    sgd = optax.sgd(0.01, 0.9)

    def step(params, batch_stats, momenta, images, labels):
        def loss_of(params):
            variables = {"params": rounded(params, images.dtype), "batch_stats": batch_stats}
            with patched():
                logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return losses.mean(), updated.get("batch_stats", {})

        gradients, batch_stats_new = jax.grad(loss_of, has_aux=True)(params)
        if axis_name:
            gradients = jax.lax.pmean(gradients, axis_name)
        updates, momenta = sgd.update(gradients, momenta)
        return optax.apply_updates(params, updates), batch_stats_new, momenta

    with patched():
        variables = random_variables(net, images)
    state = (variables["params"], variables.get("batch_stats", {}), sgd.init(variables["params"]))
    return Step(step, state, (images, labels))


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
        in_norm = any(str(entry.key).startswith(("Affine", "BatchNorm")) for entry in path)
        return value if in_norm else value.astype(dtype)

    return jax.tree.map_with_path(leaf, params)


def compile_in_turn(
    steps: dict[str, Step], shuffled: random.Random
) -> tuple[dict[str, jax.stages.Compiled], dict[str, dict[str, float]]]:
    """Compiles all arms in shuffled order, after something small, since the first program of a process takes longer.

    Returns:
      The programs, and the seconds before the first step, by arm: "trace_seconds", for Python that traces and lowers
      the step, and "compile_seconds", for XLA.
    """
    jax.jit(jnp.cumsum).lower(jnp.ones(2)).compile()
    compiled, seconds = {}, {}
    for arm in shuffled.sample(list(steps), len(steps)):
        jax.clear_caches()  # or what was traced before would shorten this
        start = time.perf_counter()
        lowered = steps[arm].lower()
        traced = time.perf_counter()
        compiled[arm] = lowered.compile()
        seconds[arm] = {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}
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
      By arm: `added`, the time over that of the net without a norm, less 1; `share`, of what Flax's norm adds; both
      with intervals, and NaN where that adds nothing; `temporaries` over those without a norm; `trace` and `compile`,
      the seconds over Flax's, the medians of the ratios in the processes.
    """
    by_arm = {}
    for record in records:
        by_arm.setdefault(record["arm"], []).append(record)

    def ratios(arm, other, name):
        return np.array([ours[name] for ours in by_arm[arm]]) / [theirs[name] for theirs in by_arm[other]]

    in_flax = ratios(FLAX, NONE, "seconds")
    return [
        {
            "arm": arm,
            "added": timing.estimate(lambda ratio: ratio - 1, ratios(arm, NONE, "seconds")),
            "share": timing.estimate(share, ratios(arm, NONE, "seconds"), in_flax),
            "temporaries": of_arm[0]["temporaries"] / by_arm[NONE][0]["temporaries"],
            "trace": timing.quartiles(ratios(arm, FLAX, "trace_seconds")),
            "compile": timing.quartiles(ratios(arm, FLAX, "compile_seconds")),
        }
        for arm, of_arm in by_arm.items()
    ]


def share(ours: ArrayLike, flax: ArrayLike) -> np.ndarray:
    """Returns what an arm adds to the net without a norm, over what Flax's adds; both are ratios to that net."""
    ours, flax = np.asarray(ours), np.asarray(flax)
    return (ours - 1) / np.where(flax > 1, flax - 1, np.nan)


def block(run: dict) -> str:
    """Returns what each norm adds to a step, by net and dtype."""
    lines, settings = [], run["header"]["settings"]
    for net, dtype in {(record["net"], record["dtype"]): None for record in run["records"]}:
        for found in summarize(select(run["records"], net=net, dtype=dtype)):
            if found["arm"] != NONE:
                lines.append(
                    {
                        "net": f"{net}, {dtype}",
                        "norm": found["arm"],
                        "time added": _interval(found["added"], 100, " %", decimals=0),
                        "over Flax's": _interval(found["share"]),
                        "temporaries, over no norm": f"{found['temporaries']:.2f}",
                        "compile / trace, over Flax's": " / ".join(
                            f"{found[name]['median']:.2f}" for name in ("compile", "trace")
                        ),
                    }
                )
    nets = {f"{r['net']} at width {r['width']:g} and batch {r['batch_size']}": None for r in run["records"]}
    return (
        f"{markdown(lines)}\n\n{', '.join(nets)}, on images of {settings['image_size']} x {settings['image_size']}; "
        "time added to the net without a norm, median of the rounds. In brackets, an interval of 95 % (bootstrap over "
        f"{settings['step_processes']} processes, and {settings['step_rounds']} rounds in each); a dash where Flax's "
        f"norm may add no time. Compile: XLA; trace: Python, before that. {STABLE}"
    )


def _interval(found, scale=1, unit="", decimals=2):
    """A value with its interval, or a dash where that is open."""
    if any(map(math.isnan, found.values())):
        return "-"
    # A rounded zero has no sign.
    value, lower, upper = (f"{round(scale * found[name], decimals) + 0:.{decimals}f}" for name in found)
    return f"{value}{unit} ({lower} to {upper})"
