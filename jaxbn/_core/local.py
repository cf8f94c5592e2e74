"""Moments of the batch on one device, by the algorithm that suits the platform of the program.

Every algorithm takes sums about a pivot, one number per feature: of z = x - pivot and of |z|^2.  From these,

    mean = pivot + offset,  offset = E[z],  var = E[|z|^2] - |offset|^2.

The difference loses as many digits as |offset|^2 exceeds var, so the pivot has to be near the mean.  The algorithms
differ in where it comes from, and so in how often they read x:

- on a CPU it is 0, and the mean only where the sums about 0 cancel, which a conditional finds out (`_raw_or_centred`);
- on a TPU it is the mean (`_two_pass`): the compiler takes the first sum in the kernel that produces x;
- on a GPU it is a median of some values of x (`_sampled`), and x is read once, but for small and masked batches.

Accelerators get no conditional over the batch: its operand would have to lie in device memory, where all of x could
have stayed on the chip of a TPU, and the host may have to wait for the predicate on a GPU.

Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, compare them ("shifted data").
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxbn._core import platforms
from jaxbn._core.dtypes import abs2, is_narrow, widen
from jaxbn._core.sums import broadcast, is_sharded_explicitly, sum_both

# A variance taken from raw sums, E[x^2] - E[x]^2, loses as many digits as mean^2 exceeds the variance, and an output
# x a - mean a half as many.  Above this ratio the sums are taken again, centred on the mean, which costs a second
# reading of x.  Just under 4 the loss is about five roundings.  Activations of real nets pass 4 now and then and 16
# hardly ever, but just under 16 the error would be four times as large; 2 they pass half of the time.
CANCELLATION = 4.0

# Values of each feature that a pivot is a median of, a power of three, and the smallest batch to take them from.
SAMPLES = 27
SMALLEST_SAMPLED = 128 * SAMPLES


class Local(NamedTuple):
    """Moments of one device's part of a batch; the mean is pivot + offset, as in `jaxbn._core.measure.Measured`."""

    pivot: jax.Array
    offset: jax.Array
    var: jax.Array


def measure_locally(x, mask, count, negligible, reduced: tuple[int, ...]) -> Local:
    """Measures the part of a batch that is on this device; under jit, the whole batch, wherever it lies.

    Args:
      x: inputs.
      mask: booleans with as many axes as ``x``, of size 1 or as in ``x``; None admits all positions.
      count: number of values behind each feature, of the shape of the features; None for a number known from shapes.
      negligible: a variance whose rounding does not matter.
      reduced: axes to sum over, sorted; the others hold features.

    Returns:
      Moments of the shape of the features.
    """
    operands = [x, jnp.asarray(negligible), *(operand for operand in (mask, count) if operand is not None)]
    options = {"reduced": reduced, "masked": mask is not None, "counted": count is not None}
    if is_sharded_explicitly(x):  # the type says how x lies, and JAX's own operations keep to it
        cpu, accelerator = (functools.partial(_of_operands(f), **options) for f in (_raw_or_centred, _two_pass))
        return Local(*platforms.choose(*operands, cpu=cpu, accelerator=accelerator))
    return Local(*local_p.bind(*platforms.varying_alike(*operands), **options))


def sums_about(pivot, x, mask, reduced) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of x - pivot and of its square, for a pivot per feature; x is read once."""
    wide = widen(x)
    centred = wide - broadcast(pivot, wide, reduced)
    return sum_both(centred, abs2(centred), mask, reduced, narrow=is_narrow(x))


def from_sums(pivot, total, squares, m) -> Local:
    """Returns the moments from sums about a pivot."""
    offset = total / m
    return Local(pivot, offset, jnp.maximum(squares / m - abs2(offset), 0))


def _cancels(mean, square, negligible):
    """Returns whether the means of x and of its square lose too many digits of the variance, in any feature."""
    mean2 = abs2(mean)
    # A sum, since it is cheaper to compile than `any`.
    return (mean2 > CANCELLATION * (square - mean2 + negligible)).astype(jnp.float32).sum() > 0


def _raw_or_centred(x, mask, m, negligible, reduced) -> Local:
    """Sums about 0, and about the mean only where those cancel: one reading of x, or two."""
    wide = widen(x)
    total, squares = sum_both(wide, abs2(wide), mask, reduced, narrow=is_narrow(x))
    cancels = _cancels(total / m, squares / m, negligible)

    def again(x, total, squares):
        del squares
        pivot, wide = total / m, widen(x)  # widened in here: outside, the wide copy of x would be written to memory
        centred = wide - broadcast(pivot, wide, reduced)
        # Not the same difference to the compiler, which would write it to memory for the two sums.
        negative = broadcast(lax.optimization_barrier(pivot), wide, reduced) - wide
        return pivot, *sum_both(centred, abs2(negative), mask, reduced, narrow=is_narrow(x))

    def once(x, total, squares):
        del x
        return jnp.zeros_like(total), total, squares

    # Either branch returns a pivot, and the sum and the sum of squares of x less that.  Coming out of a branch, the
    # pivot is one number wherever it is used: computed in place, it would be contracted to a fused multiply-add there.
    pivot, total, squares = lax.cond(cancels, again, once, x, total, squares)
    return from_sums(pivot, total, squares, m)


def _two_pass(x, mask, m, negligible, reduced) -> Local:
    """Sums about the mean: x is read twice, and nothing is lost whatever it holds."""
    del negligible
    wide = widen(x)
    # Divided inside of the sum, which takes one kernel less; the pivot need not be exact.  But it has to be one number
    # wherever it is used: XLA would fuse a division after the sum into x - pivot, as a fused multiply-add.
    share = 1 / m if isinstance(m, float) else broadcast(1 / m, wide, reduced)
    pivot = jnp.sum(wide * share, reduced, where=mask)
    return from_sums(pivot, *sums_about(pivot, x, mask, reduced), m)


def _sampled(x, mask, m, negligible, reduced) -> Local:
    """Sums about a median of some values: one reading of x, and what is lost is bounded unless the sample is unlucky.

    The pivot is more than t standard deviations from the mean only if the median of the sample is.  By Chebyshev fewer
    than 1 in t^2 of the values lie that far off, whatever the batch holds, and a tree of medians of three passes them
    on only if they are many in the sample: a level makes 3 p^2 - 2 p^3 of a probability p.  With 27 values, t^2 > 8
    (six roundings) is less likely than 1e-4, t^2 > 64 (where outputs leave 5e-6) less than 1e-11.
    The positions are irregular, one in each of 27 equal parts of the batch, and fixed.  An example, a border, or every
    n-th position that is constant or far off does not move the median, unless it is half of the batch, and then it lies
    near the mean.  Whoever knows the positions can move it with 8 of the values; but these raise the variance too, so
    that what is lost stays below n / 8 roundings, for n values of a feature.
    A masked batch, whose sample may hold nothing valid, is read twice; so is a small one, where that costs nothing, one
    of unknown size, and a complex one.
    """
    sizes = [x.shape[i] for i in reduced]
    known = all(isinstance(size, int) for size in sizes)  # not so in a program exported for any size of batch
    if mask is not None or jnp.iscomplexobj(x) or not known or math.prod(sizes) < SMALLEST_SAMPLED:
        return _two_pass(x, mask, m, negligible, reduced)
    positions = np.unravel_index(sample_positions(math.prod(sizes)), sizes)
    values = widen(jnp.moveaxis(x, reduced, range(len(reduced)))[tuple(jnp.asarray(p) for p in positions)])
    while len(values) > 1:
        values = _median_of_three(*values.reshape(3, -1, *values.shape[1:]))
    return from_sums(values[0], *sums_about(values[0], x, mask, reduced), m)


def sample_positions(total: int) -> np.ndarray:
    """Returns the positions, out of ``total``, that a pivot is a median of, in the order in which they are compared."""
    rng = np.random.default_rng(0)
    parts = np.linspace(0, total, SAMPLES, endpoint=False)
    return rng.permutation((parts + rng.uniform(0, total / SAMPLES, SAMPLES)).astype(np.int64))


def _median_of_three(a, b, c):
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _in_groups(algorithm: Callable, groups: int) -> Callable:
    """Returns an algorithm that measures as many groups of the batch as there are devices, and combines them.

    In one program for several devices under jit, a pivot from the whole batch would be a collective more.  The groups
    are equal parts of the batch, as JAX shards it: each lies on one device, if the batch is spread over all of them.
    """

    def measure(x, mask, m, negligible, reduced) -> Local:
        batch = reduced[0]
        if not isinstance(m, float) or not isinstance(x.shape[batch], int) or x.shape[batch] % groups:
            return algorithm(x, mask, m, negligible, reduced)
        split = x.reshape(*x.shape[:batch], groups, x.shape[batch] // groups, *x.shape[batch + 1 :])
        local = algorithm(split, None, m / groups, negligible, tuple(axis + 1 for axis in reduced))

        def add(*parts):
            return [part.sum(batch) for part in parts]

        return combine(local, m / groups, m, negligible, add, axis=batch)[0]

    return measure


def combine(
    local: Local,
    count: float | jax.Array,
    size: float,
    negligible,
    add: Callable[..., Sequence[jax.Array]],
    own: Callable[..., Sequence[jax.Array]] = lambda *totals: totals,
    axis: int | None = None,
) -> tuple[Local, jax.Array]:
    """Combines the moments of the parts of a batch, in one addition, and in a second one where that cancels.

    mean = sum(n_i mean_i) / m,  var = sum(n_i (var_i + |mean_i - pivot|^2)) / m - |mean - pivot|^2, about the pivot 0.
    Where that loses digits, once more about the mean.  The operands of the conditional are numbers per feature.

    Args:
      local: moments of each part.
      count: number of values n_i behind those of a part.
      size: number of values m behind all; 0.0 where only the running program can tell.
      negligible: a variance whose rounding does not matter.
      add: adds arrays over the parts.
      own: of what ``add`` returns, or of a function of it, what belongs to this part.
      axis: of ``local`` along which the parts lie; None if they lie on devices.

    Returns:
      The moments of the whole, and the number of values behind them.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance, equations 2.1.
    """

    def sums(pivot):
        distance = (local.pivot - pivot) + local.offset
        return count * distance, count * (local.var + abs2(distance))

    total, squares, *counts = add(*sums(0), *(() if size else (count,)))
    m = size or jnp.maximum(counts[0], 1)
    # Decided before each part turns to its own: all that add together must take the same branch.
    cancels = _cancels(total / m, squares / m, negligible)
    total, squares, *counts = own(total, squares, *counts)
    m = size or jnp.maximum(counts[0], 1)

    def again(mean):
        total, squares = own(*add(*sums(mean if axis is None else jnp.expand_dims(mean, axis))))
        return mean, total / m, squares / m

    mean, square = total / m, squares / m
    once = jnp.zeros_like(mean), mean, square
    if axis is None:
        pivot, offset, square = lax.cond(cancels, lambda values: again(values[1]), lambda values: values, once)
    else:
        # A loop of no turn or one.  Of a conditional whose branches look cheap, as long as no addition over devices
        # stands in them, XLA executes both on a GPU and selects; then it partitions the program, and adds twice.
        _, (pivot, offset, square) = lax.while_loop(
            lambda state: state[0], lambda state: (jnp.zeros_like(cancels), again(state[1][1])), (cancels, once)
        )
    var = jnp.maximum(square - abs2(offset), 0)
    return Local(pivot, offset, var), jnp.full_like(var, size) if size else counts[0]


# --- the primitive whose lowering chooses among the algorithms ---


def _of_operands(algorithm):
    """Returns an algorithm as a function of operands alone, the number of values among them or known from shapes."""

    def run(x, negligible, *rest, reduced, masked, counted):
        rest = list(rest)
        mask = rest.pop(0) if masked else None
        m = jnp.maximum(rest.pop(0), 1) if counted else float(math.prod(x.shape[i] for i in reduced))
        return list(algorithm(x, mask, m, negligible, reduced))

    return run


def _lower_for(platform):
    def lower(context, *operands, **options):
        chosen = platforms.lowered_for(platform)
        algorithm = ALGORITHMS[chosen]
        devices = platforms.devices_to_share(context)
        if chosen != "cpu" and devices > 1:
            algorithm = _in_groups(algorithm, devices)
        return mlir.lower_fun(_of_operands(algorithm), multiple_results=True)(context, *operands, **options)

    return lower


def _batch(operands, axes, *, reduced, masked, counted):
    """The mapped axis becomes one more feature axis, in front: one conditional decides for all of them."""
    size = next(v.shape[axis] for v, axis in zip(operands, axes, strict=True) if axis is not None)
    x, negligible, *rest = (
        v if axis is None else jnp.moveaxis(v, axis, 0) for v, axis in zip(operands, axes, strict=True)
    )
    mapped_x, mapped_negligible, *mapped = (axis is not None for axis in axes)
    if not mapped_x:
        x = jnp.broadcast_to(x, (size, *x.shape))
    if mapped_negligible:
        features = x.ndim - len(reduced)
        negligible = negligible.reshape(size, *[1] * (features - negligible.ndim), *negligible.shape[1:])
    if masked and not mapped[0]:
        rest[0] = rest[0][None]
    if counted and not mapped[-1]:
        rest[-1] = jnp.broadcast_to(rest[-1], (size, *rest[-1].shape))
    reduced = tuple(axis + 1 for axis in reduced)
    return local_p.bind(x, negligible, *rest, reduced=reduced, masked=masked, counted=counted), (0, 0, 0)


@functools.lru_cache(1024)
def _types(*operands, **options):
    """Returns the types of the results; every algorithm has the same, and the same again for every layer of a kind."""
    return jax.make_jaxpr(functools.partial(_of_operands(_two_pass), **options))(*operands).out_avals


ALGORITHMS = {"cpu": _raw_or_centred, "tpu": _two_pass, "cuda": _sampled, "rocm": _sampled}

local_p = Primitive("local_moments")
local_p.multiple_results = True
local_p.def_impl(_of_operands(_two_pass))  # only with jit disabled: elsewhere it is in a program that is compiled
local_p.def_abstract_eval(lambda *operands, **options: _types(*operands, **options))
batching.primitive_batchers[local_p] = _batch
mlir.register_lowering(local_p, mlir.lower_fun(_of_operands(_two_pass), multiple_results=True))
for _platform in ALGORITHMS:
    mlir.register_lowering(local_p, _lower_for(_platform), platform=_platform)
