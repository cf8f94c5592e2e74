"""Variants of batch norm: other ways to normalize a batch in training.

Each has the signature of :func:`jaxbn.batch_normalize`; pass it as ``method`` to a layer or to
:func:`jaxbn.batch_norm`.  Bind its additional options first, as in
``method=functools.partial(ghost_normalize, group_size=16)``.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jax.typing import ArrayLike

from jaxbn._core import checks, lowering
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import wide_dtype, widen
from jaxbn._core.functional import checked_arguments
from jaxbn._core.measure import measure
from jaxbn._core.running import number_of_updates
from jaxbn._core.scaling import apply_measured, result_dtype
from jaxbn._core.stats import STATS_TYPES, AnyStats, Moments, pool, round_mean

# A number, or a schedule: a function of the number of earlier updates, an int32 scalar.
Limit = ArrayLike | Callable[[jax.Array], ArrayLike]


def ghost_normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    group_size: int,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    stats: AnyStats | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes groups of ``group_size`` consecutive examples separately (ghost batch norm).

    So a large batch keeps the noise of a small one.  The moments of the groups are combined, also over devices, but for
    the running statistics only; no group reaches from one device to the next.

    >>> x = jnp.array([[1.], [3.], [10.], [30.]])
    >>> y, moments = jaxbn.ghost_normalize(x, group_size=2, epsilon=1e-9)
    >>> y.ravel(), moments.mean
    (Array([-1.,  1., -1.,  1.], dtype=float32), Array([11.], dtype=float32))

    Args:
      x: inputs, shape [N, ..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None means 1.
      bias: shift per feature (beta), shape [C]; None means 0.
      group_size: examples per group; divides N.
      axis: feature axis or axes of ``x``; not the first.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the moments are combined.
      axis_index_groups: groups of device indices to combine separately.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch; not used.

    Returns:
      y, shape [N, ..., C], and the moments of the whole batch.

    Raises:
      ValueError: if ``group_size`` is not an integer that divides N, or an argument does not fit ``x``.

    References:
      Hoffer, Hubara and Soudry 2017, arXiv:1705.08741.
    """
    del stats
    x, mask, reduced, devices = checked_arguments(
        x, mask, axis, epsilon, axis_name, axis_index_groups, scale=scale, bias=bias
    )
    if 0 not in reduced:
        raise ValueError(
            f"axis must not include the first axis, which ghost batch norm divides into groups, got {axis} for an "
            f"input of shape {x.shape}. Move the examples to the first axis."
        )
    group_size = checks.whole("group_size", group_size, least=1)
    if x.shape[0] % group_size:
        raise ValueError(
            f"group_size must divide the batch of {x.shape[0]} examples, got {group_size}. "
            "Choose a divisor, or pad the batch and pass a mask."
        )
    if x.size and group_size * math.prod(x.shape[i] for i in reduced[1:]) == 1:
        warnings.warn(
            f"group_size=1 leaves one value per group and feature of an input of shape {x.shape}, so training "
            "normalizes it to 0; use a group_size of at least two.",
            stacklevel=2,
        )
    normalize: Any = functools.partial(
        _normalize_groups, size=group_size, reduced=reduced, epsilon=epsilon, devices=devices
    )
    sharding = jax.typeof(x).sharding
    if sharding.spec and sharding.spec[0] is not None:
        # The examples are sharded over explicit mesh axes, whose types cannot express the reshape into groups if a
        # group spans devices.  So inside, the axes are automatic.
        of_features = PartitionSpec(*(sharding.spec[i] for i in range(x.ndim) if i not in reduced))
        normalize = auto_axes(
            normalize,
            axes=sharding.mesh.explicit_axes,
            out_sharding=(sharding, NamedSharding(sharding.mesh, of_features)),
        )
    return normalize(x, scale, bias, mask)


def _normalize_groups(
    x: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    mask: jax.Array | None,
    *,
    size: int,
    reduced: tuple[int, ...],
    epsilon: float,
    devices: Devices,
) -> tuple[jax.Array, Moments]:
    groups = x.shape[0] // size

    def split(v: jax.Array) -> jax.Array:  # [N, ...] to [groups, size, ...]; the group becomes one more feature axis
        return v.reshape((1, *v.shape) if v.shape[0] == 1 else (groups, size, *v.shape[1:]))

    def repeat(parameter: ArrayLike | None) -> jax.Array | None:
        return None if parameter is None else jnp.broadcast_to(parameter, (groups, *jnp.shape(parameter)))

    grouped = split(x)
    mask = None if mask is None else split(mask)
    reduced = tuple(i + 1 for i in reduced)
    # Each group is normalized by itself, on its own device; only the moments are pooled over devices.
    batch = measure(grouped, mask, reduced, Devices(), negligible=epsilon)
    y = apply_measured(grouped, mask, batch, repeat(scale), repeat(bias), reduced, epsilon)
    return y.reshape(x.shape), pool(round_mean(batch), devices)


def batch_renormalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    r_max: Limit = 3.0,
    d_max: Limit = 5.0,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    stats: AnyStats | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes a batch as evaluation would, with the running statistics, but only up to limits (batch renorm).

    y = scale * (r (x - mean)/sigma + d) + bias,  r = sigma / running sigma in [1/r_max, r_max],
    d = (mean - running mean) / running sigma in [-d_max, d_max],  sigma = sqrt(var + epsilon);
    No gradient flows through r and d.  r_max=1 and d_max=0 give batch norm, with which the paper starts
    training before it relaxes the limits: pass schedules for that, as in Optax.  A layer whose ``method`` is a
    functools.partial with schedules counts its updates in the variable ``steps``.

    >>> stats = jaxbn.BatchStats(mean=jnp.array([0.]), var=jnp.array([4.]))
    >>> y, _ = jaxbn.batch_renormalize(jnp.array([[1.], [3.]]), stats=stats, epsilon=1e-9)
    >>> y.ravel()  # x / 2, as in evaluation
    Array([0.5, 1.5], dtype=float32)

    Batch norm for 5,000 updates, then batch renorm (a schedule is a function of the number of earlier updates):

    >>> method = functools.partial(
    ...     jaxbn.batch_renormalize,
    ...     r_max=lambda step: jnp.where(step < 5000, 1.0, 3.0),
    ...     d_max=lambda step: jnp.where(step < 5000, 0.0, 5.0),
    ... )
    >>> layer = jaxbn.linen.BatchNorm(use_running_average=False, method=method)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None means 1.
      bias: shift per feature (beta), shape [C]; None means 0.
      r_max: largest factor between the sigma of the batch and the running sigma; at least 1; or a schedule of it.
      d_max: largest difference of the means, in running sigmas; at least 0; or a schedule of it.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the batch is spread.
      axis_index_groups: groups of device indices to normalize separately.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch, shape [C]; counted ones for schedules.

    Returns:
      y, shape [..., C], and the moments of the batch.

    Raises:
      ValueError: without ``stats``, for limits that exclude batch norm, or an argument that does not fit ``x``.

    References:
      Ioffe 2017, arXiv:1702.03275.
    """
    stats = _given(stats, "batch renormalization compares the batch with the running statistics")
    if callable(r_max):
        r_max = r_max(number_of_updates(stats, "r_max is a schedule"))
    if callable(d_max):
        d_max = d_max(number_of_updates(stats, "d_max is a schedule"))
    checks.at_least("r_max", r_max, 1)
    checks.at_least("d_max", d_max, 0)
    x, mask, reduced, devices = checked_arguments(
        x, mask, axis, epsilon, axis_name, axis_index_groups, mean=stats.mean, var=stats.var, scale=scale, bias=bias
    )
    checks.several_values(x.shape, reduced, axis_name)
    batch = measure(x, mask, reduced, devices, negligible=epsilon)
    moments = round_mean(batch)
    # Algorithm 1 of the paper; the gradient does not flow through r and d (its section 3).
    sigma, running_sigma = jnp.sqrt(batch.var + epsilon), jnp.sqrt(stats.var + epsilon)
    r = lax.stop_gradient(jnp.clip(sigma / running_sigma, 1 / jnp.asarray(r_max), r_max))
    d = lax.stop_gradient(_limit((moments.mean - stats.mean) / running_sigma, d_max))
    d = lowering.where(batch.count > 0, d, 0)  # a feature that is masked everywhere has no mean to compare
    # r and d change the scale and the bias of batch norm: scale (r z + d) + bias = (scale r) z + (scale d + bias).
    dtype = result_dtype(x, scale, bias)
    scale = jnp.ones_like(r) if scale is None else widen(jnp.asarray(scale))
    shift = scale * d if bias is None else scale * d + widen(jnp.asarray(bias))
    return apply_measured(x, mask, batch, scale * r, shift, reduced, epsilon).astype(dtype), moments


def shifted_normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    stats: AnyStats | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes a batch with its own moments, measured about the running mean: one pass over x on every platform.

    Equal to :func:`jaxbn.batch_normalize` as long as the running mean is within about two standard deviations of the
    mean of the batch.  The farther off it is, the more digits of the variance are lost:
    with d = (mean - running mean) / sigma, the relative error is about d^2 roundings.

    On a TPU, where :func:`jaxbn.batch_normalize` reads x twice, this method moves less memory, and on several devices a
    layer never needs a second collective.  It assumes that the inputs of a layer are near 0, where the running mean
    starts, or that training or `jaxbn.calibrate` has brought the running mean near theirs.

    >>> stats = jaxbn.BatchStats(mean=jnp.array([1.5]), var=jnp.array([1.]))
    >>> y, moments = jaxbn.shifted_normalize(jnp.array([[1.], [3.]]), stats=stats, epsilon=1e-9)
    >>> y
    Array([[-1.],
           [ 1.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None means 1.
      bias: shift per feature (beta), shape [C]; None means 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the batch is spread; the running statistics have to be the
        same on all of them.
      axis_index_groups: groups of device indices to normalize separately.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch, shape [C].

    Returns:
      y, shape [..., C], and the moments of the batch.

    Raises:
      ValueError: without ``stats``, or for an argument that does not fit ``x``; the message says what does.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance: "shifted data".
    """
    stats = _given(stats, "the moments are measured about the running mean")
    x, mask, reduced, devices = checked_arguments(
        x, mask, axis, epsilon, axis_name, axis_index_groups, mean=stats.mean, var=stats.var, scale=scale, bias=bias
    )
    checks.several_values(x.shape, reduced, axis_name)
    mean = jnp.asarray(stats.mean)
    if not jnp.iscomplexobj(x):
        mean = mean.real  # running statistics of complex inputs may be used for real ones
    about = lax.stop_gradient(mean.astype(wide_dtype(x.dtype)))
    batch = measure(x, mask, reduced, devices, negligible=epsilon, about=about)
    return apply_measured(x, mask, batch, scale, bias, reduced, epsilon), round_mean(batch)


def _given(stats: AnyStats | None, reason: str) -> AnyStats:
    """Refuses to go without running statistics."""
    if stats is None:
        raise ValueError(
            f"stats must not be None: {reason}. "
            "Pass stats, or use this function as the method of batch_norm or of a layer, which pass them."
        )
    checks.statistics(stats, STATS_TYPES)
    return stats


def _limit(d: jax.Array, d_max: ArrayLike) -> jax.Array:
    """Limits the magnitude of ``d`` to ``d_max``; the mean, and so d, may be complex."""
    return d * jnp.minimum(1, d_max / jnp.maximum(jnp.abs(d), 1e-30))
