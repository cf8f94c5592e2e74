"""The interface between an implementation of batch norm and the laws.

The functions check the results of an implementation and convert them to NumPy arrays in float64.  A traceable
implementation is compiled once for all laws that call it with arrays of the same shapes and dtypes.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core import checks

#: Name of the device axis under which the laws call `Adapter.over_devices`.
AXIS = "devices"


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """How to call an implementation of batch norm, and which conventions it follows.

    ``state`` holds parameters and running statistics.  Functions take and return channels-last arrays; they return a
    new state and leave the old one unchanged.  Arrays are JAX arrays if the implementation is traceable, and NumPy
    arrays otherwise.

    Attributes:
      name: name of the implementation in reports.
      init: ``x -> state``, with scale 1 and bias 0; x is an example batch, shape [N, ..., C].
      train: ``(state, x, mask) -> (y, state)``, normalized with the statistics of the batch; mask is None, or booleans
        of shape [N, 1, ..., 1] or of the shape of x.
      evaluate: ``(state, x) -> y``, normalized with the running statistics.
      statistics: ``state -> (mean, var)``, the running statistics that evaluation uses, shape [C].
      with_parameters: ``(state, scale, bias) -> state``.
      gradients: ``(state, x, scale, bias, dy, mask) -> (dx, dscale, dbias)`` of sum(y dy) in training; dy has the
        dtype of x.  None if `train` is traceable, so that jax.vjp can compute them.
      epsilon: added to the variance.
      momentum: weight of the OLD running value.
      unbiased: whether the running variance is multiplied by m/(m - 1).
      debiased: whether the running statistics are corrected for their initial values, so that after one batch they
        equal those of the batch; otherwise they start at mean 0 and variance 1.
      masks: whether `train` takes masks.
      traceable: whether JAX can trace the functions, that is, jit, differentiate, vmap and scan them, and states are
        pytrees.
      half_precision: dtypes with fewer than 32 bits that it accepts.
      float64: whether it accepts float64, which JAX arrays have under ``jax.enable_x64``.
      over_devices: an adapter of the same implementation that synchronizes over the device axis `AXIS`; its `train` is
        called under ``jax.vmap(axis_name=AXIS)``.  None if it cannot.
    """

    name: str
    init: Callable[[Any], Any]
    train: Callable[[Any, Any, Any], tuple[Any, Any]]
    evaluate: Callable[[Any, Any], Any]
    statistics: Callable[[Any], tuple[Any, Any]]
    with_parameters: Callable[[Any, Any, Any], Any]
    gradients: Callable[..., tuple[Any, Any, Any]] | None = None
    epsilon: float = 1e-5
    momentum: float = 0.99
    unbiased: bool = False
    debiased: bool = False
    masks: bool = False
    traceable: bool = True
    half_precision: tuple[str, ...] = ("bfloat16", "float16")
    float64: bool = True
    over_devices: "Adapter | None" = None

    def __post_init__(self):
        """Raises ValueError for conventions that no batch norm has, and for functions that the laws could not call."""
        for name in ("init", "train", "evaluate", "statistics", "with_parameters"):
            function = getattr(self, name)
            if not callable(function):
                raise ValueError(
                    f"{name} must be a function, got {function!r}; the docstring of Adapter has its signature."
                )
        if self.momentum is None:
            raise ValueError("momentum must be a number, got None; use the weight of the old value, for example 0.99.")
        checks.momentum(self.momentum)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}; use for example 1e-5.")
        if self.gradients is None and not self.traceable:
            raise ValueError(
                "gradients must be a function if traceable=False, got None; "
                "pass gradients=(state, x, scale, bias, dy, mask) -> (dx, dscale, dbias)."
            )
        dtypes = self.half_precision
        if isinstance(dtypes, str) or any(_bits(dtype) >= 32 for dtype in dtypes):
            raise ValueError(
                f"half_precision must be a sequence of floating-point dtypes below 32 bits, got {dtypes!r}; use those "
                'that the implementation accepts, such as ("bfloat16", "float16"), or ().'
            )
        spread = self.over_devices
        if spread is not None and not (isinstance(spread, Adapter) and spread.traceable):
            raise ValueError(
                f"over_devices must be a traceable Adapter or None, got {spread!r}; use one whose train has AXIS as "
                "the axis name of its collectives."
            )


class Law(NamedTuple):
    """A law of batch norm.

    Attributes:
      name: an identifier, such as ``statistics_of_masked_data``.
      statement: one sentence.
      applies: whether the law applies to an adapter: whether that declares the feature, such as masks.
      check: raises AssertionError if the law is broken, with the quantity, the case, the error and the tolerance.
    """

    name: str
    statement: str
    applies: Callable[[Adapter], bool]
    check: Callable[[Adapter], None]


def law(applies: Callable[[Adapter], bool] = lambda adapter: True) -> Callable[[Callable[[Adapter], None]], Law]:
    """Turns a check into a law, with the name of the function and its docstring as the statement."""

    def make(check: Callable[[Adapter], None]) -> Law:
        return Law(check.__name__, inspect.getdoc(check) or check.__name__, applies, check)

    return make


def start(adapter: Adapter, x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> Any:
    """Creates the state before the first batch, with these parameters."""
    state = adapter.init(arrays(adapter, x))
    return adapter.with_parameters(state, arrays(adapter, scale), arrays(adapter, bias))


def train(adapter: Adapter, state: Any, x: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
    """Runs a training step; returns its output and the new state."""
    x = arrays(adapter, x)
    mask = arrays(adapter, mask)
    if not adapter.traceable:
        return train_eagerly(adapter, state, x, mask)
    returned = _train(adapter, state, x, mask)
    y, after = entries(returned, "train", "y", "state")
    return wide(y, x.shape, "y of train"), after


def train_eagerly(adapter: Adapter, state: Any, x: Any, mask: Any | None = None) -> tuple[np.ndarray, Any]:
    """Runs a training step without jit; returns its output and the new state."""
    before = statistics(adapter, state)
    returned = adapter.train(state, x, mask)
    y, after = entries(returned, "train", "y", "state")
    # Only needed here: under jit, a state cannot change in place.
    if not np.array_equal(before, statistics(adapter, state), equal_nan=True):
        raise AssertionError("train changed the running statistics of the state it was given; return a new state")
    return wide(y, x.shape, "y of train"), after


def evaluate(adapter: Adapter, state: Any, x: np.ndarray) -> np.ndarray:
    """Evaluates a batch."""
    x = arrays(adapter, x)
    y = _evaluate(adapter, state, x) if adapter.traceable else adapter.evaluate(state, x)
    return wide(y, x.shape, "y of evaluate")


def statistics(adapter: Adapter, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the running mean and variance."""
    returned = adapter.statistics(state)
    if isinstance(returned, tuple):
        returned = returned[:2]  # jaxbn.CountedStats has the number of batches as a third entry
    mean, var = entries(returned, "statistics", "mean", "var")
    for name, value in (("mean", mean), ("var", var)):
        if np.ndim(value) != 1:
            raise AssertionError(f"the running {name} has shape {np.shape(value)}, expected one value per feature, [C]")
    return wide(mean, np.shape(mean), "mean"), wide(var, np.shape(mean), "running var")


def gradients(
    adapter: Adapter,
    state: Any,
    x: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    dy: np.ndarray,
    mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns dx, dscale and dbias of sum(y dy) in training."""
    x, scale, bias, dy, mask = (arrays(adapter, value) for value in (x, scale, bias, dy, mask))
    if adapter.gradients is None:
        returned = _gradients(adapter, state, x, scale, bias, dy, mask)
    else:
        returned = adapter.gradients(state, x, scale, bias, dy, mask)
    dx, dscale, dbias = entries(returned, "gradients", "dx", "dscale", "dbias")
    return {
        "dx": wide(dx, x.shape, "dx"),
        "dscale": wide(dscale, scale.shape, "dscale"),
        "dbias": wide(dbias, bias.shape, "dbias"),
    }


def arrays(adapter: Adapter, value: Any) -> Any:
    """Converts to a JAX array if the implementation is traceable, and leaves NumPy arrays and None as they are."""
    return value if value is None or not adapter.traceable else jnp.asarray(value)


def wide(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Converts a result to float64, and checks its shape."""
    value = np.asarray(value).astype(np.float64)
    if value.shape != tuple(shape):
        raise AssertionError(f"{name} has shape {value.shape}, expected {tuple(shape)}")
    return value


def entries(returned: Any, function: str, *names: str) -> Any:
    """Returns a result, after checking that it is a tuple with an entry for each name."""
    if not isinstance(returned, (tuple, list)) or len(returned) != len(names):
        raise AssertionError(f"{function} returned {_in_words(returned)}, expected ({', '.join(names)})")
    return returned


# Adapters are compared and hashed by identity (eq=False), so all laws share the programs compiled for an adapter.


@functools.partial(jax.jit, static_argnums=0)
def _train(adapter: Adapter, state: Any, x: jax.Array, mask: jax.Array | None) -> Any:
    return adapter.train(state, x, mask)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(adapter: Adapter, state: Any, x: jax.Array) -> Any:
    return adapter.evaluate(state, x)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    adapter: Adapter,
    state: Any,
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    dy: jax.Array,
    mask: jax.Array | None,
) -> Any:
    def output(x, scale, bias):
        with_parameters = adapter.with_parameters(state, scale, bias)
        return adapter.train(with_parameters, x, mask)[0]

    y, vjp = jax.vjp(output, x, scale, bias)
    # The output of an implementation may have another dtype than x.
    return vjp(dy.astype(y.dtype))


def _in_words(returned: Any) -> str:
    """Describes a returned value that is not a tuple of the expected length."""
    if isinstance(returned, (tuple, list)):
        return f"{len(returned)} value{'s' * (len(returned) != 1)}"
    if isinstance(returned, (jax.Array, np.ndarray)):
        return "one array"
    return f"one value of type {type(returned).__name__}"


def _bits(dtype: Any) -> int:
    """Returns the number of bits of a floating-point dtype; 64, which is never accepted, for anything else."""
    try:
        return jnp.finfo(dtype).bits
    except (TypeError, ValueError):
        return 64
