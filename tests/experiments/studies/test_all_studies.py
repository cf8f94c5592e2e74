"""One step of every arm of every study, on generated images: its table, its finding and its figure come out of it."""

import copy
import functools

import numpy as np
import pytest

from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.evidence import files, provenance
from experiments.report import studies
from experiments.studies import protocol
from experiments.training import loop

IMAGES = 40  # for training, and as many for testing
BATCH = 20
WIDTHS = {"cnn7": 0.25, "resnet20": 0.25, "inception": 1 / 16}
# The published protocol of these two is the one that a GPU is asked to run; the other studies share its net.
FULL = ("bn_vs_none", "learning_rates")
REHEARSALS = [(name, "small") for name in protocol.names()] + [
    (name, "full") for name in FULL if name in protocol.names()
]


def shrink(config: Config) -> Config:
    """Returns a run that differs in nothing but its size: one step on small images with a narrow net."""
    half = config.sampling == "half_the_classes"
    return config.replace(
        image_size=8,
        train_images=None,
        width=WIDTHS[config.net],
        group_size=config.group_size and min(config.group_size, 4),
        momentum=config.momentum and 0.99,  # one program for all of them; with this one, `population` measures
        batch_size=10 if half else BATCH,
        epochs=1,
        evaluations=1,
        start=config.start and shrink(config.start),
    )


@functools.cache
def generate(classes: int) -> Dataset:
    """Images of noise, whose brightness gives the class away; one step's batch, and a few for testing."""

    def images_of(n):
        labels = np.arange(n, dtype=np.int32) % classes
        noise = generator.integers(0, 100, (n, 8, 8, 3))
        return (noise + 10 * labels[:, None, None, None]).astype(np.uint8), labels

    generator = np.random.default_rng(classes)
    names = tuple(map(str, range(classes)))
    return Dataset("generated", "generated", "generated for tests", *images_of(BATCH), *images_of(IMAGES), names)


def rehearse(module, configs, preset, folder):
    """Trains a step of every arm, and writes the results as if there were as many seeds as it takes."""
    fit = getattr(module, "fit", loop.fit)
    for label, config in configs.items():
        options = {}
        if config.start is not None:
            source = generate(len(config.start.classes or range(10)))
            options["start_variables"] = loop.fit(config.start, source).variables
        trained = fit(config, generate(len(config.classes or range(10))), checkpoint_dir=None, **options)
        for seed in range(protocol.MIN_SEEDS[preset]):
            header = provenance.run_header(config.with_seed(seed), images="generated", parameters=1, seconds=1.0)
            header["settings"] = protocol.settings_of(module)
            place = files.place_in_study(folder, protocol.short_name(module), preset, label, seed)
            files.save(place, header, copy.deepcopy(trained.rows), trained.measured)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), REHEARSALS)
def test_every_arm_takes_a_step_and_the_report_is_made_of_it(name, preset, tmp_path, monkeypatch):
    module = protocol.load(name)
    configs = {label: shrink(config) for label, config in module.runs(preset).items()}
    rehearse(module, configs, preset, tmp_path)
    monkeypatch.setattr(module, "runs", lambda preset: configs)
    monkeypatch.setattr(protocol, "names", lambda: [name])
    (figure,) = studies.figures(module, tmp_path, tmp_path)
    text = studies.readme(tmp_path)
    assert figure.stat().st_size > 10_000 and figure.name in text
    assert "{" not in text and f"{preset}: {len(configs) * protocol.MIN_SEEDS[preset]} runs" in studies.state(
        module, tmp_path
    )
