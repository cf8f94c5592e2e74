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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._core.dtypes import in_float64
from jaxbn._core.stats import BatchStats
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import evaluated, norm_of
from jaxbn._models.intercept import run
from jaxbn._models.model import BATCH_NORMS, Model
from jaxbn._models.passes import combine_masks, jit_partial, nothing_to_measure, open_batches
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
) -> dict[str, Record]:
    """Records what the layers of a model see, by path, in the order in which they are first called."""
    sum_batch = jit_partial(_sum_batch, model.definition, call, mask)
    first, batches = open_batches(batches)
    order = _order(model, first, call, mask)
    if not order:
        raise nothing_to_measure(frozen=False)
    # Sums are fetched after each batch, so that only one batch is in memory, and totals are float64 without x64 mode.
    number = 0
    layers = {}
    evaluation: dict[str, Sums] = {}
    training: dict[str, Sums] = {}
    for batch in batches:
        number += 1
        layers, *of_batch = sum_batch(model.arrays, batch)
        in_evaluation, in_training = jax.device_get(of_batch)
        _add(evaluation, in_evaluation)
        _add(training, in_training)
    return {path: _record(layers[path], evaluation[path], training[path], number) for path in order}


def _add(totals: dict[str, Sums], of_batch: dict[str, Sums]) -> None:
    """Adds the sums of a batch to the totals, on the host."""
    for path, sums in of_batch.items():
        sums = _on_host(sums)
        totals[path] = totals[path].add(sums) if path in totals else sums


def _sum_batch(
    definition: Any,
    call: Callable[[Any, Any], Any],
    mask: Callable[[Any], ArrayLike] | None,
    arrays: Any,
    batch: Any,
) -> tuple[dict, dict, dict]:
    """Returns the layers, and the sums over their calls in evaluation and in training mode, each by path."""
    model = Model(definition, arrays)
    evaluation = _calls(model, batch, call, mask, train=False)
    training = _calls(model, batch, call, mask, train=True)
    # The host needs the running statistics and settings of a layer, but not the sums per example.
    layers = {
        path: dataclasses.replace(first, mean=None, counts=None, sums=None, squares=None)
        for path, (first, *_) in evaluation.items()
    }
    return layers, _sums_by_path(evaluation), _sums_by_path(training)


def _sums_by_path(calls: dict[str, list[CallRecord]]) -> dict[str, Sums]:
    return {path: sum_calls(of_layer) for path, of_layer in calls.items()}


def _calls(model: Model, batch: Any, call, mask, *, train: bool, mark: bool = False) -> dict[str, list[CallRecord]]:
    """Runs the model on a batch and records the calls of each batch norm, by path.

    Args:
      model: the model.
      batch: the batch.
      call: how the model evaluates a batch.
      mask: ``mask(batch)`` returns the examples that count; None: all.
      train: whether layers normalize with the batch.
      mark: whether to keep the inputs of the layers, marked so that they are found in the graph of the program.
    """
    examples = None if mask is None else mask(batch)
    leaves = jax.tree.leaves(batch if mask is None else examples)
    sizes = {np.shape(leaf)[0] for leaf in leaves if np.ndim(leaf)}  # any of them may be the number of examples

    def handle(intercepted):
        norm = norm_of(intercepted)
        norm = norm._replace(mask=combine_masks(norm, examples, intercepted.path))
        if norm.use_running_average is None:
            raise ValueError(
                f"use_running_average of {intercepted.path or 'the model'} is set neither by the model nor by call. "
                "Let call say how the model evaluates, as in lambda module, batch: module(batch, train=False)."
            )
        if mark:
            norm = norm._replace(x=dataflow.mark(norm.x, "batch norm"))
        record, batch_stats = record_call(norm, sizes)
        # Unusable statistics would spoil the inputs of all later layers, which are not to blame.
        evaluates = not train or record.settings.frozen
        keep = usable(norm.stats) & evaluates
        stats = jax.tree.map(functools.partial(jnp.where, keep), norm.stats, batch_stats)
        # Training too is evaluation with the statistics of the batch, and so leaves the running statistics as they are.
        y = evaluated(norm._replace(stats=stats))
        return y, dataclasses.replace(record, x=norm.x if mark else None)

    return run(model, batch, call, handle, BATCH_NORMS)[1]


def _order(model: Model, batch: Any, call, mask) -> list[str]:
    """Returns the paths of the layers in the order in which they are first called.

    Records of blocks under nn.jit or nn.remat come back as variables, sorted by name.  The order is therefore read from
    the program: a layer comes where its inputs, which are marked, are computed.
    """
    paths = []

    def inputs_of_layers(arrays, batch):
        calls = _calls(Model(model.definition, arrays), batch, call, mask, train=False, mark=True)
        paths[:] = calls
        return [first.x for first, *_ in calls.values()]

    graph = dataflow.trace(inputs_of_layers, model.arrays, batch)
    computed_at = {value: place for place, operation in enumerate(graph.operations) for value in operation.outputs}
    places = {path: computed_at.get(value, -1) for path, value in zip(paths, graph.outputs, strict=True)}
    return sorted(paths, key=lambda path: places[path])


def _on_host(sums: Sums) -> Sums:
    """Returns the sums in float64, with zeros where the batch is not finite."""
    values, means, squares, skipped = jax.tree.map(lambda value: np.where(sums.skipped, 0, in_float64(value)), sums)
    return Sums(values, means, squares, np.asarray(sums.skipped, int))


def _record(layer: CallRecord, evaluation: Sums, training: Sums, batches: int) -> Record:
    running = BatchStats(*map(in_float64, layer.stats))
    scale = np.ones(running.var.shape) if layer.scale is None else in_float64(layer.scale)
    return Record(layer.settings, running, scale, evaluation, training, batches)
