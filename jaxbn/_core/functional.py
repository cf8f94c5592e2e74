"""Batch normalisation as pure functions: in evaluation, in training, and both with the running statistics.

y = scale * (x - mean) / sqrt(var + epsilon) + bias.  ``axis`` names the feature axes of ``x``; mean, var, scale and
bias have their shape, [C] for inputs [..., C].  All arithmetic is in at least float32; y has the dtype to which x,
scale and bias promote, as in Flax.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import checks, platforms
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import is_narrow, widen
from jaxbn._core.measure import Measured, fill, measure
from jaxbn._core.stats import STATS_TYPES, AnyStats, Moments, Stats, round_mean, update_stats
from jaxbn._core.sums import broadcast, pair_broadcast


class Method(Protocol):
    """What training does with a batch: the signature that :func:`jaxbn.batch_normalize` and its variants share."""

    def __call__(
        self,
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
        """Returns the normalised batch, and the moments for the running statistics."""
        ...


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    epsilon: float = 1e-5,
) -> jax.Array:
    """Normalises with given statistics, as evaluation does.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias.

    >>> jaxbn.normalize(jnp.array([[1.], [3.]]), mean=jnp.array([2.]), var=jnp.array([1.]), epsilon=1e-9)
    Array([[-1.],
           [ 1.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      mean: shape [C].
      var: shape [C], not negative.
      scale: factor per feature (gamma), shape [C]; None for 1.
      bias: shift per feature (beta), shape [C]; None for 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.

    Returns:
      y, shape [..., C].

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what would.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2.
    """
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, mean=mean, var=var, scale=scale, bias=bias)
    mean, var = widen(jnp.asarray(mean)), widen(jnp.asarray(var))
    return _normalize_about(x, None, mean, None, var + epsilon, scale, bias, reduced)


def batch_normalize(
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
    """Normalises a batch with its own moments, as training does.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias, with the mean and biased variance of the batch.

    >>> y, moments = jaxbn.batch_normalize(jnp.array([[1.], [3.]]), epsilon=1e-9)
    >>> y
    Array([[-1.],
           [ 1.]], dtype=float32)

    Masked positions are normalised with the moments of the others; there, a value that is not finite counts as 0.
    A feature that is masked everywhere becomes its bias.

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None for 1.
      bias: shift per feature (beta), shape [C]; None for 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the batch is spread, under shard_map, pmap or vmap.
      axis_index_groups: groups of device indices to normalise separately, as in :func:`jax.lax.psum`.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch; not used here, but by methods that compare with them.

    Returns:
      y, shape [..., C], and the moments of the batch.

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what would.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    del stats
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, scale=scale, bias=bias)
    mask = checks.mask(mask, x)
    devices = Devices(*checks.axis_names(axis_name, axis_index_groups))
    checks.several_values(x.shape, reduced, axis_name)
    # A variance far below epsilon need not be exact: features that are constant do not cost a second reading of x.
    batch = measure(x, mask, reduced, devices, negligible=epsilon)
    return apply_measured(x, mask, batch, scale, bias, reduced, epsilon), round_mean(batch)


def batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    momentum: ArrayLike | None = 0.99,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    unbiased: bool = False,
    method: Method = batch_normalize,
) -> tuple[jax.Array, Stats]:
    """Normalises with the batch and updates the running statistics, or normalises with those.

    Training: y, moments = method(x, ...);  stats = update_stats(stats, moments).
    Evaluation: y = normalize(x, stats.mean, stats.var);  stats stay.

    >>> x = jnp.array([[1.], [3.]])
    >>> y, stats = jaxbn.batch_norm(x, jaxbn.init_stats(1), use_running_average=False, momentum=0.9)
    >>> stats
    BatchStats(mean=Array([0.2], dtype=float32), var=Array([1.], dtype=float32))

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      stats: running statistics, shape [C].
      scale: factor per feature (gamma), shape [C]; None for 1.
      bias: shift per feature (beta), shape [C]; None for 0.
      use_running_average: True to evaluate, False to train.
      momentum: weight of the old statistics, in [0, 1]; see :func:`jaxbn.update_stats`.
      epsilon: added to the variance; positive.
      axis: feature axis or axes of ``x``.
      axis_name: name or names of the device axes over which the batch is spread, under shard_map, pmap or vmap.
      axis_index_groups: groups of device indices to normalise separately, as in :func:`jax.lax.psum`.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      unbiased: multiply the variance by m/(m - 1) for the running statistics, as the paper and PyTorch do.
      method: what training does with a batch; :func:`batch_normalize` or a variant with its signature.

    Returns:
      y, shape [..., C], and the running statistics, of the kind, shape and dtype given; a real mean becomes complex
      with complex inputs.

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what would.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    x, axes, _ = checks.inputs(x, axis)
    checks.statistics(stats, STATS_TYPES)
    checks.method(method)
    checks.parameters(x, axes, epsilon, mean=stats.mean, var=stats.var, scale=scale, bias=bias)
    checks.momentum(momentum)
    if use_running_average:
        x = fill(x, checks.mask(mask, x))
        return normalize(x, stats.mean, stats.var, scale, bias, axis=axes, epsilon=epsilon), stats
    y, moments = method(
        x,
        scale,
        bias,
        axis=axes,
        epsilon=epsilon,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        mask=mask,
        stats=stats,
    )
    return y, update_stats(stats, moments, momentum=momentum, unbiased=unbiased)


def affine(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Scales and shifts each feature: what batch norm is in evaluation, with its statistics gone into two arrays.

    y = scale * x + bias.  The same as :func:`normalize` with scale = gamma / sqrt(var + epsilon) and
    bias = beta - mean gamma / sqrt(var + epsilon), but for rounding where the mean is large.

    >>> jaxbn.affine(jnp.array([[1.], [3.]]), jnp.array([2.]), jnp.array([-4.]))
    Array([[-2.],
           [ 2.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature, shape [C]; None for 1.
      bias: shift per feature, shape [C]; None for 0.
      axis: feature axis or axes of ``x``.
      mask: booleans that broadcast to ``x``; where False, a value that is not finite counts as 0.

    Returns:
      y, shape [..., C].

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what would.
    """
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, 1.0, scale=scale, bias=bias)
    mask = checks.mask(mask, x)
    if scale is None and bias is None:
        return fill(x, mask)
    features = [x.shape[one] for one in axes]
    a = jnp.ones(features) if scale is None else widen(jnp.asarray(scale))
    shift = None if bias is None else widen(jnp.asarray(bias))
    return _scale_and_shift(x, mask, jnp.zeros(features), a, shift, reduced, result_dtype(x, scale, bias))


def apply_measured(x, mask, batch: Measured, scale, bias, reduced, epsilon) -> jax.Array:
    """Normalises x, shape [..., C], with moments that were measured on it; its arguments have been checked."""
    v = batch.var + epsilon
    if mask is not None:  # a feature that is masked everywhere becomes its bias
        v = jnp.where(batch.count > 0, v, jnp.inf)
    return _normalize_about(x, mask, lax.stop_gradient(batch.pivot), batch.offset, v, scale, bias, reduced)


def result_dtype(x, scale, bias):
    """Returns the dtype of y: what x, scale and bias promote to, as far as they are given."""
    return jnp.result_type(x, *(p for p in (scale, bias) if p is not None))


def _normalize_about(x, mask, pivot, offset, v, scale, bias, reduced) -> jax.Array:
    """Returns y = (x - pivot) a + (bias - offset a), with a = scale / sqrt(v): exact where x and its mean are large."""
    a, shift = _coefficients(offset, v, scale, bias)
    return _scale_and_shift(x, mask, pivot, a, shift, reduced, result_dtype(x, scale, bias))


@jax.jit  # a net has many layers of the same kind, for which this need not be traced again
def _coefficients(offset, v, scale, bias):
    """Returns a = scale / sqrt(v) and bias - offset a, or None for the latter where both are None."""
    a = _slope(jnp.ones_like(v) if scale is None else widen(jnp.asarray(scale)), v)
    shift = None if bias is None else widen(jnp.asarray(bias))
    if offset is not None:
        shift = -offset * a if shift is None else shift - offset * a
    return a, shift


@platforms.rematerialized(static_argnums=(5, 6))  # keeps x alone for the backward pass, not x - pivot as well
def _scale_and_shift(x, mask, pivot, a, shift, reduced, dtype):
    wide = widen(fill(x, mask))
    centred = wide - broadcast(pivot, wide, reduced)
    if shift is None:
        y = centred * broadcast(a, wide, reduced)
    else:
        a, shift = pair_broadcast(a, shift, wide, reduced, narrow=is_narrow(x))
        y = centred * a + shift
    return y.astype(dtype)


@jax.custom_jvp
def _slope(scale, v):
    """Returns scale / sqrt(v)."""
    return scale * lax.rsqrt(v)


@_slope.defjvp
def _slope_jvp(primals, tangents):
    """Derivative, divided where that comes last backward.

    XLA keeps what a division gives, an array per feature.  Products of such arrays it repeats for every value of the
    batch that they are applied to.
    """
    scale, v = primals
    scale_dot, v_dot = tangents
    return _slope(scale, v), scale_dot * lax.rsqrt(v) - (0.5 * _slope(scale, v)) * (v_dot / v)
