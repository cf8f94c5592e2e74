"""Replaces batch norms with jaxbn's, with new options, or with group norms."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._core import checks
from jaxbn._core.stats import init_stats
from jaxbn._core.variables import to_variables
from jaxbn._models.batch_norms import NormCall
from jaxbn._models.intercept import call_model
from jaxbn._models.model import arrays_of
from jaxbn.surgery._new_layers import NewLayer, make_batch_norm, make_group_norm
from jaxbn.surgery._operation import LayerPaths, Surgery, find_batch_norms, operate, select

# Options of jaxbn's layers that can change in a trained model: the shapes of scale, bias, mean and var do not depend on
# them.
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
    layers: LayerPaths | None = None,
    check: bool = True,
    steps: int | None = None,
    **options: Any,
) -> Surgery:
    """Replaces batch norms with jaxbn's layer and, if given, new options; keeps their arrays.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> variables = net.init(jax.random.key(0), x)
    >>> done = jaxbn.surgery.replace(net, variables, x, axis_name="data")  # synchronized over devices
    >>> done.layers
    ('layers_1',)
    >>> ghost = functools.partial(jaxbn.ghost_normalize, group_size=4)
    >>> done = jaxbn.surgery.replace(net, variables, x, method=ghost)
    >>> y, updates = done.model.apply(done.variables, x, mutable=["batch_stats"])

    Args:
      model: a linen or nnx module.
      variables: variables of the linen module; None for an nnx module.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      check: whether to run the model before and after, for ``difference`` and ``scale``; both are NaN without.
      steps: number of batches that the statistics come from, for ``debias=True`` and ``momentum=None``, which continue
        the count.
      **options: arguments of :class:`jaxbn.linen.BatchNorm` or :class:`jaxbn.nnx.BatchNorm` to change: accumulate,
        axis_index_groups, axis_name, debias, dtype, epsilon, frozen, method, momentum, unbiased.

    Returns:
      The new model.

    Raises:
      ValueError: for an option that the layer does not have, a layer that the model does not have, or options that
        need ``steps``.
    """
    if unknown := sorted(options.keys() - {*_OPTIONS}):
        arguments = ", ".join(f"{name}={options[name]!r}" for name in unknown)
        raise ValueError(
            f"{arguments} cannot change in a trained model, unlike {', '.join(_OPTIONS)}; leave it out, or make and "
            "train a new model."
        )
    checks.momentum(options.get("momentum"))
    if steps is not None:
        checks.whole("steps", steps, least=0)
    before = find_batch_norms(model, variables, sample, call)
    make = functools.partial(make_batch_norm, options)
    stored = arrays_of(before.model)
    new_layers = {
        path: NewLayer(make, batch_stats=_new_statistics(path, norm, stored[path], options, steps))
        for path, norm in select(before.norms, layers).items()
    }
    return operate(before, new_layers, [*new_layers], {}, check=check)


def replace_by_group_norm(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    num_groups: int,
    call: Callable[[Any, Any], Any] = call_model,
    layers: LayerPaths | None = None,
    check: bool = True,
) -> Surgery:
    """Replaces batch norms with group norms of the same scale, bias and epsilon; the statistics are dropped.

    The new model computes something else, and has to be trained; ``difference`` says by how much its outputs change.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.replace_by_group_norm(net, net.init(jax.random.key(0), x), x, num_groups=2)
    >>> sorted(done.variables)
    ['params']

    Args:
      model: a linen or nnx module.
      variables: variables of the linen module; None for an nnx module.
      sample: a batch, as ``call`` takes it.
      num_groups: number of groups; must divide the number of features of each layer.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      check: whether to run the model before and after, for ``difference`` and ``scale``; both are NaN without.

    Returns:
      The new model.

    Raises:
      ValueError: for a layer that the model does not have, a number of groups that does not divide a layer's features,
        or features that are not on the last axis.

    References:
      Wu and He 2018, arXiv:1803.08494.
    """
    before = find_batch_norms(model, variables, sample, call)
    new_layers = {}
    for path, norm in select(before.norms, layers).items():
        axis, ndim = norm.options["axis"], len(norm.x.shape)
        if axis not in (-1, ndim - 1):
            raise ValueError(
                f"{path} has its features on axis {axis} of {ndim}, but Flax's group norm needs them on the last axis; "
                "leave this layer out, with layers=."
            )
        (features,) = norm.stats.mean.shape
        if num_groups < 1 or features % num_groups:
            raise ValueError(
                f"num_groups={num_groups} does not divide the {features} features of {path}; choose a divisor, "
                "or replace layers of different widths separately, with layers=."
            )
        new_layers[path] = NewLayer(functools.partial(make_group_norm, num_groups), batch_stats={})
    return operate(before, new_layers, [*new_layers], {}, check=check)


def _new_statistics(
    path: str, norm: NormCall, stored: dict[str, Any], options: dict[str, Any], steps: int | None
) -> dict[str, Any]:
    """Returns the stored statistics that the options still need, and initial values of those that they add."""
    settings: dict[str, Any] = (
        {"debias": False, "accumulate": 1} | norm.options | options
    )  # Flax's layers lack the first two
    counted = settings["momentum"] is None or settings["debias"]
    mean = norm.stats.mean

    def initialize() -> dict[str, Any]:
        stats = init_stats(mean.shape, counted=counted, accumulate=settings["accumulate"], dtype=mean.dtype)
        return to_variables(stats)

    needed = jax.eval_shape(initialize).keys()
    added = sorted(needed - stored.keys())
    # Most operations add none, and so need no arrays.
    statistics = {name: stored[name] for name in needed if name in stored}
    if added:
        statistics = initialize() | statistics
    # In a loop over layers, the stored arrays have one more axis than those of a call.
    if added and stored["mean"].shape != mean.shape:
        raise ValueError(
            f"{path} is inside of a scan or vmap, which does not know the new variables ({', '.join(added)}); leave "
            "out options that add some (debias, momentum=None, accumulate), or leave out this layer, with layers=."
        )
    if "steps" in added and steps is None:
        raise ValueError(
            f"{path} will count batches (debias=True or momentum=None), but does not know how many its statistics come "
            "from; pass their number as steps=, or 0 to restart the averages."
        )
    if steps is not None:
        if "steps" not in needed:
            raise ValueError(
                f"steps={steps} has no use, because {path} does not count batches; leave it out, or pass debias=True "
                "or momentum=None."
            )
        statistics["steps"] = jnp.full_like(statistics["steps"], steps)
    return statistics
