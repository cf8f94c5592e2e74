"""The demo of synchronized batch norm: its training, its measurements, and the committed results."""

import functools
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh
from PIL import Image
from rich.console import Console

from experiments.benchmarks import collectives
from experiments.demos import synchronised
from experiments.evidence import files
from experiments.evidence.verdicts import spread
from experiments.processes import distributed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
COMMITTED = ROOT / "docs" / "sync_demo"  # where the README and the documentation show it

IMAGES = np.random.default_rng(0).integers(0, 255, (64, 8, 8, 1), dtype=np.uint8)
LABELS = (IMAGES.mean((1, 2, 3)) > 127).astype(np.int32)
ORDER = np.arange(64, dtype=np.int32).reshape(4, 16)


def mesh(devices):
    return Mesh(jax.devices()[:devices], (synchronised.AXIS,), axis_types=(AxisType.Auto,))


@pytest.fixture(autouse=True, scope="module")
def small_net():
    """One layer, which compiles in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synchronised, "CHANNELS", (4,))
        yield


@functools.cache
def trained(arm, devices):
    """Returns the state after an epoch of 4 steps of 16 images, and the spread over the devices in the last batch."""
    net, optimizer = synchronised.Net(2, synchronised.ARMS[arm]), optax.sgd(0.1, 0.9)
    programs = synchronised.make_programs(net, optimizer, mesh(devices))
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), IMAGES[:1])
    state = synchronised.State(variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))
    state, train_set, order = distributed.replicate((state, (IMAGES, LABELS), ORDER), mesh(devices))
    for step in range(len(ORDER)):
        state = jax.block_until_ready(programs.step(state, train_set, order, step))
    return jax.device_get((state, programs.spread(state, train_set, order, step)))


def test_synchronised_training_on_eight_devices_is_that_on_one():
    whole, split = trained("synchronised", 1)[0], trained("synchronised", 8)[0]
    # Sums in another order, four steps long.
    chex.assert_trees_all_close(split, whole, rtol=1e-4, atol=1e-5)


def test_statistics_per_device_train_another_net():
    kernels = [trained(arm, 8)[0].params["Conv_0"]["kernel"] for arm in synchronised.ARMS]
    assert abs(kernels[0] - kernels[1]).max() > 1e-3


def test_synchronised_statistics_are_equal_on_all_devices_and_others_are_not():
    assert max(trained("synchronised", 8)[1]) < 1e-6
    assert min(trained("per device", 8)[1]) > 0.01


def test_spread_is_the_deviation_over_devices_in_units_of_the_feature():
    mean, var = np.float32([[1.0, 0.0], [3.0, 0.0]]), np.float32([[1.0, 4.0], [3.0, 4.0]])
    deviations = jax.vmap(synchronised.apart, axis_name=synchronised.AXIS)(mean, var)
    np.testing.assert_allclose(deviations[0], np.full(2, (1 / np.sqrt(2) + 0) / 2), rtol=1e-6)
    np.testing.assert_allclose(deviations[1], np.full(2, (1 / 2 + 0) / 2), rtol=1e-6)


@pytest.fixture
def shown(tmp_path, blobs, monkeypatch):
    """The output of a small demo, and the run that it has written."""
    for name, value in {"PER_DEVICE": (2,), "EPOCHS": 1, "SEEDS": 2}.items():
        monkeypatch.setattr(synchronised, name, value)
    monkeypatch.setattr(distributed, "mesh", lambda: mesh(8))
    monkeypatch.setattr(synchronised.small_run, "choose_data", lambda data_dir: (blobs, "Because."))
    for name in ("RECIPES", "LAYERS"):  # one of each is enough
        monkeypatch.setattr(collectives, name, dict(list(getattr(collectives, name).items())[:1]))
    console = Console(width=120, record=True)
    monkeypatch.setattr(synchronised, "Console", lambda **_: console)
    synchronised.run(data_dir=None, out=tmp_path)
    assert (tmp_path / "sync_demo.png").stat().st_size > 10_000
    return console.export_text(), files.read(tmp_path / "measured.jsonl")


def test_demo_measures_every_arm_and_seed_and_draws_a_figure(shown):
    text, measured = shown
    runs = {(row["arm"], row["per_device"], row["seed"]) for row in measured["rows"]}
    assert runs == {(arm, 2, seed) for arm in synchronised.ARMS for seed in (0, 1)}
    assert all(0 <= row["test_accuracy"] <= 1 and row["milliseconds"] > 0 for row in measured["rows"])
    # Each layer adds a collective to the forward pass and one to the backward pass.
    without, together = (synchronised.values(measured, arm, 2, "collectives")[0] for arm in synchronised.ARMS)
    assert together - without == 2 * len(synchronised.CHANNELS)
    assert all((row["spread_of_mean"] > 0.01) == (row["arm"] == "per device") for row in measured["rows"])
    assert "Because." in text and "mean ± std over 2 seed(s)" in text
    assert "Collectives and errors of one layer on 8 devices" in text


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="the documentation is not in this distribution")
def test_committed_figure_and_the_numbers_of_the_readme_are_those_of_the_committed_results():
    measured = files.read(COMMITTED / "measured.jsonl")
    expected = f"results {files.digest({'': [measured]})}"
    assert Image.open(COMMITTED / "sync_demo.png").text["Description"] == expected
    accuracies = [
        spread(100 * synchronised.values(measured, arm, 2, "test_accuracy")).text() for arm in synchronised.ARMS
    ]
    assert "{} % against {} %".format(*accuracies) in " ".join((ROOT / "README.md").read_text().split())
