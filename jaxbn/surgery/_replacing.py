"""Another norm in the place of a model's batch norms, or theirs with other options."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._core import checks
from jaxbn._core.functional import result_dtype
from jaxbn._core.stats import init_stats, to_variables
from jaxbn._models.intercept import call_model
from jaxbn._models.model import arrays_of, split
from jaxbn.surgery import _kernels
from jaxbn.surgery._exchange import NewLayer, make_affine, make_batch_norm, make_group_norm, make_with
from jaxbn.surgery._operation import Layers, Surgery, find_batch_norms, is_below, must_be_operable, operate, select

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


def freeze(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
) -> Surgery:
    """Makes batch norms evaluate always, whatever ``train`` flags, ``train()`` and ``eval()`` say: for fine-tuning.

    The same as ``replace(..., frozen=True)``; ``replace(..., frozen=False)`` undoes it.  Scale and bias are still
    learned; :func:`frozen_mask` keeps them from an optimizer.

    >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> done = jaxbn.surgery.freeze(net, None, jnp.ones((8, 3)))
    >>> done.model.train()
    >>> y = done.model(jnp.ones((8, 3)))
    >>> done.model.layers[1].mean[...]
    Array([0., 0., 0., 0.], dtype=float32)

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.

    Returns:
      The new model.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    return replace(model, variables, sample, call=call, layers=layers, frozen=True)


def frozen_mask(tree: Any, layers: Layers, *, scale_and_bias: bool = True) -> Any:
    """Returns a mask for Optax: True for leaves that are to stay, neither updated nor decayed.

    True are all statistics of batch norms, and scale and bias of the layers given.  It is for
    ``optax.transforms.selective_transform(optimizer, freeze_mask=mask)``; mind that ``optax.masked`` passes gradients
    on, as updates, where its mask is False.

    >>> params = {"dense": {"bias": jnp.ones(2)}, "norm": {"bias": jnp.ones(2)}}
    >>> jaxbn.surgery.frozen_mask(params, ["norm"])
    {'dense': {'bias': False}, 'norm': {'bias': True}}

    Args:
      tree: what the optimizer gets: params or variables of a linen model, or the State of an nnx model.
      layers: paths of batch norms, such as ``Surgery.layers``, or of modules that contain nothing else to train.
      scale_and_bias: False leaves scale and bias to the optimizer.

    Returns:
      A tree of booleans with the structure of ``tree``; of a State, one in the place of each variable, as
      ``nnx.Optimizer`` wants it.

    Raises:
      ValueError: for layers of which the tree has none.
    """
    layers = [layers] if isinstance(layers, str) else list(layers)
    met = set()

    def frozen(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        is_statistic = names[0] == "batch_stats" or isinstance(leaf, nnx.BatchStat)
        *layer, name = names[1:] if names[0] in ("params", "batch_stats") else names
        met.add("/".join(layer))
        chosen = any(is_below("/".join(layer), one) for one in layers)
        return is_statistic or (scale_and_bias and name in ("scale", "bias") and chosen)

    mask = jax.tree.map_with_path(frozen, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if layers and not any(is_below(layer, one) for layer in met for one in layers):
        raise ValueError(
            f"the tree has no leaves at {', '.join(map(repr, layers))}; it has some at "
            f"{', '.join(map(repr, sorted(met)))}; pass paths such as Surgery.layers, and the tree of the same model."
        )
    return mask


def to_affine(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
    learnable: bool = True,
) -> Surgery:
    """Turns batch norms into y = scale' * x + bias', with their statistics in two arrays: for fine-tuning.

    scale' = scale / sqrt(var + epsilon),  bias' = bias - mean scale'.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.to_affine(net, net.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jnp.shape, done.variables["params"]["layers_1"])
    {'bias': (4,), 'scale': (4,)}

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      learnable: False keeps both arrays with the statistics (``batch_stats``, ``BatchStat``), out of an optimizer's
        sight.

    Returns:
      The new model, with :class:`jaxbn.linen.Affine` or :class:`jaxbn.nnx.Affine` layers.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    before, found = find_batch_norms(model, variables, sample, call)
    stored, new = arrays_of(before), {}
    for path, norm in select(found, layers).items():
        arrays = zip(("scale", "bias"), _kernels.affine_of(stored[path], norm.options["epsilon"]), strict=True)
        dtype = jnp.promote_types(norm.options["param_dtype"], norm.stats.mean.dtype)
        arrays = {name: jnp.asarray(value.astype(dtype)) for name, value in arrays}
        make = functools.partial(make_affine, {"dtype": _result_dtype(norm), "fixed": not learnable})
        new[path] = NewLayer(make, arrays if learnable else {}, {} if learnable else arrays)
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


def fold(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
) -> Surgery:
    """Puts batch norms into the convolution or dense layer before them, or after them where that is exact.

    Before: K' = a K, b' = a b + s, with a = scale / sqrt(var + epsilon) and s = bias - mean a.  After:
    K' = K a, b' = b + K s, which is exact for dense layers, and for convolutions that do not pad with zeros.  Pairs
    are found from what flows where when the model runs.  The new model can be evaluated only, and costs what it would
    without a norm.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False), nn.relu])
    >>> x = jnp.ones((8, 3))
    >>> done = jaxbn.surgery.fold(net, net.init(jax.random.key(0), x), x)
    >>> jax.tree.map(jnp.shape, done.variables)
    {'params': {'layers_0': {'bias': (4,), 'kernel': (3, 4)}}}

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them, all of which must fold; None for those that can.

    Returns:
      The new model; ``kept`` lists the batch norms that cannot be folded, with the reason.

    Raises:
      ValueError: if a layer that was asked for, or every layer, cannot be folded; the message says why.
    """
    before = split(model, variables)
    finder = _kernels.Finder(before, sample, call)
    norms = finder.norms()
    must_be_operable(before, norms, sample, call)
    arrays, new, kept = {}, {}, {}  # arrays of linear layers, which may take in a batch norm on either side
    for path in select(norms, layers):
        pairs = finder.pairs(path)
        folded = pairs if isinstance(pairs, str) else _kernels.fold(finder.arrays, pairs, arrays)
        if isinstance(pairs, str) or isinstance(folded, str):
            kept[path] = folded
            continue
        arrays |= folded
        options = {"use_scale": False, "use_bias": False, "dtype": pairs[0].norm.y.dtype}
        new[path] = NewLayer(functools.partial(make_affine, options), {}, {})
    if kept and (layers is not None or not new):
        raise ValueError(
            "cannot fold "
            + "; ".join(f"{path or 'the model'}: {reason}" for path, reason in kept.items())
            + ". Nothing was changed; "
            "name layers that can be folded with layers=, or make these affine with to_affine."
        )
    changed = [*new]
    for path, (kernel, bias) in arrays.items():
        dtype = finder.arrays[path]["kernel"].dtype
        values = {"kernel": jnp.asarray(kernel.astype(dtype)), "bias": jnp.asarray(bias.astype(dtype))}
        new[path] = NewLayer(functools.partial(make_with, {"use_bias": True}), values)
    return operate(before, new, changed, kept, sample, call)


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


def _result_dtype(norm):
    return norm.options["dtype"] or result_dtype(norm.x, norm.scale, norm.bias)
