"""The benchmark of calibration: it corrupts the statistics, and calibration restores the accuracy."""

import functools
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import Settings, calibration
from experiments.benchmarks.__main__ import main
from experiments.config import Config
from experiments.evidence import files
from experiments.nets import linen as linen_nets
from experiments.training import evaluation
from jaxbn import calibrate

SETTINGS = json.dumps(Settings().to_json())


@pytest.fixture
def on_blobs(monkeypatch, blobs):
    """Lets the benchmark use `blobs`."""
    monkeypatch.setattr(calibration.small_run, "choose_data", lambda _: (blobs, "Made up."))
    monkeypatch.setitem(calibration.small_run.CONFIGS, "blobs", Config())


@pytest.mark.slow
def test_calibrated_networks_are_as_accurate_as_the_trained_one(monkeypatch, on_blobs, tmp_path, tiny):
    methods = {"one pass": (calibrate.one_pass, 16), "layer by layer": (calibrate.layer_by_layer, 16)}
    for name, value in {"IMAGES": (32, 64, 1000), "DRAWS": 2, "METHODS": methods}.items():
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setitem(calibration.small_run.CONFIGS, "blobs", tiny)
    main("calibration", str(tmp_path), SETTINGS)
    trained, wrecked, *calibrated = files.read_records(tmp_path / "calibration.jsonl")["records"]
    assert (trained["statistics"], wrecked["statistics"]) == (calibration.TRAINED, calibration.WRECKED)
    (high,), (low,) = trained["accuracies"], wrecked["accuracies"]
    assert high > low + 10
    labels = [(record["images"], record["statistics"]) for record in calibrated]
    assert labels == [(n, name) for n in (32, 64) for name in methods]  # there are no 1,000 images
    assert all(len(record["accuracies"]) == 2 for record in calibrated)
    assert all(np.mean(record["accuracies"]) > low + 10 for record in calibrated[-2:])


def test_data_are_named_and_the_accuracies_are_in_the_block(monkeypatch, capsys, tmp_path, blobs, on_blobs):
    records = [
        {"statistics": calibration.TRAINED, "accuracies": [50.0]},
        {"statistics": calibration.WRECKED, "accuracies": [10.0]},
        {"statistics": "one pass", "images": 30, "accuracies": [48.0, 50.0]},
    ]
    monkeypatch.setattr(calibration, "measure", lambda *_: records)
    main("calibration", str(tmp_path), SETTINGS)
    assert "made up for tests. Made up." in " ".join(capsys.readouterr().out.split())
    run = files.read_records(tmp_path / "calibration.jsonl")
    settings = run["header"]["settings"]
    assert (settings["data"], settings["train_images"]) == ("blobs", len(blobs.train_images))
    assert "49.0 ± 1.4" in calibration.block(run)


def test_wrecked_statistics_are_far_off():
    wrecked = calibration.wreck({"norm": {"mean": np.ones(2), "var": np.ones(2)}})
    np.testing.assert_array_equal(wrecked["norm"]["mean"], [4, 4])
    np.testing.assert_array_equal(wrecked["norm"]["var"], [10, 10])


class CountedBatches:
    """A batch of images that counts how often it is read."""

    def __init__(self, images):
        self.images, self.passes = images, 0

    def __iter__(self):
        self.passes += 1
        yield self.images


@pytest.mark.slow
@pytest.mark.parametrize(("net", "levels"), [("cnn7", 6), ("resnet20", 19), ("inception", 18)])
def test_branches_of_a_network_are_measured_in_the_same_pass(net, levels):
    module = linen_nets.build(Config(net=net, width=1 / 16), num_classes=2)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), images / 255)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    batches = CountedBatches(images)
    calibrate.layer_by_layer(module, variables, batches, call=evaluation.call)
    assert batches.passes == levels
