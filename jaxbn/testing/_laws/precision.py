"""Laws of precision: large means, constant features, half precision, and batches that hold NaN or Inf."""

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

MANY = (64, 16, 16, 4), (2**14, 4)  # values, whose sums in half precision stand still, or overflow in float16
RATIOS = 10.0, 1e3, 1e5  # of mean to standard deviation


@law()
def large_means(adapter: Adapter) -> None:
    """Output and gradients lose no more digits than the mean has over the standard deviation, rounded to float32."""
    # The variance as a difference of sums of squares loses twice as many.
    _step_at_large_means(adapter, lambda ratio: (ROUNDINGS + 32 * ratio) * EPS)


@law()
def large_means_lose_nothing(adapter: Adapter) -> None:
    """Output and gradients are exact to float32 at any mean, since the inputs are."""
    _step_at_large_means(adapter, lambda ratio: ROUNDINGS * EPS)


@law()
def running_statistics_at_large_means(adapter: Adapter) -> None:
    """The running variance of data with a large mean is that of the same data without it."""
    for ratio in RATIOS:
        for data in _at_ratio(ratio):
            mean, var, _ = _oracle.moments(data.x)
            nearby = np.round(mean).astype(np.float32)  # no further than twice from x, so that x - nearby is exact
            state = start(adapter, *data[:3])
            (large_mean, large_var), (small_mean, small_var) = (
                statistics(adapter, train(adapter, state, x)[1]) for x in (data.x, data.x - nearby)
            )
            part, case = weight(adapter), at(data.x, f"at mean/std {ratio:g}")
            require_close(f"running mean {case}", large_mean, small_mean + part * nearby, 16 * EPS * abs(mean))
            # A mean that is off by a few roundings adds the square of that.
            allowed = (ROUNDINGS + 32 * ratio * part) * EPS * np.maximum(var, 1) + (8 * EPS * mean) ** 2
            require_close(f"running var {case}", large_var, small_var, allowed)


@law(lambda adapter: adapter.epsilon > 0)
def variance_is_never_negative(adapter: Adapter) -> None:
    """Features that are constant, or nearly so, have no negative variance, and finite outputs and gradients."""
    values = np.concatenate([[0.1, 1e3 + 0.1], np.geomspace(0.3, 3e4, 30)]).astype(np.float32)
    data = sample((50, len(values)), mean=0, std=1)
    nearly = values * (1 + EPS * np.random.default_rng(0).integers(0, 2, data.x.shape)).astype(np.float32)
    for case, x in (("constant", np.broadcast_to(values, data.x.shape)), ("nearly constant", nearly)):
        state = start(adapter, x, data.scale, data.bias)
        y, after = train(adapter, state, x)
        require_finite(f"y of {case} features", y)
        for name, found in gradients(adapter, state, x, *data[1:]).items():
            require_finite(f"{name} of {case} features", found)
        # What this batch has added to the running variance; that is stored with a rounding, next to what was there.
        _, found = statistics(adapter, after)
        _, at_zero = running(adapter, [(values, np.zeros_like(values, np.float64), np.full(len(values), 50.0))])
        added = found - at_zero
        worst = np.argmin(added)
        if added[worst] < -4 * EPS * at_zero[worst]:
            raise AssertionError(
                f"variance of {case} feature {values[worst]:g} is negative: {added[worst]:.2g} was added to the "
                "running variance"
            )
        require_finite(f"y of evaluation on {case} features", evaluate(adapter, after, x))


@law(lambda adapter: bool(adapter.half_precision))
def low_precision(adapter: Adapter) -> None:
    """Outputs, statistics and gradients of half-precision inputs are as precise as these, however many there are."""
    for dtype in adapter.half_precision:
        for shape in MANY:  # of a mean of 300 squares overflow in float16 too
            data = _adding_up(sample(shape, mean=(3, -1, 300, 0.5), std=(1, 0.5, 30, 2), dtype=dtype))
            _require_precision_of_inputs(adapter, data, float(jnp.finfo(dtype).eps), at(data.x, f"in {dtype}"))


@law()
def one_nan_batch(adapter: Adapter) -> None:
    """A batch with NaN or Inf in it leaves the running statistics finite, and training goes on."""
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
                for name, found in zip(("mean", "var"), statistics(adapter, state), strict=True):
                    require_finite(f"running {name} {case}", found)
                require_finite(f"y of evaluation {case}", evaluate(adapter, state, data.x))
                y, state = train(adapter, state, data.x)
                require_finite(f"y {case}", y)


def _require_precision_of_inputs(adapter, data: Sample, rounding, case):
    """Compares a step on rounded inputs, and evaluation, with the same in float32, to a few roundings of the inputs."""
    wide = data._replace(x=data.x.astype(np.float32))
    before, before_wide = (start(adapter, *each[:3]) for each in (data, wide))
    (y, state), (_, of_wide) = train(adapter, before, data.x), train(adapter, before_wide, wide.x)
    (mean, var, _), expected, magnitude = _oracle.moments(wide.x), exact(adapter, wide), magnitudes(adapter, wide)
    # The mean, rounded as the inputs are, is as much of their standard deviation.
    allowed = 4 * rounding * (1 + abs(mean) / np.sqrt(var))
    require_close(f"y {case}", y, expected["y"], allowed * magnitude["y"])
    found, of_batch = statistics(adapter, state), {"mean": magnitude["mean"], "var": var}
    moved = {name: 4 * rounding * weight(adapter) * of_batch[name] + 16 * EPS * magnitude[name] for name in of_batch}
    require_statistics(case, found, statistics(adapter, of_wide), moved, rounding=1)
    evaluated, size = exact_evaluation(adapter, wide, *found)
    require_close(f"y of evaluation {case}", evaluate(adapter, state, data.x), evaluated, 4 * rounding * size)
    for name, value in gradients(adapter, before, *data).items():
        part = 4 * rounding if name == "dbias" else allowed  # the sum of dy knows no mean
        require_close(f"{name} {case}", value, expected[name], part * magnitude[name])


def _adding_up(data: Sample) -> Sample:
    """Returns data with a dy, in the dtype of x, whose sums grow with the number of values: with z and without."""
    # Sums that hover around zero never become too large for the next term to count.
    mean, var, _ = _oracle.moments(data.x)
    dy = data.dy + 1 + (data.x.astype(np.float64) - mean) / np.sqrt(var)
    return data._replace(dy=dy.astype(data.x.dtype))


def _at_ratio(ratio: float) -> list[Sample]:
    """Returns dense and convolutional data with means of either sign, so many standard deviations away from 0."""
    return [sample(shape, mean=ratio * np.array(ALIKE) * (1, -1, 1, -1), std=ALIKE) for shape in SHAPES]


def _step_at_large_means(adapter, tolerance):
    for ratio in RATIOS:
        for data in _at_ratio(ratio):
            state = start(adapter, *data[:3])
            y, _ = train(adapter, state, data.x)
            found = {"y": y, **gradients(adapter, state, *data)}
            expected, magnitude = exact(adapter, data), magnitudes(adapter, data)
            for name, value in found.items():
                case = f"{name} {at(data.x, f'at mean/std {ratio:g}')}"
                require_close(case, value, expected[name], tolerance(ratio) * magnitude[name])
