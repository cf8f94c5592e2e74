"""What depends on the platform that a program is compiled for: a CPU, or an accelerator.

The platform is known when a program is lowered, not when it is traced: one trace may be exported for several platforms.
So the choice is left to JAX (:func:`jax.lax.platform_dependent`, or a lowering rule).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
from jax import lax

_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed platform", default=None)


def choose(*arguments: Any, cpu: Callable, accelerator: Callable) -> Any:
    """Returns what one of two functions makes of the arguments, by the platform that the program is compiled for."""
    if assumed := _assumed.get():
        return (cpu if assumed == "cpu" else accelerator)(*arguments)
    # Else a transposed function would add over devices inside of what JAX lowers to a conditional of one branch.
    leaves, structure = jax.tree.flatten(arguments)
    arguments = jax.tree.unflatten(structure, varying_alike(*leaves))
    return lax.platform_dependent(*arguments, cpu=cpu, default=accelerator)


def varying_alike(*values):
    """Returns the values as varying over all those device axes of shard_map over which one of them varies."""
    axes = [jax.typeof(value).manual_axis_type.varying for value in values]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [lax.pcast(v, names, to="varying") if names else v for v, names in zip(values, missing, strict=True)]


def rematerialized(static_argnums: Sequence[int] = ()) -> Callable[[Callable], Callable]:
    """Returns a decorator: the backward pass computes the function again from its arguments, and keeps nothing else.

    The barriers of `jax.checkpoint` make XLA do so on a CPU; without them it shares x - mean between the forward and
    the backward pass and keeps it in memory.  On an accelerator the compiler computes again what it can fuse anyway.
    There a barrier does harm: it forces a copy of the batch, and separates sums from the convolution before them.
    """

    def decorate(function: Callable) -> Callable:
        # Called eagerly, the choice would be traced and compiled at every call.
        @functools.partial(jax.jit, static_argnums=static_argnums)
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            static = {i: arguments[i] for i in static_argnums}

            def bound(*arrays: Any) -> Any:
                rest = iter(arrays)
                return function(*(static[i] if i in static else next(rest) for i in range(len(arguments))))

            return choose(
                *(a for i, a in enumerate(arguments) if i not in static),
                cpu=jax.checkpoint(bound),
                accelerator=jax.checkpoint(bound, prevent_cse=False),
            )

        return run

    return decorate


def devices_to_share(context: Any) -> int:
    """Returns over how many devices XLA divides a program that is being lowered, given the context of a lowering rule.

    Under shard_map a program is that of one device, as far as the mesh has no automatic axes; under pmap it always is.
    """
    devices = context.module_context.axis_context
    if hasattr(devices, "num_devices"):
        return devices.num_devices
    if hasattr(devices, "manual_axes"):
        sizes = devices.mesh.shape.items()
        return math.prod(size for name, size in sizes if name not in devices.manual_axes)
    return 1


def lowered_for(platform: str) -> str:
    """Returns the platform whose algorithm a lowering rule takes: its own, unless a test assumes another."""
    return _assumed.get() or platform


@contextlib.contextmanager
def assumed(platform: str) -> Generator[None]:
    """Inside, programs take the algorithms for this platform, on whatever they run: a test of those for accelerators.

    Args:
      platform: "cpu", "tpu" or "cuda".
    """
    token = _assumed.set(platform)
    jax.clear_caches()  # what has been traced or compiled for another platform
    try:
        yield
    finally:
        _assumed.reset(token)
        jax.clear_caches()
