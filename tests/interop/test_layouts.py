"""A layer of PyTorch or Keras gives the same output in Flax; weights go there and back bit for bit, or are refused."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
import jaxbn.linen
from jaxbn import interop
from tests.golden import make_keras
from tests.golden import make_pytorch_training as make_pytorch


def refused(message):
    return pytest.raises(ValueError, match=re.escape(message))


@functools.cache
def golden(file):
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays}


def golden_tree(file, prefix):
    return {name.removeprefix(prefix): array for name, array in golden(file).items() if name.startswith(prefix)}


def assert_within_rounding(found, expected, steps=1):
    """Compares trees: a step rounds each value some tens of times, 64 units of the largest, which it may sum with."""
    found, expected = (jax.tree.map(np.asarray, tree) for tree in (found, expected))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(abs(array).max() for array in jax.tree.leaves(expected) if array.dtype.kind == "f")
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        units = 64 * steps * np.finfo(one.dtype).eps if one.dtype.kind == "f" else 0
        np.testing.assert_allclose(one, other, rtol=0, atol=units * largest)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


# Outputs


def transposed(k, stride, padding=0, output_padding=0, dilation=1):
    """Returns the options of Flax's transposed convolution for those of PyTorch's, as the docstring says."""

    def each(value):
        return (value,) * len(k) if isinstance(value, int) else value

    low = [d * (size - 1) - p for d, size, p in zip(each(dilation), k, each(padding), strict=True)]
    high = [one + q for one, q in zip(low, each(output_padding), strict=True)]
    padding = list(zip(low, high, strict=True))
    return {"kernel_size": k, "strides": each(stride), "padding": padding, "kernel_dilation": each(dilation)}


FROM_TORCH = {
    "conv-1d": (interop.conv_layout(), nn.Conv(4, (5,), strides=2, padding=2)),
    "conv-2d-grouped": (
        interop.conv_layout(),
        nn.Conv(6, (3, 2), padding="VALID", kernel_dilation=(2, 1), feature_group_count=2, use_bias=False),
    ),
    "conv-2d-depthwise": (
        interop.depthwise_conv_layout(multiplier=2),
        nn.Conv(6, (3, 3), padding=1, feature_group_count=3),
    ),
    "conv-3d": (interop.conv_layout(), nn.Conv(4, (2, 3, 1), padding=(1, 1, 0))),
    "conv-transpose-1d": (interop.conv_transpose_layout(), nn.ConvTranspose(4, **transposed((5,), 2))),
    "conv-transpose-2d": (
        interop.conv_transpose_layout(),
        nn.ConvTranspose(4, **transposed((3, 2), (2, 3), padding=(1, 0), output_padding=(1, 2))),
    ),
    "conv-transpose-2d-dilated": (
        interop.conv_transpose_layout(transpose_kernel=True),
        nn.ConvTranspose(
            3,
            **transposed((3, 3), 2, padding=2, output_padding=1, dilation=2),
            use_bias=False,
            transpose_kernel=True,
        ),
    ),
    "conv-transpose-3d": (
        interop.conv_transpose_layout(),
        nn.ConvTranspose(3, **transposed((2, 3, 1), 2, padding=(1, 2, 0))),
    ),
    "dense": (interop.dense_layout(), nn.Dense(3)),
}
FROM_KERAS = {
    "conv-1d": (interop.conv_layout(), nn.Conv(4, (3,), strides=2)),
    "conv-2d-grouped": (
        interop.conv_layout(),
        nn.Conv(6, (3, 2), padding="VALID", feature_group_count=2, use_bias=False),
    ),
    "conv-3d": (interop.conv_layout(), nn.Conv(4, (2, 3, 1), padding="VALID")),
    "depthwise-1d": (
        interop.depthwise_conv_layout(multiplier=2),
        nn.Conv(6, (3,), padding="VALID", feature_group_count=3),
    ),
    "depthwise-2d": (
        interop.depthwise_conv_layout(multiplier=3),
        nn.Conv(12, (3, 2), strides=2, feature_group_count=4),
    ),
    "conv-transpose-1d": (interop.conv_transpose_layout(), nn.ConvTranspose(4, (5,), strides=(2,), padding="VALID")),
    "conv-transpose-2d": (interop.conv_transpose_layout(), nn.ConvTranspose(4, (3, 2), strides=(2, 3))),
    "conv-transpose-3d": (
        interop.conv_transpose_layout(transpose_kernel=True),
        nn.ConvTranspose(3, (2, 3, 1), strides=(2, 2, 2), padding="VALID", use_bias=False, transpose_kernel=True),
    ),
    "dense": (interop.dense_layout(), nn.Dense(3)),
    **{
        "batch-norm" + name: (
            interop.batch_norm_layout(**options),
            jaxbn.linen.BatchNorm(use_running_average=True, epsilon=1e-3, **options),
        )
        for name, options in {
            "": {},
            "-without-scale": {"use_scale": False},
            "-without-bias": {"use_bias": False},
            "-without-either": {"use_scale": False, "use_bias": False},
        }.items()
    },
}


@pytest.mark.parametrize("source", ["golden", "live"])
@pytest.mark.parametrize("case", make_pytorch.LAYERS)
def test_a_layer_of_pytorch_gives_the_same_output_in_flax(case, source):
    if source == "live":
        pytest.importorskip("torch", reason="PyTorch is not installed; the golden file stands for it")
    expected = make_pytorch.run_layer(case) if source == "live" else golden(make_pytorch.FILE)[f"layers/{case}"]
    layout, layer = FROM_TORCH[case]
    entries, x = make_pytorch.layer_inputs(case)
    with jax.enable_x64(True):
        y = jax.jit(layer.apply)(layout.from_torch(entries), np.moveaxis(x, 1, -1))
    assert_within_rounding(np.moveaxis(y, -1, 1), expected)


@pytest.mark.parametrize("case", make_keras.LAYERS)
def test_a_layer_of_keras_gives_the_same_output_in_flax(case):
    layout, layer = FROM_KERAS[case]
    weights, x = make_keras.layer_inputs(case)
    y = jax.jit(layer.apply)(layout.from_keras(weights), x)
    assert_within_rounding(y, golden(make_keras.FILE)[f"layers/{case}"])


class Flattened(nn.Module):
    """A flattening in PyTorch and in Flax orders the features of a batch norm and a dense layer differently."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), padding="VALID")(x)
        x = jaxbn.linen.BatchNorm(True)(x.reshape(len(x), -1))
        return nn.Dense(7)(x)


class Unflattened(nn.Module):
    """The same of an unflattening."""

    @nn.compact
    def __call__(self, x):
        x = jaxbn.linen.BatchNorm(True)(nn.Dense(24)(x))
        x = jaxbn.linen.BatchNorm(True)(x.reshape(len(x), 2, 3, 4))
        return nn.ConvTranspose(3, **transposed((3, 2), 1))(x)


CHAINS = {
    "flattened": (
        Flattened(),
        {"0": "Conv_0", "2": "BatchNorm_0", "3": "Dense_0"},
        {"2": interop.batch_norm_layout(flattened=(4, 2, 3)), "3": interop.dense_layout(flattened=(4, 2, 3))},
    ),
    "unflattened": (
        Unflattened(),
        {"0": "Dense_0", "1": "BatchNorm_0", "3": "BatchNorm_1", "4": "ConvTranspose_0"},
        {
            "0": interop.dense_layout(unflattened=(4, 2, 3)),
            "1": interop.batch_norm_layout(flattened=(4, 2, 3)),
            "4": interop.conv_transpose_layout(),
        },
    ),
}


@pytest.mark.parametrize("source", ["golden", "live"])
@pytest.mark.parametrize("case", make_pytorch.CHAINS)
def test_a_chain_of_pytorch_gives_the_same_output_in_flax_and_the_same_bits_back(case, source):
    if source == "live":
        pytest.importorskip("torch", reason="PyTorch is not installed; the golden file stands for it")
    expected = make_pytorch.run_chain(case) if source == "live" else golden(make_pytorch.FILE)[f"chains/{case}"]
    model, names, layouts = CHAINS[case]
    entries, x = make_pytorch.chain_inputs(case)
    x = np.moveaxis(x, 1, -1)
    with jax.enable_x64(True):
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), jax.eval_shape(model.init, jax.random.key(0), x)
        )
        variables = interop.from_torch(entries, shapes, names, layouts=layouts)
        y = jax.jit(model.apply)(variables, x)
    assert_within_rounding(np.moveaxis(y, -1, 1), expected)
    back = interop.to_torch(variables, names, layouts=layouts)
    assert_same_bits({name: array for name, array in back.items() if "num_batches" not in name}, entries)


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_a_transposed_convolution_is_the_same_with_either_kernel(transpose_kernel):
    layout = interop.conv_transpose_layout(transpose_kernel=transpose_kernel)
    layer = nn.ConvTranspose(4, (3, 2), padding="VALID", transpose_kernel=transpose_kernel)
    entries = {"weight": random((2, 4, 3, 2), np.float64, 0), "bias": random((4,), np.float64, 1)}
    other = interop.conv_transpose_layout(transpose_kernel=not transpose_kernel)
    x = random((1, 4, 3, 2), np.float64, 2)
    with jax.enable_x64(True):
        y = layer.apply(layout.from_torch(entries), x)
        expected = layer.clone(transpose_kernel=not transpose_kernel).apply(other.from_torch(entries), x)
    assert_within_rounding(y, expected)
    assert_same_bits(layout.to_torch(layout.from_torch(entries)), entries)
    assert_same_bits(layout.to_keras(layout.from_torch(entries)), other.to_keras(other.from_torch(entries)))


# There and back


DTYPE = st.sampled_from([np.float16, np.float32, np.float64])
SIZE = st.integers(1, 4)


def random(shape, dtype, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@st.composite
def kernels(draw):
    """Draws a layout and variables of a layer with it."""
    k = tuple(draw(st.lists(SIZE, min_size=1, max_size=3)))
    groups, per_group, out_per_group = draw(SIZE), draw(SIZE), draw(SIZE)
    transpose_kernel = draw(st.booleans())
    ends = (groups * per_group, groups * out_per_group)
    layout, shape, features = draw(
        st.sampled_from(
            [
                (interop.conv_layout(), (*k, per_group, ends[1]), ends[1]),
                (interop.depthwise_conv_layout(multiplier=out_per_group), (*k, 1, ends[1]), ends[1]),
                (
                    interop.conv_transpose_layout(transpose_kernel=transpose_kernel),
                    (*k, *(ends[::-1] if transpose_kernel else ends)),
                    ends[1],
                ),
                (interop.dense_layout(), ends, ends[1]),
                (interop.dense_layout(flattened=(groups, *k)), (groups * math.prod(k), ends[1]), ends[1]),
                (
                    interop.dense_layout(unflattened=(groups, *k)),
                    (ends[0], groups * math.prod(k)),
                    groups * math.prod(k),
                ),
            ]
        )
    )
    dtype = draw(DTYPE)
    variables = {"kernel": random(shape, dtype, 0)}
    if draw(st.booleans()):
        variables["bias"] = random((features,), dtype, 1)
    return layout, {"params": variables}


@st.composite
def norms(draw):
    use_scale, use_bias, counted = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    flattened, dtype = draw(st.lists(SIZE, min_size=1, max_size=3)), draw(DTYPE)
    features = math.prod(flattened)
    params = {
        name: random((features,), dtype, seed) for seed, name in enumerate(["scale"] * use_scale + ["bias"] * use_bias)
    }
    stats = {"mean": random((features,), np.float32, 2), "var": random((features,), np.float32, 3)}
    if counted:
        stats["steps"] = np.full(features, draw(st.integers(0, 2**31 - 1)), np.int32)
    layout = interop.batch_norm_layout(
        use_scale=use_scale, use_bias=use_bias, counted=counted, flattened=draw(st.sampled_from([None, flattened]))
    )
    return layout, {"params": params, "batch_stats": stats} if params else {"batch_stats": stats}


@settings(max_examples=100, deadline=None)
@given(st.one_of(kernels(), norms()))
def test_variables_to_pytorch_and_back_are_the_same_bits(case):
    layout, variables = case
    entries = layout.to_torch(variables)
    assert_same_bits(layout.from_torch(entries), variables)
    assert_same_bits(layout.to_torch(layout.from_torch(entries)), entries)


@settings(max_examples=100, deadline=None)
@given(st.one_of(kernels(), norms()))
def test_variables_to_keras_and_back_are_the_same_bits_but_for_steps(case):
    layout, variables = case
    weights = layout.to_keras(variables)
    variables.get("batch_stats", {}).pop("steps", None)
    assert_same_bits(layout.from_keras(weights), variables)
    assert_same_bits(layout.to_keras(layout.from_keras(weights)), weights)


def test_results_share_no_memory_with_what_is_given():
    entries = {"weight": np.ones((1, 1, 1)), "bias": np.ones(1)}
    layout = interop.conv_layout()
    variables = layout.from_torch(entries)
    for results, sources in [
        (variables, entries),
        (layout.to_torch(variables), variables),
        (layout.to_keras(variables), variables),
        (layout.from_keras(list(entries.values())), entries),
    ]:
        pairs = itertools.product(jax.tree.leaves(results), jax.tree.leaves(sources))
        assert not any(np.shares_memory(one, other) for one, other in pairs)


def test_results_are_contiguous_and_writable_as_pytorch_needs_them():
    variables = {"params": {"kernel": jnp.ones((3, 2, 4)), "bias": jnp.ones(4)}}
    layout = interop.conv_layout()
    for array in (*layout.to_torch(variables).values(), *layout.to_keras(variables)):
        assert array.flags.c_contiguous and array.flags.writeable


# What a layer may lack


BATCH_NORM = {
    "weight": np.array([1.0, 2.0]),
    "bias": np.array([3.0, 4.0]),
    "running_mean": np.array([5.0, 6.0]),
    "running_var": np.array([7.0, 8.0]),
    "num_batches_tracked": np.array(9),
}


def only(*names):
    return {name: BATCH_NORM[name] for name in names}


def test_without_affine_there_are_no_params():
    found = interop.batch_norm_layout().from_torch(only("running_mean", "running_var", "num_batches_tracked"))
    assert list(found) == ["batch_stats"] and list(found["batch_stats"]) == ["mean", "var"]
    entries = interop.batch_norm_layout().to_torch(found)
    assert list(entries) == ["running_mean", "running_var", "num_batches_tracked"]
    assert entries["num_batches_tracked"] == 0  # the layer does not count


def test_without_running_statistics_there_are_no_batch_stats():
    found = interop.batch_norm_layout(counted=True).from_torch(only("weight", "bias"))
    assert list(found) == ["params"]
    assert_same_bits(interop.batch_norm_layout().to_torch(found), only("weight", "bias"))


def test_steps_are_read_only_for_layers_that_count():
    assert "steps" not in interop.batch_norm_layout().from_torch(BATCH_NORM)["batch_stats"]
    found = interop.batch_norm_layout(counted=True).from_torch(BATCH_NORM)["batch_stats"]["steps"]
    assert_same_bits(found, np.array([9, 9], np.int32))


def test_the_feature_that_saw_most_batches_counts_them_for_all():
    stats = {"mean": np.zeros(2), "var": np.ones(2), "steps": np.array([7, 9], np.int32)}
    assert interop.batch_norm_layout(counted=True).to_torch({"batch_stats": stats})["num_batches_tracked"] == 9


def test_a_scale_or_bias_that_flax_lacks_is_neutral_in_pytorch():
    variables = {"params": {"bias": np.array([3.0, 4.0])}, "batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}
    layout = interop.batch_norm_layout(use_scale=False)
    np.testing.assert_array_equal(layout.to_torch(variables)["weight"], 1)
    assert_same_bits(layout.from_torch(layout.to_torch(variables)), variables)
    with refused("the weight of this batch norm is not 1 everywhere, and Flax's layer has none; make Flax's layer"):
        layout.from_torch(BATCH_NORM)


@pytest.mark.parametrize(("own", "entry"), [("scale", "weight"), ("bias", "bias")])
def test_a_scale_or_bias_that_flax_lacks_has_no_momentum(own, entry):
    momenta = {"params": {own: np.zeros(2)}}
    layout = interop.batch_norm_layout(use_scale=own == "scale", use_bias=own == "bias")
    assert list(layout.to_torch(momenta)) == [entry]
    assert_same_bits(layout.from_torch(layout.to_torch(momenta)), momenta)


def test_averages_without_the_share_of_their_start_are_those_of_debias():
    moments = [jaxbn.Moments(*np.array([[n + 2], [n + 3], [8]], np.float32)) for n in range(3)]
    plain, debiased = jaxbn.init_stats(1), jaxbn.init_stats(1, counted=True)
    for batch in moments:
        plain, debiased = (jaxbn.update_stats(stats, batch, momentum=0.9) for stats in (plain, debiased))
    share = 0.9**3
    corrected = [plain.mean / (1 - share), (plain.var - share) / (1 - share)]
    assert_within_rounding(corrected, [debiased.mean, debiased.var])


def test_weights_of_several_groups_without_a_bias_look_like_those_of_fewer_features():
    found = interop.conv_transpose_layout().from_torch({"weight": np.ones((4, 3, 5))})
    assert found["params"]["kernel"].shape == (5, 4, 3)


# Refusals


MISTAKES = {
    "a convolution of two axes": (
        lambda: interop.conv_layout().from_torch({"weight": np.ones((3, 2))}),
        "the kernel of a convolution has 3 or 4 or 5 axes, but the shape (3, 2) is given; use the layout of the layer",
    ),
    "a dense layer of four axes": (
        lambda: interop.dense_layout().from_keras([np.ones((3, 3, 2, 2))]),
        "the kernel of a dense layer has 2 axes, but the shape (3, 3, 2, 2) is given; use the layout of the layer",
    ),
    "a transposed convolution of two groups": (
        lambda: interop.conv_transpose_layout().from_torch({"weight": np.ones((4, 3, 5)), "bias": np.ones(6)}),
        "a transposed convolution without groups with a kernel of shape (5, 4, 3) in Flax has 3 features, but its bias "
        "has the shape (6,); pass kernel and bias of one layer, of this kind.",
    ),
    "a prefix": (
        lambda: interop.dense_layout().from_torch({"fc.weight": np.ones((3, 2))}),
        "a dense layer in PyTorch has weight and may have bias, but fc.weight is given; "
        "pass what belongs to this layer alone, by these names.",
    ),
    "no entries": (
        lambda: interop.batch_norm_layout().from_torch({}),
        "a batch norm in PyTorch may have weight, bias, running_mean, running_var, num_batches_tracked, "
        "but nothing is given; pass what belongs to this layer alone, by these names.",
    ),
    "variables without collections": (
        lambda: interop.dense_layout().to_torch({"kernel": np.ones((2, 3))}),
        "a dense layer in Flax has params/kernel and may have params/bias, but kernel is given; pass what belongs",
    ),
    "norm arrays of two sizes": (
        lambda: interop.batch_norm_layout().from_torch(BATCH_NORM | {"bias": np.ones(3)}),
        "the arrays of a norm have one shape, but {'running_mean': (2,), 'running_var': (2,), 'weight': (2,), "
        "'bias': (3,)} are given; pass those of one layer.",
    ),
    "a count that is missing": (
        lambda: interop.batch_norm_layout(counted=True).from_torch(without(BATCH_NORM, "num_batches_tracked")),
        "a batch norm in PyTorch has running_mean, running_var, num_batches_tracked and may have weight, bias, but",
    ),
    "three arrays for a norm of four": (
        lambda: interop.batch_norm_layout().from_keras([np.ones(2)] * 3),
        "a batch norm in Keras has gamma, beta, moving_mean, moving_variance, but 3 arrays are given; "
        "pass the weights of this layer alone, and give the layout the options of the layer.",
    ),
    "no arrays for a norm of two": (
        lambda: interop.batch_norm_layout(use_scale=False, use_bias=False).from_keras([]),
        "a batch norm in Keras has moving_mean, moving_variance, but 0 arrays are given; pass the weights of this",
    ),
    "arrays of two sizes from Keras": (
        lambda: interop.batch_norm_layout().from_keras([np.ones(2), np.ones(2), np.ones(3), np.ones(3)]),
        "the arrays of a norm have one shape, but {'gamma': (2,), 'beta': (2,), 'moving_mean': (3,), "
        "'moving_variance': (3,)} are given; pass those of one layer.",
    ),
    "arrays of two sizes to Keras": (
        lambda: interop.batch_norm_layout().to_keras({"params": {"scale": np.ones(2), "bias": np.ones(3)}}),
        "the arrays of a norm have one shape, but {'params/scale': (2,), 'params/bias': (3,)} are given; pass those",
    ),
    "arrays of two sizes to PyTorch": (
        lambda: interop.batch_norm_layout().to_torch({"params": {"scale": np.ones(2), "bias": np.ones(3)}}),
        "the arrays of a norm have one shape, but {'params/scale': (2,), 'params/bias': (3,)} are given; pass those",
    ),
    "a norm over several axes": (
        lambda: interop.batch_norm_layout().from_torch({"weight": np.ones((4, 3, 2)), "bias": np.ones((4, 3, 2))}),
        "the arrays of a norm have one axis, the features, but {'weight': (4, 3, 2), 'bias': (4, 3, 2)} are given; the "
        "order of several differs between frameworks: move their axes yourself, in a Layout of your own.",
    ),
    "a mean without a variance": (
        lambda: interop.batch_norm_layout().to_torch({"batch_stats": {"mean": np.ones(2)}}),
        "a batch norm in Flax has batch_stats/mean, batch_stats/var and may have params/scale, params/bias, "
        "batch_stats/steps, but batch_stats/mean is given",
    ),
    "a count beyond int32": (
        lambda: interop.batch_norm_layout(counted=True).from_torch(
            BATCH_NORM | {"num_batches_tracked": np.array(2**31)}
        ),
        "num_batches_tracked=2147483648 is not one number from 0 to 2**31 - 1, which Flax's int32 holds; "
        "give a smaller one: the average changes by less than it rounds.",
    ),
    "counts by feature": (
        lambda: interop.batch_norm_layout(counted=True).from_torch(
            BATCH_NORM | {"num_batches_tracked": np.array([7, 7])}
        ),
        "num_batches_tracked=[7 7] is not one number from 0 to 2**31 - 1",
    ),
    "a bias of another layer": (
        lambda: interop.conv_layout().to_torch({"params": {"kernel": np.ones((3, 2, 4)), "bias": np.ones(2)}}),
        "a convolution with a kernel of shape (3, 2, 4) in Flax has 4 features, but its bias has the shape (2,)",
    ),
    "a grouped kernel as depthwise": (
        lambda: interop.depthwise_conv_layout().to_keras({"params": {"kernel": np.ones((3, 3, 2, 8))}}),
        "a kernel of shape (3, 3, 2, 8) in Flax is not depthwise with the multiplier 1, which has the shape [*k, 1,",
    ),
    "a scale that the layout denies": (
        lambda: interop.batch_norm_layout(use_scale=False).to_keras(interop.batch_norm_layout().from_torch(BATCH_NORM)),
        "a batch norm in Flax has params/bias, batch_stats/mean, batch_stats/var and may have batch_stats/steps, but",
    ),
    "three arrays for a convolution": (
        lambda: interop.conv_layout().from_keras([np.ones((3, 3, 4, 1)), np.ones((1, 1, 4, 8)), np.ones(8)]),
        "a convolution in Keras has kernel and may have bias, but 3 arrays are given; pass the weights of",
    ),
    "another multiplier in Keras": (
        lambda: interop.depthwise_conv_layout().from_keras([np.ones((3, 3, 4, 2))]),
        "a depthwise kernel of shape (3, 3, 4, 2) in Keras has the multiplier 2, not 1; "
        "use depthwise_conv_layout(multiplier=2).",
    ),
    "another multiplier in Flax": (
        lambda: interop.depthwise_conv_layout(multiplier=3).to_keras({"params": {"kernel": np.ones((3, 3, 1, 8))}}),
        "a kernel of shape (3, 3, 1, 8) in Flax is not depthwise with the multiplier 3, "
        "which has the shape [*k, 1, in*3]; use another multiplier, or conv_layout().",
    ),
    "another flattened shape": (
        lambda: interop.dense_layout(flattened=(2, 4, 4)).from_torch({"weight": np.ones((3, 30))}),
        "flattened=(2, 4, 4) makes 32 features, but this layer has 30; "
        "give the shape [C, *k] of one example in PyTorch where it is not flat.",
    ),
    "another unflattened shape": (
        lambda: interop.dense_layout(unflattened=(2, 2)).to_torch({"params": {"kernel": np.ones((4, 3))}}),
        "unflattened=(2, 2) makes 4 features, but this layer has 3; give the shape [C, *k] of one example in PyTorch",
    ),
    "another flattened shape of a norm": (
        lambda: interop.batch_norm_layout(flattened=(2, 2)).from_torch(BATCH_NORM),
        "flattened=(2, 2) makes 4 features, but this layer has 2; give the shape [C, *k] of one example in PyTorch",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_layout_refuses(case):
    call, message = MISTAKES[case]
    with refused(message):
        call()
