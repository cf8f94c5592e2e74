"""Sums over a batch, two at a time, and their transposes: broadcasts of values per feature.

Batch norm needs its sums in pairs: of x and x^2 forward, of dy and dy (x - mean) backward.  In float32, XLA's kernels
for single sums are hard to beat.  In half precision they are not:

- On a CPU, XLA writes a float32 copy of the batch to memory before it sums.  `_sum_in_runs` sums both in one loop over
  x, which fuses the cast, if the features are last and the number of positions has a suitable divisor.
- On a GPU, XLA sums in two steps.  `_sum_in_parts` does the second step of both sums in one kernel.

Everything else is left to `jnp.sum`.

`pair_sum` and `pair_broadcast` are linear primitives, each the transpose of the other.  So the sums of every derivative
come in pairs as well, of any order and in any mode: JAX derives them from these two rules.

``reduced`` names the axes that are summed over, a sorted tuple; the others hold features.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbn._core import lowering

# How many neighboring positions a CPU sums first, in a loop that XLA unrolls, with the features side by side.  XLA does
# not unroll loops of more than 32, which makes them many times slower; short runs leave too much to sum afterward.
LONGEST_RUN = 16
SHORTEST_RUN = 4

# On a GPU: the number of positions from which sums take two steps, the least that the first step sums, and the least
# number of sums that it leaves.
SMALLEST_IN_PARTS = 4096
FEWEST_PER_PART = 32
FEWEST_PARTS = 16

Pair = tuple[jax.Array, jax.Array]


def masked_pair_sum(
    a: jax.Array,
    b: jax.Array,
    mask: jax.Array | None,
    reduced: tuple[int, ...],
    *,
    narrow: bool,
) -> Pair:
    """Sums a and b where the mask is True; see :func:`pair_sum`."""
    if mask is not None:
        a, b = lowering.where(mask, a, 0), lowering.where(mask, b, 0)
    return pair_sum(a, b, reduced, narrow=narrow)


def pair_sum(a: jax.Array, b: jax.Array, reduced: tuple[int, ...], *, narrow: bool = True) -> Pair:
    """Sums two arrays of one shape over the axes ``reduced``.

    Args:
      a: one array.
      b: the other.
      reduced: axes to sum over.
      narrow: whether a and b are casts from a narrower dtype, in which the batch is in memory.

    Returns:
      The sums of a and of b.
    """
    if is_sharded_explicitly(a):
        total_a, total_b = _sum_separately(a, b, reduced=reduced)
    else:
        total_a, total_b = sum_p.bind(*lowering.varying_alike(a, b), reduced=reduced, narrow=narrow)
    return total_a, total_b


def pair_broadcast(a: jax.Array, b: jax.Array, x: jax.Array, reduced: tuple[int, ...], *, narrow: bool = True) -> Pair:
    """Broadcasts a and b like :func:`broadcast`; the transpose sums both cotangents in one pass."""
    if is_sharded_explicitly(x):
        return broadcast(a, x, reduced), broadcast(b, x, reduced)
    # Cast to vary over devices before the broadcast.  The transpose of the cast is a psum, which then adds values per
    # feature over the devices; after the broadcast it would add whole batches.
    a, b, _ = lowering.varying_alike(a, b, x)
    wide_a, wide_b = broadcast_p.bind(a, b, shape=x.shape, reduced=reduced, narrow=narrow)
    return wide_a, wide_b


def broadcast(values: jax.Array, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Expands values per feature to the shape of x, or to a shape that broadcasts to it."""
    if is_sharded_explicitly(x) or jax.typeof(x).manual_axis_type.varying:
        # JAX's implicit broadcast handles shardings and varying axes, and so does its transpose.
        return jnp.expand_dims(values, reduced)
    # One operation, and one for its transpose, where JAX's implicit broadcast makes four that all have to be compiled.
    return lax.broadcast_in_dim(values, x.shape, [axis for axis in range(x.ndim) if axis not in reduced])


def is_sharded_explicitly(x: jax.Array) -> bool:
    """Tells whether the type of x holds its sharding, which JAX's own operations then propagate."""
    return any(jax.typeof(x).sharding.spec)


# Ways to sum.


def _sum_separately(a: jax.Array, b: jax.Array, *, reduced: tuple[int, ...], narrow: bool = False) -> list[jax.Array]:
    del narrow
    return [jnp.sum(a, reduced), jnp.sum(b, reduced)]


def _sum_in_runs(a: jax.Array, b: jax.Array, *, reduced: tuple[int, ...]) -> list[jax.Array]:
    """Sums runs of up to `LONGEST_RUN` positions of both arrays in one loop, and then the sums of the runs."""
    positions, features = _positions_and_features(a, reduced)
    if features is None or a.dtype != b.dtype:
        return _sum_separately(a, b, reduced=reduced)
    length = _run_length(positions)
    if length < SHORTEST_RUN:
        return _sum_separately(a, b, reduced=reduced)
    runs = (math.prod(positions) // length, length, *features)
    zero = jnp.zeros((), a.dtype)
    a, b = lax.reduce((a.reshape(runs), b.reshape(runs)), (zero, zero), _add_pairs, (1,))
    return _sum_separately(a, b, reduced=(0,))


def _sum_in_parts(a: jax.Array, b: jax.Array, *, reduced: tuple[int, ...]) -> list[jax.Array]:
    """Sums in two steps, as XLA does on a GPU, but with the second step of both sums in one kernel."""
    positions, features = _positions_and_features(a, reduced)
    total = math.prod(positions)
    if features is None or a.dtype != b.dtype or total < SMALLEST_IN_PARTS:
        return _sum_separately(a, b, reduced=reduced)
    # XLA itself chooses a power of two below the square root.  With up to three times as many parts, it fuses what
    # makes the summands, such as the derivative of a ReLU, into the first kernel rather than write it to memory.
    most = min(3 * math.isqrt(total), total // FEWEST_PER_PART)
    parts = max(number for number in range(1, most + 1) if total % number == 0)
    if parts < FEWEST_PARTS:
        return _sum_separately(a, b, reduced=reduced)
    shape = (parts, total // parts, *features)
    both = jnp.stack([jnp.sum(values.reshape(shape), 1) for values in (a, b)])
    return list(jnp.sum(both, 1))


def _positions_and_features(a: jax.Array, reduced: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Returns the sizes of the axes to sum over, and of the others; None for those unless they come last."""
    features_are_last = reduced == tuple(range(len(reduced))) and len(reduced) < a.ndim
    is_exported_for_any_size = not all(isinstance(size, int) for size in a.shape)
    features = a.shape[len(reduced) :] if features_are_last and not is_exported_for_any_size else None
    return a.shape[: len(reduced)], features


def _run_length(positions: tuple[int, ...]) -> int:
    """Returns how many neighbors make a run, up to `LONGEST_RUN`: whole trailing axes, and a part of one more."""
    length = 1
    for size in reversed(positions):
        part = max(part for part in range(1, LONGEST_RUN // length + 1) if size % part == 0)
        length *= part
        if part < size:
            break
    return length


def _add_pairs(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def _broadcast_separately(
    a: jax.Array,
    b: jax.Array,
    *,
    shape: tuple[int, ...],
    reduced: tuple[int, ...],
    narrow: bool = False,
) -> list[jax.Array]:
    del narrow
    kept = [axis for axis in range(len(shape)) if axis not in reduced]
    return [lax.broadcast_in_dim(value, shape, kept) for value in (a, b)]


# The primitives.


def _linear_primitive(name: str, implementation: Callable[..., list[jax.Array]]) -> Primitive:
    """Makes a primitive of a function that is linear in its two arrays together, and has two results."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda a, b, **options: _compiled(implementation, **options)(a, b))
    primitive.def_abstract_eval(lambda a, b, **options: _types(implementation, a, b, **options))
    mlir.register_lowering(primitive, mlir.lower_fun(implementation, multiple_results=True))

    def jvp(primals: Sequence[jax.Array], tangents: Sequence[Any], **options: Any) -> tuple[Any, Any]:
        # Linear: the tangents of the results are the results for the tangents.
        results = primitive.bind(*primals, **options)
        return results, primitive.bind(*map(ad.instantiate_zeros, tangents), **options)

    ad.primitive_jvps[primitive] = jvp
    return primitive


@functools.lru_cache(1024)  # networks have many layers of the same shape
def _types(function: Callable, a: Any, b: Any, **options: Any) -> Any:
    return jax.make_jaxpr(functools.partial(function, **options))(a, b).out_avals


@functools.cache  # for eager calls
def _compiled(function: Callable, **options: Any) -> Callable:
    return jax.jit(functools.partial(function, **options))


sum_p = _linear_primitive("pair_sum", _sum_separately)
broadcast_p = _linear_primitive("pair_broadcast", _broadcast_separately)


def _sum_lowering_for(platform: str) -> Callable:
    def lower(context: Any, a: Any, b: Any, *, reduced: tuple[int, ...], narrow: bool) -> Any:
        chosen = lowering.lowered_for(platform)
        # In a program for several devices, a run or a part could reach from one to the next, and XLA would gather the
        # batch.
        is_for_one_device = lowering.devices_to_share(context) == 1
        sum_ = _sum_separately
        if is_for_one_device and chosen == "cpu" and narrow:
            sum_ = _sum_in_runs
        # Not for images in float32: XLA may put their features first in memory (it does for an A100), and would have to
        # copy the batch to cut it into parts.
        elif is_for_one_device and chosen in ("cuda", "rocm") and (narrow or context.avals_in[0].ndim == 2):
            sum_ = _sum_in_parts
        return mlir.lower_fun(sum_, multiple_results=True)(context, a, b, reduced=reduced)

    return lower


for _platform in ("cpu", "cuda", "rocm"):
    mlir.register_lowering(sum_p, _sum_lowering_for(_platform), platform=_platform)


# Their derivatives and batching rules.


def _transpose_sum(cotangents: Sequence[Any], a: Any, b: Any, **options: Any) -> list[jax.Array]:
    shape = next(v.aval.shape for v in (a, b) if ad.is_undefined_primal(v))
    return broadcast_p.bind(*map(ad.instantiate_zeros, cotangents), shape=shape, **options)


def _transpose_broadcast(
    cotangents: Sequence[Any],
    a: Any,
    b: Any,
    *,
    shape: tuple[int, ...],
    **options: Any,
) -> list[jax.Array]:
    del a, b, shape
    return sum_p.bind(*map(ad.instantiate_zeros, cotangents), **options)


def _batch_sum(
    values: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    reduced: tuple[int, ...],
    narrow: bool,
) -> tuple[list[jax.Array], tuple[int, int]]:
    _, values = _to_front(values, axes)
    # The mapped axis becomes one more feature axis, in front.
    return sum_p.bind(*values, reduced=tuple(axis + 1 for axis in reduced), narrow=narrow), (0, 0)


def _batch_broadcast(
    values: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    shape: tuple[int, ...],
    reduced: tuple[int, ...],
    narrow: bool,
) -> tuple[list[jax.Array], tuple[int, int]]:
    size, values = _to_front(values, axes)
    reduced = tuple(axis + 1 for axis in reduced)
    return broadcast_p.bind(*values, shape=(size, *shape), reduced=reduced, narrow=narrow), (0, 0)


def _to_front(values: Sequence[jax.Array], axes: Sequence[int | None]) -> tuple[int, list[jax.Array]]:
    """Returns the size of the mapped axis, and the values with that axis in front; repeats the unmapped ones."""
    size = next(v.shape[axis] for v, axis in zip(values, axes, strict=True) if axis is not None)
    return size, lowering.sharded_alike(
        *(
            jnp.broadcast_to(v, (size, *v.shape)) if axis is None else jnp.moveaxis(v, axis, 0)
            for v, axis in zip(values, axes, strict=True)
        )
    )


ad.primitive_transposes[sum_p] = _transpose_sum
ad.primitive_transposes[broadcast_p] = _transpose_broadcast
batching.primitive_batchers[sum_p] = _batch_sum
batching.primitive_batchers[broadcast_p] = _batch_broadcast
