"""Population statistics of a trained model, measured on data: precise batch norm, and AdaBN on another domain.

Running averages lag behind the weights, and know nothing of weights that were averaged or of data that have shifted.
The functions here measure the statistics anew and change nothing else.

``model`` is a linen module with its ``variables``, or an nnx module with None in their place.  ``call(module, batch)``
says how it evaluates a batch, as in ``lambda module, batch: module(batch["image"], train=False)``; only its batch norms
(Flax's or ours, at any depth, under remat and jit) do something else meanwhile.  ``mask(batch)`` returns booleans [n],
the examples that count, for models that hand no mask to their layers; where both say something, a position needs the
consent of both.  Programs are compiled once for each ``call`` and ``mask``: define them once, outside of loops.  A
layer that is ``frozen`` normalises with the statistics it has, and keeps them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import unfreeze
from jax.typing import ArrayLike

from jaxbn._core.checks import AxisNames
from jaxbn._core.stats import BatchStats, Moments, combine, init_stats
from jaxbn._models.intercept import call_model
from jaxbn._models.model import join, split, with_stats
from jaxbn._models.passes import find_layers, measure_all, measure_calls, nothing_to_measure, opened

__all__ = ["blend", "layer_by_layer", "measure", "one_pass"]

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
CallModel = Callable[[Any, Any], Any]
Mask = Callable[[Any], ArrayLike]


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
    """Measures the inputs of each batch norm in one batch; pure, and fit for jit, vmap and shard_map.

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> batch = jnp.array([[1., 2.], [3., 5.]])
    >>> variables = model.init(jax.random.key(0), batch)
    >>> jaxbn.calibrate.measure(model, variables, batch)['layers_1'].count
    Array([2., 2., 2.], dtype=float32)

    Args:
      model: a linen or nnx module.
      variables: of a linen module, with ``batch_stats``; None for an nnx module.
      batch: handed on to ``call`` and ``mask``.
      call: how the model evaluates a batch.
      mask: which examples of a batch count; None: all.
      axis_name: name or names of the device axes that the batch is spread over, under shard_map, pmap or vmap; what the
        layers say of it does not count.  Under jit a sharded batch needs none.
      use_running_average: True: each layer normalises with its running statistics, so that deeper layers see what they
        see in evaluation; False: with this batch, as in training.

    Returns:
      The moments, shape [C], by path of the layer, as in "Block_0/BatchNorm_0"; several calls of a layer combined.

    Raises:
      ValueError: for a model without batch norm, variables without statistics, or a mask that does not fit.
    """
    found = measure_calls(
        split(model, variables), batch, call, mask, axis_name=axis_name, use_running_average=use_running_average
    )
    if not found:
        raise nothing_to_measure(frozen=False)
    return _per_layer(found)


def one_pass(
    model: Any,
    variables: Mapping | None,
    batches: Batches,
    *,
    call: CallModel = call_model,
    mask: Mask | None = None,
    use_running_average: bool = False,
) -> Any:
    """Replaces the running statistics by those of the data, read once: precise batch norm.

    mean = sum_i n_i mean_i / n,  var = sum_i n_i (var_i + (mean_i - mean)^2) / n, with n_i values in batch i.

    Each layer normalises a batch with the moments of that batch, as training does, so that the statistics of deeper
    layers are those of batches of this size.  With ``use_running_average=True`` it normalises with the statistics it
    has: the result does not depend on how the data are split, and is exact for layers with no batch norm before them.

    After averaging weights (SWA, EMA), whose statistics nobody has measured:

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> batches = [jnp.array([[1., 2.], [3., 5.]]), jnp.array([[0., 1.], [2., 2.], [4., 0.]])]
    >>> variables = model.init(jax.random.key(0), batches[0])
    >>> averaged = jax.tree.map(lambda value: value / 2, variables['params'])
    >>> variables = jaxbn.calibrate.one_pass(model, variables | {'params': averaged}, batches)

    Differs from torch.optim.swa_utils.update_bn in:
      1. Batches are weighted by their counts, and the spread of their means belongs to the variance.
      2. Everything else evaluates meanwhile: dropout stays off.

    Args:
      model: a linen or nnx module.
      variables: of a linen module, with ``batch_stats``; None for an nnx module.
      batches: an iterable of batches, or a function that returns one.  Each shape of a batch is compiled for itself:
        :func:`jaxbn.pad_batch` fills up a smaller last one, and ``mask`` leaves out the padding.
      call: how the model evaluates a batch.
      mask: which examples of a batch count; None: all.
      use_running_average: whether layers normalise with the statistics they have, and not with the batch.

    Returns:
      The variables with new ``mean`` and ``var`` in ``batch_stats``, or a copy of the nnx module with them.

    Raises:
      ValueError: for no batches, a model without batch norm, inputs that are not finite, or a mask that does not fit or
        leaves a feature without values.

    References:
      Wu and Johnson 2021, arXiv:2105.07576, section 3; Izmailov et al. 2018, arXiv:1803.05407 (SWA).
    """
    given = split(model, variables)
    first, data = opened(batches)
    layers = find_layers(given, first, call)
    try:
        found, _ = measure_all(given, data, call, mask, use_running_average=use_running_average)
    except jax.errors.UnexpectedTracerError:
        _refuse_loops(layers)
        raise
    for path in sorted(layers, key=lambda path: layers[path][0].x or 0):  # the first that fails is the cause
        _refuse_useless(path, *jax.device_get(found[path]))
    return _stored(given, layers, found)


def layer_by_layer(
    model: Any,
    variables: Mapping | None,
    batches: Batches,
    *,
    call: CallModel = call_model,
    mask: Mask | None = None,
) -> Any:
    """Replaces the running statistics by those of the data, so that deeper layers see calibrated inputs: exact.

    The result is what a training-mode forward pass of all the data as one batch would measure, however they are split.
    Each call of a layer is normalised with the moments of its own inputs over all the data while deeper ones are
    measured; a layer that is called several times stores the combination of its calls.  Calls that do not depend on
    each other are measured in the same pass: the data are read as often as there are batch norms on the longest way
    through the model, 19 times for ResNet-20.

    On data of another domain this is AdaBN, and :func:`blend` goes a part of the way:

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
      ValueError: as :func:`one_pass`, and for batches that can be read only once, or layers that are called in loops.

    References:
      Li et al. 2016, arXiv:1603.04779 (AdaBN); Wu and Johnson 2021, arXiv:2105.07576, section 3.
    """
    given = split(model, variables)
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is a {type(batches).__name__}, which can be read only once, but layer_by_layer reads the data "
            "once for each level of layers; pass a list, or a function that returns an iterator; or use one_pass."
        )
    first, data = opened(batches)
    layers = find_layers(given, first, call)
    _refuse_loops(layers)
    known = {path: [_start(one) for one in calls] for path, calls in layers.items()}
    found, reads = {}, []
    for level in range(1, 1 + max(one.x for calls in layers.values() for one in calls)):
        data = data if level == 1 else opened(batches)[1]
        stats = {path: jax.tree.map(lambda *rows: np.stack(rows), *calls) for path, calls in known.items()}
        found, read = measure_all(with_stats(given, stats), data, call, mask, use_running_average=True, by_call=True)
        reads.append(read)
        if read != reads[0]:
            raise ValueError(
                f"batches gave {reads[0]} batches at first and {read} when read again, but the data must be the same "
                "each time; pass a list, or a function that returns a new iterator."
            )
        for path, index in ((p, i) for p, calls in layers.items() for i, one in enumerate(calls) if one.x == level):
            # By way of the host: where the arrays lie is a part of what a program is compiled for.
            measured = jax.device_get(found[path][index])
            _refuse_useless(path, measured)
            known[path][index] = BatchStats(measured.mean, measured.var)
    return _stored(given, layers, found)


def blend(source: Any, target: Any, *, source_weight: float | jax.Array) -> Any:
    """Mixes the running statistics of a source and a target domain, for targets of few examples.

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
      The variables, or a copy of the nnx module: the target's in all but ``mean`` and ``var``.

    Raises:
      ValueError: for different models, or a weight outside [0, 1].

    References:
      Schneider et al. 2020, arXiv:2006.16971.
    """
    if not isinstance(source_weight, jax.core.Tracer) and not 0 <= source_weight <= 1:
        raise ValueError(
            f"source_weight={source_weight} is outside [0, 1]; it is the weight of the source's statistics; "
            "use N / (N + n) for n target examples and a source that is worth N."
        )
    stats = [_batch_stats(one) for one in (source, target)]
    shapes = [jax.tree.map(jnp.shape, one) for one in stats]
    if shapes[0] != shapes[1] or isinstance(source, nnx.Module) != isinstance(target, nnx.Module):
        raise ValueError(
            f"source has statistics of shapes {shapes[0]}, and target of shapes {shapes[1]}; accepted are two states "
            "of one model; calibrate the source on target data, and blend the source with what that returns."
        )

    def mix(path, s, t):
        *_, name = (step.key for step in path if hasattr(step, "key"))
        return (source_weight * s + (1 - source_weight) * t).astype(t.dtype) if name in BatchStats._fields else t

    mixed = jax.tree_util.tree_map_with_path(mix, *stats)
    if not isinstance(target, nnx.Module):
        return {**target, "batch_stats": mixed}
    blended, _ = join(split(target, None))
    nnx.update(blended, mixed)
    return blended


def _batch_stats(one):
    """Returns the running statistics of a model by name."""
    if isinstance(one, nnx.Module):
        return nnx.to_pure_dict(nnx.state(one, nnx.BatchStat))
    if isinstance(one, Mapping) and "batch_stats" in one:
        return unfreeze(one["batch_stats"])
    raise ValueError(
        f"a {type(one).__name__} was given; accepted are two nnx modules, or the variables of a linen module twice, "
        "with 'batch_stats' in them; pass what was calibrated, and what it was before."
    )


def _start(call):
    """Returns the statistics of a call that is not measured yet; what it hands on is not looked at."""
    return jax.device_get(init_stats(call.features, dtype=jnp.promote_types(call.dtype, jnp.float32)))


def _per_layer(found):
    return {path: functools.reduce(combine, calls) for path, calls in found.items()}


def _stored(model, layers, found):
    """Returns the linen variables, or the nnx module, with what was found in place of the running statistics."""
    stats = {}
    for path, (mean, var, count) in _per_layer({path: found[path] for path in layers}).items():
        layer = layers[path][0]
        if layer.unbiased:
            var = var * (count / jnp.maximum(count - 1, 1))
        dtype = mean.dtype if jnp.iscomplexobj(mean) else layer.dtype
        stats[path] = BatchStats(mean.astype(dtype), var.astype(jnp.finfo(dtype).dtype))
    module, variables = join(with_stats(model, stats))
    return module if variables is None else variables


def _refuse_useless(path, *calls):
    """Refuses moments that nothing can be normalised with."""
    for mean, var, count in calls:
        if not (count > 0).all():
            raise ValueError(
                f"{(count == 0).sum()} of the {count.size} features of {path} have no value behind them; "
                "at least one example must count; check the mask, or give more batches."
            )
        wrong = ~(np.isfinite(mean) & np.isfinite(var))
        if wrong.any():
            raise ValueError(
                f"the inputs of {path} are not finite in {wrong.sum()} of {wrong.size} features; statistics of them "
                "would not be either; look for NaN in the data and the parameters, or mask those examples out."
            )


def _refuse_loops(layers):
    for path, calls in layers.items():
        if any(one.x is None for one in calls):
            raise ValueError(
                f"{path} is called inside of a loop or a branch, such as nn.scan, jax.vmap or nn.cond, out of which "
                "the moments of a single call cannot be had; accepted are layers called outside of these, under remat "
                "and jit too; unroll the loop."
            )
