"""Passes over data: the moments of the inputs of each call of a batch norm.

``call(module, batch)`` and ``mask(batch)`` are the arguments of the same names in :mod:`jaxbn.calibrate`.  Moments are
returned for each call, in the order of execution, with the axes of loops and of vmap in front.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.checks import AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.functional import batch_normalize
from jaxbn._core.stats import BatchStats, Moments, combine, moments, pool
from jaxbn._models.batch_norms import WITH_BATCH_NORM, NormCall, evaluated
from jaxbn._models.compiled import compiled
from jaxbn._models.model import Model
from jaxbn._models.program import Call, Program, evaluate, trace
from jaxbn._models.tracing import text

CallModel = Callable[[Any, Any], Any]
Mask = Callable[[Any], ArrayLike]
CallMoments = tuple[Moments, ...]
# Returns what a tool wants of a batch: measured(program, arrays, batch, *others, **options).
Measure = Callable[..., Any]


class Programs:
    """The programs of a model, one for each shape of the batches."""

    def __init__(self, model: Model, call: CallModel, mask: Mask | None):
        self.model, self._call, self._mask = model, call, mask
        self._programs: dict[Any, tuple[Program, ClosedJaxpr | None]] = {}

    def of(self, batch: Any) -> tuple[Program, ClosedJaxpr | None]:
        """Returns the programs of the model and of the mask, which are traced once for each shape of a batch."""
        key = jax.tree.structure(batch), tuple(map(jax.typeof, jax.tree.leaves(batch)))
        if key not in self._programs:
            mask = None if self._mask is None else jax.make_jaxpr(self._mask)(batch)
            self._programs[key] = trace(self.model, batch, self._call), mask
        return self._programs[key]

    def compiled(self, measure: Measure, **options: Any) -> Callable:
        """Returns ``measured(arrays, batch, *others)``, which is compiled once for each program."""

        def measured(arrays, batch, *others):
            program, mask = self.of(batch)
            return compiled(measure, program, mask=mask, **options)(arrays, batch, *others)

        return measured


def examples_of(mask: ClosedJaxpr | None, batch: Any) -> jax.Array | None:
    """Returns which examples of a batch count, or None."""
    if mask is None:
        return None
    (examples,) = jaxpr_as_fun(mask)(*jax.tree.leaves(batch))
    return examples


def measure_calls(
    program: Program,
    arrays: Any,
    batch: Any,
    stats: tuple[BatchStats | None, ...] | None = None,
    *,
    mask: ClosedJaxpr | None,
    use_running_average: bool,
    axis_name: AxisNames | None = None,
) -> CallMoments:
    """Measures the inputs of each call of a batch norm in one batch.

    Args:
      program: of the model.
      arrays: those of the model.
      batch: the batch.
      stats: statistics with which each call normalizes, in place of the running ones; None where these hold.
      mask: the program of the mask, or None.
      use_running_average: whether layers normalize with statistics, or with the batch.
      axis_name: axes of devices that the batch is spread over.
    """
    examples = examples_of(mask, batch)
    given = {} if stats is None else dict(zip(program.calls, stats, strict=True))

    def rule(place: tuple[int, ...], norm: NormCall, known: BatchStats | None) -> tuple[jax.Array, Moments]:
        norm = norm._replace(mask=combine_masks(norm, examples, text(program.calls[place].path)))
        if known is not None:
            norm = norm._replace(stats=known)
        options = {"axis": norm.options["axis"], "mask": norm.mask, "axis_name": axis_name}
        if use_running_average or norm.is_frozen:
            return evaluated(norm), moments(norm.x, **options)
        # As the layer trains, which may be with a variant of batch norm; Flax's layers have no method.
        normalize = norm.options.get("method", batch_normalize)
        options |= {"epsilon": norm.options["epsilon"], "stats": norm.stats}
        y, batch_moments = normalize(norm.x, norm.scale, norm.bias, **options)
        return norm.cast(y), batch_moments

    _, records = evaluate(program, rule, arrays, batch, given)
    # No rule reaches some frozen layers, such as those in a while loop.
    nothing = Moments(*(jnp.zeros(0),) * 3)
    return tuple(records.get(place, nothing) for place in program.calls)


def measure_all(measure: Measure, arrays: Any, batches: Iterable) -> tuple[CallMoments, int]:
    """Measures each batch, and combines the moments of all batches for each call of a batch norm.

    Args:
      measure: ``measure(arrays, batch)`` returns the moments of one batch.
      arrays: those of the model.
      batches: read once.

    Returns:
      The moments, and the number of batches.
    """
    # Pairwise summation, whose rounding grows with the logarithm of the number of batches (Higham 1993, The accuracy of
    # floating point summation).
    partial: list[CallMoments] = []
    number = 0
    for number, batch in enumerate(batches, start=1):
        partial.append(measure(arrays, batch))
        if jax.tree.map(jnp.shape, partial[-1]) != jax.tree.map(jnp.shape, partial[0]):
            raise ValueError(
                f"batch {number} calls layers more or less often than the first batch, but each call of a layer is "
                "measured by itself, so that all batches must make the same calls; cut sequences to one length."
            )
        # A binary counter: each entry stands for 2^k batches, the first for the most, and after n batches there is one
        # for each 1 among the binary digits of n.
        while len(partial) > number.bit_count():
            partial[-2:] = [_combine_calls(*partial[-2:])]
    return functools.reduce(_combine_calls, reversed(partial)), number


@jax.jit
def _combine_calls(a: CallMoments, b: CallMoments) -> CallMoments:
    return jax.tree.map(combine, a, b, is_leaf=lambda node: isinstance(node, Moments))


def by_layer(calls: Iterable[Call]) -> dict[str, list[int]]:
    """Returns the numbers of the calls of each layer, by path, in the order of execution."""
    numbers: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        numbers.setdefault(text(call.path), []).append(number)
    return numbers


@functools.partial(jax.jit, static_argnums=0)
def merge_calls(axes: tuple[tuple[int | None, ...], ...], of_calls: CallMoments) -> Moments:
    """Combines the moments of the calls of a layer, in the shape of its running statistics.

    Args:
      axes: those of each call, see :class:`Call`.
      of_calls: the moments of each call.
    """
    return functools.reduce(combine, map(_like_statistics, axes, of_calls))


def _like_statistics(axes: tuple[int | None, ...], measured: Moments) -> Moments:
    """Combines turns that share their statistics, and puts the axes of the others where the statistics have them."""
    shared = [i for i, axis in enumerate(axes) if axis is None]
    if shared:
        in_front = Moments(*(jnp.moveaxis(leaf, shared, range(len(shared))) for leaf in measured))
        flat = Moments(*(leaf.reshape(-1, *leaf.shape[len(shared) :]) for leaf in in_front))
        measured = pool(flat, Devices(*checks.axis_names(None, None)))
    mapped = [axis for axis in axes if axis is not None]
    features = [axis for axis in range(measured.mean.ndim) if axis not in mapped]
    order = [*map(int, np.argsort([*mapped, *features]))]
    return Moments(*(jnp.transpose(leaf, order) for leaf in measured))


def combine_masks(norm: NormCall, examples: Any, path: str) -> jax.Array | None:
    """Returns the mask of a layer's inputs: True where the layer's own mask and that of the examples are.

    Args:
      norm: the call of the layer at ``path``.
      examples: the result of ``mask(batch)``, shape [n], or None.
      path: of the layer.
    """
    if examples is None:
        return norm.mask
    x, examples = norm.x, jnp.asarray(examples)
    features = checks.feature_axes(x.shape, norm.options["axis"])
    if examples.shape != x.shape[:1] or 0 in features:
        raise ValueError(
            f"mask must return a boolean for each example, on the first axis of the inputs, but it returned an array "
            f"of shape {examples.shape}, and the inputs of {path} have shape {x.shape}; return one value for each "
            "example, or let the model pass masks to its layers if it moves the examples to another axis."
        )
    by_example = examples.reshape(-1, *[1] * (x.ndim - 1))
    valid = checks.mask(by_example, x)
    return valid if norm.mask is None else valid & checks.mask(norm.mask, x)


def check_reachable(call: Call) -> None:
    """Raises an error for a call that no rule reaches."""
    if call.hidden is not None:
        raise ValueError(
            f"{text(call.path) or 'the model'} is called inside of {call.hidden}, where its calls cannot be measured "
            "one by one; use a loop with a fixed number of turns, such as nn.scan, or call the layer outside of it."
        )


def check_measurable(program: Program, *, trains: bool, frozen_too: bool = False) -> None:
    """Raises an error for batch norms whose inputs cannot be measured.

    Args:
      program: of the model.
      trains: whether layers normalize with other statistics than those of the model.
      frozen_too: whether frozen layers are measured.
    """
    for path, reason in program.unmarked.items():
        if program.has_moments(path):
            raise ValueError(f"the statistics of {text(path)} cannot be measured: {reason}.")
    to_measure = [call for call in program.calls.values() if frozen_too or not call.site.is_frozen]
    if not to_measure:
        raise nothing_to_measure(frozen=bool(program.calls))
    for call in to_measure:
        path = text(call.path) or "the model"
        check_reachable(call)
        if call.mean is None or call.var is None:
            raise ValueError(
                f"{path} is called with statistics that the model computes from others, so that measured ones have no "
                "place; call the layer with its own variables."
            )
        if trains and call.is_differentiated:
            raise ValueError(
                f"the model takes a derivative of {path}, which would be that of the running statistics; pass a call "
                "that returns what comes before the derivative."
            )


def check_usable(call: Call, measured: Moments) -> None:
    """Raises an error for moments that cannot be normalized with, unless they are being traced."""
    path, (mean, var, count) = text(call.path), measured
    if isinstance(mean, jax.core.Tracer):
        return
    if not (count > 0).all():
        raise ValueError(
            f"{(count == 0).sum()} of the {count.size} features of {path} have no values, but at least "
            "one example must count; check the mask, or pass more batches."
        )
    wrong = ~(np.isfinite(mean) & np.isfinite(var))
    if wrong.any():
        raise ValueError(
            f"the inputs of {path} are not finite in {wrong.sum()} of {wrong.size} features, so their statistics "
            "would not be either; look for NaN in the data and the parameters, or mask those examples out."
        )


def open_batches(batches: Iterable | Callable[[], Iterable]) -> tuple[Any, Iterator]:
    """Returns the first batch, and an iterator over all of them, the first included."""
    if isinstance(batches, Mapping | jax.Array | np.ndarray):
        got = "a dict" if isinstance(batches, Mapping) else f"an array of shape {batches.shape}"
        raise ValueError(
            f"batches is {got}, which looks like a single batch; pass [batch], or list(batches) if its first axis is "
            "that of the batches."
        )
    if not isinstance(batches, Iterable) and not callable(batches):
        raise ValueError(
            f"batches must be an iterable of batches or a function without arguments that returns one, got a "
            f"{type(batches).__name__}; pass for example a list."
        )
    iterator = iter(batches if isinstance(batches, Iterable) else batches())
    end = object()
    first = next(iterator, end)
    if first is end:
        raise ValueError(
            "batches is empty; pass at least one batch; an iterator can be read only once, so make a new one."
        )
    return first, itertools.chain([first], iterator)


def nothing_to_measure(frozen: bool) -> ValueError:
    """Returns the error for a model without a batch norm to measure; ``frozen`` if it has some, all frozen."""
    what = "every batch norm that was called is frozen" if frozen else "no batch norm was called"
    remedy = "check that call runs the whole model" + (", or thaw the layers." if frozen else ".")
    return ValueError(f"{what}, so there is nothing to measure; {WITH_BATCH_NORM}; {remedy}")
