"""Laws of values: outputs, gradients and statistics equal those of the oracle, and the running average converges."""

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

FORGOTTEN = 2.0**-22  # weight of the start in a running average that has converged
ENOUGH = 2000  # batches at most; momentum 0.99 takes 1518 to forget its start


def moves(adapter: Adapter) -> bool:
    """Says whether the running statistics ever leave their start."""
    return adapter.momentum < 1 or adapter.debiased


@law()
def output_equals_oracle(adapter: Adapter) -> None:
    """The output of training is that of the oracle in float64."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        y, _ = train(adapter, state, data.x)
        expected = exact(adapter, data)["y"]
        allowed = ROUNDINGS * EPS * magnitudes(adapter, data)["y"]
        require_close(f"y {at(data.x)}", y, expected, allowed)


@law()
def gradients_equal_oracle(adapter: Adapter) -> None:
    """The gradients with respect to inputs, scale and bias are those of the oracle in float64."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        expected = exact(adapter, data)
        magnitude = magnitudes(adapter, data)
        for name, gradient in gradients(adapter, state, *data).items():
            require_close(f"{name} {at(data.x)}", gradient, expected[name], ROUNDINGS * EPS * magnitude[name])


@law()
def running_statistics_equal_oracle(adapter: Adapter) -> None:
    """The running statistics after one batch and after several are those of the oracle, by the declared conventions."""
    for shape in SHAPES:
        batches = [sample(shape, mean=2 - t, std=1 + t, seed=t) for t in range(4)]
        state = start(adapter, *batches[0][:3])
        seen = []
        for number, data in enumerate(batches, start=1):
            _, state = train(adapter, state, data.x)
            seen.append(_oracle.moments(data.x))
            expected = running(adapter, seen)
            case = f"after {number} batch{'es' * (number > 1)} {at(data.x)}"
            magnitude = {"mean": 4 + number, "var": (1 + number) ** 2}
            require_statistics(case, statistics(adapter, state), expected, magnitude)


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
        after = statistics(adapter, state)
        require_statistics(f"after evaluation {at(data.x)}", after, before, magnitudes(adapter, data), rounding=0)


@law(moves)
def evaluation_equals_training_on_constant_statistics(adapter: Adapter) -> None:
    """Where every batch is the same, evaluation becomes what training is."""
    data = sample(SHAPES[0], std=ALIKE)
    state = start(adapter, *data[:3])
    batches = _until_converged(adapter)
    y = np.zeros(())
    for _ in range(batches):
        y, state = train(adapter, state, data.x)
    # Even after so many batches a running average holds a little of its start, and so does that of the oracle.  With
    # it, evaluation does not return y, but
    #   scale * (x - running_mean) / running_std + bias = factor * (y - bias) + shift + bias
    mean, var, count = _oracle.moments(data.x)
    running_mean, running_var = running(adapter, [(mean, var, count)] * batches)
    running_std = np.sqrt(running_var + adapter.epsilon)
    factor = np.sqrt((var + adapter.epsilon) / (running_var + adapter.epsilon))
    shift = data.scale * (mean - running_mean) / running_std
    expected = data.bias + factor * (y - data.bias) + shift
    allowed = (ROUNDINGS * EPS + _noise(adapter)) * (magnitudes(adapter, data)["y"] + abs(shift))
    require_close(f"y {at(data.x)}", evaluate(adapter, state, data.x), expected, allowed)


@law(moves)
def running_average_converges(adapter: Adapter) -> None:
    """Where every batch is the same, the distance of the running statistics from it falls like momentum^t."""
    data = sample(SHAPES[0], std=ALIKE)
    state = start(adapter, *data[:3])
    magnitude = magnitudes(adapter, data)
    mean, var, count = _oracle.moments(data.x)
    if adapter.unbiased:
        var = var * count / (count - 1)
    batch = np.stack([mean, var])
    initial = np.array([[0.0], [1.0]])  # mean and variance
    rounding = 16 * EPS + _noise(adapter)
    for number in range(1, 33):
        _, state = train(adapter, state, data.x)
        if number & (number - 1):
            continue  # compare after 1, 2, 4, ... batches
        left = 0 if adapter.debiased else adapter.momentum**number
        distance = statistics(adapter, state) - batch
        expected = left * (initial - batch)
        require_statistics(f"less the batch's, after {number}", distance, expected, magnitude, rounding=rounding)


def _until_converged(adapter: Adapter) -> int:
    """Returns the number of batches after which the running average has forgotten its start, or `ENOUGH`."""
    if adapter.debiased or adapter.momentum in (0, 1):
        return 2
    batches = math.ceil(math.log(FORGOTTEN) / math.log(adapter.momentum))
    return min(batches, ENOUGH)


def _noise(adapter: Adapter) -> float:
    """Bounds the distance of a float32 average of constants from them: steps below half a unit of rounding are lost."""
    return 2 * EPS / (1 - adapter.momentum) if adapter.momentum < 1 else 0.0
