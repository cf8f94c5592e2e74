"""Each fault is found, and nothing else is; a healthy model has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxbn.calibrate
import jaxbn.linen
from jaxbn.diagnose import diagnose
from tests.diagnose.nets import (
    LAYER,
    STANDARD,
    Net,
    changed,
    digits,
    evaluate,
    held_out,
    in_batches,
    names,
    never_updated,
    normal,
    planted,
    state_of,
    trained,
)

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
BATCHES = [normal(64, 3, seed=k) for k in range(9)]


@every_fault
def test_each_fault_is_found_by_itself_and_a_healthy_net_has_none(fault):
    assert names(planted(fault)) == FAULTS[fault]


FAST_IN_NNX = ("train flag left on", "dead features")  # one that lies in the call, and one in the arrays


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=[] if fault in FAST_IN_NNX else pytest.mark.slow) for fault in FAULTS]
)
def test_each_fault_is_found_in_an_nnx_model(fault):
    assert names(planted(fault, front_end="nnx")) == FAULTS[fault]


@pytest.mark.slow
@every_fault
@pytest.mark.parametrize("on_training_images", [False, True])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_fault_is_found_with_any_seed_and_on_training_images_too(seed, on_training_images, fault):
    assert names(planted(fault, seed=seed, on_training_images=on_training_images)) == FAULTS[fault]


def test_findings_name_the_layers_in_the_order_of_their_calls_and_what_was_measured():
    (dead,) = planted("dead features").findings
    assert "3 of 24 features" in dead.evidence and "(first: 3, 5, 7)" in dead.evidence
    (few,) = planted("batches of two").findings
    assert "of 2 examples" in few.evidence
    for fault in ("train flag left on", "never updated", "inverted"):
        (finding,) = planted(fault).findings
        assert finding.layers == ("second", "first")


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("size", [32, 250])
def test_independent_batches_have_no_findings(count, size):
    for seed in range(5):
        batches = [normal(size, 2, 3, seed=1000 * seed + k) for k in range(count)]
        assert names(diagnose(LAYER, STANDARD, batches)) == []


def test_a_batch_that_is_not_finite_is_counted_and_spoils_nothing():
    batches = held_out()
    bad = batches[2].copy()
    bad[3, 4, 4] = np.nan
    without = diagnose(Net(), trained(), batches, call=evaluate)
    diagnosis = diagnose(Net(), trained(), [*batches, bad], call=evaluate)
    assert names(diagnosis) == ["batches not finite"]
    assert f"1 of {len(batches) + 1} batches are not finite, from second on" in diagnosis.findings[0].evidence
    for layer, expected in zip(diagnosis.layers, without.layers, strict=True):
        assert layer.skipped == 1
        assert (layer.gap, layer.noise, layer.excess) == (expected.gap, expected.noise, expected.excess)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_running_variances_that_are_impossible_are_found(value):
    def change(path, array):
        if path[-2:] == ("second", "var"):
            array[4] = value
        return array

    (finding,) = diagnose(Net(), changed(trained(), change), held_out(), call=evaluate).findings
    assert (finding.name, finding.layers) == ("statistics not finite", ("second",))


def test_a_single_layer_that_was_never_updated_is_named():
    initial = never_updated(trained())["batch_stats"]
    stats = trained()["batch_stats"] | {"second": initial["second"]}
    (finding,) = diagnose(Net(), trained() | {"batch_stats": stats}, held_out(), call=evaluate).findings
    assert (finding.name, finding.layers) == ("statistics never updated", ("second",))


def test_a_shift_is_found_from_the_layer_on_where_it_starts():
    def change(path, value):
        return 3 * value if path[-2:] == ("first", "var") else value

    (finding,) = diagnose(Net(), changed(trained(), change), held_out(), call=evaluate).findings
    assert (finding.name, finding.layers) == ("shifted inputs", ("first",))
    assert 0.3 < finding.figures["ratio"] < 0.37


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["per-device batch too small and not synchronized"]),
        ({"axis_name": "data"}, []),
        ({"axis_name": "data", "axis_index_groups": [[0, 1, 2], [3, 4, 5], [6, 7]]}, []),
    ],
    ids=str,
)
def test_a_batch_that_is_split_over_devices_without_an_axis_name_is_found(options, expected):
    batches = [normal(96, 3, seed=k) for k in range(9)]
    layer = nn.BatchNorm(use_running_average=True, **options)
    assert names(diagnose(layer, STANDARD, batches, devices=8)) == expected
    assert names(diagnose(layer, STANDARD, batches)) == []


def test_layers_that_are_frozen_may_see_small_batches_that_are_alike():
    batches = [normal(2, 3, seed=k) + k % 5 for k in range(40)]
    variables = state_of([2, 2, 2.1], [3, 3, 3])
    assert names(diagnose(LAYER, variables, batches)) == ["too few values per feature", "batches not independent"]
    assert names(diagnose(jaxbn.linen.BatchNorm(frozen=True), variables, batches)) == []


def test_what_cannot_be_told_from_one_batch_is_left_out():
    _, _, images, labels = digits()
    one_class = images[labels == 3][:32]
    layers = diagnose(Net(), trained(), [one_class], call=evaluate).layers
    assert all(np.isnan([layer.excess, layer.score]).all() for layer in layers)
    assert names(diagnose(Net(), trained(), [images[:2]], call=evaluate)) == ["too few values per feature"]


@pytest.mark.parametrize(
    ("method", "size", "expected"),
    [
        (functools.partial(jaxbn.ghost_normalize, group_size=2), 64, ["too few values per feature"]),
        (functools.partial(jaxbn.ghost_normalize, group_size=32), 64, []),
        (jaxbn.batch_renormalize, 2, []),
    ],
)
def test_batches_are_judged_as_the_method_takes_them(method, size, expected):
    batches = [normal(size, 3, seed=k) for k in range(12)]
    layer = jaxbn.linen.BatchNorm(True, method=method)
    assert names(diagnose(layer, STANDARD, batches)) == expected


def test_a_layer_whose_scales_are_all_zero_is_not_called_dead():
    state = STANDARD | {"params": STANDARD["params"] | {"scale": jnp.zeros(3)}}
    assert names(diagnose(LAYER, state, BATCHES)) == []


@pytest.mark.slow
def test_dead_features_do_not_hide_a_shift_behind_them():
    net = nn.Sequential(
        [nn.BatchNorm(True), nn.Dense(3, kernel_init=nn.initializers.constant(0.5)), nn.BatchNorm(True)]
    )
    state = net.init(jax.random.key(0), BATCHES[0])
    state["params"]["layers_0"]["scale"] = jnp.array([0.0, 1.0, 1.0])
    state = jaxbn.calibrate.layer_by_layer(net, state, BATCHES)
    (finding,) = diagnose(net, state, BATCHES).findings
    assert finding.name == "dead features" and "Later layers" not in finding.evidence
    state["batch_stats"]["layers_2"]["mean"] += 3
    (finding,) = diagnose(net, state, BATCHES).findings
    assert finding.name == "dead features" and "Later layers are off by up to" in finding.evidence


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
