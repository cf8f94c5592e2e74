"""Records what the batch norms of a model see in each batch, as the sums that a diagnosis is based on.

Each batch goes through the model twice.

1. In evaluation mode, layers normalize with their running statistics.  As when the model is used, an error of one layer
   carries over to later layers.
2. In training mode, layers normalize with the batch.  What a layer sees then does not depend on the running statistics
   of other layers.

Of each batch, only sums of the size of the statistics leave the device; the host adds them up in float64.  If a feature
of a batch is not finite, the batch is left out of the sums of that feature, and counted as skipped.  Running statistics
that were never updated or are not finite are replaced by those of the batch, so that later layers are judged
separately.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.typing import ArrayLike

from jaxbn._core.dtypes import in_float64
from jaxbn._core.stats import BatchStats
from jaxbn._models.batch_norms import NormCall, evaluated
from jaxbn._models.model import Model
from jaxbn._models.passes import (
    Programs,
    by_layer,
    check_reachable,
    combine_masks,
    examples_of,
    nothing_to_measure,
    open_batches,
)
from jaxbn._models.program import Call, Program, evaluate
from jaxbn._models.tracing import text
from jaxbn.diagnose._sums import CallRecord, Settings, Sums, record_call, sum_calls


class Record(NamedTuple):
    """A layer and what it has seen in all batches.

    Attributes:
      settings: its options.
      running: running statistics, shape [C].
      scale: shape [C]; ones where the layer has none.
      evaluation: what it sees while the layers before it evaluate.
      training: what it sees while the layers before it train.
      batches: number of batches.
    """

    settings: Settings
    running: BatchStats
    scale: np.ndarray
    evaluation: Sums
    training: Sums
    batches: int


def usable(stats: BatchStats) -> Any:
    """Marks the running statistics that are finite, have no negative variance, and have left mean 0 and variance 1."""
    mean, var = stats
    finite = (abs(mean) < np.inf) & (var < np.inf)
    never_updated = (mean == 0) & (var == 1)
    return finite & (var >= 0) & ~never_updated


def record_layers(
    model: Model,
    batches: Any,
    call: Callable[[Any, Any], Any],
    mask: Callable[[Any], ArrayLike] | None,
) -> tuple[dict[str, Record], dict[str, str]]:
    """Records what the layers of a model see, in the order in which they are first called.

    Returns:
      The records by path; each layer of a stack has its own, as in "layers/norm[2]".  And the layers whose calls are
      not known as those of batch norms, with the reason.
    """
    first, batches = open_batches(batches)
    # As the user left it, and not switched to evaluation: a train flag that was left on is a finding.
    programs = Programs(model, call, mask)
    program, _ = programs.of(first)
    _check_calls(program)
    # Sums are fetched after each batch, so that only one batch is in memory, and totals are float64 without x64 mode.
    number = 0
    layers: dict[str, _Layer] = {}
    evaluation: dict[str, Sums] = {}
    training: dict[str, Sums] = {}
    for batch in batches:
        number += 1
        _, examples = programs.of(batch)
        sizes = _sizes(batch if examples is None else examples.out_avals)
        sum_batch = programs.compiled(_sum_batch, sizes=sizes)
        layers, *of_batch = sum_batch(model.arrays, batch)
        in_evaluation, in_training = jax.device_get(of_batch)
        _add(evaluation, in_evaluation)
        _add(training, in_training)
    records = {}
    for path in by_layer(program.calls.values()):
        layer = jax.device_get(layers[path])
        for row, name in enumerate(_names(path, layer.stack)):
            whole = layer.stats, layer.scale, evaluation[path], training[path]
            stats, scale, *sums = jax.tree.map(lambda leaf, row=row: leaf[row], whole)
            records[name] = _record(layer.settings, stats, scale, *sums, batches=number)
    unknown = {text(path): reason for path, reason in program.unmarked.items() if program.has_moments(path)}
    return records, unknown


def _check_calls(program: Program) -> None:
    if not program.calls:
        raise nothing_to_measure(frozen=False)
    for call in program.calls.values():
        check_reachable(call)
        if call.site.use_running_average is None:
            raise ValueError(
                f"use_running_average of {text(call.path) or 'the model'} is set neither by the model nor by call. "
                "Let call say how the model evaluates, as in lambda module, batch: module(batch, train=False)."
            )


def _sizes(arrays: Any) -> frozenset[int]:
    """Returns the sizes of the first axes, any of which may be the number of examples."""
    return frozenset(np.shape(leaf)[0] for leaf in jax.tree.leaves(arrays) if np.ndim(leaf))


def _names(path: str, stack: tuple[int, ...]) -> list[str]:
    """Returns the names of the layers of a stack, or the path of a layer by itself."""
    if not stack:
        return [path]
    return [f"{path}[{','.join(map(str, turn))}]" for turn in itertools.product(*map(range, stack))]


def _add(totals: dict[str, Sums], of_batch: dict[str, Sums]) -> None:
    """Adds the sums of a batch to the totals, on the host."""
    for path, sums in of_batch.items():
        sums = _on_host(sums)
        totals[path] = totals[path].add(sums) if path in totals else sums


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stats", "scale"], meta_fields=["settings", "stack"])
@dataclasses.dataclass(frozen=True)
class _Layer:
    """What the host needs of a layer: statistics and scale, shape [rows, C], settings, and the shape of its stack."""

    stats: BatchStats
    scale: Any
    settings: Settings
    stack: tuple[int, ...]


def _sum_batch(
    program: Program, arrays: Any, batch: Any, *, mask: ClosedJaxpr | None, sizes: frozenset[int]
) -> tuple[dict, dict, dict]:
    """Returns the layers, and the sums over their calls in evaluation and in training mode, each by path."""
    examples = examples_of(mask, batch)
    evaluation = _records(program, arrays, batch, examples, sizes, train=False)
    training = _records(program, arrays, batch, examples, sizes, train=True)
    calls, layers, sums = [*program.calls.values()], {}, ({}, {})
    for path, numbers in by_layer(calls).items():
        first = calls[numbers[0]]
        rows, *_ = _in_rows(first, evaluation[numbers[0]])
        layers[path] = _Layer(rows.stats, rows.scale, rows.settings, tuple(_stack(first).values()))
        for of_mode, records in zip(sums, (evaluation, training), strict=True):
            of_calls = [row for number in numbers for row in _in_rows(calls[number], records[number])]
            of_mode[path] = jax.vmap(sum_calls)(of_calls)
    return layers, *sums


def _stack(call: Call) -> dict[int, int]:
    """Returns the place and the size of each axis in front of a record that is one of the running statistics."""
    axes = {axis: i for i, axis in enumerate(call.axes) if axis is not None}
    return {axes[axis]: call.sizes[axes[axis]] for axis in sorted(axes)}


def _in_rows(call: Call, record: CallRecord) -> list[CallRecord]:
    """Returns a record for each turn that shares its statistics with the others, shape [rows, ...].

    Such turns are several calls of one layer.  The other turns, each with its own statistics, are the layers of a
    stack: rows.
    """
    stack = _stack(call)
    shared = [i for i in range(len(call.sizes)) if i not in stack]
    turns = math.prod(call.sizes[i] for i in shared)

    def in_rows(leaf):
        leaf = jnp.transpose(leaf, (*shared, *stack, *range(len(call.sizes), leaf.ndim)))
        return leaf.reshape(turns, math.prod(stack.values()), *leaf.shape[len(call.sizes) :])

    record = jax.tree.map(in_rows, record)
    return [jax.tree.map(lambda leaf, turn=turn: leaf[turn], record) for turn in range(turns)]


def _records(
    program: Program, arrays: Any, batch: Any, examples: Any, sizes: frozenset[int], *, train: bool
) -> list[CallRecord]:
    """Evaluates the model on a batch and returns the record of each call of a batch norm, in order."""

    def rule(place: tuple[int, ...], norm: NormCall, _: Any) -> tuple[jax.Array, CallRecord]:
        norm = norm._replace(mask=combine_masks(norm, examples, text(program.calls[place].path)))
        record, batch_stats = record_call(norm, sizes)
        # Unusable statistics would spoil the inputs of all later layers, which are not to blame.
        evaluates = not train or record.settings.frozen
        keep = usable(norm.stats) & evaluates
        stats = jax.tree.map(functools.partial(jnp.where, keep), norm.stats, batch_stats)
        # Training too is evaluation with the statistics of the batch, and so leaves the running statistics as they are.
        return evaluated(norm._replace(stats=stats)), record

    _, records = evaluate(program, rule, arrays, batch)
    return [records[place] for place in program.calls]


def _on_host(sums: Sums) -> Sums:
    """Returns the sums in float64, with zeros where the batch is not finite."""
    values, means, squares, skipped = jax.tree.map(lambda value: np.where(sums.skipped, 0, in_float64(value)), sums)
    return Sums(values, means, squares, np.asarray(sums.skipped, int))


def _record(
    settings: Settings, stats: BatchStats, scale: Any, evaluation: Sums, training: Sums, batches: int
) -> Record:
    running = BatchStats(*map(in_float64, stats))
    scale = np.ones(running.var.shape) if scale is None else in_float64(scale)
    return Record(settings, running, scale, evaluation, training, batches)
