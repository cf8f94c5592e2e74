"""The devices that measure a batch together: named axes, groups of devices, and the collectives over them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._core import lowering


class Devices(NamedTuple):
    """The named device axes over which a batch is spread.

    Hashable, so that `jax.jit` and `jax.custom_jvp` can take it as a static argument.

    Attributes:
      names: names of the axes; empty if the batch is not spread over named axes.
      groups: groups of device indices that are summed separately; empty if all devices are summed together.
    """

    names: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()

    def total(self, *sums: jax.Array) -> tuple[jax.Array, ...]:
        """Adds arrays of one shape over the devices, or over this device's group, in one collective."""
        return self.own(*self.totals(*sums))

    def totals(self, *sums: jax.Array) -> tuple[jax.Array, ...]:
        """Adds like :meth:`total`, but leaves it to :meth:`own` to pick the totals of this device's group.

        Where JAX cannot add within groups, returns the totals of all groups, stacked on a new first axis.
        """
        if not self.names:
            return sums
        # One array, and so one collective: its latency, not its size, is what a few numbers per feature cost.
        reals: list[jax.Array] = []
        for values in sums:
            reals += (values.real, values.imag) if jnp.iscomplexobj(values) else (values,)
        reals = lowering.sharded_alike(*reals)
        if jax.typeof(reals[0]).sharding.mesh.explicit_axes and not self._are_manual() and not self.groups:
            # Under vmap, JAX does not stack mapped and other arrays if the mapped axis is sharded explicitly.
            added = lax.psum(reals, self.names)
        else:
            added = self._add(jnp.stack(reals))
        parts = iter(added)
        return tuple(
            lax.complex(next(parts), next(parts)) if jnp.iscomplexobj(values) else next(parts) for values in sums
        )

    def own(self, *totals: jax.Array) -> tuple[jax.Array, ...]:
        """Picks this device's group from the totals of all groups, or from a function of them."""
        if self._adds_within_groups():
            return totals
        return tuple(total[self._group()] for total in totals)

    def size(self) -> int | None:
        """Returns how many devices add together; None if that differs between groups."""
        sizes = {len(group) for group in self.groups}
        if not self.groups:
            sizes = {math.prod(lax.axis_size(name) for name in self.names)}
        return sizes.pop() if len(sizes) == 1 else None

    def _add(self, stacked: jax.Array) -> jax.Array:
        """Adds over devices, within each group; where JAX cannot, the groups become a new second axis."""
        if self._adds_within_groups():
            return lax.psum(stacked, self.names, axis_index_groups=self.groups or None)
        # Each device adds zeros to the rows of the other groups.
        is_own_row = jnp.arange(len(self.groups)) == self._group()
        is_own_row = jnp.expand_dims(is_own_row, (0, *range(2, stacked.ndim + 1)))
        return lax.psum(lowering.where(is_own_row, stacked[:, None], 0), self.names)

    def _group(self) -> jax.Array:
        """Returns the number of this device's group."""
        group_of = {index: number for number, members in enumerate(self.groups) for index in members}
        group_by_index = jnp.asarray([group_of[index] for index in range(len(group_of))])
        return group_by_index[lax.axis_index(self.names)]

    def _are_manual(self) -> bool:
        """Tells whether the axes are those of shard_map or pmap, and not of vmap."""
        return {*self.names} <= {*jax.sharding.get_abstract_mesh().manual_axes}

    def _adds_within_groups(self) -> bool:
        """Tells whether `lax.psum` accepts these groups here.

        It does under pmap and under shard_map with check_vma=False, but not under vmap or with check_vma=True, and
        groups of unequal size work on some platforms only.
        """
        if not self.groups:
            return True
        if len(set(map(len, self.groups))) > 1:
            return False
        if not self._are_manual():
            return False
        return not any(is_tracked(name) for name in self.names)


def is_tracked(name: str) -> bool:
    """Tells whether JAX tracks which values vary over an axis: an axis of shard_map with check_vma=True."""
    if name not in jax.sharding.get_abstract_mesh().manual_axes:
        return False
    # JAX has no query for check_vma.  Only with check_vma=True does a value cast to vary say that it varies.
    probe = lax.pcast(jnp.zeros(()), name, to="varying")
    return bool(jax.typeof(probe).manual_axis_type.varying)
