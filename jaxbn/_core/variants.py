"""Variants of batch norm: other things that training can do with a batch.

Each has the signature of :func:`jaxbn.batch_normalize`, and enters a layer or :func:`jaxbn.batch_norm` by ``method``.
Options of its own are bound first: ``method=functools.partial(ghost_normalize, group_size=16)``.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, auto_axes
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import wide_dtype, widen
from jaxbn._core.functional import apply_measured, result_dtype
from jaxbn._core.measure import measure
from jaxbn._core.stats import STATS_TYPES, AnyStats, Moments, pool, round_mean


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
    """Normalises groups of ``group_size`` consecutive examples separately (ghost batch norm).

    A large batch keeps the noise of a small one.  The groups' moments are combined for the running statistics only,
    over the devices too; no group reaches from one device to another.

    >>> x = jnp.array([[1.], [3.], [10.], [30.]])
    >>> y, moments = jaxbn.ghost_normalize(x, group_size=2, epsilon=1e-9)
    >>> y.ravel(), moments.mean
    (Array([-1.,  1., -1.,  1.], dtype=float32), Array([11.], dtype=float32))

    Args:
      x: inputs, shape [N, ..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None for 1.
      bias: shift per feature (beta), shape [C]; None for 0.
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
      ValueError: if ``group_size`` is no integer that divides N, or an argument does not fit ``x``.

    References:
      Hoffer, Hubara and Soudry 2017, arXiv:1705.08741.
    """
    del stats
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, scale=scale, bias=bias)
    mask = checks.mask(mask, x)
    devices = Devices(*checks.axis_names(axis_name, axis_index_groups))
    if axes[0] == 0:
        raise ValueError(
            f"axis={axis} makes the first axis of an input of shape {x.shape} a feature axis, but ghost batch norm "
            "divides that axis into groups; move the examples to the first axis."
        )
    group_size = checks.whole("group_size", group_size, least=1)
    if x.shape[0] % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide the batch of {x.shape[0]}; "
            "choose a divisor, or pad the batch and pass a mask."
        )
    if x.size and group_size * math.prod(x.shape[i] for i in reduced[1:]) == 1:
        warnings.warn(
            f"group_size=1 leaves one value per group and feature of an input of shape {x.shape}, so that training "
            "normalises it to 0; use a group_size of at least two.",
            stacklevel=2,
        )
    normalize = functools.partial(_normalize_groups, size=group_size, reduced=reduced, epsilon=epsilon, devices=devices)
    sharding = jax.typeof(x).sharding
    if sharding.spec and sharding.spec[0] is not None:  # explicit axes cannot say how groups that span devices lie
        of_features = NamedSharding(sharding.mesh, PartitionSpec(*(sharding.spec[i] for i in axes)))
        explicit = sharding.mesh.explicit_axes
        normalize: Any = auto_axes(normalize, axes=explicit, out_sharding=(sharding, of_features))
    return normalize(x, scale, bias, mask)


def _normalize_groups(x, scale, bias, mask, *, size, reduced, epsilon, devices) -> tuple[jax.Array, Moments]:
    groups = x.shape[0] // size

    def split(v):  # [N, ...] to [groups, size, ...]; the group becomes one more feature axis
        return v.reshape((1, *v.shape) if v.shape[0] == 1 else (groups, size, *v.shape[1:]))

    def repeat(parameter):
        return None if parameter is None else jnp.broadcast_to(parameter, (groups, *jnp.shape(parameter)))

    grouped, mask, reduced = split(x), None if mask is None else split(mask), tuple(i + 1 for i in reduced)
    batch = measure(grouped, mask, reduced, Devices(), negligible=epsilon)
    y = apply_measured(grouped, mask, batch, repeat(scale), repeat(bias), reduced, epsilon)
    return y.reshape(x.shape), pool(round_mean(batch), devices)


def batch_renormalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    r_max: ArrayLike = 3.0,
    d_max: ArrayLike = 5.0,
    axis: Axes = -1,
    epsilon: float = 1e-5,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    stats: AnyStats | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalises a batch so that training sees what evaluation will: with the running statistics, up to limits.

    y = scale * (r (x - mean)/sigma + d) + bias,  r = sigma / running sigma in [1/r_max, r_max],
    d = (mean - running mean) / running sigma in [-d_max, d_max],  sigma = sqrt(var + epsilon);
    r and d are constants to differentiation.  r_max=1 and d_max=0 is batch norm, with which the paper starts.

    >>> stats = jaxbn.BatchStats(mean=jnp.array([0.]), var=jnp.array([4.]))
    >>> y, _ = jaxbn.batch_renormalize(jnp.array([[1.], [3.]]), stats=stats, epsilon=1e-9)
    >>> y.ravel()  # x / 2, as in evaluation
    Array([0.5, 1.5], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None for 1.
      bias: shift per feature (beta), shape [C]; None for 0.
      r_max: largest factor by which the batch's sigma may differ from the running one; at least 1.
      d_max: largest difference of the means, in running sigmas; at least 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the batch is spread.
      axis_index_groups: groups of device indices to normalise separately.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch, shape [C].

    Returns:
      y, shape [..., C], and the moments of the batch.

    Raises:
      ValueError: without ``stats``, for limits that exclude batch norm, or an argument that does not fit ``x``.

    References:
      Ioffe 2017, arXiv:1702.03275.
    """
    if stats is None:
        raise ValueError(
            "stats=None, but batch renormalisation compares the batch with the running statistics; "
            "pass stats, or use it as the method of batch_norm or of a layer, which do."
        )
    checks.statistics(stats, STATS_TYPES)
    checks.at_least("r_max", r_max, 1)
    checks.at_least("d_max", d_max, 0)
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, mean=stats.mean, var=stats.var, scale=scale, bias=bias)
    mask = checks.mask(mask, x)
    devices = Devices(*checks.axis_names(axis_name, axis_index_groups))
    checks.several_values(x.shape, reduced, axis_name)
    batch = measure(x, mask, reduced, devices, negligible=epsilon)
    moments = round_mean(batch)
    sigma, running_sigma = jnp.sqrt(batch.var + epsilon), jnp.sqrt(stats.var + epsilon)
    r = lax.stop_gradient(jnp.clip(sigma / running_sigma, 1 / jnp.asarray(r_max), r_max))
    d = lax.stop_gradient(_limit((moments.mean - stats.mean) / running_sigma, d_max))
    d = jnp.where(batch.count > 0, d, 0)  # nothing to compare where all is masked
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
    """Normalises a batch with its own moments, measured about the running mean: one reading of x on every platform.

    The same as :func:`jaxbn.batch_normalize` as long as the running mean is within about two standard deviations of the
    mean of the batch.  The farther off it is, the more digits of the variance are lost:
    with d = (mean - running mean) / sigma, a relative error of about d^2 roundings.

    On a TPU, where :func:`jaxbn.batch_normalize` reads x twice, a net moves less memory with this method, and on
    several devices a layer never needs a second collective.  It assumes that the inputs of a layer are near 0, where
    the running mean starts, or that training or `jaxbn.calibrate` has brought it near their mean.

    >>> stats = jaxbn.BatchStats(mean=jnp.array([1.5]), var=jnp.array([1.]))
    >>> y, moments = jaxbn.shifted_normalize(jnp.array([[1.], [3.]]), stats=stats, epsilon=1e-9)
    >>> y
    Array([[-1.],
           [ 1.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None for 1.
      bias: shift per feature (beta), shape [C]; None for 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the batch is spread; the running statistics have to be the
        same on all of them.
      axis_index_groups: groups of device indices to normalise separately.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch, shape [C].

    Returns:
      y, shape [..., C], and the moments of the batch.

    Raises:
      ValueError: without ``stats``, or for an argument that does not fit ``x``; the message says what would.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance: "shifted data".
    """
    if stats is None:
        raise ValueError(
            "stats=None, but the moments are measured about the running mean; "
            "pass stats, or use it as the method of batch_norm or of a layer, which do."
        )
    checks.statistics(stats, STATS_TYPES)
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, mean=stats.mean, var=stats.var, scale=scale, bias=bias)
    mask = checks.mask(mask, x)
    devices = Devices(*checks.axis_names(axis_name, axis_index_groups))
    checks.several_values(x.shape, reduced, axis_name)
    mean = jnp.asarray(stats.mean)
    about = lax.stop_gradient((mean if jnp.iscomplexobj(x) else mean.real).astype(wide_dtype(x.dtype)))
    batch = measure(x, mask, reduced, devices, negligible=epsilon, about=about)
    return apply_measured(x, mask, batch, scale, bias, reduced, epsilon), round_mean(batch)


def _limit(d, d_max):
    """Returns ``d`` with its magnitude at most ``d_max``; the mean, and so d, may be complex."""
    return d * jnp.minimum(1, d_max / jnp.maximum(jnp.abs(d), 1e-30))
