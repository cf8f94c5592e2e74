"""Diagnosis: each fault is found, by itself, and a healthy net has none.

A net is trained on handwritten digits, and a fault is planted in the net, in the data, or in how it is called.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy import stats as scipy_stats
from sklearn.datasets import load_digits

import jaxbn.calibrate
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnose import diagnose

MOMENTUM = 0.9
BATCH = 32


class Net(nn.Module):
    """Two convolutions with batch norms whose names sort the other way round, and a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        for features, name in ((8, "second"), (16, "first")):
            x = nn.Conv(features, (3, 3), strides=features // 8, use_bias=False, name=f"conv_{name}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=MOMENTUM, name=name)(x))
        return nn.Dense(10, name="dense")(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """The same in nnx."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        for features, inputs, name in ((8, 1, "second"), (16, 8, "first")):
            conv = nnx.Conv(inputs, features, (3, 3), strides=features // 8, use_bias=False, rngs=rngs)
            setattr(self, f"conv_{name}", conv)
            setattr(self, name, jaxbn.nnx.BatchNorm(features, momentum=MOMENTUM, rngs=rngs))
        self.dense = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, train):
        for name in ("second", "first"):
            x = nnx.relu(getattr(self, name)(getattr(self, f"conv_{name}")(x), use_running_average=not train))
        return self.dense(x.mean((1, 2)))


def evaluate(model, images):
    return model(images, train=False)


def forget(model, images):
    """Evaluates with the train flag left on."""
    return model(images, train=True)


def in_batches(images, size):
    return [images[i : i + size] for i in range(0, len(images) - size + 1, size)]


def trained(images, labels, seed, epochs=4):
    """Returns variables of the net, which is right about nine times in ten."""
    net, optimizer = Net(), optax.sgd(optax.cosine_decay_schedule(0.2, epochs * (len(images) // BATCH)), 0.9)
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), images[:1])

    def start(path, shape):
        if path[-1] == "kernel":
            return generator.normal(size=shape.shape, scale=shape.shape[-2] ** -0.5).astype(np.float32) / 3
        return np.full(shape.shape, path[-1] in ("scale", "var"), np.float32)

    variables = unflatten_dict({path: start(path, shape) for path, shape in flatten_dict(shapes).items()})

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(variables, state, x, y):
        def loss(params):
            logits, updates = net.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

        gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
        changes, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], changes), **updates}, state

    state = jax.jit(optimizer.init)(variables["params"])
    for _ in range(epochs):
        order = generator.permutation(len(images))
        for chosen in in_batches(order, BATCH):
            variables, state = step(variables, state, images[chosen], labels[chosen])
    return variables


@pytest.fixture(scope="module")
def digits():
    """Images and labels for training, and for testing, in an order that is independent of writers and classes."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.images))
    images, labels = (found.images[order, ..., None] / 16).astype(np.float32), found.target[order]
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


@pytest.fixture(scope="module")
def healthy(digits):
    return trained(*digits[:2], seed=0)


@pytest.fixture(scope="module")
def held_out(digits):
    return in_batches(digits[2], BATCH)


def model_of(front_end, variables):
    """Returns model and variables for ``diagnose``."""
    if front_end == "linen":
        return Net(), variables
    graph, state = nnx.split(nnx.eval_shape(NnxNet))  # initialising it for real would take seconds
    arrays = {}
    for tree in variables.values():
        for name, of_layer in tree.items():
            arrays[name] = arrays.get(name, {}) | of_layer
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graph, state), None


def names(diagnosis):
    return [finding.name for finding in diagnosis.findings]


def changed(variables, change):
    """Returns variables with ``change(path, array)`` in place of each array."""
    flat = {path: np.array(value) for path, value in flatten_dict(variables).items()}
    return unflatten_dict({path: change(path, value) for path, value in flat.items()})


def never_updated(variables):
    start = {"mean": 0, "var": 1}
    return changed(variables, lambda path, value: np.full_like(value, start[path[-1]]) if path[-1] in start else value)


def with_dead_features(variables):
    def change(path, value):
        if path[-2:] == ("first", "scale"):
            value[[3, 7]] = 0
        if path[-2:] == ("conv_first", "kernel"):
            value[..., 5] = 0
        return value

    return changed(variables, change)


def planted(front_end, fault, variables, images, labels):
    """Returns the diagnosis of a net with a fault."""
    batches, call = in_batches(images, BATCH), evaluate
    if fault == "train flag left on":
        call = forget
    elif fault == "never updated":
        variables = never_updated(variables)
    elif fault == "batches of two":
        batches = in_batches(images, 2)[:60]
    elif fault == "sorted by class":
        batches = in_batches(images[np.argsort(labels, kind="stable")], BATCH)
    elif fault == "less contrast":
        batches = [0.5 * x + 0.2 for x in batches]
    elif fault == "inverted":
        batches = [1 - x for x in batches]
    elif fault == "dead features":
        variables = with_dead_features(variables)
    return diagnose(*model_of(front_end, variables), batches, call=call)


FAULTS = {
    "none": [],
    "train flag left on": ["train flag left on"],
    "never updated": ["statistics never updated"],
    "batches of two": ["too few values per feature"],
    "sorted by class": ["batches not independent"],
    "less contrast": ["shifted inputs"],
    "inverted": ["shifted inputs"],
    "dead features": ["dead features"],
}
every_fault = pytest.mark.parametrize("fault", FAULTS)


# What the thresholds are compared with, on test images, in the healthy net and in the faulty one; seeds 0 to 3:
#   gap: threshold 0.3; healthy up to 0.03; less contrast and inverted from 0.63.
#   independent values: threshold 20, or 4 examples; healthy from 358; batches of two from 24, and 2 examples.
#   excess, and its score: thresholds 3 and 3.7; healthy up to 1.2 and 0.6; sorted from 23 and 14.
#   variances and scales, beside the 0.9 quantile: thresholds 1e-6 and 1e-4; healthy from 0.15 and 0.46; dead 0.
@every_fault
@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_each_fault_is_found_by_itself_and_a_healthy_net_has_none(front_end, fault, healthy, digits):
    assert names(planted(front_end, fault, healthy, *digits[2:])) == FAULTS[fault]


@pytest.mark.slow
@every_fault
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_fault_is_found_whatever_the_seed_and_on_training_images_too(seed, fault, digits):
    variables = trained(*digits[:2], seed)
    for images_and_labels in (digits[:2], digits[2:]):
        assert names(planted("linen", fault, variables, *images_and_labels)) == FAULTS[fault]


def test_findings_name_the_layers_in_the_order_of_their_calls_and_what_was_measured(healthy, digits):
    (dead,) = planted("linen", "dead features", healthy, *digits[2:]).findings
    assert "3 of 24 features" in dead.evidence and "(first: 3, 5, 7)" in dead.evidence
    (few,) = planted("linen", "batches of two", healthy, *digits[2:]).findings
    assert "of 2 examples" in few.evidence
    for fault in ("train flag left on", "never updated", "inverted"):
        (finding,) = planted("linen", fault, healthy, *digits[2:]).findings
        assert finding.layers == ("second", "first")


LAYER = nn.BatchNorm(use_running_average=True)


def state_of(mean, var, **params):
    """Variables of a single layer."""
    stats = {"mean": jnp.asarray(mean, float), "var": jnp.asarray(var, float)}
    ones = {"scale": jnp.ones(len(mean)), "bias": jnp.zeros(len(mean))}
    return {"params": ones | params, "batch_stats": stats}


STANDARD = state_of([0.1, -0.1, 0], [1, 1, 0.9])  # of what normal() draws, and not exactly as statistics start


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_figures_are_those_of_all_values_however_they_are_split_and_masked():
    x, counts = 5 + 3 * normal(40, 6, 3), np.random.default_rng(1).integers(0, 7, 40)
    mask = (np.arange(6) < counts[:, None])[..., None]
    batches = [(x[a:b], mask[a:b]) for a, b in ((0, 16), (16, 32), (32, 40))]
    found = diagnose(LAYER, STANDARD, batches, call=lambda layer, batch: layer(batch[0], mask=batch[1])).layers[0]
    values = np.float64(x)[mask[..., 0]]
    np.testing.assert_allclose(found.population.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.population.var, values.var(0), rtol=1e-6)
    assert (found.population.count == counts.sum()).all()
    of_batches = [np.float64(v)[m[..., 0]].var(0) * m.sum() for v, m in batches]
    np.testing.assert_allclose(found.batch.var, sum(of_batches) / counts.sum(), rtol=1e-6)
    a_found, a = 1 / np.sqrt(values.var(0) + 1e-5), 1 / np.sqrt(STANDARD["batch_stats"]["var"] + 1e-5)
    apart = (a - a_found) * (values - values.mean(0)) + a * (values.mean(0) - STANDARD["batch_stats"]["mean"])
    gap = np.sqrt((apart**2).mean(0).sum() / (a_found**2 * values.var(0)).sum())
    np.testing.assert_allclose(found.gap, gap, rtol=1e-6)


def test_a_mask_for_the_examples_leaves_them_out():
    batches = [(normal(20, 4, 3, seed=k), np.arange(20) < 12) for k in range(9)]
    padded = diagnose(LAYER, STANDARD, batches, call=lambda layer, batch: layer(batch[0]), mask=lambda batch: batch[1])
    whole = diagnose(LAYER, STANDARD, [x[:12] for x, _ in batches])
    assert names(padded) == names(whole) == []
    for name in ("values", "examples", "gap", "noise", "excess", "score"):
        np.testing.assert_allclose(getattr(padded.layers[0], name), getattr(whole.layers[0], name), rtol=1e-5)


def test_the_excess_of_batches_is_the_f_statistic_of_their_examples():
    batches = [normal(n, 5, 1, seed=k) + k / 5 for k, n in enumerate((11, 17, 11))]
    found = diagnose(LAYER, state_of([0.1], [1]), batches).layers[0]
    expected = scipy_stats.f_oneway(*(np.float64(x).mean(1) for x in batches))
    np.testing.assert_allclose(found.excess, expected.statistic, rtol=1e-5)
    np.testing.assert_allclose(scipy_stats.norm.sf(found.score), expected.pvalue, rtol=0.1)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("size", [32, 250])
def test_independent_batches_have_no_findings(count, size):
    for seed in range(5):
        batches = [normal(size, 2, 3, seed=1000 * seed + k) for k in range(count)]
        assert names(diagnose(LAYER, STANDARD, batches)) == []


def test_a_mean_far_above_the_standard_deviation_costs_nothing():
    far = state_of([1e4] * 3, [1, 1, 1])
    found = diagnose(LAYER, far, [1e4 + normal(32, 2, 3, seed=k) for k in range(9)])
    near = diagnose(LAYER, STANDARD, [normal(32, 2, 3, seed=k) for k in range(9)])
    assert names(found) == []
    np.testing.assert_allclose(found.layers[0].noise, near.layers[0].noise, rtol=1e-2)


def test_complex_inputs_are_diagnosed():
    batches = [normal(64, 3, seed=k) + 1j * normal(64, 3, seed=100 + k) for k in range(9)]
    stats = {"mean": jnp.zeros(3, complex), "var": jnp.full(3, 2.0)}
    variables = {"params": STANDARD["params"], "batch_stats": stats}
    for scale in (jnp.ones(3), jnp.full(3, 1j)):
        state = variables | {"params": variables["params"] | {"scale": scale}}
        assert names(diagnose(jaxbn.linen.BatchNorm(True), state, batches)) == []
        assert names(diagnose(jaxbn.linen.BatchNorm(True), state, [x + 1j for x in batches])) == ["shifted inputs"]


@pytest.mark.parametrize("steps", [2, 8, 15])
def test_averages_that_hold_their_start_are_found_and_its_weight_is_fitted(healthy, digits, held_out, steps):
    """The weights stay: what is fitted is momentum^steps, 0.81, 0.43 and 0.21."""
    update = jax.jit(lambda state, x: Net().apply(state, x, train=True, mutable=["batch_stats"])[1])
    state = never_updated(healthy)
    for x in in_batches(digits[0], BATCH)[:steps]:
        state = state | update(state, x)
    (finding,) = diagnose(Net(), state, held_out, call=evaluate).findings
    assert finding.name == "averages not converged"
    assert 0.9 < finding.figures["start"] / MOMENTUM**steps < 1.1
    assert abs(finding.figures["steps"] - steps) <= 1


class Far(nn.Module):
    """Batch norms behind one another, each behind a dense layer or a convolution."""

    layers: int = 2
    conv: bool = False

    @nn.compact
    def __call__(self, x, train):
        for _ in range(self.layers):
            x = nn.Conv(8, (3, 3), use_bias=False)(x) if self.conv else nn.Dense(16)(x)
            x = nn.relu(nn.BatchNorm(not train)(x))
        return x


def far(inputs):
    """Returns batches of inputs far from 0, and a net that is healthy on them."""
    if images := inputs == "0..255":
        smooth = jax.image.resize(normal(9, 64, 3, 3, 3), (9, 64, 8, 8, 3), "cubic")
        batches = list(np.asarray(255 * jnp.clip(0.45 + 0.1 * smooth, 0, 1)))
    else:
        batches = [5 + normal(64, 10, seed=k) for k in range(9)]
    net = Far(conv=images)
    variables = net.init(jax.random.key(0), batches[0], train=False)
    return net, jaxbn.calibrate.layer_by_layer(net, variables, batches, call=evaluate), batches


@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        ("mean 5", lambda x: 2 * x + 1),
        ("mean 5", lambda x: x + 1),
        ("0..255", lambda x: x + 20),
    ],
)
def test_inputs_far_from_zero_that_shift_are_not_taken_for_averages_that_hold_their_start(inputs, change):
    net, variables, batches = far(inputs)
    assert names(diagnose(net, variables, batches, call=evaluate)) == []
    assert names(diagnose(net, variables, [change(x) for x in batches], call=evaluate)) == ["shifted inputs"]


@pytest.mark.parametrize("steps", [30, 100, 300])
@pytest.mark.parametrize("inputs", ["mean 5", "0..255"])
def test_averages_that_hold_their_start_are_found_for_inputs_far_from_zero(inputs, steps):
    """As the averages would be with momentum 0.99, on layers that see in training what healthy ones see."""
    net, variables, batches = far(inputs)
    start = 0.99**steps
    held = changed(
        variables["batch_stats"], lambda path, value: (1 - start) * value + (start if path[-1] == "var" else 0)
    )
    (finding,) = diagnose(net, variables | {"batch_stats": held}, batches, call=evaluate).findings
    assert finding.name == "averages not converged" and "single layer" not in finding.evidence
    assert 0.9 < finding.figures["start"] / start < 1.1


def test_what_a_single_layer_cannot_tell_is_said():
    shifted = diagnose(LAYER, state_of([5, 5, 5], [1, 1, 1]), [6 + normal(64, 3, seed=k) for k in range(9)])
    assert names(shifted) == ["averages not converged"]
    assert "if training batches do not have this finding, it is a shift" in shifted.findings[0].evidence


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)
def test_averages_without_bias_are_never_said_to_hold_their_start(options):
    start = state_of([0.5 * 3] * 3, [0.5 + 0.5 * 4] * 3)
    batches = [3 + 2 * normal(64, 3, seed=k) for k in range(9)]
    assert names(diagnose(LAYER, start, batches)) == ["averages not converged"]
    assert names(diagnose(jaxbn.linen.BatchNorm(True, **options), start, batches)) == ["shifted inputs"]


def test_a_batch_that_is_not_finite_is_counted_and_spoils_nothing(healthy, held_out):
    bad = held_out[2].copy()
    bad[3, 4, 4] = np.nan
    others = diagnose(Net(), healthy, held_out, call=evaluate)
    found = diagnose(Net(), healthy, [*held_out, bad], call=evaluate)
    assert names(found) == ["batches not finite"]
    assert f"1 of {len(held_out) + 1} batches are not finite, from second on" in found.findings[0].evidence
    for one, other in zip(found.layers, others.layers, strict=True):
        assert (one.gap, one.noise, one.excess, one.skipped) == (other.gap, other.noise, other.excess, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_running_statistics_that_are_no_variance_are_found(healthy, held_out, value):
    def change(path, array):
        if path[-2:] == ("second", "var"):
            array[4] = value
        return array

    (finding,) = diagnose(Net(), changed(healthy, change), held_out, call=evaluate).findings
    assert (finding.name, finding.layers) == ("statistics not finite", ("second",))


def test_a_single_layer_that_was_never_updated_is_named(healthy, held_out):
    start = never_updated(healthy)
    stats = healthy["batch_stats"] | {"second": start["batch_stats"]["second"]}
    (finding,) = diagnose(Net(), healthy | {"batch_stats": stats}, held_out, call=evaluate).findings
    assert (finding.name, finding.layers) == ("statistics never updated", ("second",))


def test_a_shift_is_found_from_the_layer_on_where_it_starts(healthy, held_out):
    def change(path, value):
        return 3 * value if path[-2:] == ("first", "var") else value

    (finding,) = diagnose(Net(), changed(healthy, change), held_out, call=evaluate).findings
    assert (finding.name, finding.layers) == ("shifted inputs", ("first",))
    assert 0.3 < finding.figures["ratio"] < 0.37


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["per-device batch too small and not synchronised"]),
        ({"axis_name": "data"}, []),
        ({"axis_name": "data", "axis_index_groups": [[0, 1, 2], [3, 4, 5], [6, 7]]}, []),
    ],
    ids=str,
)
def test_a_batch_that_is_split_over_devices_without_an_axis_name_is_found(options, found):
    batches = [normal(96, 3, seed=k) for k in range(9)]
    layer = nn.BatchNorm(use_running_average=True, **options)
    assert names(diagnose(layer, STANDARD, batches, devices=8)) == found
    assert names(diagnose(layer, STANDARD, batches)) == []


def test_layers_that_are_frozen_may_see_small_batches_that_are_alike():
    batches = [normal(2, 3, seed=k) + k % 5 for k in range(40)]
    variables = state_of([2, 2, 2.1], [3, 3, 3])
    assert names(diagnose(LAYER, variables, batches)) == ["too few values per feature", "batches not independent"]
    assert names(diagnose(jaxbn.linen.BatchNorm(frozen=True), variables, batches)) == []


def test_layers_behind_a_frozen_one_see_in_training_what_it_hands_on():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jaxbn.linen.BatchNorm(use_running_average=True, frozen=True, name="a")(x)
            return nn.BatchNorm(use_running_average=True, name="b")(x)

    stats = {"a": state_of([0.1] * 3, [4, 4, 4]), "b": state_of([0.1] * 3, [0.25] * 3)}
    variables = {kind: {name: of_layer[kind] for name, of_layer in stats.items()} for kind in ("params", "batch_stats")}
    behind = diagnose(Two(), variables, [normal(64, 3, seed=k) for k in range(9)]).layers[1]
    np.testing.assert_allclose(behind.batch.var, 0.25, rtol=0.1)


def test_several_rows_of_each_example_are_not_taken_for_independent_examples():
    class Rows(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(x.reshape(-1, 3))

    batches = [0.9 * normal(32, 1, 3, seed=k) + 0.4 * normal(32, 10, 3, seed=100 + k) for k in range(9)]
    diagnosis = diagnose(Rows(), {name: {"BatchNorm_0": value} for name, value in STANDARD.items()}, batches)
    assert names(diagnosis) == [] and diagnosis.layers[0].examples == 32


def test_what_cannot_be_told_from_one_batch_is_left_out(healthy, digits):
    _, _, images, labels = digits
    one_class = images[labels == 3][:24]
    layers = diagnose(Net(), healthy, [one_class], call=evaluate).layers
    assert all(np.isnan([layer.excess, layer.score]).all() for layer in layers)
    assert names(diagnose(Net(), healthy, [images[:2]], call=evaluate)) == ["too few values per feature"]


@pytest.mark.parametrize(
    ("method", "size", "found"),
    [
        (functools.partial(jaxbn.ghost_normalize, group_size=2), 64, ["too few values per feature"]),
        (functools.partial(jaxbn.ghost_normalize, group_size=32), 64, []),
        (jaxbn.batch_renormalize, 2, []),
    ],
)
def test_batches_are_judged_as_the_method_takes_them(method, size, found):
    batches = [normal(size, 3, seed=k) for k in range(12)]
    layer = jaxbn.linen.BatchNorm(True, method=method)
    assert names(diagnose(layer, STANDARD, batches)) == found


def test_an_empty_batch_says_nothing():
    batches = [normal(64, 3, seed=k) for k in range(9)]
    full, more = (diagnose(nn.BatchNorm(True), STANDARD, b) for b in (batches, [*batches, batches[0][:0]]))
    assert names(more) == [] and more.layers[0].gap == full.layers[0].gap


def test_a_layer_whose_scales_are_all_zero_is_not_called_dead():
    state = STANDARD | {"params": STANDARD["params"] | {"scale": jnp.zeros(3)}}
    assert names(diagnose(nn.BatchNorm(True), state, [normal(64, 3, seed=k) for k in range(9)])) == []


@pytest.mark.slow
def test_dead_features_do_not_hide_a_shift_behind_them():
    net = nn.Sequential(
        [nn.BatchNorm(True), nn.Dense(3, kernel_init=nn.initializers.constant(0.5)), nn.BatchNorm(True)]
    )
    batches = [normal(64, 3, seed=k) for k in range(9)]
    state = net.init(jax.random.key(0), batches[0])
    state["params"]["layers_0"]["scale"] = jnp.array([0.0, 1.0, 1.0])
    state = jaxbn.calibrate.layer_by_layer(net, state, batches)
    (told,) = diagnose(net, state, batches).findings
    assert told.name == "dead features" and "behind them" not in told.evidence
    state["batch_stats"]["layers_2"]["mean"] += 3
    (told,) = diagnose(net, state, batches).findings
    assert told.name == "dead features" and "Layers behind them are off by up to" in told.evidence


def test_a_feature_that_is_rarely_active_is_not_dead():
    rare = np.where(np.arange(400)[:, None] == [-1, 7, 9], 1.0, normal(400, 3) * [0, 1, 1]).astype(np.float32)
    batches = in_batches(rare, 40)
    stats = {"var": [2e-3, 1, 1], "mean": [0, 0.1, 0.1]}
    assert names(diagnose(LAYER, state_of(**stats), batches)) == []
    assert names(diagnose(LAYER, state_of(**stats | {"var": [0.5, 1, 1]}), batches)) == ["dead features"]
    assert names(diagnose(LAYER, state_of(**stats | {"var": [0, 1, 1]}), batches)) == ["dead features"]


def test_small_variances_and_scales_are_not_dead_where_the_whole_layer_has_them():
    layer = nn.BatchNorm(use_running_average=True, epsilon=1e-3)
    small = state_of([1e-4] * 64, [1e-6] * 64, scale=0.1 * normal(64, seed=1))
    assert names(diagnose(layer, small, [1e-3 * normal(64, 64, seed=k) for k in range(9)])) == []


def test_a_layer_that_is_called_twice_has_the_moments_of_both_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True)
            return norm(x) + norm(1 + 2 * x)

    batches = [normal(32, 3, seed=k) for k in range(9)]
    diagnosis = diagnose(Twice(), {name: {"BatchNorm_0": value} for name, value in STANDARD.items()}, batches)
    both = np.concatenate([np.float64(f(x)) for x in batches for f in (lambda x: x, lambda x: 1 + 2 * x)])
    np.testing.assert_allclose(diagnosis.layers[0].population.var, both.var(0), rtol=1e-6)
    assert diagnosis.layers[0].values == 64 and diagnosis.layers[0].examples == 32
    assert "batches not independent" not in names(diagnosis)


@pytest.mark.slow
def test_layers_under_jit_and_remat_are_found_in_the_order_of_their_calls():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="b")(x)
            return nn.BatchNorm(use_running_average=True, name="a")(nn.relu(x))

    class Blocks(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name, block in (("z", nn.jit(Block)), ("y", nn.jit(Block)), ("x", nn.remat(Block))):
                x = block(name=name)(x)
            return x

    batches = [normal(32, 3, seed=k) for k in range(3)]
    block = {name: {"b": value, "a": value} for name, value in STANDARD.items()}
    variables = {name: {"z": value, "y": value, "x": value} for name, value in block.items()}
    found = [layer.path for layer in diagnose(Blocks(), variables, batches).layers]
    assert found == ["z/b", "z/a", "y/b", "y/a", "x/b", "x/a"]


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_nothing_that_is_given_changes(front_end, healthy, held_out):
    model, variables = model_of(front_end, jax.tree.map(jnp.copy, healthy))
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)) if variables is None else variables)
    kept = [x.copy() for x in held_out]
    diagnose(model, variables, held_out, call=forget)
    after = nnx.to_pure_dict(nnx.state(model)) if variables is None else variables
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))
    jax.tree.map(np.testing.assert_array_equal, kept, held_out)


def held_out_are_read_once_and_compiled_once():
    traced = []

    def call(layer, x):
        traced.append(x.shape)
        return layer(x)

    def numbers_of_traces(count):
        traced.clear()
        batches = (normal(32, 3, seed=k) for k in range(count))
        assert diagnose(LAYER, STANDARD, batches, call=call).layers[0].batches == count
        return len(traced)

    first = numbers_of_traces(2)
    assert numbers_of_traces(7) < first  # compiled already; what comes first is asked again


def test_a_function_may_return_the_batches():
    assert names(diagnose(LAYER, STANDARD, lambda: iter([normal(32, 2, 3)]))) == []


def test_text_shows_a_row_for_each_layer_and_all_of_a_finding(healthy, held_out):
    diagnosis = diagnose(Net(), healthy, held_out, call=forget)
    head, *lines = str(diagnosis).splitlines()
    assert re.split(" +", head) == [
        *("layer", "features", "values", "gap", "alone", "shift", "ratio", "noise", "excess", "notes")
    ]
    assert re.fullmatch(r"second +8 +2048( +\d\.\d\d){6}  trains", lines[0])
    assert re.fullmatch(r"first +16 +512( +\d\.\d\d){6}  trains", lines[1])
    finding = diagnosis.findings[0]
    for words in (finding.name, finding.evidence, finding.remedy):
        assert words in " ".join(str(diagnosis).split())
    assert max(map(len, diagnosis.text(60).splitlines())) <= 60


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("model", "variables", "batches", "options", "message"),
    [
        (LAYER, STANDARD, [], {}, "batches is empty; .*at least one batch"),
        (
            LAYER,
            STANDARD,
            normal(32, 3),
            {},
            r"batches is an array of shape .*, which looks like a single batch; .*pass \[batch\]",
        ),
        (LAYER, STANDARD, [normal(32, 3)], {"devices": 0}, "devices must be at least 1, got 0"),
        (LAYER, {"params": {}}, [normal(32, 3)], {}, "'batch_stats', but .* was given; pass what model.init returns"),
        (LAYER.apply, STANDARD, [normal(32, 3)], {}, "the model is a method; accepted are"),
        (nn.BatchNorm(), STANDARD, [normal(32, 3)], {}, "use_running_average of the model is given neither by"),
        (NoNorm(), {"params": {}, "batch_stats": {}}, [normal(32, 3)], {}, "no batch norm was called"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_diagnosed_is_refused(model, variables, batches, options, message):
    if isinstance(model, NoNorm):
        variables = NoNorm().init(jax.random.key(0), batches[0]) | {"batch_stats": {}}
    with pytest.raises(ValueError, match=message):
        diagnose(model, variables, batches, **options)


def test_variables_beside_an_nnx_model_are_refused():
    with pytest.raises(ValueError, match="variables are given beside an nnx model"):
        diagnose(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {}, [normal(32, 3)])
