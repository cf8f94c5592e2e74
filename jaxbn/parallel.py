"""Gradients of a loss over a batch that is spread over devices.

Each device computes its share of the loss: the sum of the losses of its own examples, divided by the number of examples
on all devices.  The shares add up to the loss of the whole batch, however many valid examples each device has.  How
their gradients add up depends on whether JAX tracks which values are equal on all devices: only ``jax.shard_map`` with
``check_vma=True``, its default, does.  A function that is used in the wrong place raises an error, because its
gradients would be too large by the number of devices.

With nnx, pass ``transform=nnx.value_and_grad``: the share is then a function of the module.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxbn._core import checks
from jaxbn._core.checks import AxisNames
from jaxbn._core.devices import is_tracked

__all__ = ["psum_of_value_and_grad", "value_and_grad_of_psum"]


def value_and_grad_of_psum(
    share: Callable[..., Any],
    axis_name: AxisNames,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    transform: Callable[..., Any] = jax.value_and_grad,
) -> Callable[..., Any]:
    """Differentiates the loss of the whole batch under shard_map with check_vma=True.

    (loss, grads) = value_and_grad(psum(share)).  JAX itself adds the gradients of what the devices hold in common, such
    as parameters, so they must not be added again.

    >>> def share(w, x):
    ...     return (w * x).sum() / jax.lax.psum(x.size, "d")
    >>> step = jaxbn.parallel.value_and_grad_of_psum(share, "d")
    >>> mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> P, x = jax.sharding.PartitionSpec, jnp.array([1., 3.])
    >>> jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d")), out_specs=P()))(jnp.ones(()), x)
    (Array(2., dtype=float32), Array(2., dtype=float32))

    Args:
      share: returns a device's share of the loss, a scalar; with ``has_aux``, a pair of it and anything else.
      axis_name: name or names of all device axes over which the batch is spread.
      argnums: arguments to differentiate with respect to, as in :func:`jax.value_and_grad`; with nnx also
        ``nnx.DiffState``.
      has_aux: whether ``share`` returns a pair.
      transform: :func:`jax.value_and_grad` or ``nnx.value_and_grad``.

    Returns:
      A function of the arguments of ``share`` that returns the loss of the whole batch, or a pair of it and the second
      result of ``share`` on this device, and the gradients of that loss.

    Raises:
      ValueError: when called outside of shard_map with check_vma=True; or if ``axis_name`` is not an axis there.
    """

    def loss(*args: Any, **kwargs: Any) -> Any:
        result = share(*args, **kwargs)
        if not has_aux:
            return lax.psum(result, axis_name)
        value, aux = result
        return lax.psum(value, axis_name), aux

    value_and_grad = transform(loss, argnums=argnums, has_aux=has_aux)

    def step(*args: Any, **kwargs: Any) -> Any:
        if untracked := [name for name in _names(axis_name) if not is_tracked(name)]:
            raise ValueError(
                f"value_and_grad_of_psum needs axes of jax.shard_map with check_vma=True, got {untracked[0]!r}, which "
                "is one of jax.vmap, jax.pmap or shard_map with check_vma=False. Use psum_of_value_and_grad there."
            )
        return value_and_grad(*args, **kwargs)

    return step


def psum_of_value_and_grad(
    share: Callable[..., Any],
    axis_name: AxisNames,
    *,
    argnums: Any = 0,
    has_aux: bool = False,
    transform: Callable[..., Any] = jax.value_and_grad,
) -> Callable[..., Any]:
    """Differentiates the loss of the whole batch under shard_map with check_vma=False, pmap and vmap.

    (loss, grads) = psum(value_and_grad(share)).  Each device knows the gradient of its own share alone, so they are
    added; this holds for arguments that are equal on all devices, such as parameters.

    >>> def share(w, x):
    ...     return (w * x).sum() / jax.lax.psum(x.size, "d")
    >>> step = jaxbn.parallel.psum_of_value_and_grad(share, "d")
    >>> x = jnp.array([[1., 3.], [5., 7.]])  # two devices, simulated
    >>> jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="d")(jnp.ones(()), x)
    (Array(4., dtype=float32), Array(4., dtype=float32))

    Args:
      share: returns a device's share of the loss, a scalar; with ``has_aux``, a pair of it and anything else.
      axis_name: name or names of all device axes over which the batch is spread.
      argnums: arguments to differentiate with respect to, as in :func:`jax.value_and_grad`; with nnx also
        ``nnx.DiffState``.
      has_aux: whether ``share`` returns a pair.
      transform: :func:`jax.value_and_grad` or ``nnx.value_and_grad``.

    Returns:
      A function of the arguments of ``share`` that returns the loss of the whole batch, or a pair of it and the second
      result of ``share`` on this device, and the gradients of that loss.

    Raises:
      ValueError: when called inside of shard_map with check_vma=True; or if ``axis_name`` is not an axis there.
    """
    value_and_grad = transform(share, argnums=argnums, has_aux=has_aux)

    def step(*args: Any, **kwargs: Any) -> Any:
        if tracked := [name for name in _names(axis_name) if is_tracked(name)]:
            raise ValueError(
                "psum_of_value_and_grad needs axes of jax.vmap, jax.pmap or jax.shard_map with check_vma=False, got "
                f"{tracked[0]!r}, on which JAX adds the gradients itself. Use value_and_grad_of_psum there."
            )
        result, grads = value_and_grad(*args, **kwargs)
        value, aux = result if has_aux else (result, None)
        value, grads = lax.psum((value, grads), axis_name)
        return ((value, aux) if has_aux else value), grads

    return step


def _names(axis_name: AxisNames) -> tuple[str, ...]:
    """Returns the axis names as a tuple; refuses names that are not bound here."""
    names, _ = checks.axis_names(axis_name, None)
    return names
