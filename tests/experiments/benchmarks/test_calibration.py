"""The command on calibration: what it wrecks is far off, what it shows is measured, and the nets have their levels."""

import functools
import sys

import jax
import numpy as np
import pytest

from experiments import __main__ as cli
from experiments.benchmarks import calibration
from experiments.config import Config
from experiments.evidence import files
from experiments.nets import linen as linen_nets
from experiments.training import evaluation
from jaxbn import calibrate
from jaxbn._models import model, passes

pytestmark = pytest.mark.slow

IMAGES = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.fixture
def written(monkeypatch, tmp_path, blobs, tiny):
    """What the command writes of a small run."""
    methods = {"one pass": (calibrate.one_pass, 16), "layer by layer": (calibrate.layer_by_layer, 16)}
    for name, value in {"IMAGES": (32, 64, 1000), "DRAWS": 2, "METHODS": methods}.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(calibration.demo, "choose_data", lambda _: (blobs, "Made up."))
    monkeypatch.setitem(calibration.demo.CONFIGS, "blobs", tiny)
    monkeypatch.setattr(sys, "argv", f"experiments calibration --out {tmp_path}".split())
    assert cli.main() == 0
    return files.read_records(tmp_path / "calibration.jsonl")


def test_calibrated_nets_do_what_the_trained_one_did(written):
    trained, wrecked, *calibrated = written["records"]
    assert (trained["statistics"], wrecked["statistics"]) == (calibration.TRAINED, calibration.WRECKED)
    (level,), (low,) = trained["accuracies"], wrecked["accuracies"]
    assert level > low + 10
    labels = [(each["images"], each["statistics"]) for each in calibrated]
    assert labels == [(n, name) for n in (32, 64) for name in calibration.METHODS]  # there are no 1,000 images
    assert all(len(each["accuracies"]) == 2 and np.mean(each["accuracies"]) > low + 10 for each in calibrated[-2:])


def test_command_says_what_it_learns_and_prints_what_it_has_written(monkeypatch, capsys, tmp_path, blobs):
    found = [
        {"statistics": calibration.TRAINED, "accuracies": [50.0]},
        {"statistics": calibration.WRECKED, "accuracies": [10.0]},
        {"statistics": "one pass", "images": 30, "accuracies": [48.0, 50.0]},
    ]
    monkeypatch.setattr(calibration.demo, "choose_data", lambda _: (blobs, "Made up."))
    monkeypatch.setitem(calibration.demo.CONFIGS, "blobs", Config())
    monkeypatch.setattr(calibration, "measure", lambda *_: found)
    monkeypatch.setattr(sys, "argv", f"experiments calibration --out {tmp_path}".split())
    assert cli.main() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "made up for tests. Made up." in printed and "49.0 ± 1.4" in printed
    settings = files.read_records(tmp_path / "calibration.jsonl")["header"]["settings"]
    assert (settings["data"], settings["train_images"]) == ("blobs", len(blobs.train_images))


def test_wrecked_statistics_are_far_off():
    found = calibration.wreck({"norm": {"mean": np.ones(2), "var": np.ones(2)}})
    np.testing.assert_array_equal(found["norm"]["mean"], [4, 4])
    np.testing.assert_array_equal(found["norm"]["var"], [10, 10])


@pytest.mark.parametrize(("net", "levels", "layers"), [("cnn7", 6, 6), ("resnet20", 19, 19), ("inception", 18, 54)])
def test_branches_of_a_net_are_measured_in_the_same_pass(net, levels, layers):
    module = linen_nets.build(Config(net=net, width=0.125), num_classes=2)
    variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), IMAGES / 255)
    found = passes.find_calls(model.split(module, variables), IMAGES, evaluation.call)
    assert {one.level for calls in found.values() for one in calls} == {*range(1, levels + 1)} and len(found) == layers
