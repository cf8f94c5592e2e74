"""What flows where in a traced program: its operations in one flat list, those of nested functions among them.

Values are marked with :func:`mark` while the program is traced, and found again by their names.  Loops and branches
(scan, while, cond) stay single operations; what is marked inside of them is not found.
"""

import collections
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Operations that hand on the value they get, in another dtype or place at most.
_HAND_ON = {"convert_element_type", "sharding_constraint", "copy", "name", "optimization_barrier", "pvary"}
_CALLS = {"jit", "pjit", "closed_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
_LONGEST_NAMED = 8  # operations of a function that is spoken of by its name; longer ones are parts of the model
_MARK = "jaxbn "


class Operation(NamedTuple):
    """One operation.

    Attributes:
      name: what it does, as users know it: the nearest function with a name, such as relu, or the primitive.
      primitive: name of the primitive.
      inputs: numbers of the values that it reads.
      outputs: numbers of the values that it makes.
      mark: what :func:`mark` called its value, or None.
      effects: whether it does something besides.
    """

    name: str
    primitive: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mark: str | None
    effects: bool


class Graph(NamedTuple):
    """A program.

    Attributes:
      operations: in an order in which they can be computed.
      outputs: numbers of the values that the program returns.
    """

    operations: list[Operation]
    outputs: tuple[int, ...]

    def marked(self) -> dict[str, Operation]:
        """Returns the marks that can be found, by name."""
        return {operation.mark: operation for operation in self.operations if operation.mark is not None}

    def maker(self, value: int) -> Operation | None:
        """Returns the operation that makes a value; None for an argument or a constant."""
        return next((operation for operation in self.operations if value in operation.outputs), None)

    def readers(self, value: int) -> list[Operation | None]:
        """Returns the operations that read a value, and None for each time that the program returns it."""
        found = [operation for operation in self.operations for read in operation.inputs if read == value]
        return [*found, *[None] * self.outputs.count(value)]


def mark(x: jax.Array, name: str) -> jax.Array:
    """Returns ``x``, to be found in the graph by this name."""
    return checkpoint_name(x, _MARK + name)


def hands_on(operation: Operation) -> bool:
    """Says whether an operation returns the one value that it gets, in another dtype or place at most."""
    return operation.mark is None and operation.primitive in _HAND_ON and len(operation.inputs) == 1


def trace(function: Callable, *arguments: Any) -> Graph:
    """Returns the graph of a function of arrays, without operations that nobody reads."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    fresh = itertools.count()
    operations = []
    outputs = _flatten(jaxpr, [next(fresh) for _ in jaxpr.invars], operations, fresh, None)
    read, alive = set(outputs), []
    for operation in reversed(operations):
        if read & {*operation.outputs} or operation.effects:
            read |= {*operation.inputs}
            alive.append(operation)
    return Graph(alive[::-1], tuple(outputs))


def _flatten(jaxpr, arguments, operations, fresh, name):
    """Appends the operations of a jaxpr that gets the values of these numbers; returns the numbers of its results."""
    numbers = collections.defaultdict(lambda: next(fresh), zip(jaxpr.invars, arguments, strict=True))

    def number(atom):
        return next(fresh) if isinstance(atom, Literal) else numbers[atom]

    for eqn in jaxpr.eqns:
        inputs, inner = [number(atom) for atom in eqn.invars], _function_called(eqn)
        if inner is None:
            mark = eqn.params["name"] if eqn.primitive.name == "name" else ""
            mark = mark.removeprefix(_MARK) if mark.startswith(_MARK) else None
            outputs = [number(var) for var in eqn.outvars]
            what = (name or eqn.primitive.name, eqn.primitive.name)
            operations.append(Operation(*what, tuple(inputs), tuple(outputs), mark, bool(eqn.effects)))
        else:
            given = eqn.params.get("name", "")
            named = given if given.isidentifier() and len(inner.eqns) <= _LONGEST_NAMED else None
            numbers.update(zip(eqn.outvars, _flatten(inner, inputs, operations, fresh, named or name), strict=True))
    return [number(atom) for atom in jaxpr.outvars]


def _function_called(eqn):
    """Returns the function that an operation only calls, or None."""
    if eqn.primitive.name not in _CALLS:
        return None
    (inner,) = (value for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr))
    return inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
