"""The data flow of a traced program: which operation makes each value, and which operations read it.

The operations of nested functions (jit, remat, custom_jvp) are inlined, so that a path through the graph does not stop
at their borders.  Values of interest are marked with :func:`mark` while the program is traced, and found by name in
the graph.  Loops and branches (scan, while, cond) stay single operations, because what happens inside of them happens
any number of times; marks inside of them are not found.
"""

import collections
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Primitives with one input that return its values, perhaps in another dtype or on other devices.
_HAND_ON = {"convert_element_type", "sharding_constraint", "copy", "name", "optimization_barrier", "pvary"}
# Primitives that call a function once, and do nothing else.  Their names differ between versions of JAX.
_CALLS = {"jit", "pjit", "closed_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
# Functions of at most so many equations, such as relu or softmax, lend their name to their operations.  A longer one is
# a block of the model, whose name would not tell the user which operation is meant.
_LONGEST_NAMED = 8
# Tells our names apart from those that the model gives with checkpoint_name.
_PREFIX = "jaxbn "


class Operation(NamedTuple):
    """One operation of a traced program.

    Attributes:
      name: for messages: the innermost short function around it, such as relu, or the primitive.
      primitive: name of the primitive.
      inputs: numbers of the values that it reads.
      outputs: numbers of the values that it makes.
      mark: the name that :func:`mark` gave to its value, or None.
      effects: whether it has side effects, such as printing.
    """

    name: str
    primitive: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    mark: str | None
    effects: bool


class Graph(NamedTuple):
    """A traced program.

    Attributes:
      operations: each after those whose values it reads.
      outputs: numbers of the values that the program returns, flattened.
      structure: of the pytree that it returns.
    """

    operations: list[Operation]
    outputs: tuple[int, ...]
    structure: jax.tree_util.PyTreeDef

    def marked(self) -> dict[str, Operation]:
        """Returns the operations that carry a mark, by its name."""
        return {operation.mark: operation for operation in self.operations if operation.mark is not None}

    def maker(self, value: int) -> Operation | None:
        """Returns the operation that makes a value; None for an argument or a constant."""
        return next((operation for operation in self.operations if value in operation.outputs), None)

    def readers(self, value: int) -> list[Operation | None]:
        """Returns the operation for each time that a value is read, and None for each time that it is returned."""
        reading = [operation for operation in self.operations for read in operation.inputs if read == value]
        return [*reading, *[None] * self.outputs.count(value)]


def mark(x: jax.Array, name: str) -> jax.Array:
    """Returns ``x`` unchanged; in the graph of the program, the operation that makes it has this name."""
    # checkpoint_name is the one identity that JAX offers with a name in the jaxpr.  It costs nothing in a compiled
    # program, and survives vmap and grad.
    return checkpoint_name(x, _PREFIX + name)


def hands_on(operation: Operation) -> bool:
    """Tests whether an operation returns its only input, perhaps in another dtype or on other devices."""
    return operation.mark is None and operation.primitive in _HAND_ON and len(operation.inputs) == 1


def trace(function: Callable, *arguments: Any) -> Graph:
    """Traces a function of arrays, and leaves out operations on which neither result nor side effect depends."""
    closed_jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
    jaxpr = closed_jaxpr.jaxpr
    fresh = itertools.count()
    operations: list[Operation] = []
    inputs = [next(fresh) for _ in jaxpr.invars]
    outputs = _inline(jaxpr, inputs, operations, fresh, name=None)
    # Dead code must go: a model may compute what it then drops, which would look like a second reader of a value.
    needed, alive = set(outputs), []
    for operation in reversed(operations):
        if operation.effects or not needed.isdisjoint(operation.outputs):
            needed.update(operation.inputs)
            alive.append(operation)
    return Graph(alive[::-1], tuple(outputs), jax.tree.structure(result))


def _inline(
    jaxpr: Jaxpr,
    arguments: Sequence[int],
    operations: list[Operation],
    fresh: Iterator[int],
    name: str | None,
) -> list[int]:
    """Appends the operations of a function to a list.

    Args:
      jaxpr: the function.
      arguments: numbers of the values it is called with.
      operations: the list.
      fresh: yields numbers of new values.
      name: that of the short function around it, if any.

    Returns:
      The numbers of its results.
    """
    # JAX traces a function once and reuses the jaxpr, and so its variables, in every call: a variable is known by a
    # number only within this call.  Variables without one so far are results of operations, or constants.
    numbers = collections.defaultdict(lambda: next(fresh), zip(jaxpr.invars, arguments, strict=True))

    def number(atom):
        return next(fresh) if isinstance(atom, Literal) else numbers[atom]  # a literal is a new constant each time

    for eqn in jaxpr.eqns:
        inputs = [number(atom) for atom in eqn.invars]
        called = _called_function(eqn)
        if called is None:
            operation = Operation(
                name=name or eqn.primitive.name,
                primitive=eqn.primitive.name,
                inputs=tuple(inputs),
                outputs=tuple(number(var) for var in eqn.outvars),
                mark=_mark_of(eqn),
                effects=bool(eqn.effects),
            )
            operations.append(operation)
        else:
            function_name = eqn.params.get("name", "")
            # A lambda is called "<lambda>", which is no name.
            is_short = function_name.isidentifier() and len(called.eqns) <= _LONGEST_NAMED
            results = _inline(called, inputs, operations, fresh, function_name if is_short else name)
            numbers.update(zip(eqn.outvars, results, strict=True))
    return [number(atom) for atom in jaxpr.outvars]


def _mark_of(eqn: JaxprEqn) -> str | None:
    """Returns the name that :func:`mark` gave to the value of an equation, or None."""
    if eqn.primitive.name != "name" or not eqn.params["name"].startswith(_PREFIX):
        return None
    return eqn.params["name"].removeprefix(_PREFIX)


def _called_function(eqn: JaxprEqn) -> Jaxpr | None:
    """Returns the function that an equation only calls, or None if it does something else."""
    if eqn.primitive.name not in _CALLS:
        return None
    # The parameter is called jaxpr or call_jaxpr.  The derivatives of custom_jvp_call and custom_vjp_call are no jaxprs
    # yet, but functions that wait to be traced.
    (called,) = (value for value in eqn.params.values() if isinstance(value, Jaxpr | ClosedJaxpr))
    return called.jaxpr if isinstance(called, ClosedJaxpr) else called
