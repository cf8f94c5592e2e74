"""Batch norm with statistics of its own for each domain: for each data set, task, or step of an inner loop.

Statistics of D domains are rows of one array: [D, C] in place of [C].  A domain is an index from 0 to D - 1.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._core.checks import Axes, AxisNames
from jaxbn._core.devices import is_tracked
from jaxbn._core.functional import batch_norm
from jaxbn._core.stats import STATS_TYPES, Stats

# A part of the key under which JAX caches what it has traced, so that a function compiled for one domain is never taken
# for another.
_chosen = jax.make_user_context(None)


class _Array:
    """An index that is known only when the program runs; equal to itself alone."""

    def __init__(self, index: ArrayLike):
        self.index: ArrayLike | None = index


@contextlib.contextmanager
def domain(index: ArrayLike) -> Iterator[None]:
    """Chooses the domain of all domain norms that are called in this context, however deep in a model.

    >>> layer = jaxbn.nnx.DomainBatchNorm(2, num_domains=3, momentum=0., rngs=nnx.Rngs(0))
    >>> with jaxbn.domain(1):
    ...     y = layer(jnp.array([[1., 10.], [3., 30.]]))
    >>> layer.mean[...]
    Array([[ 0.,  0.],
           [ 2., 20.],
           [ 0.,  0.]], dtype=float32)

    The context holds while a function is traced, under jit, grad, remat, scan and vmap alike.  A compiled function that
    is called in it is compiled once for each integer.  So that one program serves all domains, pass the index to the
    compiled function, and open the context inside.

    Args:
      index: as in :func:`jaxbn.domain_batch_norm`: an integer, a traced one, or one for each example, shape [N].

    Returns:
      A context manager.
    """
    try:
        choice: Any = operator.index(index)  # pyrefly: ignore[bad-argument-type]
    except TypeError:  # also of a tracer
        choice = _Array(index)
    try:
        with _chosen(choice):
            yield
    finally:
        if isinstance(choice, _Array):
            choice.index = None  # caches keep the choice, but not the tracer


def chosen_domain(passed: ArrayLike | None) -> ArrayLike:
    """Returns the domain that was passed to a call, or else that of the innermost context; refuses neither."""
    choice = _chosen.value if passed is None else passed
    choice = choice.index if isinstance(choice, _Array) else choice
    if choice is None:
        raise ValueError(
            "domain must be passed to the call of the layer, or chosen around that of the model: "
            "with jaxbn.domain(index): ..."
        )
    return choice


def repeat_rows(stats: Any, num_domains: int) -> Any:
    """Returns running statistics, or other arrays, with a row for each domain, all equal: [C] to [D, C]."""
    return jax.tree.map(lambda array: jnp.repeat(jnp.asarray(array)[None], num_domains, axis=0), stats)


def domain_batch_norm(
    x: ArrayLike,
    stats: Stats,
    domain: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    use_running_average: bool,
    axis: Axes = -1,
    axis_name: AxisNames | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    update_stats: bool = True,
    **options: Any,
) -> tuple[jax.Array, Stats]:
    """Batch norm of one domain, or of each domain's part of the batch.

    y, stats[d] = batch_norm(x, stats[d]), for the d that ``domain`` says.  With one index per example, the moments of
    each domain are those of its own examples; training then normalizes the batch D times.  Domains
    that are not chosen, or have no examples, keep their statistics.

    >>> x = jnp.array([[1.], [3.], [10.], [20.]])
    >>> stats = jax.tree.map(lambda s: jnp.stack([s, s]), jaxbn.init_stats(1))  # two domains
    >>> y, stats = jaxbn.domain_batch_norm(
    ...     x, stats, jnp.array([0, 0, 1, 1]), use_running_average=False, momentum=0., epsilon=1e-9)
    >>> y.ravel()
    Array([-1.,  1., -1.,  1.], dtype=float32)
    >>> stats.mean
    Array([[ 2.],
           [15.]], dtype=float32)

    Args:
      x: inputs, shape [..., C]; floating-point or complex.
      stats: running statistics, shape [D, C]; those of :func:`jaxbn.init_stats`, stacked.
      domain: integer, or integers of shape [N], one for each example on the first axis of ``x``.  An index that is not
        from 0 to D - 1 is refused if it is known before the program runs; otherwise its outputs are NaN.
      scale: factor per feature, shape [C], or [D, C] for one of each domain; None means 1.
      bias: shift per feature, shape [C], or [D, C] for one of each domain; None means 0.
      use_running_average: True to evaluate, False to train.
      axis: feature axis or axes of ``x``.
      axis_name: name or names of the device axes over which the batch is spread.  A single index must then be the same
        on all devices: one that differs is refused under shard_map, and elsewhere, at the cost of one more collective,
        makes the outputs NaN.  Indices per example may differ in any way.
      axis_index_groups: groups of device indices to normalize separately, as in :func:`jax.lax.psum`.
      mask: booleans that broadcast to ``x``; False leaves a position out of the moments.
      update_stats: False, in training, normalizes with the batch, and leaves all statistics as they are.
      **options: other arguments of :func:`jaxbn.batch_norm`.

    Returns:
      y, shape [..., C], and running statistics of the class, shape and dtype of ``stats``; a real mean becomes complex
      with complex inputs.

    Raises:
      ValueError: for an argument that does not fit ``x``; the message says what does.

    References:
      Chang et al. 2019, arXiv:1906.03950 (domain-specific batch norm); Xie et al. 2020, arXiv:1911.09665 (AdvProp);
      Antoniou, Edwards and Storkey 2019, arXiv:1810.09502 (MAML++).
    """
    x, axes, _ = checks.inputs(x, axis)
    checks.statistics(stats, STATS_TYPES)
    features = tuple(x.shape[i] for i in axes)
    num_domains = _number_of_domains(jnp.shape(stats.mean), features, scale=scale, bias=bias)
    index = _checked(domain, num_domains, x.shape, axes)
    mask = checks.mask(mask, x)
    # The number of batches per update is one for all domains, and has no rows.
    stats = jax.tree.map(lambda value: jnp.asarray(value) if jnp.ndim(value) else value, stats)
    options |= {"use_running_average": use_running_average}
    on_devices = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}

    def row(value: ArrayLike | None, d: Any) -> ArrayLike | None:
        """Returns the domain's row of an array; a value of all domains as it is."""
        return None if value is None else jnp.asarray(value)[d] if jnp.ndim(value) > len(features) else value

    def on_domain(stats: Stats, d: Any, mask: jax.Array | None) -> tuple[jax.Array, Stats]:
        """Applies the batch norm of a domain to the whole batch, and puts its statistics back into their row."""
        own = jax.tree.map(lambda value: value[d] if jnp.ndim(value) else value, stats)
        y, new = batch_norm(x, own, row(scale, d), row(bias, d), axis=axes, mask=mask, **on_devices, **options)
        if use_running_average or not update_stats:
            return y, stats
        return y, jax.tree.map(lambda old, new: _with_row(old, d, new), stats, new)

    if isinstance(index, int):
        return on_domain(stats, index, mask)
    if index.ndim == 0:
        if axis_name is not None and not use_running_average:
            names, _ = checks.axis_names(axis_name, axis_index_groups)
            index = _agreed(index, names)
        y, new = on_domain(stats, index, mask)
        return _or_nan(y, index, num_domains), new
    index = index.reshape(-1, *[1] * (x.ndim - 1))
    y: Any = jnp.nan  # of an example whose index no domain has
    # XLA fuses the domains of an evaluation into one pass over x.
    for d in range(num_domains):
        is_own = index == d
        examples = mask if use_running_average else is_own if mask is None else is_own & mask
        y_own, stats = on_domain(stats, d, examples)
        y = jnp.where(is_own, y_own, y)
    return y, stats


def _number_of_domains(shape: tuple[int, ...], features: tuple[int, ...], **parameters: ArrayLike | None) -> int:
    """Returns the number of rows of statistics of this shape; refuses parameters that have another."""
    num_domains, *rest = shape or (0,)
    if tuple(rest) != features:
        raise ValueError(
            f"stats must have shape (domains, {', '.join(map(str, features))}), got {shape}. "
            "Stack those of init_stats: jax.tree.map(lambda s: jnp.stack([s] * num_domains), stats)."
        )
    for name, value in parameters.items():
        if value is not None and jnp.shape(value) not in (features, (num_domains, *features)):
            raise ValueError(
                f"{name} must have shape {features}, the same for all domains, or {(num_domains, *features)}, one row "
                f"for each of the {num_domains} domains of stats, got {jnp.shape(value)}."
            )
    return num_domains


def _checked(domain: ArrayLike, num_domains: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> int | jax.Array:
    """Returns the domain as an integer if it is one, or else as an array; refuses what cannot index the domains."""
    is_known = not isinstance(domain, jax.Array) or not (
        isinstance(domain, jax.core.Tracer) or not domain.is_fully_addressable
    )
    known = np.asarray(domain) if is_known else None
    dtype = domain.dtype if known is None else known.dtype  # pyrefly: ignore[missing-attribute]
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"domain must hold integers, got dtype {dtype}. It is the index of a row of the statistics; convert a "
            "boolean with .astype(int)."
        )
    if known is not None and not ((0 <= known) & (known < num_domains)).all():
        raise ValueError(
            f"domain must be from 0 to {num_domains - 1}, because the statistics have {num_domains} rows, got {domain}."
        )
    if jnp.ndim(domain) and (jnp.shape(domain) != shape[:1] or 0 in axes):
        raise ValueError(
            f"domain must be a single integer, or one for each example on the first axis of an input of shape {shape}, "
            f"got shape {jnp.shape(domain)} with features on axis {axes}."
        )
    return int(known) if known is not None and known.ndim == 0 else jnp.asarray(domain)


def _agreed(index: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns the index if it is the same on all devices, and otherwise one that no domain has."""
    if differing := [name for name in names if name in jax.typeof(index).manual_axis_type.varying]:
        raise ValueError(
            f"domain must be the same on all devices of axis_name={differing[0]!r}, which normalize one batch "
            "together. Pass one index for each example instead: jnp.full(len(x), domain)."
        )
    untracked = tuple(name for name in names if not is_tracked(name))
    if not untracked:
        return index
    extremes = lax.pmax(jnp.stack([index, -index]), untracked)
    return jnp.where(extremes[0] == -extremes[1], index, -1)


def _or_nan(y: jax.Array, index: jax.Array, num_domains: int) -> jax.Array:
    """Returns y, or NaN for an index that no domain has; as a factor, which makes the gradient NaN too."""
    return y * jnp.where((index >= 0) & (index < num_domains), 1, jnp.nan).astype(y.dtype)


def _with_row(rows: Any, index: Any, row: Any) -> Any:
    """Replaces a row; with an index that no domain has, none."""
    if jnp.ndim(rows) == 0:
        return rows
    is_chosen = jnp.expand_dims(jnp.arange(len(rows)) == index, tuple(range(1, rows.ndim)))
    # Not a scatter, whose result has no sharding of its own on a mesh with Explicit axes.
    return jnp.where(is_chosen, row[None], rows)
