"""Data for the laws, what the oracle says of them, and how far a float32 implementation may be from that.

An error is measured against the natural magnitude of a quantity: that of the terms of which it is a sum, per feature.
Inputs are rounded to their dtype first, and the oracle sees the rounded numbers: what is measured is what the
arithmetic adds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter

SHAPES = (48, 4), (6, 5, 3, 4)  # dense and convolutional
MEANS, STDS = (0.0, 1.0, -6.0, 0.02), (1.0, 0.5, 3.0, 0.01)  # the last variance is not far from a usual epsilon
ALIKE = (1.0, 0.5, 3.0, 2.0)  # standard deviations far above epsilon
EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 64  # allowed: sums of a hundred float32 numbers, multiplied a few times


class Sample(NamedTuple):
    """A batch and what goes with it: x and dy of shape [N, ..., C], scale and bias of shape [C]."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    dy: np.ndarray


def sample(
    shape: tuple[int, ...],
    *,
    mean: Sequence[float] | np.ndarray | float = MEANS,
    std: Sequence[float] | np.ndarray | float = STDS,
    dtype: str = "float32",
    seed: int = 0,
) -> Sample:
    """Returns normally distributed data, the same at every call; x is rounded to its dtype, the rest to float32."""
    generator = np.random.default_rng((seed, len(shape)))
    features = shape[-1]
    x = generator.normal(size=shape) * std + mean
    scale = generator.uniform(0.5, 2, features) * np.resize((1, -1), features)
    bias, dy = generator.normal(size=features), generator.normal(size=shape)
    return Sample(x.astype(jnp.dtype(dtype)), *(value.astype(np.float32) for value in (scale, bias, dy)))


def exact(adapter: Adapter, data: Sample, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns y, dx, dscale, dbias, mean, var and count of a training step, by the oracle in float64."""
    y, mean, var, count = _oracle.batch_norm(data.x, data.scale, data.bias, epsilon=adapter.epsilon, mask=mask)
    dx, dscale, dbias = _oracle.gradients(*data, epsilon=adapter.epsilon, mask=mask)
    return {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias, "mean": mean, "var": var, "count": count}


def magnitudes(adapter: Adapter, data: Sample, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Returns the natural magnitudes of y, dx, dscale, dbias and of the statistics, per feature."""
    x, scale, bias, dy = (np.asarray(value, np.float64) for value in data)
    mean, var, _ = _oracle.moments(x, mask=mask)
    rsqrt = 1 / np.sqrt(var + adapter.epsilon)
    z, rows = abs(x - mean) * rsqrt, tuple(range(x.ndim - 1))
    return {
        "y": abs(scale) * z.max(rows) + abs(bias),
        "dx": abs(scale) * rsqrt * abs(dy).max(rows),
        "dscale": (abs(dy) * (z + 1)).sum(rows),
        "dbias": abs(dy).sum(rows),
        "mean": abs(mean) + np.sqrt(var),
        "var": np.maximum(var, 1),  # running variances begin at 1
    }


def exact_evaluation(
    adapter: Adapter, data: Sample, mean: np.ndarray, var: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns y of evaluation with a running mean and variance, by the oracle, and its natural magnitude."""
    y = _oracle.normalize(data.x, mean, var, data.scale, data.bias, epsilon=adapter.epsilon)
    # As an implementation may have it: scale * x / sqrt(var) + (bias - scale * mean / sqrt(var)).
    largest = abs(data.x).max(tuple(range(data.x.ndim - 1))) + abs(mean)
    return y, abs(data.scale) * largest / np.sqrt(var + adapter.epsilon) + abs(data.bias)


def running(adapter: Adapter, batches: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the running mean and variance after batches of (mean, var, count), by the adapter's conventions."""
    mean, var = np.zeros_like(batches[0][0]), np.ones_like(batches[0][1])
    for number, (batch_mean, batch_var, count) in enumerate(batches, start=1):
        momentum = adapter.momentum
        if adapter.debiased:
            # The first `number` weights (1 - momentum) momentum^k add up to 1 - momentum^number.
            momentum = 1 - 1 / sum(momentum**k for k in range(number))
        mean, var = _oracle.update(
            mean, var, batch_mean, batch_var, count, momentum=momentum, unbiased=adapter.unbiased
        )
    return mean, var


def weight(adapter: Adapter) -> float:
    """Returns the weight of the first batch in the running statistics."""
    return 1.0 if adapter.debiased else 1 - adapter.momentum


def at(data: np.ndarray, case: str = "") -> str:
    """Returns a case in words, for messages."""
    return f"of shape {data.shape}{' ' if case else ''}{case}"


def require_close(quantity: str, found: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float) -> None:
    """Raises AssertionError where an entry is further from what is expected than allowed; names the worst one."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise AssertionError(f"{quantity}: the shape is {found.shape}, expected {expected.shape}")
    require_finite(quantity, found)
    error, allowed = abs(found - expected), np.broadcast_to(allowed, expected.shape)
    if not (error <= allowed).all():
        worst = np.unravel_index(np.argmax(error / np.maximum(allowed, 1e-300)), error.shape)
        raise AssertionError(
            f"{quantity}: error {error[worst]:.2g}, allowed {allowed[worst]:.2g} "
            f"(found {found[worst]:.6g}, expected {expected[worst]:.6g})"
        )


def require_statistics(
    case: str,
    found: Sequence | np.ndarray,
    expected: Sequence | np.ndarray,
    magnitude: Mapping[str, np.ndarray | float],
    *,
    rounding: float = 16 * EPS,
) -> None:
    """Raises AssertionError where a running mean or variance is further off than some roundings of its magnitude."""
    for name, one, other in zip(("mean", "var"), found, expected, strict=True):
        require_close(f"running {name} {case}", one, other, rounding * magnitude[name])


def require_finite(quantity: str, found: np.ndarray) -> None:
    """Raises AssertionError where an entry is NaN or infinite."""
    wrong = ~np.isfinite(found)
    if wrong.any():
        raise AssertionError(f"{quantity}: {wrong.sum()} of {wrong.size} values are not finite")
