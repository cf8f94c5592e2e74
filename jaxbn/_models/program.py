"""Programs of models: what their marked calls are, and how to evaluate them with a rule for these calls.

A program is a jaxpr.  It is walked into jit, remat and custom derivatives as if they were not there, into scan once for
all its turns, and into each branch of cond.  A call is known by its place: the numbers of the equations leading to it.
What a rule records of a call comes back with axes in front: one for each scan around it, from the outermost to the
innermost, and then one for each vmap.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxbn._models.batch_norms import NormCall
from jaxbn._models.marks import Mapped, Site, call_p, over_maps
from jaxbn._models.model import Model
from jaxbn._models.tracing import Leaf, Path, called_another, text, trace_model

# Primitives that call a function once, and do nothing else.  Their names differ between versions of JAX.
CALLS = {"jit", "pjit", "closed_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
# Primitives that return their first input, perhaps in another dtype or on other devices.
HAND_ON = {"convert_element_type", "sharding_constraint", "copy", "name", "optimization_barrier", "pvary"}

Place = tuple[int, ...]
# Answers a call from its number in `Program.calls`, its arrays, and what was given for it: its output, and a record.
Rule = Callable[[Place, NormCall, Any], tuple[jax.Array, Any]]


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


class Program(NamedTuple):
    """A traced evaluation of a model, and what is known of it.

    Attributes:
      jaxpr: of the arrays of the model and those of the batch, flat.
      leaves: the arrays of the model.
      structure: of the output.
      calls: of batch norms by place, in the order of execution.
      unmarked: layers with statistics that the program reads without a marked call, and the reason, by path.
      unread: layers with statistics that the program does not read, by path, with the name of the class.
    """

    jaxpr: ClosedJaxpr
    leaves: list[Leaf]
    structure: jax.tree_util.PyTreeDef
    calls: dict[Place, Call]
    unmarked: dict[Path, str]
    unread: dict[Path, str]

    def has_moments(self, path: Path) -> bool:
        """Tests by their names whether statistics of a layer may be a running mean and variance of one shape."""
        shapes = {}
        for leaf, aval in zip(self.leaves, self.jaxpr.in_avals, strict=False):
            if leaf.is_stat and leaf.path == path:
                shapes[leaf.name.lower()] = aval.shape
        means = [shape for name, shape in shapes.items() if "mean" in name]
        return any(shape in means for name, shape in shapes.items() if "var" in name or "std" in name)


def trace(model: Model, batch: Any, call: Callable, *, linear: bool = False) -> Program:
    """Traces a model in evaluation, with its batch norms marked, and its linear layers too, if asked."""
    traced = trace_model(model, batch, call, linear=linear)
    walk = _Walk(traced.leaves)
    arguments = []
    for number, var in enumerate(traced.jaxpr.jaxpr.invars):
        is_leaf = number < len(traced.leaves)
        arguments.append(_Value(0, Origin(number, tuple(range(var.aval.ndim))) if is_leaf else None))
    _, levels = walk.program(traced.jaxpr.jaxpr, arguments, _Where())
    calls = {place: call._replace(levels=np.asarray(levels[place])) for place, call in walk.calls.items()}
    if not (traced.was_called or walk.read or any(call.mean is not None for call in calls.values())):
        raise called_another(model)
    _check_names(traced.leaves)
    owners = dict.fromkeys(leaf.path for leaf in traced.leaves if leaf.is_stat)
    marked = {call.path for call in calls.values()}
    read = {traced.leaves[number].path for number in walk.read if traced.leaves[number].is_stat}
    unmarked, unread = {}, {}
    for path in owners:
        name = traced.classes.get(path, "a layer of another kind")
        if path in marked:
            continue
        if path not in read:
            unread[path] = name
        else:
            unmarked[path] = (
                f"{name} is not known as a batch norm: it does not call the __call__ of Flax's or jaxbn's, and is not "
                "registered with jaxbn.surgery.register_batch_norm"
            )
    return Program(traced.jaxpr, traced.leaves, traced.structure, calls, unmarked, unread)


def _check_names(leaves: list[Leaf]) -> None:
    """Refuses a model in which the paths of two layers read the same."""
    paths: dict[str, Path] = {}
    for leaf in leaves:
        if paths.setdefault(text(leaf.path), leaf.path) != leaf.path:
            raise ValueError(
                f"two layers have the path {text(leaf.path)!r}; rename the one whose name contains a slash."
            )


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    program: Program, rule: Rule, arrays: Any, batch: Any, given: dict[Place, Any] | None = None
) -> tuple[Any, dict[Place, Any]]:
    """Evaluates a program.

    Args:
      program: the program.
      rule: answers each call of a batch norm that is not hidden.
      arrays: those of the model.
      batch: the batch.
      given: what the rule gets for each call, pytrees with the axes of its record in front.

    Returns:
      The model's output, and the records by place.
    """

    def answer(place: Place, eqn: JaxprEqn, operands: Sequence[Any], given_here: Any) -> tuple[jax.Array, Any]:
        site, (out,) = eqn.params["site"], eqn.outvars

        def of_one(operands, extra):
            y, record = rule(place, site.norm(operands), extra)
            return y.astype(out.aval.dtype), record

        return over_maps(of_one, eqn.params["mapped"])([*operands], given_here)

    evaluation = _Evaluation(answer, program.calls)
    arguments = [*jax.tree.leaves(arrays), *jax.tree.leaves(batch)]
    outputs, records = evaluation.program(program.jaxpr.jaxpr, program.jaxpr.consts, arguments, (), given or {})
    return jax.tree.unflatten(program.structure, outputs), records


class _Evaluation(NamedTuple):
    """An evaluation of programs and of those in them, which returns outputs and records."""

    answer: Callable
    calls: dict[Place, Call]

    def program(self, jaxpr: Jaxpr, consts: Sequence, arguments: Sequence, place: Place, given: dict) -> tuple:
        env: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        records: dict[Place, Any] = {}

        def read(atom):
            return atom.val if isinstance(atom, Literal) else env[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            with eqn.ctx.manager:
                outputs, of_eqn = self.equation(eqn, [read(atom) for atom in eqn.invars], (*place, number), given)
            env.update(zip(eqn.outvars, outputs, strict=True))
            records |= of_eqn
        return [read(atom) for atom in jaxpr.outvars], records

    def equation(self, eqn: JaxprEqn, values: list, place: Place, given: dict) -> tuple[Sequence, dict]:
        calls = {key: call for key, call in self.calls.items() if key[: len(place)] == place and call.hidden is None}
        if place in calls:
            y, record = self.answer(place, eqn, values, given.get(place))
            return [y], {} if record is None else {place: record}
        if eqn.primitive is call_p and eqn.params["site"].role != "norm":
            return values[:1], {}
        if not calls:  # as it is, so that it keeps its derivative and its name
            outputs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
            return outputs if eqn.primitive.multiple_results else [outputs], {}
        given = {key: extra for key, extra in given.items() if key in calls}
        if eqn.primitive.name == "scan":
            return self.scan(eqn, values, place, given)
        if eqn.primitive.name == "cond":
            return self.branches(eqn, values, place, given)
        (inner,) = programs_in(eqn)
        return self.program(inner.jaxpr, inner.consts, values, place, given)

    def scan(self, eqn: JaxprEqn, values: list, place: Place, given: dict) -> tuple[Sequence, dict]:
        params, inner = eqn.params, eqn.params["jaxpr"]
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]

        def turn(carry, slices):
            xs, given_here = slices
            arguments = [*values[:first], *carry, *xs]
            outputs, records = self.program(inner.jaxpr, inner.consts, arguments, place, given_here)
            return outputs[: last - first], (outputs[last - first :], records)

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        carry, (ys, records) = jax.lax.scan(turn, values[first:last], (values[last:], given), **options)
        return [*carry, *ys], records

    def branches(self, eqn: JaxprEqn, values: list, place: Place, given: dict) -> tuple[Sequence, dict]:
        which, *operands = values

        def taken(number, branch):
            return lambda *operands: self.program(branch.jaxpr, branch.consts, operands, (*place, number), given)

        functions = [taken(number, branch) for number, branch in enumerate(eqn.params["branches"])]
        # A branch that is not taken has a record of zeros, which counts no values.
        shapes: dict[Place, Any] = {}
        for function in functions:
            shapes |= jax.eval_shape(function, *operands)[1]

        def with_all_records(function):
            def branch(*operands):
                outputs, records = function(*operands)
                empty = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
                return outputs, empty | records

            return branch

        return jax.lax.switch(which, [with_all_records(function) for function in functions], *operands)


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


# ----------------------------------------------------------------------------------------------------------- analysis


class _Value(NamedTuple):
    """What is known of a value: the number of batch norms before it, and where it comes from."""

    level: int
    origin: Origin | None = None


class _Where(NamedTuple):
    """Where an equation is: its place, the lengths of the loops around it, and what hides it."""

    place: Place = ()
    turns: tuple[int, ...] = ()
    hidden: str | None = None
    is_conditional: bool = False


Levels = dict[Place, Any]  # of each call, nested lists by turn


class _Walk:
    """Finds the calls of a program, their levels, and which arrays of the model are read."""

    def __init__(self, leaves: list[Leaf]):
        self.leaves = leaves
        self.calls: dict[Place, Call] = {}
        self.read: set[int] = set()

    def program(self, jaxpr: Jaxpr, arguments: Sequence[_Value], where: _Where) -> tuple[list[_Value], Levels]:
        env: dict[Any, _Value] = dict.fromkeys(jaxpr.constvars, _Value(0)) | dict(
            zip(jaxpr.invars, arguments, strict=True)
        )
        levels: Levels = {}

        def read(atom):
            return _Value(0) if isinstance(atom, Literal) else env[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            here = where._replace(place=(*where.place, number))
            outputs, of_eqn = self.equation(eqn, [read(atom) for atom in eqn.invars], here)
            env.update(zip(eqn.outvars, outputs, strict=True))
            levels |= of_eqn
        return [read(atom) for atom in jaxpr.outvars], levels

    def equation(self, eqn: JaxprEqn, values: list[_Value], where: _Where) -> tuple[list[_Value], Levels]:
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
            unknown = [_Value(level) for _ in inner.jaxpr.invars]
            levels |= self.program(inner.jaxpr, unknown, inside)[1]
        origins = [_moved(eqn, values)] if len(eqn.outvars) == 1 else [None] * len(eqn.outvars)
        if name == "optimization_barrier":
            origins = [value.origin for value in values]
        self.read |= {value.origin.leaf for value in values if value.origin is not None and origins == [None]}
        return [_Value(level, origin) for origin in origins], levels

    def call(self, eqn: JaxprEqn, values: list[_Value], level: int, where: _Where) -> tuple[list[_Value], Levels]:
        site, mapped = eqn.params["site"], eqn.params["mapped"]
        if site.role != "norm":
            return [values[0]._replace(origin=None)], {}
        level += not site.is_frozen
        operands = dict(zip(site.names, values, strict=True))
        for name in ("x", "scale", "bias", "mask"):
            if name in operands and operands[name].origin is not None:
                self.read.add(operands[name].origin.leaf)
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
        return [_Value(level)], {where.place: level}

    def statistics(
        self, origin: Origin | None, index: int, mapped: Mapped, where: _Where
    ) -> tuple[int | None, tuple[int | None, ...]]:
        """Returns the array that a call has its statistics from, and the array's axis for each axis of a record."""
        number = len(where.turns) + len(mapped)
        if origin is None:
            return None, (None,) * number
        turns = dict(origin.turns)
        axes = [turns.get(depth) for depth in range(len(where.turns))]
        rest = [*origin.axes]
        axes += [rest.pop(0) if flags[index] else None for flags in mapped]
        if None in rest or rest != sorted(rest):
            return None, (None,) * number
        return origin.leaf, tuple(axes)

    def scan(self, eqn: JaxprEqn, values: list[_Value], where: _Where) -> tuple[list[_Value], Levels]:
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
        return [*carry, *(_Value(level) for level in ys)], together

    def branches(self, eqn: JaxprEqn, values: list[_Value], where: _Where) -> tuple[list[_Value], Levels]:
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
            merged.append(_Value(level, origins.pop() if len(origins) == 1 else None))
        return merged, levels


def _sizes(eqn: JaxprEqn, mapped: Mapped) -> Iterator[int]:
    """Yields the size of each vmap, which the output has in front."""
    yield from eqn.outvars[0].aval.shape[: len(mapped)]


def _slice(origin: Origin | None, depth: int) -> Origin | None:
    """Returns the origin of the slices of an array along its first axis."""
    if origin is None or not origin.axes or origin.axes[0] is None:
        return None
    first, *rest = origin.axes
    return Origin(origin.leaf, tuple(rest), (*origin.turns, (depth, first)))


def _carried(before: _Value, after: _Value, depth: int) -> _Value:
    """Returns what a loop hands on to its next turn."""
    is_slice = after.origin is not None and any(turn == depth for turn, _ in after.origin.turns)
    origin = None if is_slice or after.origin != before.origin else after.origin
    return _Value(max(before.level, after.level), origin)


def _moved(eqn: JaxprEqn, values: list[_Value]) -> Origin | None:
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
        shape = eqn.invars[0].aval.shape
        axes: list[int | None] = [None] * len(params["shape"])
        for axis, to in enumerate(params["broadcast_dimensions"]):
            if shape[axis] == params["shape"][to]:
                axes[to] = origin.axes[axis]
        return origin._replace(axes=tuple(axes))
    return None
