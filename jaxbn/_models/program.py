"""Programs of models: what their marked calls are, and how to evaluate them with a rule for these calls.

A program is a jaxpr.  It is walked into jit, remat and custom derivatives as if they were not there, into scan once for
all its turns, and into each branch of cond.  A call is known by its place: the numbers of the equations leading to it.
What a rule records of a call comes back with axes in front: one for each scan around it, from the outermost to the
innermost, and then one for each vmap.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxbn._models.analysis import Call, Origin, Place, Value, Walk, Where, programs_in
from jaxbn._models.batch_norms import NormCall
from jaxbn._models.marks import call_p, over_maps
from jaxbn._models.model import Model
from jaxbn._models.tracing import Leaf, Path, called_another, text, trace_model

# Answers a call from its number in `Program.calls`, its arrays, and what was given for it: its output, and a record.
Rule = Callable[[Place, NormCall, Any], tuple[jax.Array, Any]]


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
    """Traces a model as ``call`` runs it, with its batch norms marked, and its linear layers too, if asked."""
    traced = trace_model(model, batch, call, linear=linear)
    walk = Walk(traced.leaves)
    arguments = []
    for number, var in enumerate(traced.jaxpr.jaxpr.invars):
        is_leaf = number < len(traced.leaves)
        arguments.append(Value(0, Origin(number, tuple(range(var.aval.ndim))) if is_leaf else None))
    _, levels = walk.program(traced.jaxpr.jaxpr, arguments, Where())
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
        site = eqn.params["site"]
        aval: Any = eqn.outvars[0].aval

        def of_one(operands, extra):
            y, record = rule(place, site.norm(operands), extra)
            return y.astype(aval.dtype), record

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
