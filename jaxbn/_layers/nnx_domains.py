"""Batch norm with statistics of its own for each domain, as an nnx module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes
from flax.typing import Initializer
from jax import lax
from jax.nn import initializers
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.domains import chosen_domain, domain_batch_norm, repeat_rows
from jaxbn._core.dtypes import cast
from jaxbn._core.functional import Method, batch_normalize, needs_count
from jaxbn._core.stats import init_stats
from jaxbn._core.variables import from_variables, to_variables, variable_names


class DomainBatchNorm(nnx.BatchNorm):
    """Batch normalization with statistics of its own for each of several domains.

    y, stats[d] = batch_norm(x, stats[d]), for the domain d that the call or a context chooses, or for each domain's
    part of the batch: see :func:`jaxbn.domain_batch_norm`.  The variables are those of :class:`jaxbn.nnx.BatchNorm`
    with one row for each domain: shape [D, C].

    >>> layer = jaxbn.nnx.DomainBatchNorm(2, num_domains=2, momentum=0.9, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1., 10.], [3., 30.]])
    >>> y = layer(x, domain=1)
    >>> layer.mean[...]
    Array([[0. , 0. ],
           [0.2, 2. ]], dtype=float32)
    >>> layer.eval()
    >>> with jaxbn.domain(1):  # or so, where the layer is deep in a model
    ...     y = layer(x)

    Differs from jaxbn.nnx.BatchNorm in:
      1. Counts and pending moments, of the options ``debias``, ``momentum=None`` and ``accumulate``, are those of each
         domain: with ``accumulate=4``, a domain is updated at every fourth call that chooses it.
      2. The tools of :mod:`jaxbn.surgery`, :mod:`jaxbn.calibrate` and :mod:`jaxbn.diagnose` do not operate on it.

    Args:
      num_features: number of features C.
      num_domains: number of domains D.
      separate_scale_and_bias: whether each domain has a scale and a bias of its own, too; they start equal.
      rngs: keys for the initializers.
      method: how training normalizes a batch, see :class:`jaxbn.nnx.BatchNorm`.
      unbiased: multiply the variance by m/(m - 1) for the running statistics.
      debias: correct the running statistics for their initial values; adds the variable ``steps``.
      frozen: always evaluate, even after ``train()``.
      accumulate: number of training calls of a domain per update of its statistics.
      update_stats: False, in training, leaves all statistics as they are; can be overridden in the call.
      **options: all other arguments of ``flax.nnx.BatchNorm``; ``momentum`` may be None.  With
        ``separate_scale_and_bias``, ``scale_metadata`` and ``bias_metadata`` are those of variables of shape [D, C].

    References:
      Chang et al. 2019, arXiv:1906.03950; Xie et al. 2020, arXiv:1911.09665.
    """

    def __init__(
        self,
        num_features: int,
        num_domains: int,
        *,
        separate_scale_and_bias: bool = False,
        rngs: nnx.Rngs,
        method: Method = batch_normalize,
        unbiased: bool = False,
        debias: bool = False,
        frozen: bool = False,
        accumulate: int = 1,
        update_stats: bool = True,
        **options: Any,
    ):
        checks.inexact(dtype=options.get("dtype"), param_dtype=options.get("param_dtype"))
        num_features = checks.whole("num_features", num_features, least=0)
        num_domains = checks.whole("num_domains", num_domains, least=1)
        if separate_scale_and_bias:
            for name, default in (("scale_init", initializers.ones), ("bias_init", initializers.zeros)):
                options[name] = _rows(options.get(name, default), num_domains)
        super().__init__(num_features, rngs=rngs, **options)
        self.num_domains = num_domains
        self.separate_scale_and_bias = separate_scale_and_bias
        self.method = method
        self.unbiased = unbiased
        self.debias = debias
        self.frozen = frozen
        self.accumulate = accumulate
        self.update_stats = update_stats
        counted = needs_count(self.momentum, method, debias=debias)
        stats = init_stats(num_features, counted=counted, accumulate=accumulate)
        for name, value in to_variables(stats).items():
            # As in `jaxbn.nnx.BatchNorm`, -1 tells a new layer from one whose count was not loaded.
            initial = jnp.full_like(value, -1) if name == "steps" else value
            setattr(self, name, nnx.BatchStat(repeat_rows(initial, num_domains)))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        domain: ArrayLike | None = None,
        mask: jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes ``x``; in training, updates the statistics of the chosen domains.

        Args:
          x: inputs, shape [..., C]; floating-point or complex.
          use_running_average: True to evaluate, False to train; overrides the constructor, ``train()`` and ``eval()``.
          domain: index from 0 to D - 1, or one for each example, shape [N]; if None, that of :func:`jaxbn.domain`.
          mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
          update_stats: False leaves the statistics as they are; None as the constructor or ``nnx.view`` says.

        Returns:
          y, shape [..., C].

        Raises:
          ValueError: if no domain is chosen, ``use_running_average`` is not set anywhere, unless frozen, or an argument
            does not fit ``x``.
        """
        use_running_average = self.frozen or first_from(
            use_running_average,
            self.use_running_average,
            error_msg=(
                "use_running_average must be True to evaluate or False to train, got None. "
                "Pass it to the constructor or the call, or use train(), eval() or nnx.view."
            ),
        )
        checks.boolean("use_running_average", use_running_average)
        update_stats = self.update_stats if update_stats is None else update_stats
        x = jnp.asarray(x)
        checks.num_features(self.num_features, x, self.axis)
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
        y, stats = domain_batch_norm(
            x,
            from_variables(arrays, accumulate=self.accumulate),
            chosen_domain(domain),
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
        if not use_running_average and update_stats:
            for name, value in to_variables(stats).items():
                # State rather than an output: no gradient flows through it.
                variables[name].set_value(lax.stop_gradient(value))
        return cast(y, self.dtype)

    def set_view(
        self, use_running_average: bool | None = None, frozen: bool | None = None, update_stats: bool | None = None
    ) -> None:
        """Sets the mode; called by ``nnx.view``.

        Args:
          use_running_average: True to evaluate, False to train; None keeps the current value.
          frozen: True to always evaluate; None keeps the current value.
          update_stats: False to leave the statistics as they are in training; None keeps the current value.
        """
        super().set_view(use_running_average)
        self.frozen = self.frozen if frozen is None else frozen
        self.update_stats = self.update_stats if update_stats is None else update_stats


def _rows(init: Initializer, num_domains: int) -> Initializer:
    """Returns an initializer of equal rows."""

    def initialize(*args: Any) -> jax.Array:
        return repeat_rows(init(*args), num_domains)

    return initialize
