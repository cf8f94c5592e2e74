"""Another norm in the place of a model's batch norms, or theirs with other options."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxbn._core import checks
from jaxbn._core.stats import init_stats
from jaxbn._core.variables import to_variables
from jaxbn._models.intercept import call_model
from jaxbn._models.model import arrays_of
from jaxbn.surgery._exchange import NewLayer, make_batch_norm, make_group_norm
from jaxbn.surgery._operation import Layers, Surgery, find_batch_norms, operate, select

# Arguments of our layers that change what they do, and neither the shape of their arrays nor where the features are.
_OPTIONS = (
    "accumulate",
    "axis_index_groups",
    "axis_name",
    "debias",
    "dtype",
    "epsilon",
    "frozen",
    "method",
    "momentum",
    "unbiased",
)


def replace(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
    steps: int | None = None,
    **options: Any,
) -> Surgery:
    """Puts jaxbn's layer in the place of batch norms, with other options if given, and keeps their arrays.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> variables = net.init(jax.random.key(0), x)
    >>> done = jaxbn.surgery.replace(net, variables, x, axis_name="data")  # synchronised over devices
    >>> done.layers
    ('layers_1',)
    >>> ghost = functools.partial(jaxbn.ghost_normalize, group_size=4)
    >>> done = jaxbn.surgery.replace(net, variables, x, method=ghost)
    >>> y, updates = done.model.apply(done.variables, x, mutable=["batch_stats"])

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      steps: number of batches behind the statistics, for ``debias=True`` and ``momentum=None``, which count on.
      **options: arguments of :class:`jaxbn.linen.BatchNorm` or :class:`jaxbn.nnx.BatchNorm` that are to differ from
        those of the layer: accumulate, axis_index_groups, axis_name, debias, dtype, epsilon, frozen, method, momentum,
        unbiased.

    Returns:
      The new model.

    Raises:
      ValueError: for an option that the layer does not have, a layer that the model does not have, or options that
        need ``steps``.
    """
    if unknown := sorted(options.keys() - {*_OPTIONS}):
        given = ", ".join(f"{name}={options[name]!r}" for name in unknown)
        raise ValueError(
            f"{given} cannot change in a trained model; accepted are {', '.join(_OPTIONS)}; "
            "leave it out, or make the model anew."
        )
    checks.momentum(options.get("momentum"))
    if steps is not None:
        checks.whole("steps", steps, least=0)
    before, found = find_batch_norms(model, variables, sample, call)
    make = functools.partial(make_batch_norm, options)
    stored = arrays_of(before)
    new = {
        path: NewLayer(make, batch_stats=_statistics(stored[path], path, norm, options, steps))
        for path, norm in select(found, layers).items()
    }
    return operate(before, new, [*new], {}, sample, call)


def replace_by_group_norm(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    num_groups: int,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
) -> Surgery:
    """Puts group norms in the place of batch norms, with their scale, bias and epsilon; the statistics are dropped.

    The model computes something else then, and wants training; the difference says how much.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.replace_by_group_norm(net, net.init(jax.random.key(0), x), x, num_groups=2)
    >>> sorted(done.variables)
    ['params']

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      num_groups: number of groups; divides the features of every layer concerned.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.

    Returns:
      The new model.

    Raises:
      ValueError: for a layer that the model does not have, a number of groups that does not divide its features, or
        features that are not on the last axis.

    References:
      Wu and He 2018, arXiv:1803.08494.
    """
    before, found = find_batch_norms(model, variables, sample, call)
    new = {}
    for path, norm in select(found, layers).items():
        if norm.options["axis"] not in (-1, len(norm.x.shape) - 1):
            raise ValueError(
                f"{path} has its features on axis {norm.options['axis']} of {len(norm.x.shape)}; Flax's group norm "
                "takes them on the last one; leave this layer out, with layers=."
            )
        (features,) = norm.stats.mean.shape
        if num_groups < 1 or features % num_groups:
            raise ValueError(
                f"num_groups={num_groups} does not divide the {features} features of {path}; choose a divisor, "
                "or treat layers of different widths one by one, with layers=."
            )
        new[path] = NewLayer(functools.partial(make_group_norm, num_groups), batch_stats={})
    return operate(before, new, [*new], {}, sample, call)


def _statistics(stored, path, norm, options, steps):
    """Returns the statistics of a layer, with those that its new options add, and without those that it has no more."""
    settings = {"debias": False, "accumulate": 1} | norm.options | options
    kind = {"counted": settings["momentum"] is None or settings["debias"], "accumulate": settings["accumulate"]}
    given = {name: value for name, value in stored.items() if name not in ("scale", "bias")}
    start = to_variables(init_stats(norm.stats.mean.shape, **kind, dtype=norm.stats.mean.dtype))
    if (added := sorted(start.keys() - given.keys())) and given["mean"].shape != norm.stats.mean.shape:
        raise ValueError(
            f"{path} is inside of a scan or vmap, which knows nothing of new variables ({', '.join(added)}); leave out "
            "options that add some (debias, momentum=None, accumulate), or leave out this layer, with layers=."
        )
    if "steps" in added and steps is None:
        raise ValueError(
            f"{path} is to count its batches (debias=True or momentum=None), but does not know how many are behind its "
            "statistics; say so with steps=, 0 to start anew."
        )
    if steps is not None:
        if "steps" not in start:
            raise ValueError(
                f"steps={steps} is given, but {path} does not count its batches; leave it out, or count them, with "
                "debias=True or momentum=None."
            )
        given["steps"] = jnp.full_like(given.get("steps", start["steps"]), steps)
    return {name: given.get(name, value) for name, value in start.items()}
