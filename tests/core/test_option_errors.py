"""Options that are wrong are refused before the program runs; in a compiled step nothing is checked."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.core.checked import (
    COLLECTIVE,
    FUNCTIONS,
    STATS,
    THREE,
    X,
    evaluate,
    ghost,
    normalize,
    refused,
    renorm,
    train,
)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 2, float("nan")])
@pytest.mark.parametrize(
    "function",
    [train, evaluate, functools.partial(jaxbn.update_stats, STATS, jaxbn.Moments(THREE, THREE, THREE))],
    ids=["train", "evaluate", "update_stats"],
)
def test_a_momentum_outside_0_and_1_is_refused(function, momentum):
    message = (
        f"momentum must be between 0 and 1, got {momentum}. It is the weight of the old value, 0.99 by default; "
        "PyTorch's momentum is 1 minus ours."
    )
    with refused(message):
        function(momentum=momentum)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("momentum", train),
        ("epsilon", train),
        ("momentum", evaluate),
        ("epsilon", normalize),
        ("r_max", renorm),
        ("d_max", renorm),
    ],
)
@pytest.mark.parametrize("value", ["0.5", [object()]], ids=["text", "object"])
def test_an_option_that_is_not_a_number_is_refused(name, call, value):
    with refused(f"{name} must be a number, got {value!r}."):
        call(**{name: value})


@pytest.mark.parametrize(
    "call",
    [
        lambda stats: jaxbn.batch_norm(X, stats, use_running_average=False),
        lambda stats: jaxbn.batch_norm(X, stats, use_running_average=True),
        lambda stats: jaxbn.update_stats(stats, jaxbn.moments(X), momentum=0.9),
        lambda stats: jaxbn.batch_renormalize(X, stats=stats),
    ],
    ids=["train", "evaluate", "update_stats", "batch_renormalize"],
)
@pytest.mark.parametrize(
    "stats", [{"mean": THREE, "var": THREE}, (THREE, THREE), jaxbn.moments(X)], ids=["dict", "tuple", "moments"]
)
def test_arrays_in_the_place_of_running_statistics_are_refused(call, stats):
    message = (
        f"stats must be one of BatchStats, CountedStats, AccumulatedStats, got a {type(stats).__name__}. Start with "
        "jaxbn.init_stats(features), or wrap arrays as jaxbn.BatchStats(mean=mean, var=var)."
    )
    with refused(message):
        call(stats)


ACCEPT = "method must accept the arguments of batch_normalize"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ghost", "method must be a function, got 'ghost'. Pass jaxbn.batch_normalize, or a variant with its options"),
        # Python ends the sentence, in its newer versions with other words.
        (jaxbn.ghost_normalize, f"{ACCEPT}, got ghost_normalize: missing a required "),
        (
            functools.partial(jaxbn.ghost_normalize, groupsize=4),
            f"{ACCEPT}, got ghost_normalize: it does not have all of the options ['groupsize']. Pass jaxbn",
        ),
        (jaxbn.batch_norm, f"{ACCEPT}, got batch_norm: multiple values for argument"),
        (jaxbn.normalize, f"{ACCEPT}, got normalize: got an unexpected keyword"),
    ],
    ids=["text", "option_not_bound", "misspelled", "batch_norm", "normalize"],
)
def test_a_method_that_cannot_be_called_like_batch_normalize_is_refused(method, message):
    layer = jaxbn.nnx.BatchNorm(3, method=method, rngs=nnx.Rngs(0))
    for call in (lambda: train(method=method), lambda: evaluate(method=method), lambda: layer(X)):
        with refused(message):
            call()


@pytest.mark.parametrize("features", [-1, (2, -3)])
def test_a_negative_number_of_features_is_refused(features):
    with refused(f"features must be at least 0, got {np.min(features)}."):
        jaxbn.init_stats(features)


def test_a_plain_average_of_statistics_without_a_count_is_refused():
    message = (
        "momentum must be a number in [0, 1] for BatchStats, got None: weighting all batches equally needs their "
        "number. Start from init_stats(features, counted=True), or pass a momentum."
    )
    with refused(message):
        train(momentum=None)


@pytest.mark.parametrize("epsilon", [0, 0.0, -1e-5, float("nan")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_epsilon_that_is_not_positive_is_refused(function, epsilon):
    message = f"epsilon must be positive, got {epsilon}. It is added to the variance; use for example 1e-5."
    with refused(message):
        FUNCTIONS[function](X, epsilon=epsilon)


@pytest.mark.parametrize("names", ["devices", ("hosts", "devices")])
@pytest.mark.parametrize("function", COLLECTIVE)
def test_an_axis_name_that_is_not_bound_is_refused(function, names):
    message = (
        f"axis_name must be an axis of an enclosing jax.shard_map, jax.pmap or jax.vmap, got {names!r}. "
        "Call inside one of them, or leave axis_name out: under jax.jit a sharded batch does not need it."
    )
    with refused(message):
        COLLECTIVE[function](X, axis_name=names)


@pytest.mark.parametrize("function", COLLECTIVE)
def test_an_axis_name_that_is_not_a_name_is_refused(function):
    message = "axis_name must be a string or a sequence of strings, got 0. Name the axis of devices, as in jax.pmap("
    with refused(message):
        COLLECTIVE[function](X, axis_name=0)


@pytest.mark.parametrize("function", COLLECTIVE)
def test_groups_without_an_axis_name_are_refused(function):
    message = "axis_name must be given with axis_index_groups=[[0, 1]]. The groups divide a named axis of devices."
    with refused(message):
        COLLECTIVE[function](X, axis_index_groups=[[0, 1]])


@pytest.mark.parametrize("groups", [[[0, 1], [1, 2]], [[0, 1]], [[0, 1], [2, 4]], [[0, 1], [2, 3], [3]]])
@pytest.mark.parametrize("function", COLLECTIVE)
def test_groups_that_do_not_partition_the_axis_are_refused(function, groups):
    message = f"axis_index_groups must hold each index of axis_name='d', 0 to 3, exactly once, got {groups}."
    with refused(message):
        jax.vmap(lambda x: COLLECTIVE[function](x, axis_name="d", axis_index_groups=groups), axis_name="d")(
            X.reshape(4, 2, 5, 3)
        )


@pytest.mark.parametrize("group_size", [3, 16])
def test_a_group_size_that_does_not_divide_the_batch_is_refused(group_size):
    message = (
        f"group_size must divide the batch of 8 examples, got {group_size}. "
        "Choose a divisor, or pad the batch and pass a mask."
    )
    with refused(message):
        ghost(group_size=group_size)


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_without_examples_is_refused(group_size):
    with refused(f"group_size must be at least 1, got {group_size}."):
        ghost(group_size=group_size)


def test_ghost_groups_of_features_on_the_first_axis_are_refused():
    message = (
        "axis must not include the first axis, which ghost batch norm divides into groups, got 0 for an input of shape "
        "(8, 5, 3). Move the examples to the first axis."
    )
    with refused(message):
        ghost(group_size=2, axis=0)


def test_renorm_without_running_statistics_is_refused():
    message = (
        "stats must not be None: batch renormalization compares the batch with the running statistics. "
        "Pass stats, or use this function as the method of batch_norm or of a layer, which pass them."
    )
    with refused(message):
        jaxbn.batch_renormalize(X)


def test_shifted_batch_norm_without_running_statistics_is_refused():
    message = (
        "stats must not be None: the moments are measured about the running mean. "
        "Pass stats, or use this function as the method of batch_norm or of a layer, which pass them."
    )
    with refused(message):
        jaxbn.shifted_normalize(X)


@pytest.mark.parametrize(("name", "value", "least"), [("r_max", 0.5, 1), ("d_max", -1.0, 0)])
def test_limits_of_renorm_that_exclude_batch_norm_are_refused(name, value, least):
    with refused(f"{name} must be at least {least}, got {value}."):
        renorm(**{name: value})


def test_a_momentum_and_an_epsilon_in_arrays_are_checked_too():
    with refused("momentum must be between 0 and 1, got 1.5"):
        train(momentum=jnp.float32(1.5))
    with refused("epsilon must be positive, got -1.0"):
        train(epsilon=jnp.float32(-1))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("group_size", lambda: ghost(group_size=2.0)),
        ("accumulate", lambda: jaxbn.init_stats(2, accumulate=2.0)),
        ("features", lambda: jaxbn.init_stats(2.0)),
        ("size", lambda: jaxbn.pad_batch(X, 2.0)),
    ],
)
def test_a_number_that_has_to_be_whole_is_refused_by_its_name(name, call):
    with refused(f"{name} must be an integer, got 2.0, a float."):
        call()


def test_statistics_that_would_be_integers_are_refused():
    with pytest.raises(ValueError, match="^dtype must be floating-point or complex, got .*int32.*. Use for example"):
        jaxbn.init_stats(3, dtype=jnp.int32)


# Checks cost nothing in a compiled step


def test_a_momentum_and_an_epsilon_known_only_at_run_time_pass():
    @jax.jit
    def step(momentum, epsilon):
        return jaxbn.batch_norm(X, STATS, use_running_average=False, momentum=momentum, epsilon=epsilon)

    chex.assert_trees_all_close(step(0.9, 1e-3), train(momentum=0.9, epsilon=1e-3), rtol=1e-6, atol=1e-6)


def test_a_mask_known_only_at_run_time_passes():
    mask = np.arange(8)[:, None, None] < 5
    chex.assert_trees_all_close(jax.jit(lambda mask: train(mask=mask))(mask), train(mask=mask), rtol=1e-6, atol=1e-6)


def test_a_mask_of_integers_known_only_at_run_time_admits_what_is_not_0():
    lengths = np.array([0, 2] * 4)[:, None, None]
    found = jax.jit(lambda mask: train(mask=mask))(lengths)
    chex.assert_trees_all_close(found, train(mask=lengths > 0), rtol=1e-6, atol=1e-6)


def test_a_momentum_that_is_an_array_passes():
    chex.assert_trees_all_equal(train(momentum=jnp.float32(0.5))[1], train(momentum=0.5)[1])


def test_nothing_leaves_the_device_in_a_compiled_step():
    program = str(
        jax.make_jaxpr(lambda x, mask: jaxbn.batch_norm(x, STATS, use_running_average=False, mask=mask))(X, X > 0)
    )
    assert "callback" not in program
