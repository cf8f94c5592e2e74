"""The command on calibration: what it wrecks is far off, what it shows is measured, and the nets have their levels."""

import functools
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import calibration, evaluation, models
from experiments.config import Config
from jaxbn import _models, _passes, calibrate

pytestmark = pytest.mark.slow

IMAGES = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.fixture
def shown(monkeypatch, blobs, tiny):
    """What a small run prints."""
    methods = {"one pass": (calibrate.one_pass, 16), "layer by layer": (calibrate.layer_by_layer, 16)}
    for name, value in {"IMAGES": (32, 64, 1000), "DRAWS": 2, "METHODS": methods}.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(calibration.demo, "choose_data", lambda _: (blobs, "Made up."))
    monkeypatch.setitem(calibration.demo.CONFIGS, "blobs", tiny)
    console = Console(width=120, record=True)
    monkeypatch.setattr(calibration, "Console", lambda **_: console)
    calibration.run(data_dir=None)
    return console.export_text()


def test_calibrated_nets_do_what_the_trained_one_did(shown):
    (trained,), (wrecked,) = (
        [float(number) for number in re.findall(rf"Test accuracy, {which}: (.*) %", shown)]
        for which in ("running averages of the training", "wrecked")
    )
    rows = [re.findall(r"[\d.,]+", line) for line in shown.splitlines() if "±" in line and "│" in line]
    assert [row[0] for row in rows] == ["32", "64"]  # there are no 1,000 images
    assert trained > wrecked + 10
    means = [float(mean) for mean in rows[-1][1::2]]
    assert len(means) == len(calibration.METHODS) and min(means) > wrecked + 10
    assert "made up for tests. Made up." in shown and "over 2 draws" in shown


def test_wrecked_statistics_are_far_off():
    found = calibration.wreck({"norm": {"mean": np.ones(2), "var": np.ones(2)}})
    np.testing.assert_array_equal(found["norm"]["mean"], [4, 4])
    np.testing.assert_array_equal(found["norm"]["var"], [10, 10])


@pytest.mark.parametrize(("net", "levels", "layers"), [("cnn7", 6, 6), ("resnet20", 19, 19), ("inception", 18, 54)])
def test_branches_of_a_net_are_measured_in_the_same_pass(net, levels, layers):
    module = models.build(Config(net=net, width=0.125), num_classes=2)
    variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), IMAGES / 255)
    found = _passes.find_layers(_models.split(module, variables), IMAGES, evaluation.call)
    assert {one.x for calls in found.values() for one in calls} == {*range(1, levels + 1)} and len(found) == layers
