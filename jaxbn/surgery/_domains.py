"""Replaces the batch norms of a trained model with norms that have statistics for each domain."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen
import jax.numpy as jnp
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn._core import checks
from jaxbn._core.domains import domain
from jaxbn._models.batch_norms import settings_of
from jaxbn._models.intercept import call_model
from jaxbn._models.model import arrays_of
from jaxbn.surgery._comparison import compare
from jaxbn.surgery._exchange import exchange
from jaxbn.surgery._new_layers import NewLayer
from jaxbn.surgery._operation import LayerPaths, Surgery, find_batch_norms, operate, select


def replace_by_domain_norm(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    num_domains: int,
    separate_scale_and_bias: bool = False,
    call: Callable[[Any, Any], Any] = call_model,
    layers: LayerPaths | None = None,
    check: bool = True,
) -> Surgery:
    """Replaces batch norms with domain norms, all of whose domains start from the statistics of the old layer.

    The calls in the model stay as they are: the domain is chosen around that of the model, with :func:`jaxbn.domain`.
    In evaluation, the new model computes in each domain what the old one does, until the domains are trained.

    >>> net = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
    >>> x = jnp.ones((8, 3))
    >>> variables = net.init(jax.random.key(0), x)
    >>> done = jaxbn.surgery.replace_by_domain_norm(net, variables, x, num_domains=2)
    >>> with jaxbn.domain(1):
    ...     y, updates = done.model.apply(done.variables, x, mutable=["batch_stats"])
    >>> updates["batch_stats"]["layers_1"]["var"]
    Array([[1.  , 1.  , 1.  , 1.  ],
           [0.99, 0.99, 0.99, 0.99]], dtype=float32)

    Args:
      model: a linen or nnx module.
      variables: variables of the linen module; None for an nnx module.
      sample: a batch, as ``call`` takes it.
      num_domains: number of domains D.
      separate_scale_and_bias: whether each domain gets a scale and a bias of its own, too.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.
      check: whether to run the model before and after, for ``difference`` and ``scale``; both are NaN without.

    Returns:
      The new model, with :class:`jaxbn.linen.DomainBatchNorm` or :class:`jaxbn.nnx.DomainBatchNorm`; use
      :func:`replace` first to change options.

    Raises:
      ValueError: for a layer that the model does not have, or ``num_domains`` less than 1.
    """
    num_domains = checks.whole("num_domains", num_domains, least=1)
    before = find_batch_norms(model, variables, sample, call)
    make = functools.partial(_make_domain_norm, num_domains, separate_scale_and_bias)
    stored = arrays_of(before.model)
    new_layers, compared = {}, {}
    for path, norm in select(before.norms, layers).items():
        # In a loop over layers, the stored arrays have more axes than those of a call, and domains come after these.
        axis = stored[path]["mean"].ndim - len(norm.stats.mean.shape)
        rows = {
            name: jnp.repeat(jnp.expand_dims(array, axis), num_domains, axis) for name, array in stored[path].items()
        }
        params = {name: rows.pop(name) for name in ("scale", "bias") if name in rows}
        new = NewLayer(make, params if separate_scale_and_bias else None, rows)
        new_layers[path] = new
        # A layer that trains although the model evaluates is compared as if it evaluated, as in all operations.
        evaluates = norm.use_running_average
        compared[path] = new if evaluates else new._replace(make=functools.partial(_make_frozen, make))
    done = operate(before, new_layers, [*new_layers], {}, check=False)
    if not check:
        return done
    with domain(0):  # all domains are equal
        difference, scale = compare(before.model, exchange(before.model, compared), sample, call)
    return done._replace(difference=difference, scale=scale)


def _make_domain_norm(num_domains: int, separate: bool, old: Any, *, frozen: bool = False, **parent: Any) -> Any:
    """Returns a domain norm with the settings of an old batch norm."""
    settings = settings_of(old) | {"num_domains": num_domains, "separate_scale_and_bias": separate}
    settings["frozen"] = frozen or settings.get("frozen", False)
    if isinstance(old, flax.linen.Module):
        return jaxbn.linen.DomainBatchNorm(**settings, **parent)
    return jaxbn.nnx.DomainBatchNorm(**settings, rngs=nnx.Rngs(0))


def _make_frozen(make: Callable, old: Any, **parent: Any) -> Any:
    """Returns the new layer as one that always evaluates."""
    return make(old, frozen=True, **parent)
