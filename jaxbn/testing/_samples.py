"""Data for the laws, the oracle's results for them, and the errors allowed to a float32 implementation.

Errors are relative to the natural magnitude of a quantity, per feature: the magnitude of the terms that it is a sum of.
Inputs are rounded to their dtype before the oracle gets them, so that only the arithmetic causes errors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter

SHAPES = (48, 4), (6, 5, 3, 4)  # dense and convolutional
MEANS = (0.0, 1.0, -6.0, 0.02)
STDS = (1.0, 0.5, 3.0, 0.01)  # the last variance is close to the usual epsilon
ALIKE = (1.0, 0.5, 3.0, 2.0)  # standard deviations whose squares are much larger than epsilon
EPS = float(np.finfo(np.float32).eps)
ROUNDINGS = 64  # allowed error in EPS: for sums of a hundred float32 numbers and a few multiplications


class Sample(NamedTuple):
    """A batch with parameters and a cotangent: x and dy of shape [N, ..., C], scale and bias of shape [C]."""

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
    """Draws normally distributed data, the same in every call; x has the dtype, and the rest float32."""
    generator = np.random.default_rng((seed, len(shape)))
    features = shape[-1]
    signs = np.resize((1, -1), features)
    x = generator.normal(size=shape) * std + mean
    scale = generator.uniform(0.5, 2, features) * signs
    bias = generator.normal(size=features)
    dy = generator.normal(size=shape)
    return Sample(
        x=x.astype(jnp.dtype(dtype)),
        scale=scale.astype(np.float32),
        bias=bias.astype(np.float32),
        dy=dy.astype(np.float32),
    )


def exact(adapter: Adapter, data: Sample, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Computes y, dx, dscale, dbias, mean, var and count of a training step with the oracle, in float64."""
    epsilon = adapter.epsilon
    y, mean, var, count = _oracle.batch_norm(data.x, data.scale, data.bias, epsilon=epsilon, mask=mask)
    dx, dscale, dbias = _oracle.gradients(*data, epsilon=epsilon, mask=mask)
    return {
        "y": y,
        "dx": dx,
        "dscale": dscale,
        "dbias": dbias,
        "mean": mean,
        "var": var,
        "count": count,
    }


def magnitudes(adapter: Adapter, data: Sample, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Computes the natural magnitudes of y, dx, dscale, dbias, mean and var, per feature."""
    x, scale, bias, dy = (np.asarray(value, np.float64) for value in data)
    mean, var, _ = _oracle.moments(x, mask=mask)
    rsqrt = 1 / np.sqrt(var + adapter.epsilon)
    z = abs(x - mean) * rsqrt
    rows = rows_of(x)
    return {
        "y": abs(scale) * z.max(rows) + abs(bias),
        "dx": abs(scale) * rsqrt * abs(dy).max(rows),
        "dscale": (abs(dy) * (z + 1)).sum(rows),
        "dbias": abs(dy).sum(rows),
        "mean": abs(mean) + np.sqrt(var),
        "var": np.maximum(var, 1),  # running variances start at 1
    }


def exact_evaluation(
    adapter: Adapter, data: Sample, mean: np.ndarray, var: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the oracle's y of evaluation with a running mean and variance, and its natural magnitude."""
    y = _oracle.normalize(data.x, mean, var, data.scale, data.bias, epsilon=adapter.epsilon)
    # An implementation may compute  scale / sqrt(var) * x + (bias - scale * mean / sqrt(var)),  whose terms are larger
    # than those of  scale * (x - mean) / sqrt(var) + bias.
    largest = abs(data.x).max(rows_of(data.x)) + abs(mean)
    magnitude = abs(data.scale) * largest / np.sqrt(var + adapter.epsilon) + abs(data.bias)
    return y, magnitude


def running(adapter: Adapter, batches: Sequence[tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Computes the running mean and variance after batches of (mean, var, count), with the adapter's conventions."""
    mean = np.zeros_like(batches[0][0])
    var = np.ones_like(batches[0][1])
    for number, (batch_mean, batch_var, count) in enumerate(batches, start=1):
        momentum = adapter.momentum
        if adapter.debiased:
            # A debiased average after t batches has the weights (1 - p) p^k / (1 - p^t), k = 0 to t - 1.  The newest
            # batch has k = 0, hence the weight 1 / (1 + p + ... + p^(t - 1)), which is defined for p = 1 too.
            momentum = 1 - 1 / sum(momentum**k for k in range(number))
        mean, var = _oracle.update(
            mean,
            var,
            batch_mean,
            batch_var,
            count,
            momentum=momentum,
            unbiased=adapter.unbiased,
        )
    return mean, var


def weight(adapter: Adapter) -> float:
    """Returns the weight of the first batch in the running statistics after it."""
    return 1.0 if adapter.debiased else 1 - adapter.momentum


def rows_of(x: np.ndarray) -> tuple[int, ...]:
    """Returns the axes of examples and positions: all but the last."""
    return tuple(range(x.ndim - 1))


def at(data: np.ndarray, case: str = "") -> str:
    """Describes a case in words, for messages."""
    return f"of shape {data.shape} {case}".rstrip()


def require_close(quantity: str, actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float) -> None:
    """Asserts that all errors are at most the allowed ones; the message shows the worst."""
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"{quantity}: the shape is {actual.shape}, expected {expected.shape}")
    require_finite(quantity, actual)
    error = abs(actual - expected)
    allowed = np.broadcast_to(allowed, expected.shape)
    if not (error <= allowed).all():
        excess = error / np.maximum(allowed, 1e-300)
        worst = np.unravel_index(np.argmax(excess), error.shape)
        raise AssertionError(
            f"{quantity}: error {error[worst]:.2g}, allowed {allowed[worst]:.2g} "
            f"(got {actual[worst]:.6g}, expected {expected[worst]:.6g})"
        )


def require_statistics(
    case: str,
    actual: Sequence | np.ndarray,
    expected: Sequence | np.ndarray,
    magnitude: Mapping[str, np.ndarray | float],
    *,
    rounding: float = 16 * EPS,
) -> None:
    """Asserts that errors of the running mean and variance are at most ``rounding`` times their magnitudes."""
    for name, actual_value, expected_value in zip(("mean", "var"), actual, expected, strict=True):
        require_close(f"running {name} {case}", actual_value, expected_value, rounding * magnitude[name])


def require_finite(quantity: str, actual: np.ndarray) -> None:
    """Asserts that no entry is NaN or infinite."""
    wrong = ~np.isfinite(actual)
    if wrong.any():
        raise AssertionError(f"{quantity}: {wrong.sum()} of {wrong.size} values are not finite")
