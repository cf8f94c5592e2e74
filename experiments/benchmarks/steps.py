"""Time, memory and compilation that batch norm adds to the training step of a whole network.

Conventions: all arms are timed in one run, in shuffled order, with one warm-up call right before each timing. Reported
is the time that a norm adds to the network without a norm, as a fraction of that network's time or of what Flax's norm
adds: the machine's speed cancels in both. The result still varies between processes and over minutes, with the
addresses of the arrays and with other users of the memory. So several processes measure the same, and the intervals
include their differences.

Steps in bfloat16 use mixed precision. Parameters and statistics are float32; each step rounds the images, and the
kernels and biases of the convolutions and the dense layer, to bfloat16, so all activations are bfloat16. Every norm
gets its float32 parameters and `dtype=bfloat16` for its outputs. This happens outside of the networks, which need no
option for it.
"""

import concurrent.futures
import functools
import math
import multiprocessing
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

import jaxbn.linen
from experiments.benchmarks import Settings, limit
from experiments.config import Config
from experiments.evidence import provenance, timing
from experiments.evidence.text import STABLE, markdown, select
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
    """A training step, not yet compiled, and its arguments.

    Attributes:
      run: (parameters, running statistics, momenta, images, labels) -> the first three after the step.
      state: the first three.
      batch: images and labels.
    """

    run: Callable[..., tuple]
    state: tuple
    batch: tuple

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step for this machine; it overwrites the buffers of its state."""
        shapes = jax.eval_shape(lambda: (*self.state, *self.batch))
        return jax.jit(self.run, donate_argnums=(0, 1, 2)).lower(*shapes)


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    plain = settings.to_json(
        *("step_processes", "step_rounds", "dtypes", "image_size"),
        *("batch_size", "width", "inception_batch_size", "inception_width"),
    )
    return provenance.measurement_header(plain) | {"copy_bandwidth": limit.memory_bandwidth()}


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns one piece for each network, dtype and process."""
    nets = {
        "ResNet-20": Config(net="resnet20", width=settings.width, batch_size=settings.batch_size),
        "Inception": Config(width=settings.inception_width, batch_size=settings.inception_batch_size),
    }
    sizes = {"image_size": settings.image_size, "rounds": settings.step_rounds}
    return {
        f"{name}, {dtype}, process {process}": functools.partial(measure_apart, name, config, dtype, process, **sizes)
        for name, config in nets.items()
        for dtype in settings.dtypes
        for process in range(1, settings.step_processes + 1)
    }


def measure_apart(*arguments: Any, **options: Any) -> list[dict]:
    """Calls `measure` in a new process."""
    new = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=new) as executor:
        return executor.submit(measure, *arguments, **options).result()


def measure(name: str, config: Config, dtype: str, process: int, *, image_size: int, rounds: int) -> list[dict]:
    """Returns the records of a network: one for each arm, with its seconds in each round.

    Args:
      name: the network's name in the records.
      config: the network and the batch size.
      dtype: dtype of images, activations and products.
      process: number of this process among those that measure the same, from 1.
      image_size: pixels per side.
      rounds: timings of each arm.
    """
    images = jax.random.uniform(jax.random.key(0), (config.batch_size, image_size, image_size, 3)).astype(dtype)
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
    """Makes a step of SGD with momentum for a network of the studies.

    Args:
      layer: the network's batch norm; None for no norm.
      config: the network.
      images: shape [n, height, width, 3]; their dtype is that of the activations.
      axis_name: name of the devices that share a batch, if each of them runs the step on its part.
    """
    if layer is None:
        net = linen_nets.build(config.replace(norm="none"), CLASSES)
    else:
        options = {"axis_name": axis_name} if axis_name else {}
        batch_norm = functools.partial(layer, dtype=images.dtype, **options)
        net = linen_nets.build(config.replace(norm="batch"), CLASSES, batch_norm)
    return step_of(net, images, CLASSES, axis_name)


def step_of(net: nn.Module, images: jax.Array, classes: int, axis_name: str | None = None) -> Step:
    """Makes a step of SGD with momentum.

    Args:
      net: called like the networks in `experiments.nets.linen`.
      images: see `training_step`.
      classes: number of logits.
      axis_name: see `training_step`.
    """
    labels = jnp.arange(len(images)) % classes
    sgd = optax.sgd(0.01, 0.9)

    def step(params: Any, batch_stats: Any, momenta: Any, images: jax.Array, labels: jax.Array) -> tuple:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": rounded(params, images.dtype), "batch_stats": batch_stats}
            logits, updated = net.apply(variables, images, train=True, mutable=["batch_stats"])
            # The loss is float32 in both precisions, as usual in mixed precision.
            losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
            return losses.mean(), updated.get("batch_stats", {})

        gradients, new_batch_stats = jax.grad(loss_of, has_aux=True)(params)
        if axis_name:
            # Each device has the gradient of its own part of the loss; see `collectives.RECIPES`.
            gradients = jax.lax.pmean(gradients, axis_name)
        updates, momenta = sgd.update(gradients, momenta)
        return optax.apply_updates(params, updates), new_batch_stats, momenta

    variables = random_variables(net, images)
    state = (variables["params"], variables.get("batch_stats", {}), sgd.init(variables["params"]))
    return Step(step, state, (images, labels))


def random_variables(net: nn.Module, images: jax.Array) -> dict:
    """Draws initial variables in NumPy, since compiling the initializers takes longer than compiling the step."""
    rng = np.random.default_rng(0)

    def variable(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            values = rng.normal(0, math.sqrt(2 / fan_in), leaf.shape)
        else:
            values = np.full(leaf.shape, 1.0 if name in ("scale", "var") else 0.0)
        return jnp.asarray(values, leaf.dtype)

    shapes = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), images)
    return jax.tree.map_with_path(variable, shapes)


def rounded(params: dict, dtype: Any) -> dict:
    """Casts all parameters to this dtype, except those of the norms."""

    def cast(path: tuple, value: jax.Array) -> jax.Array:
        in_norm = any(str(entry.key).startswith(("Affine", "BatchNorm")) for entry in path)
        return value if in_norm else value.astype(dtype)

    return jax.tree.map_with_path(cast, params)


def compile_in_turn(
    steps: dict[str, Step], shuffled: random.Random
) -> tuple[dict[str, jax.stages.Compiled], dict[str, dict[str, float]]]:
    """Compiles all arms in shuffled order.

    Returns:
      The programs by arm, and the seconds before their first step: "trace_seconds", in which Python traces and lowers
      the step, and "compile_seconds", in which XLA compiles it.
    """
    # The first program of a process takes longer, so compile something small before the first arm.
    jax.jit(jnp.cumsum).lower(jnp.ones(2)).compile()
    compiled, seconds = {}, {}
    for arm in shuffled.sample(list(steps), len(steps)):
        jax.clear_caches()  # The arms share traced functions, and the later ones would be faster.
        start = time.perf_counter()
        lowered = steps[arm].lower()
        traced = time.perf_counter()
        compiled[arm] = lowered.compile()
        seconds[arm] = {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}
    return compiled, seconds


def calls(steps: dict[str, Step], compiled: dict[str, Callable]) -> dict[str, Callable[[], Any]]:
    """Returns a call for each arm that takes its next step, and keeps the state, whose buffers a step overwrites."""
    states = {arm: step.state for arm, step in steps.items()}

    def advance(arm: str) -> tuple:
        states[arm] = compiled[arm](*states[arm], *steps[arm].batch)
        return states[arm]

    return {arm: functools.partial(advance, arm) for arm in steps}


def summarize(records: list[dict]) -> list[dict]:
    """Summarizes the records of a network and dtype: one dict for each arm.

    Returns:
      Dicts with "arm"; "added", the time relative to the network without a norm, minus 1; "share", the time added
      relative to that of Flax's norm, NaN where that adds nothing; both with intervals; "temporaries" relative to no
      norm; "trace" and "compile", the seconds relative to Flax, quartiles over the processes.
    """
    by_arm = {}
    for record in records:
        by_arm.setdefault(record["arm"], []).append(record)

    def ratios(arm: str, baseline: str, name: str) -> np.ndarray:
        """Divides process by process, and round by round where there are rounds."""
        numerators = np.array([record[name] for record in by_arm[arm]])
        return numerators / [record[name] for record in by_arm[baseline]]

    flax_over_none = ratios(FLAX, NONE, "seconds")
    summaries = []
    for arm, of_arm in by_arm.items():
        over_none = ratios(arm, NONE, "seconds")
        summaries.append(
            {
                "arm": arm,
                "added": timing.estimate(lambda ratio: ratio - 1, over_none),
                "share": timing.estimate(share, over_none, flax_over_none),
                "temporaries": of_arm[0]["temporaries"] / by_arm[NONE][0]["temporaries"],
                "trace": timing.quartiles(ratios(arm, FLAX, "trace_seconds")),
                "compile": timing.quartiles(ratios(arm, FLAX, "compile_seconds")),
            }
        )
    return summaries


def share(ours: ArrayLike, flax: ArrayLike) -> np.ndarray:
    """Divides the time that an arm adds by the time that Flax adds; both arguments are relative to no norm."""
    ours, flax = np.asarray(ours), np.asarray(flax)
    # Where Flax's norm adds no time, the share is undefined. `timing.estimate` leaves NaN out, or opens the interval.
    return (ours - 1) / np.where(flax > 1, flax - 1, np.nan)


def block(run: dict) -> str:
    """Returns what each norm adds to a step, by network and dtype."""
    rows, settings = [], run["header"]["settings"]
    for net, dtype in dict.fromkeys((record["net"], record["dtype"]) for record in run["records"]):
        for summary in summarize(select(run["records"], net=net, dtype=dtype)):
            if summary["arm"] == NONE:
                continue
            medians = [f"{summary[name]['median']:.2f}" for name in ("compile", "trace")]
            rows.append(
                {
                    "network": f"{net}, {dtype}",
                    "norm": summary["arm"],
                    "time added": _interval(summary["added"], 100, " %", decimals=0),
                    "relative to Flax": _interval(summary["share"]),
                    "temporaries / no norm": f"{summary['temporaries']:.2f}",
                    "compile and trace / Flax": " / ".join(medians),
                }
            )
    nets = dict.fromkeys(f"{r['net']} at width {r['width']:g} and batch {r['batch_size']}" for r in run["records"])
    return (
        f"{markdown(rows)}\n\n{', '.join(nets)}, on images of {settings['image_size']} x {settings['image_size']}. "
        "Time added to the network without a norm, median of the rounds. In parentheses, a 95 % interval (bootstrap "
        f"over {settings['step_processes']} processes, and {settings['step_rounds']} rounds in each); a dash where "
        "Flax's norm may add no time. Temporaries: memory of the step besides arguments and results. Compile: XLA; "
        f"trace: Python, before that. {STABLE}"
    )


def _interval(estimate: dict[str, float], scale: float = 1, unit: str = "", decimals: int = 2) -> str:
    """Formats a value with its interval, or a dash if the interval is open."""
    if any(map(math.isnan, estimate.values())):
        return "-"
    # Adding 0 removes the sign of a rounded zero.
    value, lower, upper = (f"{round(scale * number, decimals) + 0:.{decimals}f}" for number in estimate.values())
    return f"{value}{unit} ({lower} to {upper})"
