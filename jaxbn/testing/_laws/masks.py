"""Laws of masks: what is masked might as well not be there."""

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
    """Returns whether the implementation takes masks."""
    return adapter.masks


@law(masks)
def statistics_of_masked_data(adapter: Adapter) -> None:
    """Outputs and running statistics of masked data are those of the data without what is masked."""
    for case, data, mask in _cases():
        y, state = train(adapter, start(adapter, *data[:3]), data.x, mask)
        expected = running(adapter, [_oracle.moments(data.x, mask=mask)])
        require_statistics(case, statistics(adapter, state), expected, magnitudes(adapter, data, mask))
        _require_outputs(adapter, {"y": y}, data, mask, case)


@law(masks)
def gradients_of_masked_data(adapter: Adapter) -> None:
    """A loss over what the mask admits has the gradients of the data without the rest, and none there."""
    for case, data, mask in _cases():
        data = data._replace(dy=np.where(mask, data.dy, np.float32(0)))
        found = gradients(adapter, start(adapter, *data[:3]), *data, mask)
        if np.where(mask, 0, found["dx"]).any():
            raise AssertionError(f"dx {case}: a masked position has {abs(np.where(mask, 0, found['dx'])).max():.2g}")
        _require_outputs(adapter, found, data, mask, case)


@law(masks)
def mask_of_one_feature(adapter: Adapter) -> None:
    """A mask does to data of one feature what it does to that of several."""
    # The shapes of x and of masks per example, position and value end alike: nothing may be guessed from that.
    data = sample((*SHAPES[1][:-1], 1), mean=1, std=0.5)
    mask, case = np.random.default_rng(0).random(data.x.shape) < 0.6, at(data.x, "with a mask per position")
    data = data._replace(dy=np.where(mask, data.dy, np.float32(0)))
    state = start(adapter, *data[:3])
    y, after = train(adapter, state, data.x, mask)
    expected = running(adapter, [_oracle.moments(data.x, mask=mask)])
    require_statistics(case, statistics(adapter, after), expected, magnitudes(adapter, data, mask))
    _require_outputs(adapter, {"y": y, **gradients(adapter, state, *data, mask)}, data, mask, case)


@law(masks)
def nan_in_masked_positions(adapter: Adapter) -> None:
    """NaN and Inf in masked positions reach no output elsewhere, no gradient and no statistic."""
    for value in (np.nan, np.inf):
        for case, data, mask in _cases():
            case = f"{case}, where x is {value}"
            data = data._replace(dy=np.where(mask, data.dy, np.float32(0)))
            spoilt = np.where(mask, data.x, np.float32(value))
            state = start(adapter, *data[:3])
            with np.errstate(all="ignore"):
                y, after = train(adapter, state, spoilt, mask)
                found = gradients(adapter, state, spoilt, *data[1:], mask)
            expected = running(adapter, [_oracle.moments(data.x, mask=mask)])
            require_statistics(case, statistics(adapter, after), expected, magnitudes(adapter, data, mask))
            _require_outputs(adapter, {"y": y, **found}, data, mask, case)


@law(masks)
def batch_masked_everywhere(adapter: Adapter) -> None:
    """A batch without anything in it leaves the running statistics as if it had not been, and all else finite."""
    for shape in SHAPES:
        data, mask = sample(shape), np.zeros((shape[0],) + (1,) * (len(shape) - 1), bool)
        _, before = train(adapter, start(adapter, *data[:3]), data.x)
        case, magnitude = at(data.x, "masked everywhere"), magnitudes(adapter, data)
        with np.errstate(all="ignore"):
            found = gradients(adapter, before, *data, mask)
            y, state = train(adapter, before, data.x, mask)
        for name, value in {"y": y, **found}.items():
            require_finite(f"{name} {case}", value)
        require_finite(f"y of evaluation {case}", evaluate(adapter, state, data.x))
        require_statistics(case, statistics(adapter, state), statistics(adapter, before), magnitude)
        after, expected = (statistics(adapter, train(adapter, one, data.x)[1]) for one in (state, before))
        require_statistics(f"one batch later {case}", after, expected, magnitude)


def _cases() -> list[tuple[str, Sample, np.ndarray]]:
    """Returns data with masks per example, per position, and per value."""
    found = []
    for shape in SHAPES:
        data, generator = sample(shape), np.random.default_rng(0)
        per_example = np.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1)) % 3 != 1
        found.append((at(data.x, "with a mask per example"), data, per_example))
        if len(shape) > 2:
            per_position = np.broadcast_to(generator.random((*shape[:-1], 1)) < 0.6, shape)
            found.append((at(data.x, "with a mask per position"), data, per_position))
        per_value = generator.random(shape) < np.linspace(0.4, 0.9, shape[-1])
        found.append((at(data.x, "with a mask per value"), data, per_value))
    return found


def _require_outputs(adapter, found, data, mask, case):
    """Refuses outputs or gradients that are not those of the data without the rest; outputs, where the mask admits."""
    expected, magnitude = exact(adapter, data, mask), magnitudes(adapter, data, mask)
    for name, value in found.items():
        kept = mask if name == "y" else True
        allowed = ROUNDINGS * EPS * magnitude[name]
        require_close(f"{name} {case}", np.where(kept, value, 0), np.where(kept, expected[name], 0), allowed)
