"""Laws of invariance: changes of the inputs that do not change the output, and what they imply for the gradient."""

import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter, gradients, law, start, statistics, train
from jaxbn.testing._samples import (
    ALIKE,
    EPS,
    ROUNDINGS,
    SHAPES,
    Sample,
    at,
    magnitudes,
    require_close,
    rows_of,
    running,
    sample,
)


@law()
def shifting_changes_only_the_mean(adapter: Adapter) -> None:
    """Adding a constant to the inputs adds it to the mean, and does not change output, variance or gradients."""
    shift = 2.0
    for shape in SHAPES:
        data = sample(shape, std=ALIKE)
        # In multiples of 1/1024 below 16, so that adding the shift is exact.
        x = np.clip(np.round(data.x * 1024) / 1024, -16, 16)
        data = data._replace(x=x.astype(np.float32))
        shifted = data._replace(x=data.x + np.float32(shift))
        actual = _step(adapter, shifted)
        expected = _step(adapter, data)
        # The running mean is linear in the means of the batches, so it grows by the running average of the shift.
        _, _, count = _oracle.moments(data.x)
        average_of_shift, _ = running(adapter, [(np.full_like(count, shift), np.ones_like(count), count)])
        expected["mean"] = expected["mean"] + average_of_shift
        magnitude = magnitudes(adapter, shifted)
        case = f"{at(data.x)} with {shift:g} added"
        for name in expected:
            require_close(f"{name} {case}", actual[name], expected[name], ROUNDINGS * EPS * magnitude[name])


@law()
def scaling_changes_only_the_statistics(adapter: Adapter) -> None:
    """Scaling the inputs scales mean and variance, and does not change the output, except through epsilon."""
    for shape in SHAPES:
        for factor in (2.0**-6, 2.0**6):  # powers of two, so that the product is exact
            data = sample(shape)
            scaled = data._replace(x=data.x * np.float32(factor))
            case = at(data.x, f"times {factor:g}")
            original = magnitudes(adapter, data)
            magnitude = magnitudes(adapter, scaled)
            actual = _step(adapter, scaled)
            expected = _step(adapter, data)

            # z = (x - mean) / sqrt(var + epsilon) changes only because epsilon is not scaled with the variance.
            mean, var, count = _oracle.moments(data.x)
            growth = np.sqrt((var + adapter.epsilon) / (var + adapter.epsilon / factor**2))
            expected["y"] = data.bias + growth * (expected["y"] - data.bias)
            # The output of the original inputs is multiplied by `growth`, and so is its error.
            allowed = ROUNDINGS * EPS * magnitude["y"] * (1 + growth)
            require_close(f"y {case}", actual["y"], expected["y"], allowed)

            # In the difference of two running averages, the initial values cancel.
            before = running(adapter, [(mean, var, count)])
            after = running(adapter, [(factor * mean, factor**2 * var, count)])
            for name, value, scaled_value in zip(("mean", "var"), before, after, strict=True):
                expected[name] = expected[name] + (scaled_value - value)
                allowed = ROUNDINGS * EPS * (magnitude[name] + original[name])
                require_close(f"{name} {case}", actual[name], expected[name], allowed)


@law()
def permutation_changes_only_the_order(adapter: Adapter) -> None:
    """Permuting the examples permutes outputs and gradients, and does not change the statistics."""
    for shape in SHAPES:
        data = sample(shape)
        order = np.random.default_rng(0).permutation(shape[0])
        permuted = data._replace(x=data.x[order], dy=data.dy[order])
        actual = _step(adapter, permuted)
        expected = _step(adapter, data)
        for name in ("y", "dx"):
            expected[name] = expected[name][order]
        magnitude = magnitudes(adapter, data)
        case = at(data.x, "permuted")
        for name in expected:
            require_close(f"{name} {case}", actual[name], expected[name], ROUNDINGS * EPS * magnitude[name])


@law()
def gradient_sums_to_zero(adapter: Adapter) -> None:
    """The gradient with respect to the inputs sums to zero over the batch, because shifting them changes nothing."""
    for shape in SHAPES:
        data = sample(shape)
        dx = gradients(adapter, start(adapter, *data[:3]), *data)["dx"]
        values = dx[..., 0].size
        allowed = ROUNDINGS * EPS * values * magnitudes(adapter, data)["dx"]
        require_close(f"sum of dx {at(data.x)}", dx.sum(rows_of(dx)), np.zeros(shape[-1]), allowed)


@law()
def gradient_is_orthogonal_to_the_output(adapter: Adapter) -> None:
    """The gradient with respect to the inputs is orthogonal to the normalized inputs, except through epsilon."""
    for shape in SHAPES:
        data = sample(shape)
        dx = gradients(adapter, start(adapter, *data[:3]), *data)["dx"]
        rows = rows_of(dx)
        epsilon = adapter.epsilon
        mean, var, _ = _oracle.moments(data.x)
        rsqrt = 1 / np.sqrt(var + epsilon)
        z = (data.x - mean) * rsqrt
        # By the formulas of the paper, sum(dx z) is 0 for epsilon = 0; otherwise sum(z^2) = m var / (var + epsilon)
        # leaves a part of epsilon / (var + epsilon).
        expected = data.scale * rsqrt * (data.dy * z).sum(rows) * epsilon / (var + epsilon)
        allowed = ROUNDINGS * EPS * abs(z).sum(rows) * magnitudes(adapter, data)["dx"]
        require_close(f"dx times z, summed, {at(data.x)}", (dx * z).sum(rows), expected, allowed)


@law()
def gradient_is_invariant_to_the_scale_of_weights(adapter: Adapter) -> None:
    """The gradient of weights before a batch norm is orthogonal to them; scaling the weights by c scales it by 1/c."""
    generator = np.random.default_rng(0)
    # Integers, so that x = u w is exact.  Its variance is so large that epsilon does not matter.
    u = generator.integers(-99, 100, (48, 7)).astype(np.float64)
    w = generator.integers(-99, 100, (7, 4)).astype(np.float64)
    data = sample((48, 4))
    state = start(adapter, *data[:3])

    def gradient_of_weights(factor):
        """Returns dw at the weights factor * w, and the allowed error."""
        scaled = data._replace(x=(factor * (u @ w)).astype(np.float32))
        dw = u.T @ gradients(adapter, state, *scaled)["dx"]
        return dw, ROUNDINGS * EPS * abs(u).sum(0)[:, None] * magnitudes(adapter, scaled)["dx"]

    dw, allowed = gradient_of_weights(1.0)
    dw_of_4w, _ = gradient_of_weights(4.0)
    along_w = (dw * w).sum(0)
    require_close("dw times w, summed over the inputs of a layer", along_w, np.zeros(4), (allowed * abs(w)).sum(0))
    require_close("4 times dw at 4 w", 4 * dw_of_4w, dw, allowed)


def _step(adapter: Adapter, data: Sample) -> dict[str, np.ndarray]:
    """Runs the first training step; returns outputs, gradients and running statistics."""
    state = start(adapter, *data[:3])
    y, after = train(adapter, state, data.x)
    mean, var = statistics(adapter, after)
    return {"y": y, **gradients(adapter, state, *data), "mean": mean, "var": var}
