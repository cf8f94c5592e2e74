"""Laws of precision: large means, constant features, half precision, and batches that contain NaN or infinity."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter, evaluate, gradients, law, start, statistics, train
from jaxbn.testing._samples import (
    ALIKE,
    EPS,
    ROUNDINGS,
    SHAPES,
    Sample,
    at,
    exact,
    exact_evaluation,
    magnitudes,
    require_close,
    require_finite,
    require_statistics,
    running,
    sample,
    weight,
)

# Enough values that sums in half precision stop growing, or overflow in float16.
MANY = (64, 16, 16, 4), (2**14, 4)
RATIOS = 10.0, 1e3, 1e5  # mean over standard deviation


@law()
def large_means(adapter: Adapter) -> None:
    """The error of output and gradients grows at most in proportion to mean / standard deviation."""
    # With a variance computed as E[x^2] - E[x]^2, it grows with the square of that.
    _step_at_large_means(adapter, lambda ratio: (ROUNDINGS + 32 * ratio) * EPS)


@law()
def large_means_lose_nothing(adapter: Adapter) -> None:
    """Output and gradients are accurate to float32 at any mean, because the float32 inputs are exact."""
    _step_at_large_means(adapter, lambda ratio: ROUNDINGS * EPS)


@law()
def running_statistics_at_large_means(adapter: Adapter) -> None:
    """Adding a large mean to the data does not change the running variance."""
    for ratio in RATIOS:
        for data in _at_ratio(ratio):
            mean, var, _ = _oracle.moments(data.x)
            nearby = np.round(mean).astype(np.float32)  # within a factor of 2 of x, so that x - nearby is exact
            before = start(adapter, *data[:3])
            _, after = train(adapter, before, data.x)
            _, after_small = train(adapter, before, data.x - nearby)
            large_mean, large_var = statistics(adapter, after)
            small_mean, small_var = statistics(adapter, after_small)
            part = weight(adapter)
            case = at(data.x, f"at mean/std {ratio:g}")
            require_close(f"running mean {case}", large_mean, small_mean + part * nearby, 16 * EPS * abs(mean))
            # A mean that is off by a few roundings adds the square of that to the variance.
            allowed = (ROUNDINGS + 32 * ratio * part) * EPS * np.maximum(var, 1) + (8 * EPS * mean) ** 2
            require_close(f"running var {case}", large_var, small_var, allowed)


@law(lambda adapter: adapter.epsilon > 0)
def variance_is_never_negative(adapter: Adapter) -> None:
    """Constant and almost constant features have a nonnegative variance, and finite outputs and gradients."""
    values = np.concatenate([[0.1, 1e3 + 0.1], np.geomspace(0.3, 3e4, 30)]).astype(np.float32)
    data = sample((50, len(values)), mean=0, std=1)
    constant = np.broadcast_to(values, data.x.shape)
    last_bits = np.random.default_rng(0).integers(0, 2, data.x.shape)
    nearly_constant = values * (1 + EPS * last_bits).astype(np.float32)
    for case, x in (("constant", constant), ("nearly constant", nearly_constant)):
        before = start(adapter, x, data.scale, data.bias)
        y, after = train(adapter, before, x)
        require_finite(f"y of {case} features", y)
        for name, gradient in gradients(adapter, before, x, *data[1:]).items():
            require_finite(f"{name} of {case} features", gradient)
        # The contribution of the batch to the running variance, which is stored with a rounding error.
        _, running_var = statistics(adapter, after)
        count = np.full(len(values), 50.0)
        _, with_variance_0 = running(adapter, [(values, np.zeros_like(values, np.float64), count)])
        added = running_var - with_variance_0
        worst = np.argmin(added)
        if added[worst] < -4 * EPS * with_variance_0[worst]:
            raise AssertionError(
                f"variance of {case} feature {values[worst]:g} is negative: {added[worst]:.2g} was added to the "
                "running variance"
            )
        require_finite(f"y of evaluation on {case} features", evaluate(adapter, after, x))


@law(lambda adapter: bool(adapter.half_precision))
def low_precision(adapter: Adapter) -> None:
    """Outputs, statistics and gradients are as precise as the half-precision inputs, however many values there are."""
    for dtype in adapter.half_precision:
        rounding = float(jnp.finfo(dtype).eps)
        for shape in MANY:
            # The squares of numbers with mean 300 overflow in float16, even before they are summed.
            data = sample(shape, mean=(3, -1, 300, 0.5), std=(1, 0.5, 30, 2), dtype=dtype)
            data = _with_growing_sums(data)
            _require_precision_of_inputs(adapter, data, rounding, at(data.x, f"in {dtype}"))


@law()
def one_nan_batch(adapter: Adapter) -> None:
    """After a batch that contains NaN or infinity, the running statistics are finite, and training continues."""
    for shape in SHAPES:
        for value in (np.nan, np.inf):
            data = sample(shape)
            spoilt = data.x.copy()
            spoilt[(0,) * (len(shape) - 1) + (1,)] = value
            _, state = train(adapter, start(adapter, *data[:3]), data.x)
            with np.errstate(all="ignore"):
                _, state = train(adapter, state, spoilt)
            for moment in ("after the batch", "one batch later"):
                case = f"{moment} {at(data.x, f'with {value}')}"
                mean, var = statistics(adapter, state)
                require_finite(f"running mean {case}", mean)
                require_finite(f"running var {case}", var)
                require_finite(f"y of evaluation {case}", evaluate(adapter, state, data.x))
                y, state = train(adapter, state, data.x)
                require_finite(f"y {case}", y)


def _require_precision_of_inputs(adapter: Adapter, data: Sample, rounding: float, case: str) -> None:
    """Asserts that training and evaluation are as precise as the inputs: a few of their rounding errors."""
    in_float32 = data._replace(x=data.x.astype(np.float32))
    before = start(adapter, *data[:3])
    y, after = train(adapter, before, data.x)
    expected = exact(adapter, in_float32)
    magnitude = magnitudes(adapter, in_float32)
    mean, var, _ = _oracle.moments(in_float32.x)

    # If the mean is rounded like the inputs, its error may be rounding * mean / std, in standard deviations.
    allowed = 4 * rounding * (1 + abs(mean) / np.sqrt(var))
    require_close(f"y {case}", y, expected["y"], allowed * magnitude["y"])

    _, after_float32 = train(adapter, start(adapter, *in_float32[:3]), in_float32.x)
    actual = statistics(adapter, after)
    moved = 4 * rounding * weight(adapter)
    allowed_of = {
        "mean": moved * magnitude["mean"] + 16 * EPS * magnitude["mean"],
        "var": moved * var + 16 * EPS * magnitude["var"],
    }
    require_statistics(case, actual, statistics(adapter, after_float32), allowed_of, rounding=1)

    expected_y, size = exact_evaluation(adapter, in_float32, *actual)
    require_close(f"y of evaluation {case}", evaluate(adapter, after, data.x), expected_y, 4 * rounding * size)

    for name, gradient in gradients(adapter, before, *data).items():
        part = 4 * rounding if name == "dbias" else allowed  # the sum of dy does not depend on the mean
        require_close(f"{name} {case}", gradient, expected[name], part * magnitude[name])


def _with_growing_sums(data: Sample) -> Sample:
    """Returns the data with a dy, in the dtype of x, for which sum(dy) and sum(dy z) grow with the number of values.

    Sums that stay near zero would never become so large that the next term is lost.
    """
    mean, var, _ = _oracle.moments(data.x)
    z = (data.x.astype(np.float64) - mean) / np.sqrt(var)
    dy = data.dy + 1 + z
    return data._replace(dy=dy.astype(data.x.dtype))


def _at_ratio(ratio: float) -> list[Sample]:
    """Returns dense and convolutional data with means, of both signs, that are ``ratio`` standard deviations from 0."""
    signs = (1, -1, 1, -1)
    return [sample(shape, mean=ratio * np.array(ALIKE) * signs, std=ALIKE) for shape in SHAPES]


def _step_at_large_means(adapter: Adapter, tolerance: Callable[[float], float]) -> None:
    for ratio in RATIOS:
        for data in _at_ratio(ratio):
            state = start(adapter, *data[:3])
            y, _ = train(adapter, state, data.x)
            actual = {"y": y, **gradients(adapter, state, *data)}
            expected = exact(adapter, data)
            magnitude = magnitudes(adapter, data)
            for name, value in actual.items():
                case = f"{name} {at(data.x, f'at mean/std {ratio:g}')}"
                require_close(case, value, expected[name], tolerance(ratio) * magnitude[name])
