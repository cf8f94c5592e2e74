"""Population statistics of a trained model, measured on data: precise batch norm, and AdaBN on another domain.

Running averages lag behind the weights, and are wrong for weights that were averaged and for data that have shifted.
The functions here recompute the statistics on data, and change nothing else.

``model`` is a linen module with its ``variables``, or an nnx module with None in their place.  ``call(module, batch)``
evaluates a batch, as in ``lambda module, batch: module(batch["image"], train=False)``; only the batch norms behave
differently during this call: Flax's, ours, and subclasses that call theirs, at any depth, under jit, remat, scan, vmap
and cond.  A layer under ``nn.scan`` or ``nn.vmap`` gets statistics for each turn if it has them for each turn, and
those of all turns together if it shares them.  Layers that ``call`` does not reach keep theirs, as ``frozen`` layers
do, which normalize with them.  ``mask(batch)`` returns booleans [n], the examples that count, for models that do not
pass masks to their layers; if a model does, a position counts if both masks are True there.  Equal programs are
compiled once.  Under jit and vmap the statistics are not checked for NaN.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze

from jaxbn._core.checks import AxisNames
from jaxbn._core.stats import BatchStats, Moments
from jaxbn._models.intercept import call_model, evaluating
from jaxbn._models.model import Model, join, like, split
from jaxbn._models.passes import (
    CallModel,
    CallMoments,
    Mask,
    Programs,
    by_layer,
    check_measurable,
    check_usable,
    measure_all,
    measure_calls,
    merge_calls,
    open_batches,
)
from jaxbn._models.program import Call, Program

__all__ = ["blend", "layer_by_layer", "measure", "one_pass"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


def measure(
    model: Any,
    variables: Mapping | None,
    batch: Any,
    *,
    call: CallModel = call_model,
    mask: Mask | None = None,
    axis_name: AxisNames | None = None,
    use_running_average: bool = True,
) -> dict[str, Moments]:
    """Measures the inputs of each batch norm in one batch; a pure function, for jit, vmap and shard_map.

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> batch = jnp.array([[1., 2.], [3., 5.]])
    >>> variables = model.init(jax.random.key(0), batch)
    >>> jaxbn.calibrate.measure(model, variables, batch)['layers_1'].count
    Array([2., 2., 2.], dtype=float32)

    Args:
      model: a linen or nnx module.
      variables: of a linen module, with ``batch_stats``; None for an nnx module.
      batch: passed to ``call`` and ``mask``.
      call: how the model evaluates a batch.
      mask: which examples of a batch count; None: all.
      axis_name: name or names of the device axes that the batch is spread over, under shard_map, pmap or vmap; those of
        the layers are ignored.  Not needed for a batch sharded under jit.
      use_running_average: True: each layer normalizes with its running statistics, so that deeper layers see what they
        see in evaluation; False: with this batch, as in training.

    Returns:
      The moments, shape [C], by path of the layer, as in "Block_0/BatchNorm_0"; several calls of a layer are combined.

    Raises:
      ValueError: for a model without batch norm, variables without statistics, or a mask that does not fit.
    """
    before = split(model, variables)
    program, examples = Programs(before, evaluating(call), mask).of(batch)
    check_measurable(program, trains=not use_running_average, frozen_too=True)
    options = {"mask": examples, "axis_name": axis_name, "use_running_average": use_running_average}
    moments = measure_calls(program, before.arrays, batch, **options)
    return {path: _merged(program, numbers, moments) for path, numbers in by_layer(program.calls.values()).items()}


def one_pass(
    model: Any,
    variables: Mapping | None,
    batches: Batches,
    *,
    call: CallModel = call_model,
    mask: Mask | None = None,
    use_running_average: bool = False,
) -> Any:
    """Replaces the running statistics with those of the data, read once: precise batch norm.

    mean = sum_i n_i mean_i / n,  var = sum_i n_i (var_i + (mean_i - mean)^2) / n, with n_i values in batch i.

    Each layer normalizes a batch with the moments of that batch, as in training, so that deeper layers get the
    statistics of batches of this size.  With ``use_running_average=True`` it normalizes with its running statistics:
    the result does not depend on how the data are split, and is exact for layers with no batch norm before them.

    After averaging weights (SWA, EMA), which have no statistics of their own yet:

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> batches = [jnp.array([[1., 2.], [3., 5.]]), jnp.array([[0., 1.], [2., 2.], [4., 0.]])]
    >>> variables = model.init(jax.random.key(0), batches[0])
    >>> averaged = jax.tree.map(lambda value: value / 2, variables['params'])
    >>> variables = jaxbn.calibrate.one_pass(model, variables | {'params': averaged}, batches)

    Differs from torch.optim.swa_utils.update_bn in:
      1. Batches are weighted by their counts, and the variance includes the spread of their means.
      2. All other layers are in evaluation mode; dropout, for example, is off.

    Args:
      model: a linen or nnx module.
      variables: of a linen module, with ``batch_stats``; None for an nnx module.
      batches: an iterable of batches, or a function that returns one.  Every batch shape is compiled separately; use
        :func:`jaxbn.pad_batch` to pad a smaller last batch, and ``mask`` to exclude the padding.
      call: how the model evaluates a batch.
      mask: which examples of a batch count; None: all.
      use_running_average: whether layers normalize with their running statistics instead of the batch.

    Returns:
      The variables with new ``mean`` and ``var`` in ``batch_stats``, or a copy of the nnx module with them.

    Raises:
      ValueError: for no batches, a model without batch norm, inputs that are not finite, or a mask that does not fit or
        leaves a feature without values.

    References:
      Wu and Johnson 2021, arXiv:2105.07576, section 3; Izmailov et al. 2018, arXiv:1803.05407 (SWA).
    """
    before = split(model, variables)
    first, data = open_batches(batches)
    programs = Programs(before, evaluating(call), mask)
    program, _ = programs.of(first)
    check_measurable(program, trains=not use_running_average)
    measure_batch = programs.compiled(measure_calls, use_running_average=use_running_average)
    moments, _ = measure_all(measure_batch, before.arrays, data)
    return like(_with_moments(before, program, moments), variables)


def layer_by_layer(
    model: Any,
    variables: Mapping | None,
    batches: Batches,
    *,
    call: CallModel = call_model,
    mask: Mask | None = None,
) -> Any:
    """Replaces the running statistics with the exact ones of the data, one level of layers at a time.

    The result is what a training-mode forward pass of all the data as one batch would measure, no matter how they are
    split into batches.  Each call of a layer is normalized with the moments of its own inputs over all the data while
    deeper ones are measured; a layer that is called several times stores the combination of its calls.  Calls that do
    not depend on each other are measured in the same pass: the data are read as often as there are batch norms on the
    longest path through the model, 19 times for ResNet-20.

    On data of another domain this is AdaBN, and :func:`blend` goes part of the way:

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> target = [jnp.array([[1., 2.], [3., 5.]]), jnp.array([[0., 1.]])]
    >>> variables = model.init(jax.random.key(0), target[0])
    >>> adapted = jaxbn.calibrate.layer_by_layer(model, variables, target)
    >>> y = model.apply(adapted, jnp.concatenate(target))
    >>> bool(jnp.allclose(y.mean(0), 0, atol=1e-6))
    True

    Args:
      model: a linen or nnx module.
      variables: of a linen module, with ``batch_stats``; None for an nnx module.
      batches: batches that can be read several times: a sequence, or a function that returns an iterator.
      call: how the model evaluates a batch.
      mask: which examples of a batch count; None: all.

    Returns:
      The variables with new ``mean`` and ``var`` in ``batch_stats``, or a copy of the nnx module with them.

    Raises:
      ValueError: as :func:`one_pass`, and for batches that can be read only once, or layers in a while loop.

    References:
      Li et al. 2016, arXiv:1603.04779 (AdaBN); Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """
    before = split(model, variables)
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be read only once, but layer_by_layer reads the data "
            "once for each level of layers; pass a list or a function that returns an iterator, or use one_pass."
        )
    first, data = open_batches(batches)
    programs = Programs(before, evaluating(call), mask)
    program, _ = programs.of(first)
    check_measurable(program, trains=True)
    calls = [*program.calls.values()]
    measure_batch = programs.compiled(measure_calls, use_running_average=True)
    # The statistics of each call: measured at the levels up to this one, initial at deeper ones, whose moments are
    # wrong until all levels before them are measured, and are not used.
    known: list[Any] = [None if call.site.is_frozen else _initial_stats(call) for call in calls]
    moments, number = (), 0
    for level in range(1, max(call.levels.max() for call in calls) + 1):
        if level > 1:
            _, data = open_batches(batches)
        measure_known = functools.partial(_with_stats, measure_batch, tuple(known))
        moments, number_read = measure_all(measure_known, before.arrays, data)
        number = number or number_read
        if number_read != number:
            raise ValueError(
                f"batches gave {number} batches at first and {number_read} when read again, but the data must be the "
                "same each time; pass a list, or a function that returns a new iterator."
            )
        for i, call_here in enumerate(calls):
            is_here = call_here.levels == level
            if known[i] is None or not is_here.any():
                continue
            # By way of the host: a jitted function is compiled again for arrays on other devices.
            measured = _on_host(moments[i])
            if not call_here.is_conditional and not isinstance(measured.mean, jax.core.Tracer):
                check_usable(call_here, Moments(*(leaf[is_here] for leaf in measured)))
            known[i] = BatchStats(*(_where(is_here, new, old) for new, old in zip(measured, known[i], strict=False)))
    # The last pass measured the inputs of all levels, with the statistics of those before them.
    return like(_with_moments(before, program, moments), variables)


def blend(source: Any, target: Any, *, source_weight: float | jax.Array) -> Any:
    """Mixes the running statistics of a source and a target domain, for a target domain with few examples.

    mean = w mean_s + (1 - w) mean_t,  var = w var_s + (1 - w) var_t, where w = N / (N + n) for n target examples and a
    source that is worth N.

    >>> source = {'batch_stats': {'norm': {'mean': jnp.zeros(1), 'var': jnp.ones(1)}}}
    >>> target = {'batch_stats': {'norm': {'mean': jnp.ones(1), 'var': jnp.ones(1)}}}
    >>> jaxbn.calibrate.blend(source, target, source_weight=16 / (16 + 48))['batch_stats']['norm']['mean']
    Array([0.75], dtype=float32)

    Args:
      source: variables of a linen model, or an nnx module.
      target: the same after :func:`layer_by_layer` or :func:`one_pass` on target data.
      source_weight: w, in [0, 1].

    Returns:
      A copy of ``target`` with blended ``mean`` and ``var``.

    Raises:
      ValueError: for different models, or a weight outside [0, 1].

    References:
      Schneider et al. 2020, arXiv:2006.16971.
    """
    if not isinstance(source_weight, jax.core.Tracer) and not 0 <= source_weight <= 1:
        raise ValueError(
            f"source_weight must be in [0, 1], got {source_weight}; it is the weight of the source's statistics: pass "
            "N / (N + n) for n target examples and a source that is worth N."
        )
    source_stats, target_stats = _batch_stats(source), _batch_stats(target)
    source_shapes, target_shapes = jax.tree.map(jnp.shape, source_stats), jax.tree.map(jnp.shape, target_stats)
    if source_shapes != target_shapes or isinstance(source, nnx.Module) != isinstance(target, nnx.Module):
        raise ValueError(
            f"source and target must be two states of one model, got statistics of shapes {source_shapes} and "
            f"{target_shapes}; calibrate the source on target data, and blend the source with the result."
        )

    def mix(path: tuple, s: jax.Array, t: jax.Array) -> jax.Array:
        # The last key is the variable's name; in nnx, indices of lists have none.  Counters stay those of the target.
        *_, name = (step.key for step in path if hasattr(step, "key"))
        return (source_weight * s + (1 - source_weight) * t).astype(t.dtype) if name in BatchStats._fields else t

    mixed = jax.tree_util.tree_map_with_path(mix, source_stats, target_stats)
    if not isinstance(target, nnx.Module):
        return like({**target, "batch_stats": mixed}, target)
    blended, _ = join(split(target, None))
    nnx.update(blended, mixed)
    return blended


def _batch_stats(state: Any) -> Any:
    """Returns the running statistics in the variables of a linen model, or in an nnx module."""
    if isinstance(state, nnx.Module):
        return nnx.to_pure_dict(nnx.state(state, nnx.BatchStat))
    if isinstance(state, Mapping) and "batch_stats" in state:
        return unfreeze(state["batch_stats"])
    raise ValueError(
        f"source and target must be two nnx modules, or the variables of a linen module with 'batch_stats', got a "
        f"{type(state).__name__}; pass the model before and after calibration."
    )


def _initial_stats(call: Call) -> Any:
    """Returns mean 0 and variance 1 for each turn of a call that is not measured yet."""
    # In float32 at least, as measured statistics are, so that a program of all levels sees the same dtypes.
    dtype: Any = jnp.promote_types(call.dtype, jnp.float32)
    shape = (*call.sizes, *call.features)
    zeros: Any = np.zeros(shape, dtype)
    return BatchStats(zeros, zeros.real + 1)


def _with_stats(measure_batch: Callable, stats: tuple, arrays: Any, batch: Any) -> CallMoments:
    return measure_batch(arrays, batch, stats)


def _where(is_here: np.ndarray, new: Any, old: Any) -> Any:
    """Returns the new values in the turns where ``is_here``, and the old ones elsewhere."""
    where = is_here.reshape(is_here.shape + (1,) * (np.ndim(new) - is_here.ndim))
    return (jnp if isinstance(new, jax.core.Tracer) else np).where(where, new, old)


def _on_host(measured: Moments) -> Moments:
    """Returns moments as NumPy arrays, or as they are while they are traced."""
    return measured if isinstance(measured.mean, jax.core.Tracer) else jax.device_get(measured)


def _merged(program: Program, numbers: Sequence[int], moments: CallMoments) -> Moments:
    """Combines the moments of some calls, those of a layer."""
    calls = [*program.calls.values()]
    return merge_calls(tuple(calls[i].axes for i in numbers), tuple(moments[i] for i in numbers))


def _with_moments(model: Model, program: Program, moments: CallMoments) -> Any:
    """Returns the linen variables, or the nnx module, with measured moments as running statistics."""
    calls = [*program.calls.values()]
    leaves, structure = jax.tree.flatten(model.arrays)
    layers = {path: numbers for path, numbers in by_layer(calls).items() if not calls[numbers[0]].site.is_frozen}
    merged = {path: _merged(program, numbers, moments) for path, numbers in layers.items()}
    # In the order of the levels, since NaN spread: the first layer that fails is the cause.
    for path in sorted(layers, key=lambda path: calls[layers[path][0]].levels.min()):
        check_usable(calls[layers[path][0]], _on_host(merged[path]))
    for path, numbers in layers.items():
        first, (mean, var, count) = calls[numbers[0]], merged[path]
        if first.site.options.get("unbiased", False):
            var = var * (count / jnp.maximum(count - 1, 1))
        dtype = mean.dtype if jnp.iscomplexobj(mean) else first.dtype
        new = {first.mean: mean.astype(dtype), first.var: var.astype(jnp.finfo(dtype).dtype)}
        leaves = [new.get(number, leaf) for number, leaf in enumerate(leaves)]
    module, variables = join(Model(model.definition, jax.tree.unflatten(structure, leaves)))
    return module if variables is None else variables
