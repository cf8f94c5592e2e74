"""Batch norm as a linen module: ``from jaxbn.linen import BatchNorm`` in place of ``flax.linen.BatchNorm``.

The layers only adapt: they read parameters and statistics from the scope, call a function of :mod:`jaxbn`, and write
the new statistics back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax.nn import initializers

from jaxbn._core import checks
from jaxbn._core.dtypes import cast
from jaxbn._core.functional import Method, affine, batch_norm, batch_normalize, needs_count, normalize_at_init
from jaxbn._core.running import Momentum
from jaxbn._core.stats import init_stats
from jaxbn._core.variables import from_variables, to_variables, variable_names
from jaxbn._layers.linen_domains import DomainBatchNorm

__all__ = ["BatchNorm", "Affine", "DomainBatchNorm"]


class BatchNorm(nn.BatchNorm):
    """Batch normalization with running statistics in the collection ``batch_stats``.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias, with the moments of the batch in training and the running
    statistics in evaluation.  Arguments and variables are those of ``flax.linen.BatchNorm``, in the same order and
    with the same defaults, so a model only changes an import, and its checkpoints load.

    >>> layer = jaxbn.linen.BatchNorm(momentum=0.9)
    >>> x = jnp.array([[1., 10.], [3., 30.]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean']
    Array([0.2, 2. ], dtype=float32)
    >>> y = layer.apply(variables | updates, x, use_running_average=True)

    Differs from flax.linen.BatchNorm in:
      1. Variance and gradient are accurate to the precision of ``x``, however large the mean.
      2. On a CPU, in float32, training needs no more memory for activations than the network without batch norm.
      3. A batch that is empty, masked everywhere or not finite does not change the running statistics.
      4. Devices with different numbers of masked positions are weighted by their counts.
      5. Masked positions may hold NaN or infinity, in training and in evaluation; such values count as 0.
      6. The statistics keep their dtype, so a scan over steps works in float64 too.
      7. Integer inputs, float masks, ``epsilon=0``, and ``axis_index_groups`` without ``axis_name`` raise a ValueError.
         Training on one value per feature warns.
      8. For complex inputs, the running mean is complex from the start.

    Attributes:
      use_running_average: True to evaluate, False to train; can be passed to the call instead.
      axis: feature axis or axes of the input; statistics have the shape of those axes.
      momentum: weight of the old running statistics, in [0, 1]; None weights all batches equally; a function of the
        number of earlier updates, such as an Optax schedule, changes it.  The last two count in the variable ``steps``.
      epsilon: added to the variance; positive.
      dtype: dtype of the result; by default the one to which input and parameters promote.
      param_dtype: dtype of scale and bias.
      use_bias: whether to add a learned bias (beta).
      use_scale: whether to multiply by a learned scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name or names of the device axes over which the batch is spread, under shard_map, pmap or vmap;
        a batch sharded under jit does not need it.
      axis_index_groups: groups of device indices to normalize separately, as in ``jax.lax.psum``.
      use_fast_variance: ignored; accepted for compatibility with Flax.
      force_float32_reductions: False stores the running statistics in ``param_dtype`` if that is wider than float32;
        Flax's does so for half precision too, in which averages stop moving.  Sums are at least float32 in any case.
      method: how training normalizes a batch: ``jaxbn.batch_normalize``, or a variant such as
        ``functools.partial(jaxbn.ghost_normalize, group_size=16)``.
      unbiased: multiply the variance by m/(m - 1) for the running statistics, as the paper and PyTorch do.
      debias: correct the running statistics for their initial values, as Adam does; adds the variable ``steps``.  A
        checkpoint of a layer without this option lacks it: set it to the number of batches averaged so far.
      frozen: always evaluate, and ignore ``use_running_average``; for fine-tuning.
      accumulate: number of training calls per optimizer step, as in ``optax.MultiSteps``; the running statistics are
        updated once per step, with the moments of all its calls.  These are collected in variables ``pending_...``,
        which a checkpoint of a layer without this option lacks.
      update_stats: False leaves the running statistics as they are in training: the layer normalizes with the batch,
        and ``batch_stats`` need not be mutable; can be passed to the call instead.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    use_running_average: bool | None = None
    # Wider types than Flax declares; Flax's own code accepts several axes and names.
    axis: int | Sequence[int] = -1  # pyrefly: ignore[bad-override]
    momentum: Momentum = 0.99  # pyrefly: ignore[bad-override]
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | Sequence[str] | None = None  # pyrefly: ignore[bad-override]
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    method: Method = batch_normalize
    unbiased: bool = False
    debias: bool = False
    frozen: bool = False
    accumulate: int = 1
    update_stats: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; in training, updates ``batch_stats``, which must be mutable.

        During ``init`` the statistics are not updated, and ``axis_name`` need not be bound.

        Args:
          x: inputs, shape [..., C]; floating-point or complex.
          use_running_average: True to evaluate, False to train; if not passed to the constructor.
          mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
          update_stats: False leaves the running statistics as they are; None does what the constructor says.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if ``use_running_average`` is passed twice or not at all, unless frozen, or an argument does not
            fit ``x``.
        """
        # From the constructor or from the call, but not from both; a frozen layer always evaluates.
        use_running_average = self.frozen or nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        use_running_average = checks.boolean("use_running_average", use_running_average)
        update_stats = checks.boolean("update_stats", self.update_stats if update_stats is None else update_stats)
        checks.inexact(dtype=self.dtype, param_dtype=self.param_dtype)
        x = jnp.asarray(x)
        feature_shape = tuple(x.shape[axis] for axis in checks.feature_axes(x.shape, self.axis))

        # Evaluation needs neither count nor pending moments, so it accepts checkpoints that lack them.
        evaluates = use_running_average and not self.is_initializing()
        accumulate = 1 if evaluates else self.accumulate
        counted = not evaluates and needs_count(self.momentum, self.method, debias=self.debias)
        variables = self._running_variables(feature_shape, counted, accumulate, is_complex=jnp.iscomplexobj(x))
        scale = self.param("scale", self.scale_init, feature_shape, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, feature_shape, self.param_dtype) if self.use_bias else None

        if self.is_initializing() and not use_running_average:
            # As in Flax, initialization does not update the statistics and is not spread over devices.  Nor does it
            # call the method, because the example batch may be too small for it.
            y = normalize_at_init(x, scale, bias, axis=self.axis, epsilon=self.epsilon, mask=mask)
            return cast(y, self.dtype)

        y, stats = batch_norm(
            x,
            from_variables({name: variable.value for name, variable in variables.items()}, accumulate=accumulate),
            scale,
            bias,
            use_running_average=use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis=self.axis,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            mask=mask,
            unbiased=self.unbiased,
            debias=self.debias,
            update_stats=update_stats,
            method=self.method,
        )
        # Not in evaluation, where the collection is usually immutable.
        if update_stats and not use_running_average:
            for name, value in to_variables(stats).items():
                variables[name].value = value
        return cast(y, self.dtype)

    @nn.nowrap  # otherwise Flax would put the method into a named scope, which shows up in profiles
    def _running_variables(
        self,
        feature_shape: tuple[int, ...],
        counted: bool,
        accumulate: int,
        *,
        is_complex: bool,
    ) -> dict[str, nn.Variable]:
        """Returns the variables of the running statistics by name; creates those that do not exist."""
        dtype = jnp.float32 if self.force_float32_reductions else jnp.promote_types(self.param_dtype, jnp.float32)
        if is_complex:
            dtype = jnp.promote_types(dtype, jnp.complex64)

        # Without this check, Flax would create the missing variable, and count from 0 although the statistics are
        # averages of many batches.
        if counted and self.has_variable("batch_stats", "mean"):
            checks.has_steps(self.has_variable("batch_stats", "steps"), "/".join(self.path))

        def initial(name: str) -> jax.Array:  # called by Flax, and only for a variable that does not exist
            return to_variables(init_stats(feature_shape, counted=counted, accumulate=accumulate, dtype=dtype))[name]

        # The variables of Flax's layer, "mean" and "var", and those for our options.
        names = variable_names(counted=counted, accumulate=accumulate)
        return {name: self.variable("batch_stats", name, initial, name) for name in names}


class Affine(nn.Module):
    """A batch norm whose statistics have been merged into scale and bias: y = scale * x + bias.

    It is called like batch norm, and does the same in training and evaluation.  :func:`jaxbn.surgery.to_affine`
    replaces trained batch norms with it.

    >>> layer = jaxbn.linen.Affine()
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 3)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (3,), 'scale': (3,)}}

    Attributes:
      axis: feature axis or axes of the input.
      dtype: dtype of the result; by default the one to which input and parameters promote.
      param_dtype: dtype of scale and bias.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      fixed: store scale and bias in ``batch_stats`` instead of ``params``, so that the optimizer does not update them.
    """

    axis: int | Sequence[int] = -1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    fixed: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Scales and shifts ``x``.

        Args:
          x: inputs, shape [..., C]; floating-point or complex.
          use_running_average: accepted for compatibility, without effect.
          mask: booleans that broadcast to ``x``; masked values that are not finite count as 0.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if an argument does not fit ``x``.
        """
        del use_running_average
        checks.inexact(dtype=self.dtype, param_dtype=self.param_dtype)
        x = jnp.asarray(x)
        feature_shape = tuple(x.shape[axis] for axis in checks.feature_axes(x.shape, self.axis))

        def parameter(name: str, init: Callable[..., jax.Array]) -> jax.Array:
            if self.fixed:
                return self.variable("batch_stats", name, init, None, feature_shape, self.param_dtype).value
            return self.param(name, init, feature_shape, self.param_dtype)

        scale = parameter("scale", initializers.ones) if self.use_scale else None
        bias = parameter("bias", initializers.zeros) if self.use_bias else None
        return cast(affine(x, scale, bias, axis=self.axis, mask=mask), self.dtype)
