"""The sums behind the moments of a batch, their derivative, and their addition over devices.

``reduced`` names the axes that are summed over, a sorted tuple; the others hold features.  Nothing is checked here: the
public functions have done it.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# A variance taken from raw sums, E[x^2] - E[x]^2, loses as many digits as mean^2 exceeds the variance.  Above this
# ratio the sums are taken again, centred on the mean, which costs a second reading of x.  Just under 4 the loss is
# about five roundings.  Activations of real nets pass 4 now and then and 16 hardly ever, but just under 16 the error
# would be four times as large; 2 they pass half of the time.
CANCELLATION = 4.0


class Devices(NamedTuple):
    """The device axes that a batch is spread over; hashable, so that compiled functions are found again.

    Attributes:
      names: names of the axes; none for a batch in one piece.
      groups: groups of device indices that are summed separately; none for all together.
    """

    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()

    def total(self, *sums: jax.Array) -> tuple[jax.Array, ...]:
        """Adds arrays of one shape over the devices, or over the group of this device, in one collective."""
        return self.own(*self.totals(*sums))

    def totals(self, *sums: jax.Array) -> tuple[jax.Array, ...]:
        """Adds as :meth:`total` does, but leaves the choice of this device's group to :meth:`own`.

        Where JAX cannot add within groups, the totals of all groups come back, stacked on a new first axis.
        """
        if not self.names:
            return sums
        stacked = jnp.stack([part for s in sums for part in ((s.real, s.imag) if jnp.iscomplexobj(s) else (s,))])
        if self._adds_within_groups():
            added = lax.psum(stacked, self.names, axis_index_groups=self.groups or None)
        else:
            mine = jnp.expand_dims(jnp.arange(len(self.groups)) == self._group(), (0, *range(2, stacked.ndim + 1)))
            added = lax.psum(jnp.where(mine, stacked[:, None], 0), self.names)
        parts = iter(added)
        return tuple(lax.complex(next(parts), next(parts)) if jnp.iscomplexobj(s) else next(parts) for s in sums)

    def own(self, *totals: jax.Array) -> tuple[jax.Array, ...]:
        """Returns what :meth:`totals`, or a function of it, holds for the group of this device."""
        return totals if self._adds_within_groups() else tuple(total[self._group()] for total in totals)

    def _group(self):
        """The number of this device's group."""
        number = {index: group for group, members in enumerate(self.groups) for index in members}
        return jnp.asarray([number[index] for index in range(len(number))])[lax.axis_index(self.names)]

    def _adds_within_groups(self):
        """Whether JAX can add within the groups: not under vmap, nor under shard_map with check_vma=True.

        Groups of unequal size it can add on some platforms only.
        """
        if not self.groups:
            return True
        if len(set(map(len, self.groups))) > 1 or not {*self.names} <= {*jax.sharding.get_abstract_mesh().manual_axes}:
            return False
        # Only with check_vma=True does a value that was cast to vary over the devices say that it does.
        return not jax.typeof(lax.pcast(jnp.zeros(()), self.names, to="varying")).manual_axis_type.varying


class Measured(NamedTuple):
    """Moments whose mean is kept as two floats, so that x - mean - residue is exact to the precision of x.

    Attributes:
      mean: leading part of the mean, shape [C]; constant to differentiation.
      residue: rest of the mean, shape [C]; carries the derivative of both.
      var: biased variance, shape [C].
      count: number of values behind each feature, on all devices, shape [C].
    """

    mean: jax.Array
    residue: jax.Array
    var: jax.Array
    count: jax.Array


def measure(x, mask, reduced: tuple[int, ...], devices: Devices, negligible) -> Measured:
    """Measures a batch.

    Args:
      x: inputs.
      mask: booleans with as many axes as ``x``, of size 1 or as in ``x``; None admits all positions.
      reduced: axes to sum over.
      devices: what to add over.
      negligible: a variance whose rounding does not matter.

    Returns:
      Statistics of the shape of the other axes.
    """
    return Measured(*_measure(x, mask, _count(x, mask, reduced), negligible, reduced, devices))


def fill(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns ``x`` with 0 where it is masked and not finite, so that it reaches neither outputs nor gradients."""
    return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, jnp.zeros_like(x))


def widen(x: jax.Array) -> jax.Array:
    """Returns ``x`` in at least float32; inside a reduction or a fused loop the wide copy is never in memory."""
    return x.astype(_wide(x.dtype))


def abs2(x: jax.Array) -> jax.Array:
    """Returns |x|^2, real also where x is complex."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
@functools.partial(jax.jit, static_argnums=(4, 5))  # called eagerly, the branches would be compiled at every call
def _measure(x, mask, count, negligible, reduced, devices):
    """Returns mean, residue, variance and count: raw sums in one reading of x, centred sums only where those cancel."""
    expand = functools.partial(jnp.expand_dims, axis=reduced)
    wide = widen(x)
    count, raw, squares = devices.totals(count, _sum(wide, reduced, mask), _sum(abs2(wide), reduced, mask))
    m = jnp.maximum(count, 1)
    mean = raw / m
    var = jnp.maximum(squares / m - abs2(mean), 0)
    # Decided before each device turns to its own group: all that add together must take the same branch.
    cancels = jnp.any(abs2(mean) > CANCELLATION * (var + negligible))
    mean, var, count, m = devices.own(mean, var, count, m)

    def again(x):
        centred = widen(x) - expand(mean)  # widened in here: outside, the wide copy of x would be written to memory
        raw, squares = devices.total(_sum(centred, reduced, mask), _sum(abs2(centred), reduced, mask))
        residue = raw / m
        high = mean + residue
        return high, residue - (high - mean), jnp.maximum(squares / m - abs2(residue), 0)

    # The mean goes through the branches, changed by one of them, so that it is written to memory: recomputed from the
    # sum where it is used, it would be contracted to a fused multiply-add, and the residue would be that of another.
    mean, residue, var = lax.cond(cancels, again, lambda x: (mean, jnp.zeros_like(mean), var), x)
    return mean, residue, var, count


@_measure.defjvp
def _measure_jvp(reduced, devices, primals, tangents):
    """Derivative of the moments: d mean = E[dx],  d var = 2 E[Re(conj(x - mean) dx)].

    The whole derivative of the mean goes to the residue.  With the leading part constant, the cotangent of the mean
    is a multiple of sum(dy), which the bias needs anyway, and a reading of x and dy is saved.
    """
    x, mask, *_ = primals
    mean, residue, var, count = _measure(*primals, reduced, devices)
    mean_dot, var_dot = _mean_and_var_dot(x, mask, mean, residue, count, tangents[0], reduced, devices)
    return (mean, residue, var, count), (jnp.zeros_like(mean), mean_dot, var_dot, jnp.zeros_like(count))


@functools.partial(jax.checkpoint, static_argnums=(6, 7))  # keeps x alone for the backward pass, not x - mean as well
def _mean_and_var_dot(x, mask, mean, residue, count, x_dot, reduced, devices):
    expand = functools.partial(jnp.expand_dims, axis=reduced)
    x_dot = widen(x_dot)
    centred = (widen(fill(x, mask)) - expand(mean)) - expand(residue)
    sums = devices.total(_sum(x_dot, reduced, mask), _sum((jnp.conj(centred) * x_dot).real, reduced, mask))
    m = jnp.maximum(count, 1)
    return sums[0] / m, 2 * sums[1] / m


def _sum(values, reduced, mask):
    return jnp.sum(values, reduced, where=mask)


def _count(x, mask, reduced):
    """Returns the number of values behind each feature on this device."""
    dtype = jnp.finfo(_wide(x.dtype)).dtype
    features = tuple(x.shape[i] for i in range(x.ndim) if i not in reduced)
    if mask is None:
        return jnp.full(features, math.prod(x.shape[i] for i in reduced), dtype)
    repeats = math.prod(x.shape[i] for i in reduced if mask.shape[i] == 1)
    # Added as whole numbers, since a float32 sum of ones stops at 2^24; over the examples as floats, where they are
    # fewer, so that jit adds them over devices in one collective with the other sums.
    last = tuple(i for i in reduced[:1] if mask.shape[i] < 2**24)
    admitted = jnp.sum(mask, tuple(i for i in reduced if i not in last), dtype=jnp.int32, keepdims=True)
    admitted = jnp.sum(admitted.astype(dtype), last, keepdims=True).squeeze(reduced)
    return jnp.broadcast_to(admitted * repeats, features)


def _wide(dtype):
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
