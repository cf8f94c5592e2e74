"""Batch norm as an nnx module: ``from jaxbn.nnx import BatchNorm`` in place of ``flax.nnx.BatchNorm``.

The layers only adapt: they read parameters and statistics from their variables, call a function of :mod:`jaxbn`, and
write the new statistics back.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax import lax

from jaxbn._core import checks
from jaxbn._core.dtypes import cast
from jaxbn._core.functional import Method, affine, batch_norm, batch_normalize, needs_count
from jaxbn._core.running import Momentum
from jaxbn._core.stats import init_stats
from jaxbn._core.variables import from_variables, to_variables, variable_names
from jaxbn._layers.nnx_domains import DomainBatchNorm

__all__ = ["BatchNorm", "Affine", "DomainBatchNorm"]


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with running statistics in ``BatchStat`` variables.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias, with the moments of the batch in training and the running
    statistics in evaluation.  Arguments and variables are those of ``flax.nnx.BatchNorm``, with the same defaults, so
    a model only changes an import, and its checkpoints load.

    >>> layer = jaxbn.nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.array([[1., 10.], [3., 30.]]))
    >>> layer.mean[...]
    Array([0.2, 2. ], dtype=float32)
    >>> layer.eval()
    >>> y = layer(jnp.array([[1., 10.], [3., 30.]]))

    Differs from flax.nnx.BatchNorm in:
      1. Variance and gradient are accurate to the precision of ``x``, however large the mean.
      2. On a CPU, in float32, training needs no more memory for activations than the network without batch norm.
      3. A batch that is empty, masked everywhere or not finite does not change the running statistics.
      4. Devices with different numbers of masked positions are weighted by their counts.
      5. Masked positions may hold NaN or infinity, in training and in evaluation; such values count as 0.
      6. ``dtype`` is the dtype of the result only: inputs, parameters and statistics are not rounded to it first.
         Without it, the result has the dtype to which input and parameters promote, as in linen.
      7. The statistics keep their dtype and carry no gradient.
      8. Integer inputs, float masks, ``epsilon=0``, and ``axis_index_groups`` without ``axis_name`` raise a ValueError.
         Training on one value per feature warns.

    Args:
      num_features: number of features C.
      use_running_average: True to evaluate, False to train; ``train()``, ``eval()`` and ``nnx.view`` set it.
      axis: feature axis of the input.
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
      promote_dtype: a function other than Flax's default is called first, on ``(x, mean, var, scale, bias)`` and with
        ``dtype``.
      rngs: keys for the initializers.
      bias_metadata: metadata of the bias variable, such as its sharding.
      scale_metadata: metadata of the scale variable.
      method: how training normalizes a batch: ``jaxbn.batch_normalize``, or a variant such as
        ``functools.partial(jaxbn.ghost_normalize, group_size=16)``; create it once, because ``nnx.jit`` compares it by
        identity.
      unbiased: multiply the variance by m/(m - 1) for the running statistics, as the paper and PyTorch do.
      debias: correct the running statistics for their initial values, as Adam does; adds the variable ``steps``.  A
        checkpoint of a layer without this option lacks it: set it to the number of batches averaged so far.  Until
        then it is -1: training raises a ValueError, and compiled training, which cannot see that, goes on as after very
        many batches; a plain average (``momentum=None``) becomes NaN there.
      frozen: always evaluate, even after ``train()``; for fine-tuning.
      accumulate: number of training calls per optimizer step, as in ``optax.MultiSteps``; the running statistics are
        updated once per step, with the moments of all its calls.  These are collected in variables ``pending_...``,
        which a checkpoint of a layer without this option lacks.
      update_stats: False leaves the running statistics as they are in training: the layer normalizes with the batch;
        ``nnx.view`` sets it, and it can be passed to the call instead.

    References:
      Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008  as Flax has it; stateless
        scale_init: Initializer = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        method: Method = batch_normalize,
        unbiased: bool = False,
        debias: bool = False,
        frozen: bool = False,
        accumulate: int = 1,
        update_stats: bool = True,
    ):
        checks.inexact(dtype=dtype, param_dtype=param_dtype)
        feature_shape = (checks.whole("num_features", num_features, least=0),)
        # The variables of Flax's layer, "mean" and "var", and those for our options.
        counted = needs_count(momentum, method, debias=debias)
        stats = init_stats(feature_shape, counted=counted, accumulate=accumulate)
        for name, value in to_variables(stats).items():
            # nnx.update leaves what a state lacks: -1 tells a new layer from one whose count was not loaded.
            setattr(self, name, nnx.BatchStat(jnp.full_like(value, -1) if name == "steps" else value))
        self.scale = self.bias = nnx.data(None)
        if use_scale:
            self.scale = nnx.Param(scale_init(rngs.params(), feature_shape, param_dtype), **scale_metadata)
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), feature_shape, param_dtype), **bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum  # pyrefly: ignore[bad-assignment]  wider than Flax declares, as axis_name
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name  # pyrefly: ignore[bad-assignment]
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.method = method
        self.unbiased = unbiased
        self.debias = debias
        self.frozen = frozen
        self.accumulate = accumulate
        self.update_stats = update_stats

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; in training, updates the running statistics.

        Args:
          x: inputs, shape [..., C]; floating-point or complex.
          use_running_average: True to evaluate, False to train; overrides the constructor, ``train()`` and ``eval()``.
          mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
          update_stats: False leaves the running statistics as they are; overrides constructor and ``nnx.view``.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if ``use_running_average`` is not set anywhere, unless frozen, or an argument does not fit ``x``.
        """
        use_running_average = self.frozen or first_from(
            use_running_average,
            self.use_running_average,
            error_msg=(
                "use_running_average must be True to evaluate or False to train, got None. "
                "Pass it to the constructor or the call, or use train(), eval() or nnx.view."
            ),
        )
        use_running_average = checks.boolean("use_running_average", use_running_average)
        update_stats = checks.boolean("update_stats", self.update_stats if update_stats is None else update_stats)
        x = jnp.asarray(x)
        checks.num_features(self.num_features, x, self.axis)

        # By name, and not all `BatchStat` variables, because a subclass may have more of them.
        # A layer that can count does so even while a view has replaced its schedule by a number.
        counted = hasattr(self, "steps") and not use_running_average
        names = variable_names(counted=counted, accumulate=self.accumulate)
        variables = {name: getattr(self, name) for name in names}
        arrays = {name: variable[...] for name, variable in variables.items()}
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if counted and update_stats:
            checks.counted(arrays)
        # Flax's default promotion would round inputs and statistics to `dtype`.
        if self.promote_dtype is not dtypes.promote_dtype:
            x, arrays["mean"], arrays["var"], scale, bias = self.promote_dtype(
                (x, arrays["mean"], arrays["var"], scale, bias), dtype=self.dtype
            )

        y, stats = batch_norm(
            x,
            from_variables(arrays, accumulate=self.accumulate),
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
        if update_stats and not use_running_average:
            for name, value in to_variables(stats).items():
                # State rather than an output: no gradient flows through it.
                variables[name].set_value(lax.stop_gradient(value))
        return cast(y, self.dtype)

    def set_view(
        self,
        use_running_average: bool | None = None,
        frozen: bool | None = None,
        update_stats: bool | None = None,
        momentum: float | None = None,
    ) -> None:
        """Sets the mode; called by ``nnx.view``.

        Args:
          use_running_average: True to evaluate, False to train; None keeps the current value.
          frozen: True to always evaluate; None keeps the current value.
          update_stats: False to leave the running statistics as they are; None keeps the current value.
          momentum: weight of the old running statistics, a number or an array; None keeps the current one.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if frozen is not None:
            self.frozen = frozen
        if update_stats is not None:
            self.update_stats = update_stats
        if momentum is not None:
            self.momentum = momentum


class Affine(nnx.Module):
    """A batch norm whose statistics have been merged into scale and bias: y = scale * x + bias.

    It is called like batch norm, and does the same in training and evaluation.  :func:`jaxbn.surgery.to_affine`
    replaces trained batch norms with it.

    >>> layer = jaxbn.nnx.Affine(3)
    >>> layer(jnp.ones((8, 3))).shape
    (8, 3)

    Args:
      num_features: number of features C.
      axis: feature axis of the input.
      dtype: dtype of the result; by default the one to which input and parameters promote.
      param_dtype: dtype of scale and bias.
      use_bias: whether to add a bias.
      use_scale: whether to multiply by a scale.
      fixed: store scale and bias in ``BatchStat`` variables instead of ``Param``, so that the optimizer does not update
        them.
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = -1,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        fixed: bool = False,
    ):
        checks.inexact(dtype=dtype, param_dtype=param_dtype)
        num_features = checks.whole("num_features", num_features, least=0)
        kind = nnx.BatchStat if fixed else nnx.Param
        self.scale = kind(jnp.ones(num_features, param_dtype)) if use_scale else nnx.data(None)
        self.bias = kind(jnp.zeros(num_features, param_dtype)) if use_bias else nnx.data(None)
        self.num_features = num_features
        self.axis = axis
        self.dtype = dtype

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
        x = jnp.asarray(x)
        checks.num_features(self.num_features, x, self.axis)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        return cast(affine(x, scale, bias, axis=self.axis, mask=mask), self.dtype)
