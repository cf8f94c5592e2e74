"""Laws of parallelism: a batch that is split over a named axis is normalised as the whole one would be.

The devices are those of ``jax.vmap(axis_name=AXIS)``, which need no hardware; other ways to split are not asked.
"""

import functools

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
DIVISIBLE = (48, 4), (8, 5, 3, 4)
LARGE = 1e3  # mean over standard deviation
COUNTS = (12, 7, 1, 3), (12, 7, 1, 0), (0, 5, 12, 1)  # valid examples on each device, of the 12 that it has


def spread(adapter: Adapter) -> bool:
    """Returns whether the implementation synchronises over devices."""
    return adapter.over_devices is not None


def spread_and_masked(adapter: Adapter) -> bool:
    """Returns whether it does so with masks."""
    return adapter.masks and adapter.over_devices is not None and adapter.over_devices.masks


@law(spread)
def split_over_devices(adapter: Adapter) -> None:
    """A batch split under vmap with a named axis has the output, statistics and gradients of the whole batch."""
    for shape in DIVISIBLE:
        _require_whole(adapter, sample(shape))


@law(spread)
def large_means_over_devices(adapter: Adapter) -> None:
    """Split under vmap with a named axis, large means cost no more digits than the mean has over the deviation."""
    for shape in DIVISIBLE:
        data = sample(shape, mean=LARGE * np.array(ALIKE), std=ALIKE)
        _require_whole(adapter, data, case=f"at mean/std {LARGE:g}, ", rounding=(ROUNDINGS + 32 * LARGE) * EPS)


@law(spread_and_masked)
def devices_with_unequal_counts(adapter: Adapter) -> None:
    """Devices, under vmap with a named axis, weigh as many examples as their masks admit, which may be none."""
    each = DIVISIBLE[0][0] // DEVICES
    for counts in COUNTS:
        mask = (np.arange(each) < np.array(counts)[:, None]).reshape(-1, 1)
        data = sample(DIVISIBLE[0])
        data = data._replace(dy=np.where(mask, data.dy, np.float32(0)))
        _require_whole(adapter, data, mask, case=f"with {counts} valid examples ")


def _require_whole(adapter, data: Sample, mask=None, *, case="", rounding=ROUNDINGS * EPS):
    """Compares a step over devices with the oracle on the whole batch, and statistics with those of the whole batch."""
    found, after = _step(adapter.over_devices, data, mask)
    expected, magnitude = exact(adapter, data, mask), magnitudes(adapter, data, mask)
    case = at(data.x, f"{case}over {DEVICES} devices")
    for name, value in found.items():
        kept = True if mask is None or name != "y" else mask
        one, other = np.where(kept, value, 0), np.where(kept, expected[name], 0)
        require_close(f"{name} {case}", one, other, rounding * magnitude[name])
    whole = statistics(adapter, train(adapter, start(adapter, *data[:3]), data.x, mask)[1])
    for device in range(DEVICES):
        state = jax.tree.map(lambda leaf, device=device: leaf[device], after)
        found = statistics(adapter.over_devices, state)
        require_statistics(f"on device {device} {case}", found, whole, magnitude, rounding=rounding)


def _step(adapter, data: Sample, mask):
    """Returns outputs and gradients of the whole batch, and the state of each device."""
    state = start(adapter, *data[:3])
    parts = [
        value if value is None else value.reshape(DEVICES, -1, *value.shape[1:]) for value in (data.x, data.dy, mask)
    ]
    given = (arrays(adapter, value) for value in (*data[1:3], *parts))
    y, dx, dscale, dbias, after = _on_devices(adapter, state, *given)
    # Each device knows the gradient of its own outputs in the parameters; that in the inputs is complete.
    found = {"y": y, "dx": dx, "dscale": dscale.sum(0), "dbias": dbias.sum(0)}
    shapes = {"y": data.x.shape, "dx": data.x.shape, "dscale": data.scale.shape, "dbias": data.bias.shape}
    return {name: wide(value.reshape(shapes[name]), shapes[name], name) for name, value in found.items()}, after


@functools.partial(jax.jit, static_argnums=0)
def _on_devices(adapter, state, scale, bias, x, dy, mask):
    def device(x, dy, mask):
        def run(x, scale, bias):
            updated = adapter.with_parameters(state, scale, bias)
            return entries(adapter.train(updated, x, mask), "train", "y", "state")

        y, vjp, after = jax.vjp(run, x, scale, bias, has_aux=True)
        return y, *vjp(dy.astype(y.dtype)), after

    return jax.vmap(device, axis_name=AXIS)(x, dy, mask)
