"""Shared by the tests of training: a data set that needs no file, and a network that compiles in seconds."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.processes import distributed


def mesh_of(devices: int) -> Mesh:
    """The mesh of the first so many devices."""
    return Mesh(np.array(jax.devices()[:devices]), (distributed.AXIS,))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Trains in this process alone and on one device, which compiles in half the time, unless a test asks for more."""
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")  # JAX has started, and could join no others
    monkeypatch.setattr(distributed, "mesh", lambda: mesh_of(1))


@pytest.fixture(scope="session")
def blobs() -> Dataset:
    """Images of 8x8 pixels: noise, with one bright row that gives the class away; 620 are for testing."""

    def images_of(n):
        labels = generator.integers(0, 4, n, dtype=np.int32)
        images = generator.integers(0, 100, (n, 8, 8, 1), dtype=np.uint8)
        images[np.arange(n), 2 * labels] += 120
        return images, labels

    generator = np.random.default_rng(0)
    train, test = images_of(64), images_of(620)
    return Dataset("blobs", "blobs", "made up for tests", *train, *test, ("0", "1", "2", "3"))


@pytest.fixture(scope="session")
def tiny() -> Config:
    """A run of 2 epochs of 4 steps on `blobs`."""
    return Config(data="digits", image_size=8, net="cnn7", width=0.25, batch_size=16, epochs=2, learning_rate=0.05)


def write_study(folder: Path, study: str, preset: str, results: dict[str, list[dict]]) -> None:
    """Writes the results of a study (label -> runs) at once, instead of a run at a time as `files.save` does."""
    lines = []
    for label, runs in results.items():
        for run in runs:
            name = f"{label}-seed{run['header']['config']['seed']}"
            lines += [{"run": name} | run["header"], *run["rows"], *({"measured": entry} for entry in run["measured"])]
    path = folder / study / f"{preset}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session")
def make_run():
    """Returns a function that makes up a run as `files.read` returns it."""

    def make(config: Config, accuracies=(0.2, 0.4), diverged=False, commit="c0ffee") -> dict:
        rows = [
            {
                "step": 10 * epoch,
                "epoch": float(epoch),
                "learning_rate": config.learning_rate,
                "train_loss": 1.0,
                "train_accuracy": accuracy,
                "test_loss": 1.0,
                "test_accuracy": accuracy,
                "seconds": 2.0,
                "compile_seconds": 0.0,
                "diverged": diverged and epoch == len(accuracies),
            }
            for epoch, accuracy in enumerate(accuracies, start=1)
        ]
        hardware = {"platform": "cpu", "device": "cpu", "devices": 1, "processes": 1, "cpu": "Z80", "cpu_count": 2}
        header = {
            "config": dataclasses.asdict(config),
            "images": "made up",
            "parameters": 7,
            "seconds": 60.0,
            "versions": {"python": "3.11", "jax": "0.10"},
            "hardware": hardware,
            "commit": commit,
        }
        return {"header": header, "rows": rows, "measured": []}

    return make
