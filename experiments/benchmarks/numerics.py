"""Errors of batch norm against float64 as the mean of the inputs grows, ours beside Flax's.

Conventions: one training step on inputs in float32 or bfloat16, with 2 to 5 axes and standard deviation 1; parameters
and outputs are in float32. The inputs are rounded first, and the oracle sees the rounded values: what is measured is
what the arithmetic adds. Of the output, the largest absolute error; of the gradients with respect to x, scale and bias,
the largest error over the largest entry. The gradient with respect to x is rounded to the dtype of x.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from experiments.evidence import files, provenance
from experiments.evidence.text import STABLE, markdown, short
from jaxbn._core import platforms
from jaxbn.testing import _oracle

NAME = "numerics"
SHAPES = ((512, 6), (64, 9, 6), (32, 5, 7, 6), (16, 3, 4, 5, 6))
MEASURED = (*SHAPES, (32, 12, 12, 6))  # with one that is large enough for all steps of the algorithm for GPUs
RATIOS = (0, 1, 1.9, 2.1, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6)  # means, in standard deviations
# Of a larger mean, bfloat16 is too coarse for a standard deviation of 1.
MEANS = {"float32": RATIOS, "bfloat16": tuple(ratio for ratio in RATIOS if ratio <= 100)}
# This library computing as it does on other platforms.
ELSEWHERE = {"tpu": "jaxbn, for TPUs", "cuda": "jaxbn, for GPUs"}


def sample(
    shape: tuple[int, ...], mean: float, dtype: type = np.float32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x of standard deviation 1, scale, bias and dy; x has the dtype, the others are float32."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) + mean).astype(dtype)
    scale, bias = rng.normal(1, 0.3, shape[-1]), rng.normal(0, 1, shape[-1])
    return x, scale.astype(np.float32), bias.astype(np.float32), rng.normal(size=shape).astype(np.float32)


@jax.jit
def ours(x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array) -> tuple:
    """Returns output, gradients and moments of this library's batch norm."""
    y, vjp, moments = jax.vjp(lambda *a: jaxbn.batch_normalize(*a), x, scale, bias, has_aux=True)
    return y, vjp(dy.astype(y.dtype)), moments


@functools.partial(jax.jit, static_argnames="fast")
def flax(x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array, *, fast: bool) -> tuple:
    """Returns output and gradients of Flax's layer; `fast` is its `use_fast_variance`."""
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=fast, dtype=jnp.float32)
    stats = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}

    def apply(x, scale, bias):
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
    """Returns the largest output error, and the largest error of the gradients relative to their largest entry."""
    y, gradients, *_ = implementation(x, scale, bias, dy)
    exact_gradients = _oracle.gradients(x, scale, bias, dy)
    return (
        abs(np.float64(y) - _oracle.batch_norm(x, scale, bias)[0]).max(),
        max(abs(np.float64(g) - e).max() / abs(e).max() for g, e in zip(gradients, exact_gradients, strict=True)),
    )


def measure(ratios: Sequence[float] = RATIOS, *, dtype: str = "float32", platform: str | None = None) -> list[dict]:
    """Returns a record for each mean and implementation: the worst errors over the shapes.

    Args:
      ratios: means, in standard deviations.
      dtype: of the inputs.
      platform: "tpu" or "cuda" for this library alone, computing as it does there, on whatever this runs; None for all
        implementations on the platform of this machine.
    """
    if platform is not None:
        with platforms.assumed(platform):
            return _measure(ratios, dtype, {ELSEWHERE[platform]: ours})
    return _measure(ratios, dtype, IMPLEMENTATIONS)


def _measure(ratios, dtype, implementations):
    return [
        {
            "dtype": dtype,
            "mean": float(ratio),
            "implementation": name,
            "output": float(output),
            "gradient": float(gradient),
        }
        for ratio in ratios
        for name, implementation in implementations.items()
        for output, gradient in [
            np.max([errors(implementation, *sample(shape, ratio, jnp.dtype(dtype))) for shape in MEASURED], axis=0)
        ]
    ]


def run(*, out: Path) -> None:
    """Measures all and writes the file.

    Args:
      out: its folder.
    """
    settings = {"shapes": [list(shape) for shape in MEASURED], "means": {dtype: list(r) for dtype, r in MEANS.items()}}
    pieces = {
        f"errors by mean, {dtype}, {ELSEWHERE.get(platform, 'here')}": functools.partial(
            measure, ratios, dtype=dtype, platform=platform
        )
        for dtype, ratios in MEANS.items()
        for platform in (None, *ELSEWHERE)
    }
    files.measure_in_pieces(out / f"{NAME}.jsonl", provenance.measurement_header(settings), pieces)


def block(run: dict) -> str:
    """Returns the errors by mean: a table for float32, and one for bfloat16 if that was measured."""
    parts = []
    for dtype in ("float32", "bfloat16"):
        records = [record for record in run["records"] if record.get("dtype", "float32") == dtype]
        names = list(dict.fromkeys(record["implementation"] for record in records))
        names.sort(key=lambda name: not name.startswith("jaxbn"))
        found = {(record["mean"], record["implementation"]): record for record in records}
        lines = []
        for mean in dict.fromkeys(record["mean"] for record in records):
            of = {name: found[mean, name] for name in names}
            errors = {name: short(f"{one['output']:.0e} / {one['gradient']:.0e}") for name, one in of.items()}
            lines.append({"mean/std": _mean(mean)} | errors)
        if lines and parts:
            parts.append("With inputs in bfloat16, to which the gradient with respect to them is rounded:")
        if lines:
            parts.append(markdown(lines))
    return "\n\n".join([*parts, STABLE])


def _mean(mean):
    return short(f"{mean:.0e}") if mean >= 1000 else f"{mean:g}"
