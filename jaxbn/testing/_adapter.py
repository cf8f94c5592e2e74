"""An implementation of batch norm as the laws see it, and the calls through which they use it.

The calls check what comes back, and return NumPy arrays in float64.  A traceable implementation is compiled: once for
all laws that give it arrays of the same shapes and dtypes.
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

#: Name of the device axis under which `Adapter.over_devices` is called.
AXIS = "devices"


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An implementation of batch norm, as the laws see it.

    ``state`` is whatever the implementation keeps: parameters and running statistics together.  Functions take and
    return channels-last arrays, and return a new state instead of changing the one they got.  They are given JAX's
    arrays if the implementation is traceable, otherwise NumPy's.

    Attributes:
      name: how a report calls it.
      init: ``x -> state``, with scale 1 and bias 0; x is an example batch, shape [N, ..., C].
      train: ``(state, x, mask) -> (y, state)``, normalised with the batch; mask is None, or booleans of shape
        [N, 1, ..., 1] or of the shape of x.
      evaluate: ``(state, x) -> y``, normalised with the running statistics.
      statistics: ``state -> (mean, var)``: the running statistics that evaluation uses, shape [C].
      with_parameters: ``(state, scale, bias) -> state``.
      gradients: ``(state, x, scale, bias, dy, mask) -> (dx, dscale, dbias)`` of sum(y dy) in training; dy has the
        dtype of x.  None: `train` is made of JAX, and jax.vjp takes them.
      epsilon: added to the variance.
      momentum: weight of the OLD running value.
      unbiased: whether the running variance has the factor m/(m - 1).
      debiased: whether the running statistics are corrected for their start, so that after one batch they are the
        batch's; otherwise they start at mean 0 and variance 1.
      masks: whether `train` takes masks.
      traceable: whether the functions are made of JAX, so that they can be jitted, differentiated, mapped and scanned,
        and states are pytrees.
      half_precision: dtypes with fewer than 32 bits that it takes.
      float64: whether it takes float64 too, which JAX's arrays are under ``jax.enable_x64``.
      over_devices: the same implementation with statistics over the device axis `AXIS`: its train is called under
        ``jax.vmap(axis_name=AXIS)``.  None: it has no such thing.
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
        """Refuses conventions that no batch norm has, and what the laws could not call."""
        for name in ("init", "train", "evaluate", "statistics", "with_parameters"):
            if not callable(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a function; see Adapter for what it takes.")
        if self.momentum is None:
            raise ValueError("momentum=None is not a number; declare the weight of the old value, such as 0.99.")
        checks.momentum(self.momentum)
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon={self.epsilon} is negative; it is added to the variance; such as 1e-5.")
        if self.gradients is None and not self.traceable:
            raise ValueError(
                "traceable=False without gradients: jax.vjp takes them only of functions made of JAX; "
                "pass gradients=(state, x, scale, bias, dy, mask) -> (dx, dscale, dbias)."
            )
        if isinstance(self.half_precision, str) or any(_bits(dtype) >= 32 for dtype in self.half_precision):
            raise ValueError(
                f"half_precision={self.half_precision!r} is not a sequence of floating-point dtypes below 32 bits; "
                'pass those that the implementation takes, such as ("bfloat16", "float16"), or ().'
            )
        if self.over_devices is not None and not (
            isinstance(self.over_devices, Adapter) and self.over_devices.traceable
        ):
            raise ValueError(
                f"over_devices={self.over_devices!r} is not a traceable Adapter; pass one whose train names AXIS "
                "in its collectives, or None."
            )


class Law(NamedTuple):
    """A law of batch norm.

    Attributes:
      name: an identifier, such as ``statistics_of_masked_data``.
      statement: one sentence.
      applies: whether an adapter declares what the law is about.
      check: raises AssertionError, with the quantity, the case, the error and the tolerance, where the law is broken.
    """

    name: str
    statement: str
    applies: Callable[[Adapter], bool]
    check: Callable[[Adapter], None]


def law(applies: Callable[[Adapter], bool] = lambda adapter: True) -> Callable[[Callable[[Adapter], None]], Law]:
    """Makes a law of a check: it has the check's name, and its docstring is the statement."""

    def make(check: Callable[[Adapter], None]) -> Law:
        return Law(check.__name__, inspect.getdoc(check) or check.__name__, applies, check)

    return make


def start(adapter: Adapter, x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> Any:
    """Returns the state before the first batch, with these parameters."""
    state = adapter.init(arrays(adapter, x))
    return adapter.with_parameters(state, arrays(adapter, scale), arrays(adapter, bias))


def train(adapter: Adapter, state: Any, x: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
    """Returns the output and the state of a training step."""
    x, mask = arrays(adapter, x), arrays(adapter, mask)
    if not adapter.traceable:
        return train_eagerly(adapter, state, x, mask)
    y, after = entries(_train(adapter, state, x, mask), "train", "y", "state")
    return wide(y, x.shape, "y of train"), after


def train_eagerly(adapter: Adapter, state: Any, x: Any, mask: Any | None = None) -> tuple[np.ndarray, Any]:
    """Returns the output and the state of a training step without jit."""
    before = statistics(adapter, state)
    y, after = entries(adapter.train(state, x, mask), "train", "y", "state")
    if not np.array_equal(before, statistics(adapter, state), equal_nan=True):
        raise AssertionError("train changed the running statistics of the state it was given; return a new state")
    return wide(y, x.shape, "y of train"), after


def evaluate(adapter: Adapter, state: Any, x: np.ndarray) -> np.ndarray:
    """Returns the output in evaluation."""
    x = arrays(adapter, x)
    y = _evaluate(adapter, state, x) if adapter.traceable else adapter.evaluate(state, x)
    return wide(y, x.shape, "y of evaluate")


def statistics(adapter: Adapter, state: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the running mean and variance."""
    found = adapter.statistics(state)  # perhaps jaxbn.CountedStats, whose number of batches is of no concern here
    mean, var = entries(found[:2] if isinstance(found, tuple) else found, "statistics", "mean", "var")
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
        found = _gradients(adapter, state, x, scale, bias, dy, mask)
    else:
        found = adapter.gradients(state, x, scale, bias, dy, mask)
    names = "dx", "dscale", "dbias"
    shapes = x.shape, scale.shape, bias.shape
    found = entries(found, "gradients", *names)
    return {name: wide(value, shape, name) for name, value, shape in zip(names, found, shapes, strict=True)}


def arrays(adapter: Adapter, value: Any) -> Any:
    """Returns what an implementation is given: JAX's arrays if it is made of JAX, otherwise NumPy's."""
    return value if value is None or not adapter.traceable else jnp.asarray(value)


def wide(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Returns an array that came back in float64; refuses one of another shape."""
    value = np.asarray(value).astype(np.float64)
    if value.shape != tuple(shape):
        raise AssertionError(f"{name} has shape {value.shape}, expected {tuple(shape)}")
    return value


def entries(found: Any, function: str, *names: str) -> Any:
    """Returns what came back; refuses what is not a tuple with an entry for each name."""
    if not isinstance(found, (tuple, list)) or len(found) != len(names):
        raise AssertionError(f"{function} returned {_in_words(found)}, expected ({', '.join(names)})")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _train(adapter, state, x, mask):
    return adapter.train(state, x, mask)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(adapter, state, x):
    return adapter.evaluate(state, x)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(adapter, state, x, scale, bias, dy, mask):
    def run(x, scale, bias):
        return adapter.train(adapter.with_parameters(state, scale, bias), x, mask)[0]

    y, vjp = jax.vjp(run, x, scale, bias)
    return vjp(dy.astype(y.dtype))


def _in_words(found):
    """What came back, where a tuple was expected, or one of another length."""
    if isinstance(found, (tuple, list)):
        return f"{len(found)} value{'s' * (len(found) != 1)}"
    return "one array" if isinstance(found, (jax.Array, np.ndarray)) else f"one value of type {type(found).__name__}"


def _bits(dtype):
    """The number of bits of a floating-point dtype; more than enough for anything else."""
    try:
        return jnp.finfo(dtype).bits
    except (TypeError, ValueError):
        return 64
