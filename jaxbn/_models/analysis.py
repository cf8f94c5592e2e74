"""What the marked calls in a program are: their layers, their levels, and which arrays they have their statistics from.

The program is walked with what is known of its values in place of their numbers: how many batch norms are before them,
and whether they are arrays of the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxbn._models.marks import Mapped, Site, call_p
from jaxbn._models.tracing import Leaf, Path

# Primitives that call a function once, and do nothing else.  Their names differ between versions of JAX.
CALLS = {"jit", "pjit", "closed_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
# Primitives that return their first input, perhaps in another dtype or on other devices.
HAND_ON = {"convert_element_type", "sharding_constraint", "copy", "name", "optimization_barrier", "pvary"}

Place = tuple[int, ...]


class Origin(NamedTuple):
    """Where a value comes from, if it is an array of the model, or a slice of one for each turn of a loop.

    Attributes:
      leaf: number of the array.
      axes: the array's axis for each axis of the value; None for a new one.
      turns: pairs of the depth of a loop, counted from the outermost, and the array's axis that it slices.
    """

    leaf: int
    axes: tuple[int | None, ...]
    turns: tuple[tuple[int, int], ...] = ()


class Call(NamedTuple):
    """A marked call of a batch norm in a program.

    Attributes:
      site: what is static.
      path: of the layer.
      mean: number of the array of the running mean; None if it is not an array of the model, or not all of one.
      var: the same for the running variance.
      axes: the running mean's axis for each axis in front of a record, None where turns share the statistics.
      sizes: of the axes in front of a record.
      levels: number of batch norms that are not frozen on the longest path from the model's inputs to this call, itself
        included, for each turn of the loops; of shape ``sizes`` without those of vmap.
      features: shape of the running mean in one turn.
      dtype: of the running mean.
      hidden: why the call cannot be answered by a rule, or None.
      is_conditional: whether it is in a branch that may not be taken.
      is_differentiated: whether the model takes a derivative of it.
    """

    site: Site
    path: Path
    mean: int | None
    var: int | None
    axes: tuple[int | None, ...]
    sizes: tuple[int, ...]
    levels: np.ndarray
    features: tuple[int, ...]
    dtype: Any
    hidden: str | None
    is_conditional: bool
    is_differentiated: bool


class Value(NamedTuple):
    """What is known of a value: the number of batch norms before it, and where it comes from."""

    level: int
    origin: Origin | None = None


class Where(NamedTuple):
    """Where an equation is: its place, the lengths of the loops around it, and what hides it."""

    place: Place = ()
    turns: tuple[int, ...] = ()
    hidden: str | None = None
    is_conditional: bool = False


Levels = dict[Place, Any]  # of each call, nested lists by turn


class Walk:
    """Finds the calls of a program, their levels, and which arrays of the model are read."""

    def __init__(self, leaves: list[Leaf]):
        self.leaves = leaves
        self.calls: dict[Place, Call] = {}
        self.read: set[int] = set()

    def program(self, jaxpr: Jaxpr, arguments: Sequence[Value], where: Where) -> tuple[list[Value], Levels]:
        env: dict[Any, Value] = dict.fromkeys(jaxpr.constvars, Value(0)) | dict(
            zip(jaxpr.invars, arguments, strict=True)
        )
        levels: Levels = {}

        def read(atom):
            return Value(0) if isinstance(atom, Literal) else env[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            here = where._replace(place=(*where.place, number))
            outputs, of_eqn = self.equation(eqn, [read(atom) for atom in eqn.invars], here)
            env.update(zip(eqn.outvars, outputs, strict=True))
            levels |= of_eqn
        return [read(atom) for atom in jaxpr.outvars], levels

    def equation(self, eqn: JaxprEqn, values: list[Value], where: Where) -> tuple[list[Value], Levels]:
        name, level = eqn.primitive.name, max((value.level for value in values), default=0)
        if eqn.primitive is call_p:
            return self.call(eqn, values, level, where)
        if name in CALLS:
            (inner,) = programs_in(eqn)
            return self.program(inner.jaxpr, values, where)
        if name == "scan":
            return self.scan(eqn, values, where)
        if name == "cond" and not eqn.params.get("branches_platforms"):
            return self.branches(eqn, values, where)
        levels: Levels = {}
        for number, inner in enumerate(programs_in(eqn)):
            # What happens here is found, but no rule reaches it.
            inside = where._replace(place=(*where.place, number), hidden=where.hidden or name)
            unknown = [Value(level) for _ in inner.jaxpr.invars]
            levels |= self.program(inner.jaxpr, unknown, inside)[1]
        origins = [_moved(eqn, values)] if len(eqn.outvars) == 1 else [None] * len(eqn.outvars)
        if name == "optimization_barrier":
            origins = [value.origin for value in values]
        self.read |= {value.origin.leaf for value in values if value.origin is not None and origins == [None]}
        return [Value(level, origin) for origin in origins], levels

    def call(self, eqn: JaxprEqn, values: list[Value], level: int, where: Where) -> tuple[list[Value], Levels]:
        site, mapped = eqn.params["site"], eqn.params["mapped"]
        if site.role != "norm":
            return [values[0]._replace(origin=None)], {}
        level += not site.is_frozen
        operands = dict(zip(site.names, values, strict=True))
        others = [value.origin for name, value in operands.items() if name not in ("mean", "var")]
        self.read |= {origin.leaf for origin in others if origin is not None}
        mean, axes = self.statistics(operands["mean"].origin, site.names.index("mean"), mapped, where)
        var, axes_of_var = self.statistics(operands["var"].origin, site.names.index("var"), mapped, where)
        if axes != axes_of_var:
            mean = var = None
        sizes = (*where.turns, *_sizes(eqn, mapped))
        index = site.names.index("mean")
        features = eqn.invars[index].aval
        self.calls[where.place] = Call(
            site,
            site.path if mean is None else self.leaves[mean].path,
            mean,
            var,
            axes,
            sizes,
            np.asarray(level),
            features.shape[sum(flags[index] for flags in mapped) :],
            features.dtype,
            where.hidden,
            where.is_conditional,
            eqn.params["differentiated"],
        )
        return [Value(level)], {where.place: level}

    def statistics(
        self, origin: Origin | None, index: int, mapped: Mapped, where: Where
    ) -> tuple[int | None, tuple[int | None, ...]]:
        """Returns the array that a call has its statistics from, and the array's axis for each axis of a record."""
        number = len(where.turns) + len(mapped)
        if origin is None:
            return None, (None,) * number
        turns = dict(origin.turns)
        axes = [turns.get(depth) for depth in range(len(where.turns))]
        rest = [*origin.axes]
        axes += [rest.pop(0) if flags[index] else None for flags in mapped]
        known = [axis for axis in rest if axis is not None]
        if len(known) < len(rest) or known != sorted(known):
            return None, (None,) * number
        return origin.leaf, tuple(axes)

    def scan(self, eqn: JaxprEqn, values: list[Value], where: Where) -> tuple[list[Value], Levels]:
        params, inner = eqn.params, eqn.params["jaxpr"].jaxpr
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        depth, length = len(where.turns), params["length"]
        here = where._replace(turns=(*where.turns, length))
        constants, carry = values[:first], values[first:last]
        xs = [value._replace(origin=_slice(value.origin, depth)) for value in values[last:]]
        by_turn: list[Levels] = []
        ys: list[int] = [0] * (len(inner.outvars) - len(carry))
        while len(by_turn) < length:
            outputs, levels = self.program(inner, [*constants, *carry, *xs], here)
            by_turn.append(levels)
            after = [_carried(old, new, depth) for old, new in zip(carry, outputs[: len(carry)], strict=True)]
            ys = [max(old, new.level) for old, new in zip(ys, outputs[len(carry) :], strict=True)]
            if after == carry:  # and so all later turns are like this one
                by_turn += [levels] * (length - len(by_turn))
            carry = after
        if params["reverse"]:
            by_turn.reverse()
        together = {place: [levels[place] for levels in by_turn] for place in (by_turn[0] if by_turn else {})}
        return [*carry, *(Value(level) for level in ys)], together

    def branches(self, eqn: JaxprEqn, values: list[Value], where: Where) -> tuple[list[Value], Levels]:
        which, *operands = values
        operands = [value._replace(level=max(value.level, which.level)) for value in operands]
        results, levels = [], {}
        for number, branch in enumerate(eqn.params["branches"]):
            here = where._replace(place=(*where.place, number), is_conditional=True)
            outputs, of_branch = self.program(branch.jaxpr, operands, here)
            results.append(outputs)
            levels |= of_branch
        merged = []
        for outputs in zip(*results, strict=True):
            origins = {output.origin for output in outputs}
            level = max([which.level, *(output.level for output in outputs)])
            merged.append(Value(level, origins.pop() if len(origins) == 1 else None))
        return merged, levels


def _sizes(eqn: JaxprEqn, mapped: Mapped) -> Iterator[int]:
    """Yields the size of each vmap, which the output has in front."""
    yield from _shape(eqn.outvars[0])[: len(mapped)]


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _slice(origin: Origin | None, depth: int) -> Origin | None:
    """Returns the origin of the slices of an array along its first axis."""
    if origin is None or not origin.axes:
        return None
    first, *rest = origin.axes
    if first is None:
        return None
    return Origin(origin.leaf, tuple(rest), (*origin.turns, (depth, first)))


def _carried(before: Value, after: Value, depth: int) -> Value:
    """Returns what a loop hands on to its next turn."""
    is_slice = after.origin is not None and any(turn == depth for turn, _ in after.origin.turns)
    origin = None if is_slice or after.origin != before.origin else after.origin
    return Value(max(before.level, after.level), origin)


def _moved(eqn: JaxprEqn, values: list[Value]) -> Origin | None:
    """Returns the origin of an equation's output that has the elements of its input, perhaps in another order."""
    name, params = eqn.primitive.name, eqn.params
    origin = values[0].origin if values else None
    if origin is None:
        return None
    if name in HAND_ON:
        return origin
    if name == "transpose":
        return origin._replace(axes=tuple(origin.axes[axis] for axis in params["permutation"]))
    if name == "squeeze":
        return origin._replace(axes=tuple(a for i, a in enumerate(origin.axes) if i not in params["dimensions"]))
    if name == "broadcast_in_dim":
        shape = _shape(eqn.invars[0])
        axes: list[int | None] = [None] * len(params["shape"])
        for axis, to in enumerate(params["broadcast_dimensions"]):
            if shape[axis] == params["shape"][to]:
                axes[to] = origin.axes[axis]
        return origin._replace(axes=tuple(axes))
    return None


def programs_in(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """Returns the programs in the parameters of an equation.  Derivatives are functions that wait to be traced."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, ClosedJaxpr):
                found.append(item)
            elif isinstance(item, Jaxpr):
                found.append(ClosedJaxpr(item, ()))
    return found
