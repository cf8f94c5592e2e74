"""The data flow of a traced program."""

import jax
import jax.numpy as jnp

from jaxbn._models import dataflow


def names_between_marks(function):
    """Returns the names of the operations from the value marked "out" back to the one marked "in"."""
    graph = dataflow.trace(function, jnp.ones(3))
    marked = graph.marked()
    value, names = marked["out"].inputs[0], []
    while (operation := graph.maker(value)) != marked["in"]:
        names.append(operation.name)
        value = operation.inputs[0]
    return names


def test_an_operation_is_named_by_the_short_function_around_it_or_by_its_primitive():
    def function(x):
        return dataflow.mark(jax.nn.relu(jnp.sin(dataflow.mark(x, "in"))), "out")

    assert names_between_marks(function) == ["relu", "sin"]


def test_jit_and_remat_are_inlined():
    @jax.jit
    def inner(x):
        return jax.checkpoint(lambda x: jax.nn.relu(dataflow.mark(jnp.cos(x), "in")))(x)

    def function(x):
        return dataflow.mark(jnp.tanh(inner(jnp.sin(x))), "out")

    assert names_between_marks(function) == ["tanh", "relu"]


def test_two_calls_of_a_function_have_different_values_though_they_share_a_jaxpr():
    inner = jax.jit(lambda x: jnp.sin(x))
    graph = dataflow.trace(lambda x: inner(inner(x)), jnp.ones(3))
    first, second = graph.operations
    assert first.name == second.name == "sin"
    assert first.outputs == second.inputs and second.outputs == graph.outputs


def test_loops_are_single_operations():
    def function(x):
        x, _ = jax.lax.scan(lambda c, _: (dataflow.mark(jnp.sin(c), "inside"), None), dataflow.mark(x, "in"), length=3)
        return dataflow.mark(x, "out")

    assert names_between_marks(function) == ["scan"]
    assert "inside" not in dataflow.trace(function, jnp.ones(3)).marked()


def test_dead_code_is_left_out_unless_it_has_side_effects():
    def function(x):
        dataflow.mark(jnp.cos(x), "unread")
        jax.debug.print("{}", dataflow.mark(jnp.sin(x), "printed"))
        return dataflow.mark(x, "read")

    assert set(dataflow.trace(function, jnp.ones(3)).marked()) == {"read", "printed"}


def test_marks_survive_vmap_and_grad():
    def function(x):
        return jax.grad(lambda x: jnp.sin(dataflow.mark(x, "x")))(x)

    assert set(dataflow.trace(jax.vmap(function), jnp.ones(3)).marked()) == {"x"}


def test_readers_are_operations_and_none_for_the_result():
    def function(x):
        y = dataflow.mark(x, "y")
        return y, y * y

    graph = dataflow.trace(function, jnp.ones(3))
    readers = graph.readers(graph.marked()["y"].outputs[0])
    assert [None if reader is None else reader.name for reader in readers] == ["mul", "mul", None]


def test_an_argument_that_is_returned_has_no_maker():
    graph = dataflow.trace(lambda x, y: (x, y), jnp.ones(3), jnp.ones(2))
    assert [graph.maker(value) for value in graph.outputs] == [None, None]
