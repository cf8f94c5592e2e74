"""What the batch norms of a model see in batch after batch: the sums that a diagnosis rests on.

A batch goes through the model twice.  In evaluation each layer normalises with its running statistics, so that what
one layer does differently is carried on to those behind it, as it is when the model is used.  In training each layer
normalises with the batch, so that what it sees does not hang on the running statistics of others.  A batch comes back
from the device as sums of the size of the statistics, which are added up on the host, in float64.  Features of a batch
that are not finite are left out of the sums, and counted.  Running statistics that were never updated, or are not
finite, are replaced by those of the batch, so that layers behind them are judged by themselves.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._core import checks
from jaxbn._core.dtypes import abs2, in_float64, widen
from jaxbn._core.measure import zero_masked
from jaxbn._core.stats import BatchStats
from jaxbn._core.variants import batch_renormalize, ghost_normalize
from jaxbn._models import dataflow
from jaxbn._models.batch_norms import Norm, evaluated, norm_of
from jaxbn._models.intercept import run
from jaxbn._models.model import BATCH_NORMS, Model
from jaxbn._models.passes import as_static, in_common, nothing_to_measure, opened
from jaxbn.diagnose._anova import Groups


class Settings(NamedTuple):
    """What a layer is told, and what is known of its inputs.

    Attributes:
      training: whether it normalises with the batch in the call that was given.
      frozen: whether it always evaluates.
      epsilon: added to the variance.
      momentum: weight of the old running statistics.
      counted: whether its averages know the number of batches, and so are not biased towards their start.
      unbiased: whether the running variance is multiplied by m/(m - 1).
      synchronised: whether it has an axis name.
      devices_in_group: number of devices that share their statistics, if not all or none.
      renormalised: whether training keeps near the running statistics, by batch renormalisation.
      group_size: examples that ghost batch norm takes together, if it does.
      by_example: whether the rows of its inputs are those of the examples in the batch.
    """

    training: bool
    frozen: bool
    epsilon: float
    momentum: float | None
    counted: bool
    unbiased: bool
    synchronised: bool
    devices_in_group: int | None
    renormalised: bool
    group_size: int | None
    by_example: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class CallRecord:
    """A call of a layer in one batch of n examples.

    Attributes:
      x: the inputs, only to be found in the graph of the program; None elsewhere.
      mean: of the batch, shape [C].
      counts: values of each example, shape [n, C].
      sums: of their distances from the mean, shape [n, C].
      squares: of their squared distances from the mean, added, shape [n, C].
      stats: running statistics.
      scale: shape [C], or None.
      settings: static, as a block under nn.jit shares its trace with others of its kind.
    """

    x: Any
    mean: Any
    counts: Any
    sums: Any
    squares: Any
    stats: BatchStats
    scale: Any
    settings: Settings = dataclasses.field(metadata={"static": True})


class Sums(NamedTuple):
    """What a layer has seen in some batches, in evaluation or in training.

    Attributes:
      values: all its inputs.
      means: the mean of each example.
      squares: the mean squared distance of each example from the mean of its batch.
      skipped: number of batches that are not finite, shape [C].
    """

    values: Groups
    means: Groups
    squares: Groups
    skipped: Any

    def add(self, other: Self) -> Self:
        """Returns the sums over the batches of both."""
        return self._replace(
            values=self.values.add(other.values),
            means=self.means.add(other.means),
            squares=self.squares.add(other.squares),
            skipped=self.skipped + other.skipped,
        )


class Record(NamedTuple):
    """A layer and what it has seen in all batches.

    Attributes:
      settings: what it is told.
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
    """Returns which running statistics can be normalised with, and have been updated since mean 0 and variance 1."""
    mean, var = stats
    return (abs(mean) < np.inf) & (var < np.inf) & (var >= 0) & ~((mean == 0) & (var == 1))


def record_layers(model: Model, batches: Any, call, mask) -> dict[str, Record]:
    """Returns what the layers of a model see, by path in the order in which they are called first."""
    static = as_static(model.definition, call, mask)
    first, batches = opened(batches)
    order = _order(model, first, call, mask)
    if not order:
        raise nothing_to_measure(frozen=False)
    number, layers, evaluation, training = 0, {}, {}, {}
    for batch in batches:
        number += 1
        layers, *modes = _summed(model.arrays, batch, static=static)
        for sums, of_batch in zip((evaluation, training), jax.device_get(modes), strict=True):
            for path, new in of_batch.items():
                new = _on_host(new)
                sums[path] = sums[path].add(new) if path in sums else new
    return {path: _record(layers[path], evaluation[path], training[path], number) for path in order}


@functools.partial(jax.jit, static_argnames="static")
def _summed(arrays, batch, *, static):
    """Returns the layers, and the sums over their calls in evaluation and in training, each by path."""
    definition, call, mask = static
    model = Model(definition, arrays)
    evaluation, training = (_calls(model, batch, call, mask, train=train) for train in (False, True))
    layers = {
        path: dataclasses.replace(first, mean=None, counts=None, sums=None, squares=None)
        for path, (first, *_) in evaluation.items()
    }
    return layers, *({path: _sums(calls) for path, calls in mode.items()} for mode in (evaluation, training))


def _calls(model, batch, call, mask, *, train, mark=False):
    """Returns the calls of each layer, by path."""
    examples = None if mask is None else mask(batch)
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch if mask is None else examples) if np.ndim(leaf)}

    def handle(one):
        norm = norm_of(one)
        norm = norm._replace(mask=in_common(norm, examples, one.path))
        if norm.use_running_average is None:
            raise ValueError(
                f"use_running_average of {one.path or 'the model'} is given neither by the model nor by call; accepted "
                "are True and False; say in call how the model evaluates, as in "
                "lambda module, batch: module(batch, train=False)."
            )
        if mark:
            norm = norm._replace(x=dataflow.mark(norm.x, "batch norm"))
        record, batch_stats = _record_call(norm, sizes)
        keep = usable(norm.stats) & (not train or record.settings.frozen)
        stats = jax.tree.map(functools.partial(jnp.where, keep), norm.stats, batch_stats)
        return evaluated(norm._replace(stats=stats)), dataclasses.replace(record, x=norm.x if mark else None)

    return run(model, batch, call, handle, BATCH_NORMS)[1]


def _order(model, batch, call, mask):
    """Returns the paths of the layers in the order in which they are called first."""
    paths = []

    def function(arrays, batch):
        calls = _calls(Model(model.definition, arrays), batch, call, mask, train=False, mark=True)
        paths[:] = calls
        return [first.x for first, *_ in calls.values()]

    graph = dataflow.trace(function, model.arrays, batch)
    place = {value: place for place, operation in enumerate(graph.operations) for value in operation.outputs}
    places = {path: place.get(value, -1) for path, value in zip(paths, graph.outputs, strict=True)}
    return sorted(paths, key=lambda path: places[path])


def _record_call(norm: Norm, sizes):
    """Returns the record of a call, and the moments of the batch."""
    x, axes, reduced = checks.inputs(norm.x, norm.options["axis"])
    mask = checks.mask(norm.mask, x)
    # A layer may see several rows of each example; where it sees something else, all is taken for one example.
    rows = x.shape[0] if x.shape[0] in sizes else max((n for n in sizes if n and x.shape[0] % n == 0), default=1)
    rows = max(rows, 1) if 0 in reduced else 1
    features = tuple(x.shape[axis] for axis in axes)

    def by_example(values):
        """Adds up the values of each example that count: [..., C] to [n, C]."""
        values = values if mask is None else jnp.where(mask, values, 0)
        return values.transpose(*reduced, *axes).reshape(rows, -1, *features).sum(1)

    wide = widen(zero_masked(x, mask))
    counts = by_example(jnp.ones(x.shape, wide.real.dtype))
    count = jnp.maximum(counts.sum(0), 1)
    mean = by_example(wide).sum(0) / count
    # Centred before they are squared, so that a mean far above the standard deviation costs no digits.
    centred = wide - jnp.expand_dims(mean, reduced)
    sums, squares = by_example(centred), by_example(abs2(centred))
    settings = _settings(norm, by_example=0 in reduced and rows in sizes)
    call = CallRecord(None, mean, counts, sums, squares, norm.stats, norm.scale, settings)
    return call, BatchStats(mean, squares.sum(0) / count)


def _settings(norm, by_example):
    options = norm.options
    momentum, groups = options["momentum"], options.get("axis_index_groups")
    method = options.get("method")
    function = getattr(method, "func", method)  # a variant may come with its options, by functools.partial
    return Settings(
        training=not norm.use_running_average,
        frozen=options.get("frozen", False),
        epsilon=float(options["epsilon"]),
        momentum=None if momentum is None else float(momentum),
        counted=momentum is None or options.get("debias", False),
        unbiased=options.get("unbiased", False),
        synchronised=options.get("axis_name") is not None,
        devices_in_group=None if groups is None else min(map(len, groups)),
        renormalised=function is batch_renormalize,
        group_size=getattr(method, "keywords", {}).get("group_size") if function is ghost_normalize else None,
        by_example=by_example,
    )


def _sums(calls):
    """Returns the sums over one batch; several calls of a layer are as many positions of each example."""
    if len({len(call.counts) for call in calls}) > 1:  # what is an example, differs from call to call
        calls = [dataclasses.replace(call, **_as_one_example(call)) for call in calls]
    counts = jnp.stack([call.counts for call in calls])
    offsets = jnp.stack([call.mean for call in calls])
    sums = jnp.stack([call.sums for call in calls])
    squares = jnp.stack([call.squares for call in calls])
    total = counts.sum((0, 1))
    mean = (offsets * counts.sum(1) + sums.sum(1)).sum(0) / jnp.maximum(total, 1)
    delta = (offsets - mean)[:, None]
    squares = (squares + 2 * (jnp.conj(delta) * sums).real + abs2(delta) * counts).sum(0)
    sums, counts = (sums + delta * counts).sum(0), counts.sum(0)
    present = counts > 0
    examples = present.sum(0).astype(counts.dtype)

    def groups(of_example, offset):
        of_example = jnp.where(present, of_example / jnp.maximum(counts, 1), 0)
        centre = of_example.sum(0) / jnp.maximum(examples, 1)
        within = jnp.where(present, abs2(of_example - centre), 0).sum(0)
        return Groups(jnp.sign(examples), examples, offset + centre, jnp.zeros_like(within), within)

    inside = squares.sum(0)
    values = Groups(jnp.sign(total), total, mean, jnp.zeros_like(inside), inside)
    finite = jnp.isfinite(mean) & jnp.isfinite(inside)
    return Sums(values, groups(sums, mean), groups(squares, 0), ~finite)


def _as_one_example(call):
    return {name: getattr(call, name).sum(0, keepdims=True) for name in ("counts", "sums", "squares")}


def _on_host(sums: Sums) -> Sums:
    """Returns the sums in float64, zero where the batch is not finite."""
    values, means, squares, skipped = jax.tree.map(lambda value: np.where(sums.skipped, 0, in_float64(value)), sums)
    return Sums(values, means, squares, np.asarray(sums.skipped, int))


def _record(first, evaluation, training, batches):
    running = BatchStats(*map(in_float64, first.stats))
    scale = np.ones(running.var.shape) if first.scale is None else in_float64(first.scale)
    return Record(first.settings, running, scale, evaluation, training, batches)
