"""Sums over a batch, and their transposes: values per feature, broadcast over a batch.

A batch norm needs its sums in pairs: of x and x^2 forward, of dy and dy (x - mean) backward.  For float32, XLA has
kernels for single sums that are hard to beat.  Half precision they do not take: on the CPU, XLA writes it to memory as
float32 first.  There the two sums are taken together, in one reading, where the features come last and the number of
positions has a divisor that suits.  On a GPU, where XLA adds half precision in two steps, the second step of both sums
is one kernel.  Otherwise they are sums like any others.

`pair_sum` and `pair_broadcast` are primitives of JAX, linear and each the transpose of the other, so that every kind of
derivative has its sums in pairs too.

``reduced`` names the axes that are summed over, a sorted tuple; the others hold features.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbn._core import platforms

# Positions that are added first, in one loop that XLA writes out, with the features side by side.  Loops of more than
# 32 are not written out, and many times slower; in short ones too much is left to add afterwards.
LONGEST_RUN = 16
SHORTEST_RUN = 4
# On a GPU: positions from which on sums are added in two steps, how many the first step adds at the least, and how many
# sums it leaves at the least.
SMALLEST_IN_PARTS = 4096
FEWEST_PER_PART = 32
FEWEST_PARTS = 16


def sum_both(
    a: jax.Array, b: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], *, narrow: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of a and of b where a mask admits them; see :func:`pair_sum`."""
    if mask is not None:
        a, b = (jnp.where(mask, values, 0) for values in (a, b))
    return pair_sum(a, b, reduced, narrow=narrow)


def pair_sum(
    a: jax.Array, b: jax.Array, reduced: tuple[int, ...], *, narrow: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of a and of b, arrays of one shape, over the axes ``reduced``.

    ``narrow`` says that both are made of an array of a narrower dtype, which is what lies in memory.
    """
    if is_sharded_explicitly(a):
        total_a, total_b = _sum_each(a, b, reduced=reduced)
    else:
        total_a, total_b = sum_p.bind(*platforms.varying_alike(a, b), reduced=reduced, narrow=narrow)
    return total_a, total_b


def pair_broadcast(
    a: jax.Array, b: jax.Array, x: jax.Array, reduced: tuple[int, ...], *, narrow: bool = True
) -> tuple[jax.Array, jax.Array]:
    """Returns what :func:`broadcast` does of a and of b; of their cotangents, the sums are a pair."""
    if is_sharded_explicitly(x):
        return broadcast(a, x, reduced), broadcast(b, x, reduced)
    # Made to vary over devices before they are broadcast: afterwards, whole batches would be added over the devices.
    a, b, _ = platforms.varying_alike(a, b, x)
    wide_a, wide_b = broadcast_p.bind(a, b, shape=x.shape, reduced=reduced, narrow=narrow)
    return wide_a, wide_b


def broadcast(values: jax.Array, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Returns values, of which there is one per feature, in the shape of x or in one that broadcasts to it."""
    if is_sharded_explicitly(x) or jax.typeof(x).manual_axis_type.varying:
        return jnp.expand_dims(values, reduced)  # JAX minds the devices when it broadcasts, and when it transposes that
    # In one operation, and in one when transposed: left to JAX there are four, and all of them have to be compiled.
    return lax.broadcast_in_dim(values, x.shape, [axis for axis in range(x.ndim) if axis not in reduced])


def is_sharded_explicitly(x):
    """Returns whether the type of x says how it lies on devices; JAX's own sums and broadcasts then keep to it."""
    return any(jax.typeof(x).sharding.spec)


def _sum_each(a, b, *, reduced, narrow=False):
    del narrow
    return [jnp.sum(a, reduced), jnp.sum(b, reduced)]


def _sum_in_parts(a, b, *, reduced):
    """Adds in two steps, as XLA does on a GPU, but with the second step of both sums in one kernel."""
    positions, features = _positions_and_features(a, reduced)
    total = math.prod(positions)
    if features is None or a.dtype != b.dtype or total < SMALLEST_IN_PARTS:
        return _sum_each(a, b, reduced=reduced)
    # XLA itself takes a power of two below the root.  With up to three times as many parts, it fuses what makes the
    # sums, such as the derivative of a ReLU, into their kernel, rather than writing it to memory.
    most = min(3 * math.isqrt(total), total // FEWEST_PER_PART)
    parts = max(part for part in range(1, most + 1) if total % part == 0)
    if parts < FEWEST_PARTS:
        return _sum_each(a, b, reduced=reduced)
    both = jnp.stack([jnp.sum(each.reshape(parts, total // parts, *features), 1) for each in (a, b)])
    return list(jnp.sum(both, 1))


def _positions_and_features(a, reduced):
    """Returns the sizes of the axes that are summed over, and of the others; None where these do not come last."""
    features_last = reduced == tuple(range(len(reduced))) and len(reduced) < a.ndim
    known = all(isinstance(size, int) for size in a.shape)  # not so in a program exported for any size of batch
    return a.shape[: len(reduced)], a.shape[len(reduced) :] if features_last and known else None


def _sum_together(a, b, *, reduced):
    """Adds runs of up to `LONGEST_RUN` positions of both arrays in one loop, and what comes out as usual."""
    positions, features = _positions_and_features(a, reduced)
    length = 1 if features is None else _run_length(positions)
    if features is None or a.dtype != b.dtype or length < SHORTEST_RUN:
        return _sum_each(a, b, reduced=reduced)
    runs = (math.prod(positions) // length, length, *features)
    zero = jnp.zeros((), a.dtype)
    a, b = lax.reduce((a.reshape(runs), b.reshape(runs)), (zero, zero), _add_both, (1,))
    return _sum_each(a, b, reduced=(0,))


def _run_length(positions):
    """Returns how many neighbours make a run, up to `LONGEST_RUN`: of whole trailing axes, and a part of one."""
    length = 1
    for size in reversed(positions):
        part = max(part for part in range(1, LONGEST_RUN // length + 1) if size % part == 0)
        length *= part
        if part < size:
            break
    return length


def _add_both(a, b):
    return a[0] + b[0], a[1] + b[1]


def _broadcast_each(a, b, *, shape, reduced, narrow=False):
    del narrow
    kept = [axis for axis in range(len(shape)) if axis not in reduced]
    return [lax.broadcast_in_dim(value, shape, kept) for value in (a, b)]


def _lower_sum_for(platform):
    def lower(context, a, b, *, reduced, narrow):
        # In a program for several devices, runs could reach from one to the next, and the batch would be gathered.
        alone = platforms.devices_to_share(context) == 1
        chosen = platforms.lowered_for(platform)
        sums = _sum_each
        if alone and chosen == "cpu" and narrow:
            sums = _sum_together
        # XLA may put the features of images in float32 first in memory (it does for an A100), and the parts of a batch
        # would have to be laid out anew.
        elif alone and chosen in ("cuda", "rocm") and (narrow or context.avals_in[0].ndim == 2):
            sums = _sum_in_parts
        return mlir.lower_fun(sums, multiple_results=True)(context, a, b, reduced=reduced)

    return lower


def _linear_primitive(name, each):
    """Returns a primitive that is linear in its two arrays jointly, has two results, and does what ``each`` does."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda a, b, **options: _compiled(each, **options)(a, b))
    primitive.def_abstract_eval(lambda a, b, **options: _types(each, a, b, **options))
    mlir.register_lowering(primitive, mlir.lower_fun(each, multiple_results=True))

    def jvp(primals, tangents, **options):
        values = primitive.bind(*primals, **options)
        return values, primitive.bind(*map(ad.instantiate_zeros, tangents), **options)

    ad.primitive_jvps[primitive] = jvp
    return primitive


@functools.lru_cache(1024)
def _types(function, a, b, **options):
    return jax.make_jaxpr(_bound(function, **options))(a, b).out_avals


@functools.cache
def _compiled(function, **options):
    return jax.jit(_bound(function, **options))


def _bound(function, **options):
    return functools.partial(function, **options)


sum_p = _linear_primitive("pair_sum", _sum_each)
broadcast_p = _linear_primitive("pair_broadcast", _broadcast_each)
for _platform in ("cpu", "cuda", "rocm"):
    mlir.register_lowering(sum_p, _lower_sum_for(_platform), platform=_platform)


def _transpose_sum(cotangents, a, b, **options):
    shape = next(v.aval.shape for v in (a, b) if ad.is_undefined_primal(v))
    return broadcast_p.bind(*map(ad.instantiate_zeros, cotangents), shape=shape, **options)


def _transpose_broadcast(cotangents, a, b, *, shape, **options):
    del a, b, shape
    return sum_p.bind(*map(ad.instantiate_zeros, cotangents), **options)


def _batch_sum(values, axes, *, reduced, narrow):
    _, values = _to_front(values, axes)
    return sum_p.bind(*values, reduced=tuple(axis + 1 for axis in reduced), narrow=narrow), (0, 0)


def _batch_broadcast(values, axes, *, shape, reduced, narrow):
    size, values = _to_front(values, axes)
    reduced = tuple(axis + 1 for axis in reduced)
    return broadcast_p.bind(*values, shape=(size, *shape), reduced=reduced, narrow=narrow), (0, 0)


def _to_front(values, axes):
    """Returns the size of the mapped axis, and the values with it in front, also of those that lack it: None."""
    size = next(v.shape[axis] for v, axis in zip(values, axes, strict=True) if axis is not None)
    return size, [
        jnp.broadcast_to(v, (size, *v.shape)) if axis is None else jnp.moveaxis(v, axis, 0)
        for v, axis in zip(values, axes, strict=True)
    ]


ad.primitive_transposes[sum_p] = _transpose_sum
ad.primitive_transposes[broadcast_p] = _transpose_broadcast
batching.primitive_batchers[sum_p] = _batch_sum
batching.primitive_batchers[broadcast_p] = _batch_broadcast
