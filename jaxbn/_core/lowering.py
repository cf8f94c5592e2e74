"""How a function chooses its algorithm when it is lowered for a platform: a CPU or an accelerator.

The choices themselves are in `ALGORITHMS` of moment_algorithms.py and in the lowering rule of sums.py.

The platform is known when a program is lowered, not when it is traced, because one trace may be exported for several
platforms.  So the choice is left to JAX: to :func:`jax.lax.platform_dependent`, or to a primitive's lowering rule.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

# Set by tests only, through `assumed`.
_assumed: contextvars.ContextVar[str | None] = contextvars.ContextVar("assumed platform", default=None)


def choose(*arguments: Any, cpu: Callable, accelerator: Callable) -> Any:
    """Calls one of two functions on the arguments, depending on the platform for which the program is compiled."""
    if assumed := _assumed.get():
        return (cpu if assumed == "cpu" else accelerator)(*arguments)
    # `platform_dependent` lowers to a conditional, even if only one branch is left.  Under shard_map, an argument that
    # does not vary over the devices is cast to vary where it is used, and the transpose of that cast is a psum.  The
    # casts are made out here, so that no collective ends up inside the conditional.
    leaves, structure = jax.tree.flatten(arguments)
    arguments = jax.tree.unflatten(structure, varying_alike(*leaves))
    return lax.platform_dependent(*arguments, cpu=cpu, default=accelerator)


def varying_alike(*values: jax.Array) -> list[jax.Array]:
    """Casts the values to vary over every shard_map axis over which any of them varies."""
    axes = [jax.typeof(value).manual_axis_type.varying for value in values]
    missing = [tuple(frozenset().union(*axes) - own) for own in axes]
    return [
        lax.pcast(value, names, to="varying") if names else value for value, names in zip(values, missing, strict=True)
    ]


def sharded_alike(*values: jax.Array) -> list[jax.Array]:
    """Reshards values that broadcast to one shape: along each axis like the first of them that is sharded there.

    On a mesh with explicit axes, types hold shardings.  JAX adds and multiplies arrays that are sharded differently,
    but does not select between them.
    """
    specs = [jax.typeof(value).sharding.spec for value in values]
    if not any(map(any, specs)) or len({*specs}) == 1:
        return list(values)
    mesh = next(jax.typeof(value).sharding.mesh for value, spec in zip(values, specs, strict=True) if any(spec))
    rank = max(value.ndim for value in values)
    merged: list[Any] = []
    for axis in range(-rank, 0):
        names = [spec[axis] for spec in specs if len(spec) >= -axis and spec[axis] is not None]
        merged.append(next((name for name in names if name not in merged), None))

    def reshard(value: jax.Array) -> jax.Array:
        names = merged[rank - value.ndim :]
        spec = PartitionSpec(*(None if size == 1 else name for size, name in zip(value.shape, names, strict=True)))
        return jax.sharding.reshard(value, NamedSharding(mesh, spec))

    return [reshard(value) if value.ndim else value for value in values]


def where(condition: jax.Array, a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Selects like `jnp.where`, but also between arrays that are sharded differently on a mesh with explicit axes."""
    if any(any(jax.typeof(value).sharding.spec) for value in (condition, a, b)):
        condition, a, b = sharded_alike(*jnp.broadcast_arrays(condition, a, b))
    return jnp.where(condition, a, b)


def rematerialized(static_argnums: Sequence[int] = ()) -> Callable[[Callable], Callable]:
    """Returns a decorator that makes the backward pass recompute the function from its arguments.

    `jax.checkpoint` alone saves nothing: XLA's common subexpression elimination would merge the recomputation with the
    forward pass, and keep x - mean in memory.  On a CPU the optimization barriers of ``prevent_cse=True`` stop it.  The
    compilers for accelerators recompute what they can fuse anyway, and there a barrier does harm: it forces a copy of
    the batch, and separates sums from the convolution before them.
    """

    def decorate(function: Callable) -> Callable:
        # Without jit, an eager call would trace and compile `platform_dependent` every time.
        @functools.partial(jax.jit, static_argnums=static_argnums)
        @functools.wraps(function)
        def run(*arguments: Any) -> Any:
            static = {i: arguments[i] for i in static_argnums}

            def bound(*arrays: Any) -> Any:
                remaining = iter(arrays)
                return function(*(static[i] if i in static else next(remaining) for i in range(len(arguments))))

            return choose(
                *(argument for i, argument in enumerate(arguments) if i not in static),
                cpu=jax.checkpoint(bound),
                accelerator=jax.checkpoint(bound, prevent_cse=False),
            )

        return run

    return decorate


def devices_to_share(context: Any) -> int:
    """Returns the number of devices over which XLA will partition the program that is being lowered.

    Args:
      context: of a lowering rule.
    """
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):  # jit
        return axes.num_devices
    if hasattr(axes, "manual_axes"):  # shard_map: only automatic axes are left to XLA
        sizes = axes.mesh.shape.items()
        return math.prod(size for name, size in sizes if name not in axes.manual_axes)
    return 1  # pmap


def lowered_for(platform: str) -> str:
    """Returns the platform whose algorithm a lowering rule should use: its own, unless a test assumes another."""
    return _assumed.get() or platform


@contextlib.contextmanager
def assumed(platform: str) -> Generator[None]:
    """Makes programs use another platform's algorithms, so that those for accelerators can be tested on a CPU.

    Args:
      platform: "cpu", "tpu" or "cuda".
    """
    token = _assumed.set(platform)
    jax.clear_caches()  # these programs were traced or compiled for another platform
    try:
        yield
    finally:
        _assumed.reset(token)
        jax.clear_caches()
