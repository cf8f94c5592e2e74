"""Measures how many images calibration needs to restore the running statistics of a trained network.

A trained network is tested with the running averages of its training, with corrupted ones, and with statistics measured
on images drawn at random from its training set. Nothing is downloaded.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.benchmarks import Settings
from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.evidence import provenance
from experiments.evidence.text import markdown
from experiments.evidence.verdicts import spread
from experiments.nets import linen as linen_nets
from experiments.training import evaluation, loop, small_run
from experiments.training.progress import Display
from jaxbn import calibrate

NAME = "calibration"
TRAINED, WRECKED = "running averages of the training", "wrecked"  # as stored in the records
ADDED_TO_MEANS, TIMES_VARIANCES = 3, 10  # how `wreck` corrupts them
IMAGES = (10, 30, 100, 300, 1000, 3000)
DRAWS = 5
RATE = 0.1
BATCH = 100
METHODS = {  # name: function, images in a batch
    "one pass, batches of 10": (calibrate.one_pass, 10),
    f"one pass, batches of {BATCH}": (calibrate.one_pass, BATCH),
    "layer by layer": (calibrate.layer_by_layer, BATCH),
}


def header(settings: Settings) -> dict:
    """Returns the first line of the file."""
    config, dataset, _ = _choose_run(settings)
    return provenance.measurement_header(
        {
            "config": dataclasses.asdict(config),
            "data": dataset.provenance,
            "train_images": len(dataset.train_images),
            "test_images": len(dataset.test_images),
            "draws": DRAWS,
            "added_to_means": ADDED_TO_MEANS,
            "times_variances": TIMES_VARIANCES,
        }
    )


def pieces(settings: Settings) -> dict[str, Callable[[], list[dict]]]:
    """Returns a single piece, and prints which images it uses."""
    config, dataset, reason = _choose_run(settings)
    console = Console(width=120)
    console.print(f"Data: {dataset.source}. {reason}", soft_wrap=True, highlight=False, markup=False)
    return {config.net: functools.partial(measure, config, dataset, console)}


def _choose_run(settings: Settings) -> tuple[Config, Dataset, str]:
    """Returns the training run, its images, and a sentence about their choice."""
    dataset, reason = small_run.choose_data(settings.data_dir and Path(settings.data_dir))
    return small_run.CONFIGS[dataset.name].replace(norm="batch", learning_rate=RATE), dataset, reason


def measure(config: Config, dataset: Dataset, console: Console) -> list[dict]:
    """Trains the network, and returns its test accuracies in %: one record for each kind of statistics.

    Args:
      config: the run.
      dataset: its images.
      console: shows the progress of the training.
    """
    with Display(1, console) as display:
        variables = loop.fit(config, dataset, on_progress=display.run("7-layer network")).variables
    net = linen_nets.build(config, len(dataset.class_names))
    wrecked = variables | {"batch_stats": wreck(variables["batch_stats"])}
    uncalibrated = [
        {"statistics": name, "accuracies": [accuracy(net, state, dataset)]}
        for name, state in ((TRAINED, variables), (WRECKED, wrecked))
    ]
    calibrated = [
        {"statistics": name, "images": n, "accuracies": accuracies(net, wrecked, dataset, n, *method)}
        for n in IMAGES
        if n <= len(dataset.train_images)
        for name, method in METHODS.items()
    ]
    return uncalibrated + calibrated


def wreck(batch_stats: Any) -> Any:
    """Corrupts running statistics: all means become too large, and all variances too."""
    changes = {"mean": lambda mean: mean + ADDED_TO_MEANS, "var": lambda var: TIMES_VARIANCES * var}
    return jax.tree_util.tree_map_with_path(lambda path, value: changes[path[-1].key](value), batch_stats)


def accuracies(net: Any, variables: dict, dataset: Dataset, n: int, function: Callable, batch_size: int) -> list[float]:
    """Calibrates on n images, once for each of `DRAWS` draws, and returns the test accuracies in %."""

    def calibrated(draw: int) -> dict:
        # RandomState rather than default_rng: NumPy promises that its stream never changes.
        images = dataset.train_images[np.random.RandomState(draw).permutation(len(dataset.train_images))[:n]]
        return function(net, variables, evaluation.split(images, batch_size), call=evaluation.call)

    return [accuracy(net, calibrated(draw), dataset) for draw in range(DRAWS)]


def accuracy(net: Any, variables: dict, dataset: Dataset) -> float:
    """Returns the accuracy on the test set, in %."""
    return 100 * evaluation.score(evaluation.predict(net, variables, dataset.test_images), dataset.test_labels).accuracy


def block(run: dict) -> str:
    """Returns the test accuracies by number of images and method, and those without calibration."""
    rows, uncalibrated, settings = {}, {}, run["header"]["settings"]
    for record in run["records"]:
        measured = spread(record["accuracies"])
        if "images" in record:
            row = rows.setdefault(record["images"], {"images": f"{record['images']:,}"})
            row[record["statistics"]] = measured.text()
        else:
            uncalibrated[record["statistics"]] = f"{measured.mean:.1f} %"
    config = settings["config"]
    return (
        f"{markdown(list(rows.values()))}\n\nTest accuracy in %, mean ± std over {settings['draws']} draws of "
        f"the images. The network, `{config['net']}`, was trained for {config['epochs']} epochs on "
        f"{settings['train_images']:,} images at {config['image_size']} x {config['image_size']} pixels "
        f"({settings['data']}). On {settings['test_images']:,} test images, its accuracy is {uncalibrated[TRAINED]} "
        f"with the running averages of its training, and {uncalibrated[WRECKED]} with corrupted ones (means "
        f"{settings['added_to_means']} too large, variances {settings['times_variances']} times too large)."
    )
