"""Laws of invariance: what changes nothing in the inputs, and what the gradient therefore cannot contain."""

import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter, gradients, law, start, statistics, train
from jaxbn.testing._samples import ALIKE, EPS, ROUNDINGS, SHAPES, Sample, at, magnitudes, require_close, running, sample


@law()
def shifting_changes_only_the_mean(adapter: Adapter) -> None:
    """A constant added to the inputs moves the mean by as much, and leaves output, variance and gradients."""
    shift = 2.0
    for shape in SHAPES:
        data = sample(shape, std=ALIKE)
        # In multiples of 1/1024, below 16, so that adding the shift is exact.
        data = data._replace(x=np.clip(np.round(data.x * 1024) / 1024, -16, 16).astype(np.float32))
        shifted = data._replace(x=data.x + np.float32(shift))
        magnitude = magnitudes(adapter, shifted)
        found, expected = _step(adapter, shifted), _step(adapter, data)
        _, _, count = _oracle.moments(data.x)
        alone, _ = running(adapter, [(np.full_like(count, shift), np.ones_like(count), count)])
        expected["mean"] = expected["mean"] + alone
        for name in expected:
            case = f"{at(data.x)} with {shift:g} added"
            require_close(f"{name} {case}", found[name], expected[name], ROUNDINGS * EPS * magnitude[name])


@law()
def scaling_changes_only_the_statistics(adapter: Adapter) -> None:
    """A factor on the inputs multiplies mean and variance, and leaves the output, but for the epsilon in it."""
    for shape in SHAPES:
        for factor in (2.0**-6, 2.0**6):  # of a power of two, x stays exact
            data = sample(shape)
            scaled = data._replace(x=data.x * np.float32(factor))
            mean, var, count = _oracle.moments(data.x)
            original, magnitude = magnitudes(adapter, data), magnitudes(adapter, scaled)
            found, expected = _step(adapter, scaled), _step(adapter, data)
            shrunk = np.sqrt((var + adapter.epsilon) / (var + adapter.epsilon / factor**2))
            expected["y"] = data.bias + shrunk * (expected["y"] - data.bias)
            # Differences, in which what the averages started from cancels.
            before, after = (running(adapter, [(f * mean, f**2 * var, count)]) for f in (1, factor))
            for name, was, will_be in zip(("mean", "var"), before, after, strict=True):
                expected[name] = expected[name] + (will_be - was)
            for name in ("y", "mean", "var"):
                # The output of the inputs as they were is multiplied, and with it its error.
                size = magnitude[name] * (1 + shrunk) if name == "y" else magnitude[name] + original[name]
                allowed = ROUNDINGS * EPS * size
                require_close(f"{name} {at(data.x, f'times {factor:g}')}", found[name], expected[name], allowed)


@law()
def permutation_changes_only_the_order(adapter: Adapter) -> None:
    """Examples in another order have the same outputs and gradients in that order, and the same statistics."""
    for shape in SHAPES:
        data = sample(shape)
        order = np.random.default_rng(0).permutation(shape[0])
        permuted = data._replace(x=data.x[order], dy=data.dy[order])
        magnitude = magnitudes(adapter, data)
        found, expected = _step(adapter, permuted), _step(adapter, data)
        for name in expected:
            before = expected[name][order] if name in ("y", "dx") else expected[name]
            require_close(f"{name} {at(data.x, 'permuted')}", found[name], before, ROUNDINGS * EPS * magnitude[name])


@law()
def gradient_sums_to_zero(adapter: Adapter) -> None:
    """The gradient with respect to the inputs adds up to zero over the batch: shifting them changes nothing."""
    for shape in SHAPES:
        data = sample(shape)
        dx = gradients(adapter, start(adapter, *data[:3]), *data)["dx"]
        rows, values = tuple(range(dx.ndim - 1)), dx[..., 0].size
        allowed = ROUNDINGS * EPS * values * magnitudes(adapter, data)["dx"]
        require_close(f"sum of dx {at(data.x)}", dx.sum(rows), np.zeros(shape[-1]), allowed)


@law()
def gradient_is_orthogonal_to_the_output(adapter: Adapter) -> None:
    """The gradient with respect to the inputs is orthogonal to the normalised ones, but for the epsilon in them."""
    for shape in SHAPES:
        data = sample(shape)
        dx = gradients(adapter, start(adapter, *data[:3]), *data)["dx"]
        mean, var, _ = _oracle.moments(data.x)
        rsqrt, rows = 1 / np.sqrt(var + adapter.epsilon), tuple(range(dx.ndim - 1))
        z = (data.x - mean) * rsqrt
        left = data.scale * rsqrt * (data.dy * z).sum(rows) * adapter.epsilon / (var + adapter.epsilon)
        allowed = ROUNDINGS * EPS * abs(z).sum(rows) * magnitudes(adapter, data)["dx"]
        require_close(f"dx times z, summed, {at(data.x)}", (dx * z).sum(rows), left, allowed)


@law()
def gradient_is_invariant_to_the_scale_of_weights(adapter: Adapter) -> None:
    """Weights before a batch norm have a gradient orthogonal to them, and 1/c of it where they are c times as large."""
    generator = np.random.default_rng(0)
    # Integers below 2^24, so that x = u w is exact; its variance is so large that epsilon is nothing beside it.
    u = generator.integers(-99, 100, (48, 7)).astype(np.float64)
    w = generator.integers(-99, 100, (7, 4)).astype(np.float64)
    data = sample((48, 4))
    state, found = start(adapter, *data[:3]), {}
    for factor in (1.0, 4.0):
        one = data._replace(x=(factor * (u @ w)).astype(np.float32))
        allowed = ROUNDINGS * EPS * abs(u).sum(0)[:, None] * magnitudes(adapter, one)["dx"]
        found[factor] = u.T @ gradients(adapter, state, *one)["dx"], allowed
    (dw, allowed), (dw_of_4w, _) = found[1.0], found[4.0]
    require_close(
        "dw times w, summed over the inputs of a layer", (dw * w).sum(0), np.zeros(4), (allowed * abs(w)).sum(0)
    )
    require_close("4 times dw at 4 w", 4 * dw_of_4w, dw, allowed)


def _step(adapter: Adapter, data: Sample) -> dict[str, np.ndarray]:
    """Returns outputs, gradients and running statistics of the first training step."""
    state = start(adapter, *data[:3])
    y, after = train(adapter, state, data.x)
    mean, var = statistics(adapter, after)
    return {"y": y, **gradients(adapter, state, *data), "mean": mean, "var": var}
