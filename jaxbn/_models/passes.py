"""Passes over data: the moments of the inputs of each batch norm, and which batch norms depend on which.

``call(module, batch)`` and ``mask(batch)`` are the arguments of the same names in :mod:`jaxbn.calibrate`.  Moments are
returned by path of the layer, as a tuple with one entry for each call of the layer.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.checks import AxisNames
from jaxbn._core.functional import batch_normalize
from jaxbn._core.stats import BatchStats, Moments, combine, moments
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import WITH_BATCH_NORM, NormCall, evaluated, norm_of
from jaxbn._models.intercept import Call, evaluating, run
from jaxbn._models.model import BATCH_NORMS, Model

CallModel = Callable[[Any, Any], Any]
Mask = Callable[[Any], ArrayLike]
CallMoments = dict[str, tuple[Moments, ...]]


def jit_partial(function: Callable, *static: Any, **options: Any) -> Callable:
    """Jits ``partial(function, *static, **options)``.

    Equal hashable arguments share a program (the last 128 are kept).  Unhashable ones, such as modules with arrays as
    attributes, are compiled again for each ``jit_partial``, and the program is freed with the result.
    """
    try:
        hash((static, *options.values()))
    except TypeError:
        # Not looked up by identity: an array may have been changed in place since the program was compiled.
        return jax.jit(functools.partial(function, *static, **options))
    return _shared_program(function, *static, **options)


@functools.lru_cache(maxsize=128)
def _shared_program(function: Callable, *static: Any, **options: Any) -> Callable:
    return jax.jit(functools.partial(function, *static, **options))


def measure_calls(
    definition: Any,
    call: CallModel,
    mask: Mask | None,
    arrays: Any,
    batch: Any,
    *,
    use_running_average: bool,
    axis_name: AxisNames | None = None,
    by_call: bool = False,
) -> CallMoments:
    """Measures the inputs of each call of a batch norm in one batch.

    The static arguments come first, because :func:`jit_partial` binds them.

    Args:
      definition: that of a :class:`Model`.
      call: how the model evaluates a batch.
      mask: which examples count, or None.
      arrays: those of the model.
      batch: passed on to ``call`` and ``mask``.
      use_running_average: whether layers normalize with their running statistics, or with the batch.
      axis_name: axes of devices that the batch is spread over.
      by_call: whether running statistics have a row for each call of a layer, shape [calls, C]; not those of frozen
        layers.
    """
    examples = None if mask is None else mask(batch)

    def handle(layer_call: Call) -> tuple[jax.Array, Moments]:
        norm = norm_of(layer_call)
        norm = norm._replace(mask=combine_masks(norm, examples, layer_call.path))
        if by_call and not norm.is_frozen:
            # Not layer_call.index, which is counted on the host: nn.jit may reuse the trace of an earlier call, but
            # only if as many calls were recorded before it.
            index = len(layer_call.earlier)
            mean, var = norm.stats
            norm = norm._replace(stats=BatchStats(mean[index], var[index]))
        options = {"axis": norm.options["axis"], "mask": norm.mask, "axis_name": axis_name}
        if use_running_average or norm.is_frozen:
            return evaluated(norm), moments(norm.x, **options)
        # As the layer trains, which may be with a variant of batch norm; Flax's layers have no method.
        normalize = norm.options.get("method", batch_normalize)
        options |= {"epsilon": norm.options["epsilon"], "stats": norm.stats}
        y, batch_moments = normalize(norm.x, norm.scale, norm.bias, **options)
        return norm.cast(y), batch_moments

    _, recorded = run(Model(definition, arrays), batch, evaluating(call), handle, BATCH_NORMS)
    return recorded


def measure_all(measure: Callable[[Any, Any], CallMoments], arrays: Any, batches: Iterable) -> tuple[CallMoments, int]:
    """Measures each batch, and combines the moments of all batches for each call of a batch norm.

    Args:
      measure: ``measure(arrays, batch)`` returns the moments of one batch: ``jit_partial(measure_calls, ...)``.
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
        if jax.tree.structure(partial[-1]) != jax.tree.structure(partial[0]):
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


class CallToMeasure(NamedTuple):
    """A call of a batch norm whose running statistics are to be replaced.

    Attributes:
      features: shape of the running mean.
      dtype: of the running mean.
      unbiased: whether the running variance is multiplied by m/(m - 1).
      level: number of batch norms on the longest path from the model's inputs to this call, itself included; None in a
        loop.
    """

    features: tuple[int, ...]
    dtype: Any
    unbiased: bool
    level: int | None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["features", "dtype", "unbiased"])
@dataclasses.dataclass(frozen=True)
class _MarkedCall:
    """The same call while the model is traced: ``x`` is its marked input.

    This record leaves a transformed block (remat, nn.jit) as a variable of the model.  Such a block returns arrays
    only, so all but ``x`` is static.
    """

    x: Any
    features: tuple[int, ...]
    dtype: Any
    unbiased: bool


def find_calls(model: Model, batch: Any, call: CallModel) -> dict[str, tuple[CallToMeasure, ...]]:
    """Finds the calls of the batch norms whose statistics are to be replaced, by path of the layer."""
    frozen: set[str] = set()  # paths, only for the error message

    def handle(layer_call: Call) -> tuple[jax.Array, _MarkedCall | None]:
        norm = norm_of(layer_call)
        if norm.is_frozen:
            frozen.add(layer_call.path)
            return evaluated(norm), None
        # Both the output and the record depend on the marked value: the levels count it, and its level is the record's.
        x = dataflow.mark(norm.x, "batch norm")
        mean, unbiased = norm.stats.mean, norm.options.get("unbiased", False)
        return evaluated(norm._replace(x=x)), _MarkedCall(x, mean.shape, mean.dtype, unbiased)

    def marked_calls(arrays: Any, batch: Any) -> dict[str, tuple[_MarkedCall, ...]]:
        # The output of the model is not returned, so that the graph holds only what leads to a batch norm.
        _, recorded = run(Model(model.definition, arrays), batch, evaluating(call), handle, BATCH_NORMS)
        return recorded

    graph = dataflow.trace(marked_calls, model.arrays, batch)
    if not graph.outputs:
        raise nothing_to_measure(frozen=bool(frozen))
    levels = _levels(graph)
    # Puts the level of each marked input in its place, as the record's ``x``.  The value that a loop returns is not the
    # marked one, and so has no level.
    recorded = jax.tree.unflatten(graph.structure, [levels.get(value) for value in graph.outputs])
    return {
        path: tuple(CallToMeasure(marked.features, marked.dtype, marked.unbiased, level=marked.x) for marked in calls)
        for path, calls in recorded.items()
    }


def _levels(graph: dataflow.Graph) -> dict[int, int]:
    """Returns the number of marks on the longest path to each marked value, itself included."""
    levels, marked = {}, {}
    for operation in graph.operations:  # each after those that it depends on
        level = max((levels.get(value, 0) for value in operation.inputs), default=0)
        if operation.mark is not None:
            level += 1
            marked |= dict.fromkeys(operation.outputs, level)
        levels |= dict.fromkeys(operation.outputs, level)
    return marked


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
