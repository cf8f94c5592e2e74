"""Laws of masks: masking values is equivalent to removing them."""

from typing import Any

import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter, evaluate, gradients, law, start, statistics, train
from jaxbn.testing._samples import (
    EPS,
    ROUNDINGS,
    SHAPES,
    Sample,
    at,
    exact,
    magnitudes,
    require_close,
    require_finite,
    require_statistics,
    running,
    sample,
)


def masks(adapter: Adapter) -> bool:
    """Whether the implementation takes masks."""
    return adapter.masks


@law(masks)
def statistics_of_masked_data(adapter: Adapter) -> None:
    """Masking positions gives the same outputs and running statistics as removing them."""
    for case, data, mask in _cases():
        before = start(adapter, *data[:3])
        y, after = train(adapter, before, data.x, mask)
        _require_statistics(adapter, after, data, mask, case)
        _require_outputs(adapter, {"y": y}, data, mask, case)


@law(masks)
def gradients_of_masked_data(adapter: Adapter) -> None:
    """A loss over unmasked positions has the same gradients as if the masked ones were removed, and zero at those."""
    for case, data, mask in _cases():
        data = _without_masked_loss(data, mask)
        state = start(adapter, *data[:3])
        actual = gradients(adapter, state, *data, mask)
        masked = np.where(mask, 0, actual["dx"])
        if masked.any():
            raise AssertionError(f"dx {case}: a masked position has {abs(masked).max():.2g}")
        _require_outputs(adapter, actual, data, mask, case)


@law(masks)
def mask_of_one_feature(adapter: Adapter) -> None:
    """A mask has the same effect on data with one feature as on data with several."""
    # With one feature, x and masks per example, position and value all have a last axis of size 1.  An implementation
    # must not infer the kind of mask from that.
    data = sample((*SHAPES[1][:-1], 1), mean=1, std=0.5)
    mask = np.random.default_rng(0).random(data.x.shape) < 0.6
    case = at(data.x, "with a mask per position")
    data = _without_masked_loss(data, mask)
    state = start(adapter, *data[:3])
    y, after = train(adapter, state, data.x, mask)
    _require_statistics(adapter, after, data, mask, case)
    actual = {"y": y, **gradients(adapter, state, *data, mask)}
    _require_outputs(adapter, actual, data, mask, case)


@law(masks)
def nan_in_masked_positions(adapter: Adapter) -> None:
    """NaN and infinity in masked positions do not affect other outputs, gradients or statistics."""
    for value in (np.nan, np.inf):
        for case, data, mask in _cases():
            case = f"{case}, where x is {value}"
            data = _without_masked_loss(data, mask)
            x = np.where(mask, data.x, np.float32(value))
            state = start(adapter, *data[:3])
            with np.errstate(all="ignore"):  # NumPy implementations would warn
                y, after = train(adapter, state, x, mask)
                actual = {"y": y, **gradients(adapter, state, x, *data[1:], mask)}
            _require_statistics(adapter, after, data, mask, case)
            _require_outputs(adapter, actual, data, mask, case)


@law(masks)
def batch_masked_everywhere(adapter: Adapter) -> None:
    """A fully masked batch does not change the running statistics, and all outputs and gradients are finite."""
    for shape in SHAPES:
        data = sample(shape)
        mask = np.zeros((shape[0],) + (1,) * (len(shape) - 1), bool)
        case = at(data.x, "masked everywhere")
        magnitude = magnitudes(adapter, data)
        _, before = train(adapter, start(adapter, *data[:3]), data.x)
        with np.errstate(all="ignore"):
            actual = gradients(adapter, before, *data, mask)
            y, after = train(adapter, before, data.x, mask)
        for name, value in {"y": y, **actual}.items():
            require_finite(f"{name} {case}", value)
        require_finite(f"y of evaluation {case}", evaluate(adapter, after, data.x))
        require_statistics(case, statistics(adapter, after), statistics(adapter, before), magnitude)
        # If the empty batch was counted, the next update shows it.
        _, next_after = train(adapter, after, data.x)
        _, next_before = train(adapter, before, data.x)
        expected = statistics(adapter, next_before)
        require_statistics(f"one batch later {case}", statistics(adapter, next_after), expected, magnitude)


def _cases() -> list[tuple[str, Sample, np.ndarray]]:
    """Returns data with masks per example, per position, and per value."""
    cases = []
    for shape in SHAPES:
        data = sample(shape)
        generator = np.random.default_rng(0)
        # Masks admit two thirds of the examples, 60% of the positions, and 40% to 90% of the values of a feature.
        per_example = np.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1)) % 3 != 1
        cases.append((at(data.x, "with a mask per example"), data, per_example))
        if len(shape) > 2:
            per_position = np.broadcast_to(generator.random((*shape[:-1], 1)) < 0.6, shape)
            cases.append((at(data.x, "with a mask per position"), data, per_position))
        per_value = generator.random(shape) < np.linspace(0.4, 0.9, shape[-1])
        cases.append((at(data.x, "with a mask per value"), data, per_value))
    return cases


def _without_masked_loss(data: Sample, mask: np.ndarray) -> Sample:
    """Returns the data with dy = 0 at masked positions, as for a loss over the valid positions."""
    return data._replace(dy=np.where(mask, data.dy, np.float32(0)))


def _require_statistics(adapter: Adapter, state: Any, data: Sample, mask: np.ndarray, case: str) -> None:
    """Asserts that the running statistics after one batch equal those of the valid positions."""
    expected = running(adapter, [_oracle.moments(data.x, mask=mask)])
    require_statistics(case, statistics(adapter, state), expected, magnitudes(adapter, data, mask))


def _require_outputs(
    adapter: Adapter, actual: dict[str, np.ndarray], data: Sample, mask: np.ndarray, case: str
) -> None:
    """Asserts that outputs (at valid positions) and gradients equal those of the data without masked positions."""
    expected = exact(adapter, data, mask)
    magnitude = magnitudes(adapter, data, mask)
    for name, value in actual.items():
        compared = mask if name == "y" else True
        actual_value = np.where(compared, value, 0)
        expected_value = np.where(compared, expected[name], 0)
        require_close(f"{name} {case}", actual_value, expected_value, ROUNDINGS * EPS * magnitude[name])
