"""Batch normalization as pure functions: in evaluation, in training, and both with the running statistics.

y = scale * (x - mean) / sqrt(var + epsilon) + bias.  ``axis`` names the feature axes of ``x``; mean, var, scale and
bias have the shape of these axes, [C] for inputs [..., C].  All arithmetic is in at least float32; y has the dtype to
which x, scale and bias promote, as in Flax.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import Devices
from jaxbn._core.dtypes import widen
from jaxbn._core.measure import measure, zero_masked
from jaxbn._core.running import Momentum
from jaxbn._core.running import update_stats as updated
from jaxbn._core.scaling import apply_given, apply_measured, result_dtype, scale_and_shift
from jaxbn._core.stats import STATS_TYPES, AnyStats, Moments, Stats, round_mean


class Method(Protocol):
    """A way to normalize a batch in training: the signature of :func:`jaxbn.batch_normalize` and its variants."""

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
        """Returns the normalized batch, and the moments for the running statistics."""
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
    """Normalizes with given statistics, as in evaluation.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias.

    >>> jaxbn.normalize(jnp.array([[1.], [3.]]), mean=jnp.array([2.]), var=jnp.array([1.]), epsilon=1e-9)
    Array([[-1.],
           [ 1.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      mean: shape [C].
      var: shape [C], non-negative.
      scale: factor per feature (gamma), shape [C]; None means 1.
      bias: shift per feature (beta), shape [C]; None means 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.

    Returns:
      y, shape [..., C].

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what does.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 2.
    """
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, mean=mean, var=var, scale=scale, bias=bias)
    return apply_given(x, jnp.asarray(mean), jnp.asarray(var), scale, bias, reduced, epsilon)


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
    """Normalizes a batch with its own moments, as in training.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias, with the mean and biased variance of the batch.

    >>> y, moments = jaxbn.batch_normalize(jnp.array([[1.], [3.]]), epsilon=1e-9)
    >>> y
    Array([[-1.],
           [ 1.]], dtype=float32)

    Masked positions are normalized with the moments of the other positions; a masked value that is not finite counts
    as 0.  A feature that is masked everywhere becomes its bias.  A mask with fewer axes than ``x`` belongs to the first
    axes, like [N] or [N, T] for [N, T, C], or to the last ones, whichever it fits; if it fits both, it is refused.

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature (gamma), shape [C]; None means 1.
      bias: shift per feature (beta), shape [C]; None means 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      axis_name: name or names of the device axes over which the batch is spread, under shard_map, pmap or vmap.
      axis_index_groups: groups of device indices to normalize separately, as in :func:`jax.lax.psum`.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      stats: running statistics before this batch; not used here, but by some of the variants.

    Returns:
      y, shape [..., C], and the moments of the batch.

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what does.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    del stats
    x, mask, reduced, devices = checked_arguments(
        x, mask, axis, epsilon, axis_name, axis_index_groups, scale=scale, bias=bias
    )
    checks.several_values(x.shape, reduced, axis_name)
    # A variance far below epsilon need not be exact, so that constant features do not cost a second pass over x.
    batch = measure(x, mask, reduced, devices, negligible=epsilon)
    return apply_measured(x, mask, batch, scale, bias, reduced, epsilon), round_mean(batch)


def normalize_at_init(
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    axis: Axes,
    epsilon: float,
    mask: ArrayLike | None,
) -> jax.Array:
    """Normalizes the batch with which a layer is initialized.

    That batch is often a single example, outside of any device axis.  So this is :func:`batch_normalize` without
    devices, and without the warning about a single value.

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature, shape [C]; None means 1.
      bias: shift per feature, shape [C]; None means 0.
      axis: feature axis or axes of ``x``.
      epsilon: added to the variance; positive.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.

    Returns:
      y, shape [..., C].
    """
    x, mask, reduced, devices = checked_arguments(x, mask, axis, epsilon, None, None, scale=scale, bias=bias)
    batch = measure(x, mask, reduced, devices, negligible=epsilon)
    return apply_measured(x, mask, batch, scale, bias, reduced, epsilon)


def batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    axis: Axes = -1,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    unbiased: bool = False,
    debias: bool = True,
    update_stats: bool = True,
    method: Method = batch_normalize,
) -> tuple[jax.Array, Stats]:
    """Normalizes with the batch and updates the running statistics, or normalizes with the running statistics.

    Training: y, moments = method(x, ...);  stats = update_stats(stats, moments), unless ``update_stats=False``.
    Evaluation: y = normalize(x, stats.mean, stats.var);  stats do not change.

    >>> x = jnp.array([[1.], [3.]])
    >>> y, stats = jaxbn.batch_norm(x, jaxbn.init_stats(1), use_running_average=False, momentum=0.9)
    >>> stats
    BatchStats(mean=Array([0.2], dtype=float32), var=Array([1.], dtype=float32))

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      stats: running statistics, shape [C].
      scale: factor per feature (gamma), shape [C]; None means 1.
      bias: shift per feature (beta), shape [C]; None means 0.
      use_running_average: True to evaluate, False to train.
      momentum: weight of the old statistics, in [0, 1], or a schedule of it; see :func:`jaxbn.update_stats`.
      epsilon: added to the variance; positive.
      axis: feature axis or axes of ``x``.
      axis_name: name or names of the device axes over which the batch is spread, under shard_map, pmap or vmap.
      axis_index_groups: groups of device indices to normalize separately, as in :func:`jax.lax.psum`.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      unbiased: multiply the variance by m/(m - 1) for the running statistics, as the paper and PyTorch do.
      debias: whether counted statistics are corrected for their initial values; see :func:`jaxbn.update_stats`.
      update_stats: False leaves the running statistics as they are in training too: for a second forward pass of the
        same batch, a pass of another network's data, or a batch at test time.
      method: how training normalizes a batch; :func:`batch_normalize` or a variant with its signature.

    Returns:
      y, shape [..., C], and running statistics of the class and shape of ``stats``, and of their dtype, but at least
      float32; a real mean becomes complex with complex inputs.

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what does.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167.
    """
    # `normalize` and the methods check their own arguments again.  Checked here too, an argument is refused in training
    # and evaluation alike, even one that only the other mode reads, and by a method of the user that checks nothing.
    x, axes, _ = checks.inputs(x, axis)
    checks.statistics(stats, STATS_TYPES)
    checks.method(method)
    checks.parameters(x, axes, epsilon, mean=stats.mean, var=stats.var, scale=scale, bias=bias)
    if not callable(momentum):
        checks.momentum(momentum)
    unbiased, debias = checks.boolean("unbiased", unbiased), checks.boolean("debias", debias)
    is_updated = checks.boolean("update_stats", update_stats)
    if checks.boolean("use_running_average", use_running_average):
        x = zero_masked(x, checks.mask(mask, x))
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
    if is_updated:
        stats = updated(stats, moments, momentum=momentum, unbiased=unbiased, debias=debias)
    return y, stats


def needs_count(momentum: Momentum, method: Method, *, debias: bool) -> bool:
    """Tells whether a layer with these options has to count its updates.

    Plain and debiased averages need the number of batches, and so do schedules: of the momentum, and among the bound
    options of a method (``functools.partial``).
    """
    has_schedule = any(map(callable, getattr(method, "keywords", {}).values()))
    return momentum is None or callable(momentum) or debias or has_schedule


def affine(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Scales and shifts each feature: batch norm in evaluation, with its statistics merged into scale and bias.

    y = scale * x + bias.  Equal to :func:`normalize` if scale = gamma / sqrt(var + epsilon) and
    bias = beta - mean gamma / sqrt(var + epsilon), except for rounding at large means.

    >>> jaxbn.affine(jnp.array([[1.], [3.]]), jnp.array([2.]), jnp.array([-4.]))
    Array([[-2.],
           [ 2.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      scale: factor per feature, shape [C]; None means 1.
      bias: shift per feature, shape [C]; None means 0.
      axis: feature axis or axes of ``x``.
      mask: booleans that broadcast to ``x``; masked values that are not finite count as 0.

    Returns:
      y, shape [..., C].

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what does.
    """
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, 1.0, scale=scale, bias=bias)  # with any epsilon, which plays no part here
    x = zero_masked(x, checks.mask(mask, x))
    if scale is None and bias is None:
        return x
    a = None if scale is None else widen(jnp.asarray(scale))
    return scale_and_shift(x, None, a, bias, reduced, result_dtype(x, scale, bias))


def checked_arguments(
    x: ArrayLike,
    mask: ArrayLike | None,
    axis: Axes,
    epsilon: ArrayLike,
    axis_name: AxisNames | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
    **per_feature: ArrayLike | None,
) -> tuple[jax.Array, jax.Array | None, tuple[int, ...], Devices]:
    """Checks the arguments of a method.

    :func:`batch_norm` has checked most of them already, but a method is public too, and may be called without it.

    Returns:
      The inputs and the mask as arrays, the axes to sum over, and the devices.
    """
    x, axes, reduced = checks.inputs(x, axis)
    checks.parameters(x, axes, epsilon, **per_feature)
    mask = checks.mask(mask, x)
    return x, mask, reduced, Devices(*checks.axis_names(axis_name, axis_index_groups))
