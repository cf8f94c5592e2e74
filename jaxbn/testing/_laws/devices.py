"""Laws of parallelism: a batch that is split over a named axis is normalized like the whole batch.

The devices are those of ``jax.vmap(axis_name=AXIS)``, which needs no hardware; other ways to split a batch are not
tested.
"""

import functools
from typing import Any

import jax
import numpy as np

from jaxbn.testing._adapter import AXIS, Adapter, arrays, entries, law, start, statistics, train, wide
from jaxbn.testing._samples import (
    ALIKE,
    EPS,
    ROUNDINGS,
    Sample,
    at,
    exact,
    magnitudes,
    require_close,
    require_statistics,
    sample,
)

DEVICES = 4
DIVISIBLE = (48, 4), (8, 5, 3, 4)  # shapes whose examples the devices can share evenly
LARGE = 1e3  # mean over standard deviation
COUNTS = (12, 7, 1, 3), (12, 7, 1, 0), (0, 5, 12, 1)  # valid examples on each device, of 12


def spread(adapter: Adapter) -> bool:
    """Whether the implementation synchronizes over devices."""
    return adapter.over_devices is not None


def spread_and_masked(adapter: Adapter) -> bool:
    """Whether the implementation takes masks, also when it synchronizes over devices."""
    return adapter.masks and adapter.over_devices is not None and adapter.over_devices.masks


@law(spread)
def split_over_devices(adapter: Adapter) -> None:
    """Splitting a batch under vmap with a named axis gives the output, statistics and gradients of the whole batch."""
    for shape in DIVISIBLE:
        _require_whole(adapter, sample(shape))


@law(spread)
def large_means_over_devices(adapter: Adapter) -> None:
    """Under vmap with a named axis, the error grows at most in proportion to mean / standard deviation."""
    # The mean is rounded to EPS of itself, which is LARGE * EPS of the standard deviation.
    rounding = (ROUNDINGS + 32 * LARGE) * EPS
    for shape in DIVISIBLE:
        data = sample(shape, mean=LARGE * np.array(ALIKE), std=ALIKE)
        _require_whole(adapter, data, case=f"at mean/std {LARGE:g}, ", rounding=rounding)


@law(spread_and_masked)
def devices_with_unequal_counts(adapter: Adapter) -> None:
    """Under vmap with a named axis, devices are weighted by the number of their valid examples, which may be zero."""
    shape = DIVISIBLE[0]
    per_device = shape[0] // DEVICES
    for counts in COUNTS:
        mask = np.arange(per_device) < np.array(counts)[:, None]
        mask = mask.reshape(-1, 1)
        data = sample(shape)
        data = data._replace(dy=np.where(mask, data.dy, np.float32(0)))
        _require_whole(adapter, data, mask, case=f"with {counts} valid examples ")


def _require_whole(
    adapter: Adapter,
    data: Sample,
    mask: np.ndarray | None = None,
    *,
    case: str = "",
    rounding: float = ROUNDINGS * EPS,
) -> None:
    """Asserts that a step over devices equals the oracle, and that its statistics equal those of one device."""
    spread_adapter = adapter.over_devices
    assert spread_adapter is not None  # ensured by `spread`
    actual, after = _step(spread_adapter, data, mask)
    expected = exact(adapter, data, mask)
    magnitude = magnitudes(adapter, data, mask)
    case = at(data.x, f"{case}over {DEVICES} devices")
    for name, value in actual.items():
        compared = mask if mask is not None and name == "y" else True
        actual_value = np.where(compared, value, 0)
        expected_value = np.where(compared, expected[name], 0)
        require_close(f"{name} {case}", actual_value, expected_value, rounding * magnitude[name])

    # Every device has running statistics, which must all be those of the whole batch.
    _, after_whole = train(adapter, start(adapter, *data[:3]), data.x, mask)
    whole = statistics(adapter, after_whole)
    for device in range(DEVICES):
        state = jax.tree.map(lambda leaf, device=device: leaf[device], after)
        on_device = statistics(spread_adapter, state)
        require_statistics(f"on device {device} {case}", on_device, whole, magnitude, rounding=rounding)


def _step(adapter: Adapter, data: Sample, mask: np.ndarray | None) -> tuple[dict[str, np.ndarray], Any]:
    """Returns outputs and gradients of the whole batch, and the state of each device."""
    state = start(adapter, *data[:3])
    scale, bias = arrays(adapter, data.scale), arrays(adapter, data.bias)
    x, dy = (arrays(adapter, _split(value)) for value in (data.x, data.dy))
    mask = None if mask is None else arrays(adapter, _split(mask))
    y, dx, dscale, dbias, after = _on_devices(adapter, state, scale, bias, x, dy, mask)
    # The parameter gradients of a device are those of its own outputs alone; the input gradients are complete.
    actual = {"y": y, "dx": dx, "dscale": dscale.sum(0), "dbias": dbias.sum(0)}
    shapes = {"y": data.x.shape, "dx": data.x.shape, "dscale": data.scale.shape, "dbias": data.bias.shape}
    return {name: wide(value.reshape(shapes[name]), shapes[name], name) for name, value in actual.items()}, after


def _split(value: np.ndarray) -> np.ndarray:
    return value.reshape(DEVICES, -1, *value.shape[1:])


@functools.partial(jax.jit, static_argnums=0)
def _on_devices(
    adapter: Adapter,
    state: Any,
    scale: jax.Array,
    bias: jax.Array,
    x: jax.Array,
    dy: jax.Array,
    mask: jax.Array | None,
) -> Any:
    def on_device(x, dy, mask):
        def output_and_state(x, scale, bias):
            updated = adapter.with_parameters(state, scale, bias)
            return entries(adapter.train(updated, x, mask), "train", "y", "state")

        y, vjp, after = jax.vjp(output_and_state, x, scale, bias, has_aux=True)
        return y, *vjp(dy.astype(y.dtype)), after

    return jax.vmap(on_device, axis_name=AXIS)(x, dy, mask)
