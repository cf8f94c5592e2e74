"""The devices that measure a batch together: named axes, groups, and collectives over them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


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

    def size(self) -> int | None:
        """Returns how many devices add together, None if that differs from group to group."""
        sizes = {len(group) for group in self.groups} or {math.prod(lax.axis_size(name) for name in self.names)}
        return sizes.pop() if len(sizes) == 1 else None

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
