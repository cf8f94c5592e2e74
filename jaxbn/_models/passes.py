"""Passes over data: the moments of the inputs of every batch norm of a model, and which of them hang on which.

``model`` is what :func:`jaxbn._models.model.split` returns; ``call`` and ``mask`` are as in :mod:`jaxbn.calibrate`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core import checks
from jaxbn._core.functional import batch_normalize
from jaxbn._core.stats import Moments, combine, moments
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import WITH_BATCH_NORM, evaluated, norm_of
from jaxbn._models.intercept import evaluating, run
from jaxbn._models.model import BATCH_NORMS, Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ToMeasure:
    """A call of a layer whose statistics are to be replaced.

    All but ``x`` is static: a block under nn.jit shares its trace with others of its kind, and what is known of its
    layers is what it returns.

    Attributes:
      x: inputs; afterwards the level: the number of batch norms on the longest way that ends here, None in a loop.
      features: shape of the statistics.
      dtype: of the running mean.
      unbiased: whether the running variance is multiplied by m/(m - 1).
    """

    x: Any
    features: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    unbiased: bool = dataclasses.field(metadata={"static": True})


class _Itself(tuple):
    """A static argument that cannot be hashed, and is equal to itself alone."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def as_static(*values):
    """Returns values as one static argument of a compiled function, also where some of them cannot be hashed."""
    try:
        hash(values)
    except TypeError:
        return _Itself(values)
    return values


def measure_calls(model, batch, call, mask, *, axis_name=None, use_running_average, by_call=False):
    """Returns the moments of each layer's calls; with ``by_call``, statistics hold a row for each of them."""
    examples = None if mask is None else mask(batch)

    def handle(one):
        norm = norm_of(one)
        norm = norm._replace(mask=in_common(norm, examples, one.path))
        options = {"axis": norm.options["axis"], "mask": norm.mask, "axis_name": axis_name}
        if by_call and not _is_frozen(norm):
            norm = norm._replace(stats=jax.tree.map(lambda rows: rows[len(one.earlier)], norm.stats))
        if use_running_average or _is_frozen(norm):
            return evaluated(norm), moments(norm.x, **options)
        options |= {"epsilon": norm.options["epsilon"], "stats": norm.stats}
        y, found = norm.options.get("method", batch_normalize)(norm.x, norm.scale, norm.bias, **options)
        return y if norm.options["dtype"] is None else y.astype(norm.options["dtype"]), found

    return run(model, batch, evaluating(call), handle, BATCH_NORMS)[1]


@functools.partial(jax.jit, static_argnames=("static", "use_running_average", "by_call"))
def _measured(arrays, batch, *, static, use_running_average, by_call):
    definition, call, mask = static
    model = Model(definition, arrays)
    return measure_calls(model, batch, call, mask, use_running_average=use_running_average, by_call=by_call)


@jax.jit
def _combined(a, b):
    return jax.tree.map(combine, a, b, is_leaf=lambda node: isinstance(node, Moments))


def measure_all(model, batches, call, mask, *, use_running_average, by_call=False):
    """Returns the moments of each layer's calls in all batches, and the number of batches."""
    static = as_static(model.definition, call, mask)
    options = {"static": static, "use_running_average": use_running_average, "by_call": by_call}
    sums, number = [], 0
    for number, batch in enumerate(batches, start=1):
        sums.append(_measured(model.arrays, batch, **options))
        if jax.tree.structure(sums[-1]) != jax.tree.structure(sums[0]):
            raise ValueError(
                f"batch {number} calls layers more or less often than the first, but the calls of a layer are measured "
                "one by one; accepted are batches for which the model does the same; cut sequences to one length."
            )
        # In pairs that stand for as many batches each, so that rounding grows with the logarithm of their number.
        while len(sums) > number.bit_count():
            sums[-2:] = [_combined(*sums[-2:])]
    return functools.reduce(_combined, reversed(sums)), number


def find_layers(model, batch, call):
    """Returns, by path, the calls of the layers whose statistics are to be replaced, with their levels."""
    structure, any_frozen = jax.tree.structure({}), False

    def handle(one):
        nonlocal any_frozen
        norm = norm_of(one)
        if _is_frozen(norm):
            any_frozen = True
            return evaluated(norm), None
        norm = norm._replace(x=dataflow.mark(norm.x, "batch norm"))
        features = tuple(norm.x.shape[axis] for axis in checks.feature_axes(norm.x.shape, norm.options["axis"]))
        found = ToMeasure(norm.x, features, norm.stats.mean.dtype, norm.options.get("unbiased", False))
        return evaluated(norm), found

    def function(arrays, batch):
        nonlocal structure
        _, found = run(Model(model.definition, arrays), batch, evaluating(call), handle, BATCH_NORMS)
        structure = jax.tree.structure(found)
        return found

    graph = dataflow.trace(function, model.arrays, batch)
    if not graph.outputs:
        raise nothing_to_measure(frozen=any_frozen)
    levels, inputs = {}, {}
    for operation in graph.operations:
        level = max((levels.get(value, 0) for value in operation.inputs), default=0)
        level += operation.mark is not None
        levels |= dict.fromkeys(operation.outputs, level)
        inputs |= dict.fromkeys(operation.outputs if operation.mark is not None else (), level)
    return structure.unflatten([inputs.get(value) for value in graph.outputs])


def _is_frozen(norm):
    return norm.options.get("frozen", False)


def in_common(norm, examples, path):
    """Returns the mask that a layer is given and that of the examples, taken together."""
    if examples is None:
        return norm.mask
    x, examples = norm.x, jnp.asarray(examples)
    if examples.shape != x.shape[:1] or 0 in checks.feature_axes(x.shape, norm.options["axis"]):
        raise ValueError(
            f"mask returned an array of shape {examples.shape}, but the inputs of {path} have shape {x.shape}; "
            "accepted are booleans for the examples, which are on the first axis; return one for each, or, where the "
            "model moves the examples elsewhere, let it hand masks to its layers."
        )
    masks = (checks.mask(mask, x) for mask in (examples.reshape(-1, *[1] * (x.ndim - 1)), norm.mask))
    return functools.reduce(jnp.logical_and, (mask for mask in masks if mask is not None))


def opened(batches):
    """Returns the first batch, and an iterator over all."""
    if isinstance(batches, Mapping | jax.Array | np.ndarray):
        given = "a dict" if isinstance(batches, Mapping) else f"an array of shape {batches.shape}"
        raise ValueError(
            f"batches is {given}, which looks like a single batch; accepted are an iterable of batches, and a function "
            "that returns one; pass [batch], or list(batches) where its first axis is that of the batches."
        )
    if not isinstance(batches, Iterable) and not callable(batches):
        raise ValueError(
            f"batches is a {type(batches).__name__}; accepted are an iterable of batches, and a function without "
            "arguments that returns one; pass for example a list."
        )
    iterator = iter(batches if isinstance(batches, Iterable) else batches())
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise ValueError(
        "batches is empty; statistics are measured on at least one batch; "
        "if it is an iterator that has been read already, make a new one."
    )


def nothing_to_measure(frozen):
    what = "every batch norm that was called is frozen" if frozen else "no batch norm was called"
    remedy = "check that call runs the whole model" + (", or thaw the layers." if frozen else ".")
    return ValueError(f"{what}, so that there is nothing to measure; {WITH_BATCH_NORM}; {remedy}")
