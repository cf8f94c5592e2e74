"""Laws of values: outputs, gradients and statistics compared with the oracle; convergence of the running average."""

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

FORGOTTEN = 2.0**-22  # weight of the initial value in a running average that has converged
ENOUGH = 2000  # maximum number of batches; with momentum 0.99, 1518 are enough


def moves(adapter: Adapter) -> bool:
    """Whether batches change the running statistics."""
    return adapter.momentum < 1 or adapter.debiased


@law()
def output_equals_oracle(adapter: Adapter) -> None:
    """In training, the output equals that of the float64 oracle."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        y, _ = train(adapter, state, data.x)
        expected = exact(adapter, data)["y"]
        allowed = ROUNDINGS * EPS * magnitudes(adapter, data)["y"]
        require_close(f"y {at(data.x)}", y, expected, allowed)


@law()
def gradients_equal_oracle(adapter: Adapter) -> None:
    """The gradients with respect to inputs, scale and bias equal those of the float64 oracle."""
    for shape in SHAPES:
        data = sample(shape)
        state = start(adapter, *data[:3])
        expected = exact(adapter, data)
        magnitude = magnitudes(adapter, data)
        for name, gradient in gradients(adapter, state, *data).items():
            require_close(f"{name} {at(data.x)}", gradient, expected[name], ROUNDINGS * EPS * magnitude[name])


@law()
def running_statistics_equal_oracle(adapter: Adapter) -> None:
    """After one or several batches, the running statistics equal those of the oracle with the declared conventions."""
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
    """Evaluation normalizes with the running statistics, like the oracle, and does not change them."""
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
    """If all batches are the same, evaluation converges to training."""
    data = sample(SHAPES[0], std=ALIKE)
    state = start(adapter, *data[:3])
    batches = _until_converged(adapter)
    y = np.zeros(())
    for _ in range(batches):
        y, state = train(adapter, state, data.x)
    # Even after so many batches, a running average still contains a small fraction of its initial value, and so does
    # that of the oracle.  Evaluation with it does not return y, but
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
    """If all batches are the same, the distance between the running and the batch statistics decays like momentum^t."""
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
        require_statistics(f"minus that of the batch, after {number}", distance, expected, magnitude, rounding=rounding)


def _until_converged(adapter: Adapter) -> int:
    """Returns the number of batches after which the weight of the initial values is `FORGOTTEN`; `ENOUGH` at most."""
    if adapter.debiased or adapter.momentum in (0, 1):
        return 2
    batches = math.ceil(math.log(FORGOTTEN) / math.log(adapter.momentum))
    return min(batches, ENOUGH)


def _noise(adapter: Adapter) -> float:
    """Bounds the error of a float32 running average of a constant: updates below half a unit of rounding are lost."""
    return 2 * EPS / (1 - adapter.momentum) if adapter.momentum < 1 else 0.0
