"""Calibration: statistics of the whole data set, however it is split, masked or spread, and nothing else changes.

The oracle is a net in NumPy and float64 that sees all the data as one batch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import calibrate, surgery
from jaxbn._models import passes
from tests import reference

FEATURES = 4
SPLIT = (2, 2, 4, 8, 16, 32, 64)
# A dozen roundings in each of five layers.
ROUNDING = 5 * 12 * np.finfo(np.float32).eps
X = np.random.default_rng(0).normal(3, 2, (128, FEATURES)).astype(np.float32)
X[:40] += 2  # so that batches differ


class Block(nn.Module):
    norm: Callable
    features: int = FEATURES

    @nn.compact
    def __call__(self, x, mask=None):
        return nn.relu(self.norm(use_running_average=True, name="norm")(nn.Dense(self.features)(x), mask=mask))


class Net(nn.Module):
    """A layer, two side by side, and one that is called twice in a row: four levels."""

    norm: Callable = nn.BatchNorm
    wrap: Callable = staticmethod(lambda block: block)

    @nn.compact
    def __call__(self, x, mask=None):
        first, left, right, twice = (self.wrap(Block)(self.norm, name=name) for name in NAMES)
        x = first(x, mask)
        x = left(x, mask) + right(x, mask)
        return twice(twice(x, mask), mask)


class Chain(nn.Module):
    """Two layers, which compile sooner."""

    norm: Callable = nn.BatchNorm

    @nn.compact
    def __call__(self, x, mask=None):
        return Block(self.norm, name="left")(Block(self.norm, name="first")(x, mask), mask)


class NnxBlock(nnx.Module):
    def __init__(self, norm, values):
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=nnx.Rngs(0))
        self.norm = norm(FEATURES, rngs=nnx.Rngs(0))
        nnx.update(self, {"dense": values["Dense_0"], "norm": values["norm"]})

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class NnxNet(nnx.Module):
    """The first net with the same parameters, and with dropout."""

    def __init__(self, norm=nnx.BatchNorm, wrap=lambda block: block):
        for name in NAMES:
            setattr(self, name, NnxBlock(norm, VARIABLES["params"][name]))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.wrap = wrap

    def __call__(self, x):
        call = self.wrap(lambda block, x: block(x))
        x = call(self.first, self.dropout(x))
        x = call(self.left, x) + call(self.right, x)
        return call(self.twice, call(self.twice, x))


def scattered(tree, seed=1):
    """Returns parameters and statistics with random values, far from those that they start with."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(random.uniform(0.5, 1.5, a.shape), a.dtype), tree)


NAMES = ("first", "left", "right", "twice")
NET, CHAIN, LAYER = Net(), Chain(), nn.BatchNorm(True)
VARIABLES = scattered(jax.eval_shape(NET.init, jax.random.key(0), X))


def of_chain(variables):
    return {kind: {name: tree[name] for name in ("first", "left")} for kind, tree in variables.items()}


def oracle(groups=(slice(None),), params=None):
    """Returns mean and variance of the layers of the first net; the examples of a group are normalised together."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params or VARIABLES["params"])
    inputs = {name: [] for name in params}

    def block(name, x):
        dense, norm = params[name]["Dense_0"], params[name]["norm"]
        inputs[name].append(x @ dense["kernel"] + dense["bias"])
        return np.maximum(reference.batch_norm(inputs[name][-1], **norm)[0], 0)

    for rows in groups:
        x = block("first", X[rows])
        x = block("left", x) + block("right", x)
        block("twice", block("twice", x))
    return {name: reference.moments(np.concatenate(values))[:2] for name, values in inputs.items()}


def chain_oracle(groups=(slice(None),)):
    """Returns the same of the two layers in a row."""
    return {name: stats for name, stats in oracle(groups).items() if name in ("first", "left")}


def of_layer(kind=jnp.float32):
    """Returns the variables of a batch norm by itself."""
    zeros, ones = jnp.zeros(FEATURES, kind), jnp.ones(FEATURES, kind)
    return {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}


def batches_of(sizes):
    return [X[rows] for rows in rows_of(sizes)]


def rows_of(sizes):
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def stats_of(result):
    """Returns mean and variance of each layer of a calibrated model."""
    if isinstance(result, nnx.Module):
        norms = {name: getattr(result, name).norm for name in NAMES}
        return {name: (norm.mean[...], norm.var[...]) for name, norm in norms.items()}
    stats = result["batch_stats"]
    blocks = {"": {"norm": stats}} if "mean" in stats else stats
    return {name: (block["norm"]["mean"], block["norm"]["var"]) for name, block in blocks.items()}


def assert_close(found, expected, rounding=ROUNDING):
    """Compares statistics in units of the standard deviation."""
    assert found.keys() == expected.keys()
    for name, (mean, var) in expected.items():
        np.testing.assert_array_less(abs(found[name][0] - mean) / np.sqrt(var), rounding, err_msg=name)
        np.testing.assert_array_less(abs(found[name][1] - var) / var, rounding, err_msg=name)


def test_layer_by_layer_is_a_forward_pass_of_all_data_in_float64():
    assert_close(stats_of(calibrate.layer_by_layer(NET, VARIABLES, [X])), oracle())


def test_layer_by_layer_does_not_depend_on_the_split():
    whole, split = (
        stats_of(calibrate.layer_by_layer(CHAIN, of_chain(VARIABLES), batches_of(sizes))) for sizes in ((128,), SPLIT)
    )
    assert_close(split, whole)


def test_one_pass_normalises_each_batch_with_its_own_moments():
    result = calibrate.one_pass(CHAIN, of_chain(VARIABLES), iter(batches_of((64, 64))))
    assert_close(stats_of(result), chain_oracle(rows_of((64, 64))))


def test_one_pass_with_running_averages_does_not_depend_on_the_split():
    whole, split = (
        stats_of(calibrate.one_pass(CHAIN, of_chain(VARIABLES), batches_of(sizes), use_running_average=True))
        for sizes in ((128,), (64, 64))
    )
    assert_close(split, whole)
    assert_close({"first": split["first"]}, {"first": oracle()["first"]})


def test_rounding_does_not_grow_with_the_number_of_batches():
    x = np.random.default_rng(2).normal(1, 1, (1000, 1, FEATURES)).astype(np.float32)
    result = calibrate.one_pass(LAYER, of_layer(), list(x), use_running_average=True)
    assert_close(stats_of(result), {"": reference.moments(x[:, 0])[:2]}, 10 * np.finfo(np.float32).eps)


LINEN = {
    "under jit": Net(wrap=nn.jit),
    "of jaxbn, under remat": Net(jaxbn.linen.BatchNorm, nn.remat),
    "with an axis name": Chain(functools.partial(nn.BatchNorm, axis_name="devices")),
    "in training mode": Chain(lambda use_running_average, name: jaxbn.linen.BatchNorm(False, name=name)),
}
NNX = {
    "of flax": {},
    "of jaxbn, under jit": {"norm": jaxbn.nnx.BatchNorm, "wrap": nnx.jit},
    "under remat": {"wrap": nnx.remat},
}


@pytest.mark.parametrize("model", LINEN.values(), ids=LINEN)
def test_any_linen_batch_norm_is_calibrated(model):
    in_chain = isinstance(model, Chain)
    result = calibrate.layer_by_layer(model, of_chain(VARIABLES) if in_chain else VARIABLES, [X])
    assert_close(stats_of(result), chain_oracle() if in_chain else oracle())


@pytest.mark.parametrize("options", NNX.values(), ids=NNX)
def test_any_nnx_batch_norm_is_calibrated_without_dropout(options):
    assert_close(stats_of(calibrate.layer_by_layer(NnxNet(**options), None, [X])), oracle())


def test_convolutional_nets_are_calibrated_over_positions():
    x = np.moveaxis(X.reshape(8, 4, 4, FEATURES), -1, 1)
    result = calibrate.layer_by_layer(nn.BatchNorm(True, axis=1), of_layer(), [x[:4], x[4:]])
    assert_close(stats_of(result), {"": reference.moments(X)[:2]})


def test_half_precision_models_keep_their_dtypes_and_are_measured_in_float32():
    half, x = jnp.bfloat16, (1 + X / 100).astype(jnp.bfloat16)
    variables = of_layer(half)
    model = nn.BatchNorm(True, dtype=half, force_float32_reductions=False, param_dtype=half)
    found = jax.jit(functools.partial(calibrate.measure, model))(variables, x)[""]
    assert_close({"": found[:2]}, {"": reference.moments(np.asarray(x, np.float64))[:2]})
    stored = calibrate.layer_by_layer(model, variables, [x])
    chex.assert_trees_all_equal_dtypes(stored, variables)
    assert found.mean.dtype == jnp.float32


# Masks.


def on_x(module, batch):
    return module(batch["x"])


def with_own_mask(module, batch):
    return module(batch["x"], batch["valid"][:, None])


def valid(batch):
    return batch["valid"]


def padded(sizes, size):
    found = [jaxbn.pad_batch(one, size) for one in batches_of(sizes)]
    return [{"x": np.where(mask[:, None], x, np.nan), "valid": mask} for x, mask in found]


def test_padding_does_not_count_where_the_data_say_so():
    found = calibrate.one_pass(CHAIN, of_chain(VARIABLES), padded((100, 28), 128), call=on_x, mask=valid)
    assert_close(stats_of(found), chain_oracle(rows_of((100, 28))))


def test_padding_does_not_count_where_the_model_says_so():
    found = calibrate.layer_by_layer(CHAIN, of_chain(VARIABLES), padded((100, 28), 128), call=with_own_mask)
    assert_close(stats_of(found), chain_oracle())


def test_examples_count_that_both_masks_admit():
    counted, own = np.arange(len(X)) % 2 == 0, np.arange(len(X)) % 3 == 0
    masks = {"call": lambda module, x: module(x, mask=own[:, None]), "mask": lambda x: counted}
    found = jax.jit(functools.partial(calibrate.measure, LAYER, **masks))(of_layer(), X)[""]
    mean, var, count = reference.moments(X, mask=(counted & own)[:, None])
    assert_close({"": found[:2]}, {"": (mean, var)})
    np.testing.assert_array_equal(found.count, count)


# Devices.


def mesh():
    return Mesh(jax.devices(), ("batch",))


def test_a_sharded_batch_has_the_statistics_of_the_whole():
    sharded = jax.device_put(X, NamedSharding(mesh(), P("batch")))
    found = stats_of(calibrate.layer_by_layer(CHAIN, of_chain(VARIABLES), [sharded]))
    assert_close(found, chain_oracle())


def test_devices_with_a_named_axis_measure_the_whole_batch():
    options = {"call": on_x, "mask": valid, "axis_name": "batch", "use_running_average": False}
    measure = functools.partial(calibrate.measure, CHAIN, **options)
    spread = jax.jit(jax.shard_map(measure, mesh=mesh(), in_specs=(P(), P("batch")), out_specs=P()))
    (batch,) = padded((100,), 128)
    found = spread(of_chain(VARIABLES), batch)
    assert_close({path.removesuffix("/norm"): one[:2] for path, one in found.items()}, chain_oracle([slice(100)]))
    assert {float(count) for one in found.values() for count in one.count} == {100.0}


# What is measured, and with what.


def test_a_batch_is_normalised_as_in_training_by_a_variant_too():
    method = functools.partial(jaxbn.ghost_normalize, group_size=16)
    training = Chain(lambda use_running_average, name: norm(False, name=name))
    norm = functools.partial(jaxbn.linen.BatchNorm, method=method, momentum=0.0)
    variables = of_chain(VARIABLES)
    _, updated = jax.jit(functools.partial(training.apply, mutable=["batch_stats"]))(variables, X)
    measured = jax.jit(functools.partial(calibrate.measure, Chain(norm), use_running_average=False))(variables, X)
    assert_close({path.removesuffix("/norm"): one[:2] for path, one in measured.items()}, stats_of(updated))


def test_frozen_layers_keep_their_statistics_and_normalise_with_them():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Block(functools.partial(jaxbn.linen.BatchNorm, frozen=True), name="first")(x)
            return Block(nn.BatchNorm, name="left")(x)

    result = calibrate.layer_by_layer(Half(), of_chain(VARIABLES), [X])
    chex.assert_trees_all_equal(result["batch_stats"]["first"], VARIABLES["batch_stats"]["first"])
    first, left = (jax.tree.map(np.asarray, VARIABLES["params"][name]) for name in ("first", "left"))
    x = reference.normalize(
        X @ first["Dense_0"]["kernel"] + first["Dense_0"]["bias"], *stats_of(VARIABLES)["first"], **first["norm"]
    )
    x = np.maximum(x, 0) @ left["Dense_0"]["kernel"] + left["Dense_0"]["bias"]
    assert_close({"left": stats_of(result)["left"]}, {"left": reference.moments(x)[:2]})


def test_layers_that_want_it_get_an_unbiased_variance():
    model = jaxbn.linen.BatchNorm(True, unbiased=True)
    found = calibrate.layer_by_layer(model, of_layer(), [X[:4], X[4:8]])["batch_stats"]["var"]
    np.testing.assert_allclose(found, reference.moments(X[:8])[1] * 8 / 7, rtol=ROUNDING)


def test_nothing_but_mean_and_variance_changes():
    model = Chain(functools.partial(jaxbn.linen.BatchNorm, debias=True))
    variables = scattered(jax.eval_shape(model.init, jax.random.key(0), X)) | {
        "cache": {"left": {"steps": jnp.ones(2)}}
    }
    before = jax.tree.map(np.array, variables)
    found = calibrate.layer_by_layer(model, variables, [X])
    chex.assert_trees_all_equal(variables, before)
    assert jax.tree.structure(found) == jax.tree.structure(variables)
    for name in ("first", "left"):
        assert not np.allclose(found["batch_stats"][name]["norm"]["mean"], before["batch_stats"][name]["norm"]["mean"])
        del found["batch_stats"][name]["norm"]["mean"], found["batch_stats"][name]["norm"]["var"]
        del before["batch_stats"][name]["norm"]["mean"], before["batch_stats"][name]["norm"]["var"]
    chex.assert_trees_all_equal(found, before)


def test_the_nnx_model_that_is_given_stays_as_it_is():
    model = NnxNet()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    found = calibrate.layer_by_layer(model, None, [X])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))), before)
    assert found is not model and found.first.norm.mean is not model.first.norm.mean
    assert not found.first.norm.use_running_average and not found.dropout.deterministic


def test_the_data_are_read_once_for_each_level():
    reads = []
    calibrate.layer_by_layer(NET, VARIABLES, lambda: reads.append(1) or iter([X]))
    assert len(reads) == 4


class Offset(nn.Module):
    """A model that cannot be hashed."""

    offset: np.ndarray

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True, name="norm")(x + self.offset)


def test_all_levels_share_a_program_wherever_the_arrays_lie():
    variables = jax.device_put(of_chain(VARIABLES), NamedSharding(mesh(), P()))
    before = passes._measured._cache_size()
    calibrate.layer_by_layer(CHAIN, variables, [X[:64], X[64:]])
    assert passes._measured._cache_size() == before + 1


@pytest.mark.parametrize(("model", "again"), [(LAYER, 1), (Offset(np.ones(FEATURES)), 2)], ids=["hashable", "not"])
def test_a_program_is_traced_once_for_each_model(model, again):
    traces = []

    def call(module, x):
        traces.append(x.shape)
        return module(x)

    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    variables = scattered(variables)
    calibrate.one_pass(model, variables, [X, X], call=call)
    assert len(traces) == 2  # once to see which layers there are
    calibrate.one_pass(model, variables, [X, X], call=call)
    assert len(traces) == 2 + again


def test_statistics_of_before_do_not_matter():
    wrecked = VARIABLES | {"batch_stats": jax.tree.map(lambda a: 1e3 * a - 30, VARIABLES["batch_stats"])}
    results = [calibrate.layer_by_layer(NET, variables, [X]) for variables in (VARIABLES, wrecked)]
    chex.assert_trees_all_equal(*results)


def test_averaged_weights_get_statistics_of_their_own():
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, VARIABLES["params"], scattered(VARIABLES, seed=2)["params"])
    result = calibrate.layer_by_layer(NET, VARIABLES | {"params": averaged}, [X])
    assert_close(stats_of(result), oracle(params=averaged))


# A net that tells classes apart.


class Classifier(nn.Module):
    """Two layers whose weights are random, and one that is fitted to what they see."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "left"):
            x = Block(nn.BatchNorm, features=32, name=name)(x)
        return nn.Dense(3, name="last")(x), x


class Task(NamedTuple):
    variables: dict
    x: np.ndarray
    labels: np.ndarray

    def accuracy(self, variables, x):
        """Returns which part of the examples is recognised, in evaluation mode."""
        return np.mean(predict(variables, x)[0].argmax(-1) == self.labels)


predict = jax.jit(Classifier().apply)


@functools.cache
def task():
    """Returns a net that recognises three classes, and examples of them."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 3, 256)
    x = (random.normal(0, 1, (256, FEATURES)) + 3 * np.eye(3, FEATURES)[labels]).astype(np.float32)
    shapes = jax.eval_shape(Classifier().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: jnp.asarray(random.normal(0, 1, a.shape), a.dtype), shapes)
    variables = calibrate.layer_by_layer(Classifier(), variables, [x])
    features = np.c_[predict(variables, x)[1], np.ones(256)]
    solved, *_ = np.linalg.lstsq(features, np.eye(3)[labels])
    variables["params"]["last"] = {"kernel": jnp.asarray(solved[:-1]), "bias": jnp.asarray(solved[-1])}
    return Task(variables, x, labels)


@pytest.mark.parametrize("function", [calibrate.one_pass, calibrate.layer_by_layer])
def test_a_net_with_wrecked_statistics_recovers(function):
    variables, x, _ = task()
    right = task().accuracy(variables, x)
    wrecked = variables | {"batch_stats": jax.tree.map(lambda a: 10 * a + 3, variables["batch_stats"])}
    assert right > 0.9 and task().accuracy(wrecked, x) < 0.6
    assert task().accuracy(function(Classifier(), wrecked, [x]), x) == right


def test_statistics_of_another_domain_adapt_a_net_to_it():
    variables, x, _ = task()
    shifted = 5 * x + 5
    adapted = calibrate.layer_by_layer(Classifier(), variables, [shifted])
    assert task().accuracy(variables, shifted) < 0.6
    assert task().accuracy(adapted, shifted) == task().accuracy(variables, x)


# Blending.


def test_a_blend_mixes_statistics_and_takes_the_rest_from_the_target():
    source, target = VARIABLES, jax.tree.map(lambda a: a + 1, VARIABLES)
    found = calibrate.blend(source, target, source_weight=0.25)
    chex.assert_trees_all_close(
        found["batch_stats"], jax.tree.map(lambda a: a + 0.75, source["batch_stats"]), rtol=1e-6
    )
    chex.assert_trees_all_equal(found["params"], target["params"])


def test_nnx_models_blend_like_linen_variables():
    source, target = NnxNet(), calibrate.layer_by_layer(NnxNet(), None, [X])
    before = jax.tree.map(np.array, stats_of(target))
    found = jax.tree.map(np.array, stats_of(calibrate.blend(source, target, source_weight=0.25)))
    expected = jax.tree.map(lambda s, t: 0.25 * s + 0.75 * t, stats_of(source), before)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_equal(stats_of(target), before)


def test_counters_are_the_targets():
    source, target = ({"batch_stats": {"steps": jnp.full(2, n), "mean": jnp.zeros(2)}} for n in (3, 5))
    found = calibrate.blend(source, target, source_weight=0.5)
    np.testing.assert_array_equal(found["batch_stats"]["steps"], [5, 5])


# Errors.

WRONG = {
    "an iterator": (dict(batches=iter([X])), "batches is a list_iterator, which can be read only once"),
    "a generator": (dict(batches=(x for x in [X])), "batches is a generator, which can be read only once"),
    "no batches": (dict(batches=[]), "batches is empty"),
    "one batch": (dict(batches=X), r"batches is an array of shape .*, .* pass \[batch\]"),
    "one dict": (dict(batches={"x": X}), r"batches is a dict, .* pass \[batch\]"),
    "a number": (dict(batches=3), "batches is a int; accepted are an iterable"),
    "no statistics": (dict(variables={"params": {}}), r"the collection 'batch_stats', but \['params'\] was given"),
    "other statistics": (dict(variables={"batch_stats": {}}), "variables have no 'mean', 'var'"),
    "a function": (dict(model=LAYER.apply), "the model is a method; accepted are"),
    "a class": (dict(model=type(LAYER)), "the model is the class .*; accepted are .*; pass the module itself, not its"),
    "no batch norm": (
        dict(model=nn.Sequential([nn.relu])),
        "no batch norm was called, so that there is nothing to measure",
    ),
    "all frozen": (dict(model=jaxbn.linen.BatchNorm(frozen=True)), "every batch norm that was called is frozen"),
    "long mask": (dict(mask=lambda x: np.ones(3, bool)), r"mask returned an array of shape \(3,\), but the inputs of"),
    "a weight mask": (
        dict(mask=lambda x: np.ones(len(x))),
        "mask must hold booleans, or integers 0 and 1, got dtype float",
    ),
    "nothing counts": (dict(mask=lambda x: np.zeros(len(x), bool)), "4 of the 4 features of .* have no value behind"),
    "NaN": (dict(batches=[X, np.where(X > 8, np.nan, X)]), "the inputs of .* are not finite in"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_with_a_reason(wrong, message):
    with pytest.raises(ValueError, match=message):
        calibrate.layer_by_layer(**{"model": LAYER, "variables": of_layer(), "batches": [X]} | wrong)


class WithFlag(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(not train)(nn.Dense(2)(x))


def test_a_model_that_wants_more_than_a_batch_asks_for_call():
    variables = WithFlag().init(jax.random.key(0), X, train=False)
    message = (
        r"WithFlag cannot be called as model\(batch\): missing a required argument: 'train'; say with call= how it "
        r"evaluates a batch, as in call=lambda module, batch: module\(batch, train=False\)."
    )
    for function, batches in ((calibrate.one_pass, [X]), (calibrate.layer_by_layer, [X]), (calibrate.measure, X)):
        with pytest.raises(ValueError, match=message):
            function(WithFlag(), variables, batches)


def test_a_call_that_does_not_call_the_model_it_is_given_is_refused():
    net = WithFlag()
    variables = net.init(jax.random.key(0), X, train=False)

    def call(module, batch):
        return net.apply(variables, batch, train=False)

    message = "call did not call the WithFlag that it was given; accepted is a function of that module and a batch"
    for function in (calibrate.measure, surgery.fold):
        with pytest.raises(ValueError, match=message):
            function(net, variables, X, call=call)


class Encoder(nn.Module):
    def setup(self):
        self.dense, self.norm = nn.Dense(2), nn.BatchNorm(True)

    def encode(self, x):
        return self.norm(self.dense(x))


def test_a_call_of_a_part_or_of_another_method_is_one_of_the_model():
    net = Encoder()
    variables = net.init(jax.random.key(0), X, method="encode")
    for call in (lambda module, batch: module.encode(batch), lambda module, batch: module.norm(module.dense(batch))):
        assert list(calibrate.measure(net, variables, X, call=call)) == ["norm"]
    message = r"Encoder has no __call__; say with call= which method evaluates a batch, as in call=lambda module, batch"
    with pytest.raises(ValueError, match=message):
        calibrate.measure(net, variables, X)


def test_an_error_of_the_model_on_a_batch_of_several_arrays_names_call():
    variables = WithFlag().init(jax.random.key(0), X, train=False)
    with pytest.raises(TypeError) as error:
        calibrate.one_pass(WithFlag(), variables, [(X, X)], call=lambda model, batch: model(batch, train=False))
    assert (
        "A batch is a tuple here, and not an array. Where the model takes a part of it, call= says which, as in "
        "call=lambda module, batch: module(batch[0])."
    ) in error.value.__notes__


def test_the_first_layer_whose_inputs_are_not_finite_is_named():
    broken = of_chain(jax.tree.map(jnp.array, VARIABLES))
    broken["params"]["left"]["Dense_0"]["bias"] = jnp.full(FEATURES, jnp.nan)
    for function in (calibrate.one_pass, calibrate.layer_by_layer):
        with pytest.raises(ValueError, match="the inputs of left/norm are not finite in 4 of 4 features"):
            function(CHAIN, broken, [X])
        with pytest.raises(ValueError, match="the inputs of first/norm are not finite"):
            function(CHAIN, of_chain(VARIABLES), [X + np.inf])


def test_data_that_change_from_pass_to_pass_are_refused():
    reads = iter([[X, X], [X]])
    with pytest.raises(ValueError, match="batches gave 2 batches at first and 1 when read again"):
        calibrate.layer_by_layer(CHAIN, of_chain(VARIABLES), lambda: next(reads))


class Scanned(nn.Module):
    axes: tuple[tuple[str | bool, int], ...]

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.BatchNorm(True)(x), None

        return nn.scan(Step, variable_axes=dict(self.axes), split_rngs={"params": True}, length=2)()(x)[0]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ((("params", 0), ("batch_stats", 0)), "is called inside of nn.scan, nn.vmap or another"),
        (((True, 0),), "is called inside of a loop or a branch"),
    ],
)
def test_loops_over_layers_are_refused(axes, message):
    model = Scanned(axes)
    with pytest.raises(ValueError, match=message):
        calibrate.layer_by_layer(model, model.init(jax.random.key(0), X), [X])


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.BatchNorm(True)
        return layer(x) if self.is_initializing() else jax.vmap(lambda row: layer(row[None])[0])(x)


@pytest.mark.filterwarnings("ignore:an input of shape")
@pytest.mark.parametrize("function", [calibrate.one_pass, calibrate.layer_by_layer])
def test_layers_under_a_bare_transformation_are_refused(function):
    with pytest.raises(ValueError, match="BatchNorm_0 is called inside of a loop or a branch, such as"):
        function(Mapped(), {kind: {"BatchNorm_0": tree} for kind, tree in of_layer().items()}, [X])


def test_one_pass_measures_each_layer_of_a_scan_over_layers():
    model = Scanned(((True, 0),))
    variables = scattered(jax.eval_shape(model.init, jax.random.key(0), X))
    (found,) = calibrate.one_pass(model, variables, [X])["batch_stats"].values()
    scale, bias = (np.asarray(variables["params"]["ScanStep_0"]["BatchNorm_0"][name][0]) for name in ("scale", "bias"))
    first, second = reference.moments(X), reference.moments(reference.batch_norm(X, scale, bias)[0])
    for i, (mean, var, _) in enumerate((first, second)):
        assert_close({"": (found["BatchNorm_0"]["mean"][i], found["BatchNorm_0"]["var"][i])}, {"": (mean, var)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((VARIABLES, VARIABLES, 1.5), r"source_weight=1.5 is outside \[0, 1\]"),
        ((VARIABLES, of_layer(), 0.5), "accepted are two states of one model"),
        ((VARIABLES["params"], VARIABLES, 0.5), "a dict was given; accepted are"),
    ],
)
def test_blends_of_what_does_not_belong_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        calibrate.blend(*given[:2], source_weight=given[2])


def test_an_nnx_model_takes_no_variables():
    with pytest.raises(ValueError, match="variables are given beside an nnx model"):
        calibrate.measure(NnxNet(), VARIABLES, X)
