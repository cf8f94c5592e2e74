"""A mistake is refused with what was given, what is accepted and what to do; nothing is checked at run time."""

import functools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

X = np.random.default_rng(0).normal(size=(8, 5, 3)).astype(np.float32)
THREE, FOUR = np.ones(3, np.float32), np.ones(4, np.float32)
STATS = jaxbn.init_stats(3)

train = functools.partial(jaxbn.batch_norm, X, STATS, use_running_average=False)
evaluate = functools.partial(jaxbn.batch_norm, X, STATS, use_running_average=True)
ghost = functools.partial(jaxbn.ghost_normalize, X)
renorm = functools.partial(jaxbn.batch_renormalize, X, stats=STATS)
normalize = functools.partial(jaxbn.normalize, X, THREE, THREE)

# Each takes x, axis and the parameters.
FUNCTIONS = {
    "normalize": lambda x, **options: jaxbn.normalize(x, THREE, THREE, **options),
    "batch_normalize": jaxbn.batch_normalize,
    "train": lambda x, **options: jaxbn.batch_norm(x, STATS, use_running_average=False, **options),
    "evaluate": lambda x, **options: jaxbn.batch_norm(x, STATS, use_running_average=True, **options),
    "ghost_normalize": lambda x, **options: jaxbn.ghost_normalize(x, group_size=2, **options),
    "batch_renormalize": lambda x, **options: jaxbn.batch_renormalize(x, stats=STATS, **options),
    "shifted_normalize": lambda x, **options: jaxbn.shifted_normalize(x, stats=STATS, **options),
}
MEASURING = {"moments": jaxbn.moments}


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize("axis", [3, -4, (1, 3)])
@pytest.mark.parametrize("function", FUNCTIONS | MEASURING)
def test_an_axis_out_of_range_is_refused(function, axis):
    message = f"axis={axis} is out of range for an input of shape (8, 5, 3); an axis lies between -3 and 2; name an"
    with refused(message):
        (FUNCTIONS | MEASURING)[function](X, axis=axis)


@pytest.mark.parametrize("axis", [(2, -1), (1, 1)])
@pytest.mark.parametrize("function", FUNCTIONS | MEASURING)
def test_an_axis_named_twice_is_refused(function, axis):
    message = f"axis={axis} names an axis twice of an input of shape (8, 5, 3); give each feature axis once."
    with refused(message):
        (FUNCTIONS | MEASURING)[function](X, axis=axis)


def test_no_axis_at_all_is_refused():
    with refused("axis=() names no axis of an input of shape (8, 5, 3); give each feature axis once."):
        jaxbn.moments(X, axis=())


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_parameter_for_another_number_of_features_is_refused(function, name):
    message = (
        f"{name} has shape (4,), but an input of shape (8, 5, 3) has features of shape (3,) on axis (2,); "
        f"pass {name} of that shape (does it come from another layer?), or set axis to where the features are."
    )
    with refused(message):
        FUNCTIONS[function](X, **{name: FOUR})


@pytest.mark.parametrize("name", ["mean", "var"])
def test_statistics_for_another_number_of_features_are_refused(name):
    message = f"{name} has shape (4,), but an input of shape (8, 5, 3) has features of shape (3,) on axis (2,)"
    given = {"mean": THREE, "var": THREE, name: FOUR}
    with refused(message):
        jaxbn.normalize(X, **given)
    for average in (True, False):
        with refused(message):
            jaxbn.batch_norm(X, jaxbn.BatchStats(**given), use_running_average=average)
    with refused(message):
        jaxbn.batch_renormalize(X, stats=jaxbn.BatchStats(**given))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
@pytest.mark.parametrize("function", FUNCTIONS | MEASURING)
def test_integers_and_booleans_are_refused(function, dtype):
    message = (
        f"x has dtype {np.dtype(dtype)}; batch norm takes floating-point or complex inputs; "
        "convert it first, for example with x.astype(jnp.float32)."
    )
    with refused(message):
        (FUNCTIONS | MEASURING)[function](X.astype(dtype))


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 2, float("nan")])
@pytest.mark.parametrize(
    "function",
    [train, evaluate, functools.partial(jaxbn.update_stats, STATS, jaxbn.Moments(THREE, THREE, THREE))],
    ids=["train", "evaluate", "update_stats"],
)
def test_a_momentum_outside_0_and_1_is_refused(function, momentum):
    message = (
        f"momentum={momentum} is outside [0, 1]; it is the weight of the old value, 0.99 by default; "
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
def test_an_option_that_is_no_number_is_refused(name, call, value):
    with refused(f"{name}={value!r} is a {type(value).__name__}; a number is accepted; pass one."):
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
        f"stats is a {type(stats).__name__}; accepted are BatchStats, CountedStats, AccumulatedStats; start with "
        "jaxbn.init_stats(features), or put arrays into jaxbn.BatchStats(mean=mean, var=var)."
    )
    with refused(message):
        call(stats)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ghost", "method='ghost' is a str; accepted is a function; pass jaxbn.batch_normalize, or a variant"),
        (jaxbn.ghost_normalize, "method=ghost_normalize cannot be called as batch_normalize is: missing a required"),
        (
            functools.partial(jaxbn.ghost_normalize, groupsize=4),
            "method=ghost_normalize cannot be called as batch_normalize is: ['groupsize'] are not all options of it;",
        ),
        (jaxbn.batch_norm, "method=batch_norm cannot be called as batch_normalize is: multiple values for argument"),
        (jaxbn.normalize, "method=normalize cannot be called as batch_normalize is: got an unexpected keyword"),
    ],
    ids=["text", "option_not_bound", "misspelt", "batch_norm", "normalize"],
)
def test_a_method_that_cannot_be_called_as_batch_normalize_is_refused(method, message):
    layer = jaxbn.nnx.BatchNorm(3, method=method, rngs=nnx.Rngs(0))
    for call in (lambda: train(method=method), lambda: evaluate(method=method), lambda: layer(X)):
        with refused(message):
            call()


@pytest.mark.parametrize("features", [-1, (2, -3)])
def test_a_negative_number_of_features_is_refused(features):
    with refused(f"features={np.min(features)} is below 0, its smallest value; use features=0 or more."):
        jaxbn.init_stats(features)


def test_a_plain_average_of_statistics_without_a_count_is_refused():
    message = (
        "momentum=None averages all batches alike, which needs their number, but BatchStats has no count; "
        "start from init_stats(features, counted=True), or give a momentum in [0, 1]."
    )
    with refused(message):
        train(momentum=None)


@pytest.mark.parametrize("epsilon", [0, 0.0, -1e-5, float("nan")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_epsilon_that_is_not_positive_is_refused(function, epsilon):
    message = f"epsilon={epsilon} is not positive; it is added to the variance; use for example 1e-5."
    with refused(message):
        FUNCTIONS[function](X, epsilon=epsilon)


MASKING = {name: f for name, f in (FUNCTIONS | MEASURING).items() if name != "normalize"}


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((8,), "for one entry per example, pass a mask of shape (8, 1, 1)."),
        ((8, 5), "for one entry per position, pass a mask of shape (8, 5, 1)."),
        ((7, 1, 1), "for one entry per example, pass a mask of shape (8, 1, 1)."),
        ((1, 8, 5, 3), "for one entry per example, pass a mask of shape (8, 1, 1)."),
    ],
)
@pytest.mark.parametrize("function", MASKING)
def test_a_mask_that_does_not_broadcast_to_the_input_is_refused(function, shape, hint):
    with refused(f"mask of shape {shape} does not broadcast to an input of shape (8, 5, 3); {hint}"):
        MASKING[function](X, mask=np.ones(shape, bool))


@pytest.mark.parametrize("function", MASKING)
def test_a_mask_of_weights_is_refused(function):
    message = (
        "mask has dtype float32; a mask says which positions count, as booleans or as integers 0 and 1; "
        "pass for example mask > 0."
    )
    with refused(message):
        MASKING[function](X, mask=np.ones((8, 1, 1), np.float32))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("lengths", [[0, 2] * 4, [0, -1] * 4])
@pytest.mark.parametrize("function", MASKING)
def test_a_mask_of_integers_other_than_0_and_1_is_refused(function, lengths, array):
    message = (
        "mask holds integers other than 0 and 1; a mask says which positions count, and does not weigh them; "
        "pass for example mask > 0, or for lengths, jnp.arange(size) < lengths[:, None]."
    )
    with refused(message):
        MASKING[function](X, mask=array(lengths).reshape(8, 1, 1))


COLLECTIVE = {name: f for name, f in MASKING.items() if name != "evaluate"}


@pytest.mark.parametrize("names", ["devices", ("hosts", "devices")])
@pytest.mark.parametrize("function", COLLECTIVE)
def test_an_axis_name_that_is_not_bound_is_refused(function, names):
    message = (
        f"axis_name={names!r} is not bound here; it names an axis of jax.shard_map, jax.pmap or jax.vmap; "
        "call inside one of them, or leave axis_name out: under jax.jit a sharded batch needs none."
    )
    with refused(message):
        COLLECTIVE[function](X, axis_name=names)


@pytest.mark.parametrize("function", COLLECTIVE)
def test_an_axis_name_that_is_no_name_is_refused(function):
    message = "axis_name=0 is no name; accepted are the name of an axis of devices and a sequence of names; name the"
    with refused(message):
        COLLECTIVE[function](X, axis_name=0)


@pytest.mark.parametrize("function", COLLECTIVE)
def test_groups_without_an_axis_name_are_refused(function):
    message = "axis_index_groups=[[0, 1]] without axis_name; groups divide a named axis of devices; pass its name."
    with refused(message):
        COLLECTIVE[function](X, axis_index_groups=[[0, 1]])


@pytest.mark.parametrize("groups", [[[0, 1], [1, 2]], [[0, 1]], [[0, 1], [2, 4]], [[0, 1], [2, 3], [3]]])
@pytest.mark.parametrize("function", COLLECTIVE)
def test_groups_that_do_not_partition_the_axis_are_refused(function, groups):
    message = (
        f"axis_index_groups={groups} does not partition axis_name='d' of size 4; "
        "name each index from 0 to 3 in exactly one group."
    )
    with refused(message):
        jax.vmap(lambda x: COLLECTIVE[function](x, axis_name="d", axis_index_groups=groups), axis_name="d")(
            X.reshape(4, 2, 5, 3)
        )


@pytest.mark.parametrize("group_size", [3, 16])
def test_a_group_size_that_does_not_divide_the_batch_is_refused(group_size):
    message = (
        f"group_size={group_size} does not divide the batch of 8; choose a divisor, or pad the batch and pass a mask."
    )
    with refused(message):
        ghost(group_size=group_size)


@pytest.mark.parametrize("group_size", [0, -2])
def test_a_group_without_examples_is_refused(group_size):
    with refused(f"group_size={group_size} is below 1, its smallest value; use group_size=1 or more."):
        ghost(group_size=group_size)


def test_ghost_groups_of_features_on_the_first_axis_are_refused():
    message = (
        "axis=0 makes the first axis of an input of shape (8, 5, 3) a feature axis, but ghost batch norm divides that "
        "axis into groups; move the examples to the first axis."
    )
    with refused(message):
        ghost(group_size=2, axis=0)


def test_renorm_without_running_statistics_is_refused():
    message = (
        "stats=None, but batch renormalisation compares the batch with the running statistics; "
        "pass stats, or use it as the method of batch_norm or of a layer, which do."
    )
    with refused(message):
        jaxbn.batch_renormalize(X)


def test_shifted_batch_norm_without_running_statistics_is_refused():
    message = (
        "stats=None, but the moments are measured about the running mean; "
        "pass stats, or use it as the method of batch_norm or of a layer, which do."
    )
    with refused(message):
        jaxbn.shifted_normalize(X)


@pytest.mark.parametrize(("name", "value", "least"), [("r_max", 0.5, 1), ("d_max", -1.0, 0)])
def test_limits_of_renorm_that_exclude_batch_norm_are_refused(name, value, least):
    with refused(f"{name}={value} is below {least}, its smallest value; use {name}={least} or more."):
        renorm(**{name: value})


def test_statistics_of_other_features_are_not_combined():
    one, eight = jaxbn.moments(X[..., :1]), jaxbn.moments(np.ones((4, 8), np.float32))
    with refused("the moments have features of shape (8,), but the running statistics of shape (1,); combine statis"):
        jaxbn.update_stats(jaxbn.init_stats(1), eight, momentum=0.9)
    with refused("the moments b have features of shape (8,), but the moments a of shape (1,); combine statistics of"):
        jaxbn.combine(one, eight)


def test_an_nnx_layer_for_another_number_of_features_names_num_features():
    message = (
        "num_features=4, but an input of shape (8, 5, 3) has 3 features on axis -1; "
        "construct the layer with num_features=3, or set axis to where the features are."
    )
    with refused(message):
        jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(X)


def test_a_scalar_is_refused():
    with refused("x is a scalar; batch norm takes inputs with an axis of features, such as [N, C]; reshape it."):
        jaxbn.moments(jnp.float32(1))


def test_an_axis_that_is_no_integer_is_refused():
    with refused("axis=1.5 is not an integer or a sequence of integers; use for example axis=-1."):
        jaxbn.moments(X, axis=1.5)


def test_a_momentum_and_an_epsilon_in_arrays_are_checked_too():
    with refused("momentum=1.5 is outside [0, 1]"):
        train(momentum=jnp.float32(1.5))
    with refused("epsilon=-1.0 is not positive"):
        train(epsilon=jnp.float32(-1))


# One value per feature


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 1, 3)])
@pytest.mark.parametrize("function", ["batch_normalize", "train", "batch_renormalize"])
def test_training_on_one_value_per_feature_warns(function, shape):
    message = (
        f"an input of shape {shape} has one value per feature, so that training normalises it to 0; "
        "use a batch of at least two examples, or use_running_average=True."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        FUNCTIONS[function](np.ones(shape, np.float32))


@pytest.mark.parametrize("function", ["normalize", "evaluate"])
def test_evaluating_one_value_per_feature_does_not_warn(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FUNCTIONS[function](np.ones((1, 3), np.float32))


def test_ghost_groups_of_one_value_warn_of_the_group_size():
    with pytest.warns(UserWarning, match="group_size=1 leaves one value per group and feature"):
        jaxbn.ghost_normalize(X[:, 0], group_size=1)


def test_init_on_one_example_neither_warns_nor_needs_whole_groups():
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False, method=functools.partial(jaxbn.ghost_normalize, group_size=4)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.init(jax.random.key(0), np.ones((1, 3), np.float32))


def test_one_value_per_feature_on_each_of_many_devices_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(jax.vmap(lambda x: jaxbn.batch_normalize(x, axis_name="d"), axis_name="d"), X[:, :1])


def test_one_value_per_feature_becomes_the_bias():
    with pytest.warns(UserWarning):
        y, _ = jaxbn.batch_normalize(np.full((1, 3), 7, np.float32), bias=2 * THREE)
    np.testing.assert_array_equal(y, np.full((1, 3), 2))


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
    with refused(f"{name}=2.0 is a float; an integer is accepted; pass one."):
        call()


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda **dtype: jaxbn.linen.BatchNorm(**dtype).init(jax.random.key(0), X, use_running_average=True),
        lambda **dtype: jaxbn.nnx.BatchNorm(3, **dtype, rngs=nnx.Rngs(0)),
        lambda **dtype: jaxbn.linen.Affine(**dtype).init(jax.random.key(0), X),
        lambda **dtype: jaxbn.nnx.Affine(3, **dtype),
    ],
    ids=["linen", "nnx", "linen_affine", "nnx_affine"],
)
def test_a_layer_whose_results_or_parameters_would_be_integers_is_refused(layer, name):
    with pytest.raises(ValueError, match=f"^{name}=.*int32.*; a floating-point or complex dtype is accepted; use for"):
        layer(**{name: jnp.int32})


def test_statistics_that_would_be_integers_are_refused():
    with pytest.raises(ValueError, match="^dtype=.*int32.*; a floating-point or complex dtype is accepted; use for"):
        jaxbn.init_stats(3, dtype=jnp.int32)
