"""Batch norm with statistics of its own for each domain, as a linen module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.meta import AxisMetadata
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.domains import chosen_domain, domain_batch_norm, repeat_rows
from jaxbn._core.dtypes import cast
from jaxbn._core.functional import Method, batch_normalize, needs_count, normalize_at_init
from jaxbn._core.stats import init_stats
from jaxbn._core.variables import from_variables, to_variables, variable_names


class DomainBatchNorm(nn.BatchNorm, kw_only=True):
    """Batch normalization with statistics of its own for each of several domains.

    y, batch_stats[d] = batch_norm(x, batch_stats[d]), for the domain d that the call or a context chooses, or for each
    domain's part of the batch: see :func:`jaxbn.domain_batch_norm`.  The variables are those of
    :class:`jaxbn.linen.BatchNorm` with one row for each domain: shape [D, C].

    >>> layer = jaxbn.linen.DomainBatchNorm(num_domains=2, momentum=0.9)
    >>> x = jnp.array([[1., 10.], [3., 30.]])
    >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
    >>> y, updates = layer.apply(variables, x, use_running_average=False, domain=1, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean']
    Array([[0. , 0. ],
           [0.2, 2. ]], dtype=float32)
    >>> with jaxbn.domain(1):  # or so, where the layer is deep in a model
    ...     y = layer.apply(variables | updates, x, use_running_average=True)

    Differs from jaxbn.linen.BatchNorm in:
      1. Counts and pending moments, of the options ``debias``, ``momentum=None`` and ``accumulate``, are those of each
         domain: with ``accumulate=4``, a domain is updated at every fourth call that chooses it.
      2. The tools of :mod:`jaxbn.surgery`, :mod:`jaxbn.calibrate` and :mod:`jaxbn.diagnose` do not operate on it.

    Attributes:
      num_domains: number of domains D.
      separate_scale_and_bias: whether each domain has a scale and a bias of its own, too; they start equal.
      method: how training normalizes a batch, see :class:`jaxbn.linen.BatchNorm`, as for all other arguments.
      unbiased: multiply the variance by m/(m - 1) for the running statistics.
      debias: correct the running statistics for their initial values; adds the variable ``steps``.
      frozen: always evaluate, and ignore ``use_running_average``.
      accumulate: number of training calls of a domain per update of its statistics.
      update_stats: False, in training, leaves all statistics as they are; can be overridden in the call.

    References:
      Chang et al. 2019, arXiv:1906.03950; Xie et al. 2020, arXiv:1911.09665.
    """

    num_domains: int
    separate_scale_and_bias: bool = False
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
        domain: ArrayLike | None = None,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; in training, updates the rows of the chosen domains in ``batch_stats``.

        Args:
          x: inputs, shape [..., C]; floating-point or complex.
          use_running_average: True to evaluate, False to train; if not passed to the constructor.
          domain: index from 0 to D - 1, or one for each example, shape [N]; if None, that of :func:`jaxbn.domain`.
          mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
          update_stats: False leaves the statistics as they are, so that ``batch_stats`` need not be mutable; None as
            the constructor says.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if no domain is chosen, ``use_running_average`` is passed twice or not at all, unless frozen, or
            an argument does not fit ``x``.
        """
        use_running_average = self.frozen or nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        checks.boolean("use_running_average", use_running_average)
        checks.inexact(dtype=self.dtype, param_dtype=self.param_dtype)
        update_stats = self.update_stats if update_stats is None else update_stats
        x = jnp.asarray(x)
        shape = tuple(x.shape[axis] for axis in checks.feature_axes(x.shape, self.axis))
        # Evaluation does not need the pending moments, so it accepts checkpoints that lack them.
        accumulate = 1 if use_running_average and not self.is_initializing() else self.accumulate
        variables = self._running_variables(shape, accumulate, use_running_average, jnp.iscomplexobj(x))
        scale = self._parameter("scale", self.scale_init, shape) if self.use_scale else None
        bias = self._parameter("bias", self.bias_init, shape) if self.use_bias else None

        if self.is_initializing() and not use_running_average:
            # All domains start equal, so any of them will do.
            if self.separate_scale_and_bias:
                scale, bias = (None if rows is None else rows[0] for rows in (scale, bias))
            y = normalize_at_init(x, scale, bias, axis=self.axis, epsilon=self.epsilon, mask=mask)
            return cast(y, self.dtype)

        y, stats = domain_batch_norm(
            x,
            from_variables({name: variable.value for name, variable in variables.items()}, accumulate=accumulate),
            0 if self.is_initializing() and domain is None else chosen_domain(domain),
            scale,
            bias,
            use_running_average=use_running_average,
            momentum=self.momentum,
            debias=self.debias,
            epsilon=self.epsilon,
            axis=self.axis,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            mask=mask,
            update_stats=update_stats,
            unbiased=self.unbiased,
            method=self.method,
        )
        # Not in evaluation, where the collection is usually immutable.
        if not use_running_average and update_stats:
            for name, value in to_variables(stats).items():
                variables[name].value = value
        return cast(y, self.dtype)

    @nn.nowrap
    def _parameter(self, name: str, init: Initializer, shape: tuple[int, ...]) -> jax.Array:
        """Returns scale or bias: of shape [C], or with a row for each domain."""

        def rows(*args: Any) -> Any:
            value = repeat_rows(init(*args), self.num_domains)
            # An initializer under nn.with_partitioning names the axes of [C] only.
            boxed = isinstance(value, AxisMetadata)
            return value.add_axis(0, {nn.PARTITION_NAME: None}) if boxed else value

        return self.param(name, rows if self.separate_scale_and_bias else init, shape, self.param_dtype)

    @nn.nowrap
    def _running_variables(
        self, shape: tuple[int, ...], accumulate: int, use_running_average: bool, is_complex: bool
    ) -> dict[str, nn.Variable]:
        """Returns the variables of the running statistics by name; creates those that do not exist."""
        num_domains = checks.whole("num_domains", self.num_domains, least=1)
        # Evaluation needs no count.
        counted = needs_count(self.momentum, self.method, debias=self.debias) and (
            self.is_initializing() or not use_running_average
        )
        dtype = jnp.float32 if self.force_float32_reductions else jnp.promote_types(self.param_dtype, jnp.float32)
        if is_complex:
            dtype = jnp.promote_types(dtype, jnp.complex64)
        # Flax would create the missing variable, and count from 0.
        if counted and self.has_variable("batch_stats", "mean"):
            checks.has_steps(self.has_variable("batch_stats", "steps"), "/".join(self.path))

        def initial(name: str) -> jax.Array:
            stats = init_stats(shape, counted=counted, accumulate=accumulate, dtype=dtype)
            return repeat_rows(to_variables(stats)[name], num_domains)

        names = variable_names(counted=counted, accumulate=accumulate)
        return {name: self.variable("batch_stats", name, initial, name) for name in names}
