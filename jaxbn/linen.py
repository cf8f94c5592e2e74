"""Batch norm as a linen module: ``from jaxbn.linen import BatchNorm`` in place of ``flax.linen.BatchNorm``.

An adapter without arithmetic: parameters and statistics out of the scope, into :func:`jaxbn.batch_norm`, and back.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer
from jax.nn import initializers

from jaxbn._core import checks
from jaxbn._core.functional import Method, affine, batch_norm, batch_normalize
from jaxbn._core.stats import from_variables, init_stats, to_variables, variable_names

__all__ = ["BatchNorm", "Affine"]


class BatchNorm(nn.Module):
    """Batch normalisation with running statistics in the collection ``batch_stats``.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias, with the moments of the batch in training and the running
    statistics in evaluation.  Arguments and variables are those of ``flax.linen.BatchNorm``, in the same order and
    with the same defaults, so a model changes over by its import, and its checkpoints load.

    >>> layer = jaxbn.linen.BatchNorm(momentum=0.9)
    >>> x = jnp.array([[1., 10.], [3., 30.]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, updates = layer.apply(variables, x, use_running_average=False, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean']
    Array([0.2, 2. ], dtype=float32)
    >>> y = layer.apply(variables | updates, x, use_running_average=True)

    Differs from flax.linen.BatchNorm in:
      1. Variance and gradient are exact at any mean, and training in float32 needs no more memory than without a norm.
      2. A batch that is empty, masked everywhere or not finite leaves the running statistics as they were.
      3. Devices with different numbers of masked positions are weighted by their counts.
      4. A position that is masked may hold NaN.
      5. The statistics keep their dtype, so that a scan over steps works in float64 too.
      6. Refused with a message: integer inputs, masks of floats, ``epsilon=0``, and ``axis_index_groups`` without
         ``axis_name``.  Training on one value per feature warns.
      7. In evaluation too, a masked position that is not finite counts as 0.
      8. For complex inputs the running mean is complex from the start.

    Attributes:
      use_running_average: True to evaluate, False to train; may be given to the call instead.
      axis: feature axis or axes of the input; statistics have the shape of those axes.
      momentum: weight of the old running statistics, in [0, 1]; None averages all batches alike, and keeps their
        number in the variable ``steps``.
      epsilon: added to the variance; positive.
      dtype: dtype of the result; by default what input and parameters promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to add a learned bias (beta).
      use_scale: whether to multiply by a learned scale (gamma).
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name or names of the device axes over which the batch is spread, under shard_map, pmap or vmap;
        under jit a sharded batch needs none.
      axis_index_groups: groups of device indices to normalise separately, as in ``jax.lax.psum``.
      use_fast_variance: accepted and without effect: there is one variance, fast and exact.
      force_float32_reductions: False stores the running statistics in ``param_dtype``, as Flax does; the sums are in
        float32 all the same.
      method: what training does with a batch: ``jaxbn.batch_normalize``, or a variant such as
        ``functools.partial(jaxbn.ghost_normalize, group_size=16)``.
      unbiased: multiply the variance by m/(m - 1) for the running statistics, as the paper and PyTorch do.
      debias: correct the running statistics for their start at 0 and 1, as Adam does; adds the variable ``steps``,
        which a checkpoint made without it lacks: set it to the number of batches behind the statistics.
      frozen: evaluate always, whatever ``use_running_average`` says; for fine-tuning.
      accumulate: number of calls in training that make one optimizer step, as in ``optax.MultiSteps``; the running
        statistics move once in so many calls, by the moments of all of them, which wait in variables ``pending_...``
        that a checkpoint made without it lacks.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    method: Method = batch_normalize
    unbiased: bool = False
    debias: bool = False
    frozen: bool = False
    accumulate: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises ``x``; in training, updates ``batch_stats``, which must be mutable then.

        During ``init`` the statistics are not updated, and ``axis_name`` need not be bound.

        Args:
          x: inputs, shape [..., C]; floating-point or complex.
          use_running_average: True to evaluate, False to train, if the constructor does not say.
          mask: booleans that broadcast to ``x``; False leaves a position out of the moments.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if ``use_running_average`` is given twice or not at all, or an argument does not fit ``x``.
        """
        use_running_average = self.frozen or nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        checks.boolean("use_running_average", use_running_average)
        checks.inexact(dtype=self.dtype, param_dtype=self.param_dtype)
        x = jnp.asarray(x)
        features = [x.shape[axis] for axis in checks.feature_axes(x.shape, self.axis)]
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        if jnp.iscomplexobj(x):
            stats_dtype = jnp.promote_types(stats_dtype, jnp.complex64)
        # What waits is left alone in evaluation, so that a checkpoint made without it serves there.
        accumulate = 1 if use_running_average and not self.is_initializing() else self.accumulate
        options = {"counted": self.momentum is None or self.debias, "accumulate": accumulate}

        def start(name):
            return to_variables(init_stats(features, **options, dtype=stats_dtype))[name]

        if options["counted"] and self.has_variable("batch_stats", "mean"):
            checks.has_steps(self.has_variable("batch_stats", "steps"), "/".join(self.path))
        variables = {name: self.variable("batch_stats", name, start, name) for name in variable_names(**options)}
        scale = self.param("scale", self.scale_init, features, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        if self.is_initializing() and not use_running_average:
            # Often a single example: no devices, no variant, no warning, no update.
            with warnings.catch_warnings(action="ignore"):
                y, _ = batch_normalize(x, scale, bias, axis=self.axis, epsilon=self.epsilon, mask=mask)
        else:
            y, stats = batch_norm(
                x,
                from_variables({n: v.value for n, v in variables.items()}, accumulate=accumulate),
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
                method=self.method,
            )
            if not use_running_average:
                for name, value in to_variables(stats).items():
                    variables[name].value = value
        return y if self.dtype is None else y.astype(self.dtype)


class Affine(nn.Module):
    """What is left of a batch norm whose statistics have gone into its scale and bias: y = scale * x + bias.

    It is called as batch norm is, and behaves the same in training and evaluation.  :func:`jaxbn.surgery.to_affine`
    puts it in the place of trained batch norms.

    >>> layer = jaxbn.linen.Affine()
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 3)))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (3,), 'scale': (3,)}}

    Attributes:
      axis: feature axis or axes of the input.
      dtype: dtype of the result; by default what input and parameters promote to.
      param_dtype: dtype of scale and bias.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      fixed: keep scale and bias in ``batch_stats``, out of the optimizer's sight, instead of ``params``.
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
          use_running_average: without effect.
          mask: booleans that broadcast to ``x``; where False, a value that is not finite counts as 0.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if an argument does not fit ``x``.
        """
        del use_running_average
        checks.inexact(dtype=self.dtype, param_dtype=self.param_dtype)
        features = [jnp.shape(x)[axis] for axis in checks.feature_axes(jnp.shape(x), self.axis)]

        def array(name, init):
            if not self.fixed:
                return self.param(name, init, features, self.param_dtype)
            return self.variable("batch_stats", name, lambda: init(None, features, self.param_dtype)).value

        scale = array("scale", initializers.ones) if self.use_scale else None
        bias = array("bias", initializers.zeros) if self.use_bias else None
        y = affine(x, scale, bias, axis=self.axis, mask=mask)
        return y if self.dtype is None else y.astype(self.dtype)
