"""What flows where in a traced program."""

import jax
import jax.numpy as jnp

from jaxbn._models import dataflow


def between(function, *arguments):
    """Returns the names of the operations from the value marked "in" to the one marked "out", backwards."""
    graph = dataflow.trace(function, *arguments)
    marked = graph.marked()
    value, names = marked["out"].inputs[0], []
    while (operation := graph.maker(value)) != marked["in"]:
        names.append(operation.name)
        value = operation.inputs[0]
    return names


def test_functions_with_a_name_are_spoken_of_by_it_and_the_rest_by_their_primitive():
    def function(x):
        return dataflow.mark(jax.nn.relu(jnp.sin(dataflow.mark(x, "in"))), "out")

    assert between(function, jnp.ones(3)) == ["relu", "sin"]


def test_compiled_and_recomputed_parts_are_looked_into():
    @jax.jit
    def inner(x):
        return jax.checkpoint(lambda x: jax.nn.relu(dataflow.mark(jnp.cos(x), "in")))(x)

    def function(x):
        return dataflow.mark(jnp.tanh(inner(jnp.sin(x))), "out")

    assert between(function, jnp.ones(3)) == ["tanh", "relu"]


def test_loops_are_single_operations():
    def function(x):
        x, _ = jax.lax.scan(lambda c, _: (dataflow.mark(jnp.sin(c), "inside"), None), dataflow.mark(x, "in"), length=3)
        return dataflow.mark(x, "out")

    assert between(function, jnp.ones(3)) == ["scan"]
    assert "inside" not in dataflow.trace(function, jnp.ones(3)).marked()


def test_what_nobody_reads_is_left_out():
    def function(x):
        dataflow.mark(jnp.cos(x), "unread")
        return dataflow.mark(x, "read")

    assert set(dataflow.trace(function, jnp.ones(3)).marked()) == {"read"}


def test_readers_are_operations_and_the_result():
    def function(x):
        y = dataflow.mark(x, "y")
        return y, y * y

    graph = dataflow.trace(function, jnp.ones(3))
    readers = graph.readers(graph.marked()["y"].outputs[0])
    assert [None if reader is None else reader.name for reader in readers] == ["mul", "mul", None]


def test_an_argument_that_is_returned_as_it_is_has_no_maker():
    graph = dataflow.trace(lambda x, y: (x, y), jnp.ones(3), jnp.ones(2))
    assert [graph.maker(value) for value in graph.outputs] == [None, None]
