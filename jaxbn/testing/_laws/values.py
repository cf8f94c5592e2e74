"""Laws of values: what the oracle says of outputs, gradients and statistics, and what the running average does."""

import math

import numpy as np

from jaxbn.testing import _oracle
from jaxbn.testing._adapter import Adapter, evaluate, gradients, law, start, statistics, train
from jaxbn.testing._samples import (
    ALIKE,
    EPS,
    ROUNDINGS,
    SHAPES,
    at,
    exact,
    exact_evaluation,
    magnitudes,
    require_close,
    require_statistics,
    running,
    sample,
)

FORGOTTEN = 2.0**-22  # weight of what the running average started from, where it has converged
ENOUGH = 2000  # batches at most; until momentum 0.99 has forgotten, and a small variance shows beside the start at 1


def moves(adapter: Adapter) -> bool:
    """Returns whether the running statistics ever leave their start."""
    return adapter.momentum < 1 or adapter.debiased


@law()
def output_equals_oracle(adapter: Adapter) -> None:
    """The output of training is that of the oracle in float64."""
    for shape in SHAPES:
        data = sample(shape)
        y, _ = train(adapter, start(adapter, *data[:3]), data.x)
        allowed = ROUNDINGS * EPS * magnitudes(adapter, data)["y"]
        require_close(f"y {at(data.x)}", y, exact(adapter, data)["y"], allowed)


@law()
def gradients_equal_oracle(adapter: Adapter) -> None:
    """The gradients with respect to inputs, scale and bias are those of the oracle in float64."""
    for shape in SHAPES:
        data = sample(shape)
        expected, magnitude = exact(adapter, data), magnitudes(adapter, data)
        for name, found in gradients(adapter, start(adapter, *data[:3]), *data).items():
            require_close(f"{name} {at(data.x)}", found, expected[name], ROUNDINGS * EPS * magnitude[name])


@law()
def running_statistics_equal_oracle(adapter: Adapter) -> None:
    """The running statistics after one batch and after several are those of the oracle, by the declared conventions."""
    for shape in SHAPES:
        batches = [sample(shape, mean=2 - t, std=1 + t, seed=t) for t in range(4)]
        state, seen = start(adapter, *batches[0][:3]), []
        for number, data in enumerate(batches, start=1):
            _, state = train(adapter, state, data.x)
            seen.append(_oracle.moments(data.x))
            case = f"after {number} batch{'es' * (number > 1)} {at(data.x)}"
            magnitude = {"mean": 4 + number, "var": (1 + number) ** 2}
            require_statistics(case, statistics(adapter, state), running(adapter, seen), magnitude)


@law()
def evaluation_equals_oracle(adapter: Adapter) -> None:
    """Evaluation normalises with the running statistics, as the oracle does, and leaves them."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        for _ in range(_until_converged(adapter)):
            _, state = train(adapter, state, data.x)
        before = statistics(adapter, state)
        y = evaluate(adapter, state, data.x)
        expected, magnitude = exact_evaluation(adapter, data, *before)
        require_close(f"y {at(data.x)}", y, expected, ROUNDINGS * EPS * magnitude)
        case, after = f"after evaluation {at(data.x)}", statistics(adapter, state)
        require_statistics(case, after, before, magnitudes(adapter, data), rounding=0)


@law(moves)
def evaluation_equals_training_on_constant_statistics(adapter: Adapter) -> None:
    """Where every batch is the same, evaluation becomes what training is."""
    data = sample(SHAPES[0], std=ALIKE)
    state, y, batches = start(adapter, *data[:3]), np.zeros(()), _until_converged(adapter)
    for _ in range(batches):
        y, state = train(adapter, state, data.x)
    mean, var, count = _oracle.moments(data.x)
    # The average of the oracle, which has of its start what is left there after so many batches.
    running_mean, running_var = running(adapter, [(mean, var, count)] * batches)
    factor = np.sqrt((var + adapter.epsilon) / (running_var + adapter.epsilon))
    shift = data.scale * (mean - running_mean) / np.sqrt(running_var + adapter.epsilon)
    expected = data.bias + factor * (y - data.bias) + shift
    allowed = (ROUNDINGS * EPS + _noise(adapter)) * (magnitudes(adapter, data)["y"] + abs(shift))
    require_close(f"y {at(data.x)}", evaluate(adapter, state, data.x), expected, allowed)


@law(moves)
def running_average_converges(adapter: Adapter) -> None:
    """Where every batch is the same, the distance of the running statistics from it falls like momentum^t."""
    data = sample(SHAPES[0], std=ALIKE)
    state, magnitude = start(adapter, *data[:3]), magnitudes(adapter, data)
    mean, var, count = _oracle.moments(data.x)
    batch = np.stack([mean, var * count / (count - 1) if adapter.unbiased else var])
    begun = np.array([[0.0], [1.0]])  # mean and variance
    for number in range(1, 33):
        _, state = train(adapter, state, data.x)
        if number & (number - 1):
            continue  # look after 1, 2, 4, ... batches
        left = 0 if adapter.debiased else adapter.momentum**number
        found, expected = statistics(adapter, state) - batch, left * (begun - batch)
        case, rounding = f"less the batch's, after {number}", 16 * EPS + _noise(adapter)
        require_statistics(case, found, expected, magnitude, rounding=rounding)


def _until_converged(adapter):
    """The number of batches after which the running average has forgotten its start, or as many as are enough."""
    if adapter.debiased or adapter.momentum in (0, 1):
        return 2
    return min(math.ceil(math.log(FORGOTTEN) / math.log(adapter.momentum)), ENOUGH)


def _noise(adapter):
    """How far rounding keeps a float32 average of constants from them: steps below half a unit are lost."""
    return 2 * EPS / (1 - adapter.momentum) if adapter.momentum < 1 else 0.0
