"""Errors of batch norm against float64 as the mean of the inputs grows, for jaxbn and for Flax.

Conventions: one training step on inputs in float32 or bfloat16, with 2 to 5 axes and standard deviation 1; parameters
and outputs are float32. The inputs are rounded first, and the oracle gets the rounded values, so the errors are those
of the arithmetic alone. The error of the output is the largest absolute one; the error of the gradients with respect to
x, scale and bias is the largest one relative to the largest entry. The gradient with respect to x is rounded to the
dtype of x.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.benchmarks import Settings
from experiments.evidence import provenance
from experiments.evidence.text import STABLE, markdown, short
from jaxbn._core import lowering
from jaxbn.testing import _oracle

NAME = "numerics"
SHAPES = ((512, 6), (64, 9, 6), (32, 5, 7, 6), (16, 3, 4, 5, 6))
# The additional shape is large enough for every step of the GPU algorithm.
MEASURED = (*SHAPES, (32, 12, 12, 6))
RATIOS = (0, 1, 1.9, 2.1, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6)  # means, in standard deviations
# Around larger means, the values of bfloat16 lie too far apart for a standard deviation of 1.
MEANS = {"float32": RATIOS, "bfloat16": tuple(ratio for ratio in RATIOS if ratio <= 100)}
# Names of jaxbn with the algorithms of other platforms, run on this one.
ELSEWHERE = {"tpu": "jaxbn, for TPUs", "cuda": "jaxbn, for GPUs"}


def sample(
    shape: tuple[int, ...], mean: float, dtype: type = np.float32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draws x with standard deviation 1, scale, bias and dy; x has this dtype, the others are float32."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) + mean).astype(dtype)
    scale, bias = rng.normal(1, 0.3, shape[-1]), rng.normal(0, 1, shape[-1])
    return x, scale.astype(np.float32), bias.astype(np.float32), rng.normal(size=shape).astype(np.float32)


@jax.jit
def ours(x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array) -> tuple:
    """Computes output, gradients and moments with jaxbn."""
    y, vjp, moments = jax.vjp(lambda *a: jaxbn.batch_normalize(*a), x, scale, bias, has_aux=True)
    return y, vjp(dy.astype(y.dtype)), moments


@functools.partial(jax.jit, static_argnames="fast")
def flax(x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array, *, fast: bool) -> tuple:
    """Computes output and gradients with Flax's layer; `fast` is its `use_fast_variance`."""
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=fast, dtype=jnp.float32)
    stats = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}

    def apply(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple:
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return layer.apply(variables, x, mutable=["batch_stats"])

    y, vjp, _ = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, vjp(dy)


IMPLEMENTATIONS = {
    "jaxbn": ours,
    "Flax": functools.partial(flax, fast=True),
    "Flax, stable": functools.partial(flax, fast=False),
}


def errors(
    implementation: Callable, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, dy: np.ndarray
) -> tuple[float, float]:
    """Returns the largest error of the output, and the largest relative error of the gradients; see the module."""
    y, gradients, *_ = implementation(x, scale, bias, dy)
    exact_y = _oracle.batch_norm(x, scale, bias)[0]
    exact_gradients = _oracle.gradients(x, scale, bias, dy)
    relative_errors = [
        abs(np.float64(gradient) - exact).max() / abs(exact).max()
        for gradient, exact in zip(gradients, exact_gradients, strict=True)
    ]
    return abs(np.float64(y) - exact_y).max(), np.max(relative_errors)  # Python's max would lose a NaN


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    del settings
    means = {dtype: list(ratios) for dtype, ratios in MEANS.items()}
    return provenance.measurement_header({"shapes": [list(shape) for shape in MEASURED], "means": means})


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns one piece for each dtype and platform."""
    del settings
    return {
        f"errors by mean, {dtype}, {ELSEWHERE.get(platform, 'here')}": functools.partial(
            measure, ratios, dtype=dtype, platform=platform
        )
        for dtype, ratios in MEANS.items()
        for platform in (None, *ELSEWHERE)
    }


def measure(ratios: Sequence[float] = RATIOS, *, dtype: str = "float32", platform: str | None = None) -> list[dict]:
    """Returns one record for each mean and implementation: the worst errors over the shapes.

    Args:
      ratios: means, in standard deviations.
      dtype: dtype of the inputs.
      platform: None for all implementations on this machine's platform; "tpu" or "cuda" for jaxbn alone, with the
        algorithm of that platform.
    """
    if platform is None:
        return _measure(ratios, dtype, IMPLEMENTATIONS)
    with lowering.assumed(platform):
        return _measure(ratios, dtype, {ELSEWHERE[platform]: ours})


def _measure(ratios: Sequence[float], dtype: str, implementations: dict[str, Callable]) -> list[dict]:
    records = []
    for ratio in ratios:
        for name, implementation in implementations.items():
            samples = [sample(shape, ratio, jnp.dtype(dtype)) for shape in MEASURED]
            output, gradient = np.max([errors(implementation, *arrays) for arrays in samples], axis=0)
            records.append(
                {
                    "dtype": dtype,
                    "mean": float(ratio),
                    "implementation": name,
                    "output": float(output),
                    "gradient": float(gradient),
                }
            )
    return records


def block(run: dict) -> str:
    """Returns the errors by mean: a table for float32, and one for bfloat16 where that was measured."""
    parts = []
    for dtype in ("float32", "bfloat16"):
        records = [record for record in run["records"] if record.get("dtype", "float32") == dtype]
        if not records:
            continue
        if parts:
            parts.append("With inputs in bfloat16, to which the gradient with respect to them is rounded:")
        parts.append(markdown(_rows(records)))
    return "\n\n".join([*parts, STABLE])


def _rows(records: list[dict]) -> list[dict[str, str]]:
    """Makes one row for each mean and one column for each implementation, jaxbn's first."""
    by_mean = {(record["mean"], record["implementation"]): record for record in records}
    names = list(dict.fromkeys(record["implementation"] for record in records))
    names.sort(key=lambda name: not name.startswith("jaxbn"))
    rows = []
    for mean in dict.fromkeys(record["mean"] for record in records):
        row = {"mean/std": short(f"{mean:.0e}") if mean >= 1000 else f"{mean:g}"}
        for name in names:
            record = by_mean[mean, name]
            row[name] = short(f"{record['output']:.0e} / {record['gradient']:.0e}")
        rows.append(row)
    return rows
