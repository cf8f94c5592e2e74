"""How many images calibration needs: a net whose running statistics were wrecked gets them back from a few images.

A trained net is tested with the running averages of its training, with wrecked ones, and with statistics measured on
images drawn at random from those that it was trained on.  Nothing is downloaded.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments import demo, evaluation, models, train
from experiments.data import Dataset
from experiments.display import Display
from experiments.measures import Spread, spread
from jaxbn import calibrate

IMAGES = (10, 30, 100, 300, 1000, 3000)
DRAWS = 5
RATE = 0.1
BATCH = 100
METHODS = {  # name: function, images in a batch
    "one pass, batches of 10": (calibrate.one_pass, 10),
    f"one pass, batches of {BATCH}": (calibrate.one_pass, BATCH),
    "layer by layer": (calibrate.layer_by_layer, BATCH),
}


def run(*, data_dir: Path | None) -> None:
    """Trains the net, calibrates it on more and more images, and prints the table."""
    began = time.perf_counter()
    console = Console(width=120)
    dataset, why = demo.choose_data(data_dir)
    config = demo.CONFIGS[dataset.name].replace(norm="batch", learning_rate=RATE)
    console.print(f"Data: {dataset.source}. {why}", soft_wrap=True, highlight=False, markup=False)
    with Display(1, console) as display:
        variables = train.fit(config, dataset, on_progress=display.run("7-layer net")).variables
    net = models.build(config, len(dataset.class_names))
    wrecked = variables | {"batch_stats": wreck(variables["batch_stats"])}
    measured = {n: measure(net, wrecked, dataset, n) for n in IMAGES if n <= len(dataset.train_images)}
    console.print(table(measured))
    for name, state in (("running averages of the training", variables), ("wrecked", wrecked)):
        console.print(f"Test accuracy, {name}: {accuracy(net, state, dataset):.1f} %", highlight=False)
    console.print(f"Time in all: {time.perf_counter() - began:.0f} s", highlight=False)


def wreck(batch_stats: Any) -> Any:
    """Returns running statistics that are far off: all means 3 too large, and all variances 10 times."""
    changes = {"mean": lambda mean: mean + 3, "var": lambda var: 10 * var}
    return jax.tree_util.tree_map_with_path(lambda path, value: changes[path[-1].key](value), batch_stats)


def measure(net: Any, variables: dict, dataset: Dataset, n: int) -> dict[str, Spread]:
    """Returns the test accuracy, in %, after each method on n images, with its spread over the draws."""

    def calibrated(function: Callable, batch_size: int, draw: int) -> dict:
        # RandomState, because NumPy promises never to change its stream.
        images = dataset.train_images[np.random.RandomState(draw).permutation(len(dataset.train_images))[:n]]
        return function(net, variables, evaluation.split(images, batch_size), call=evaluation.call)

    return {
        name: spread(accuracy(net, calibrated(*method, draw), dataset) for draw in range(DRAWS))
        for name, method in METHODS.items()
    }


def accuracy(net: Any, variables: dict, dataset: Dataset) -> float:
    """Returns the accuracy on the test set, in %."""
    return 100 * evaluation.score(evaluation.predict(net, variables, dataset.test_images), dataset.test_labels).accuracy


def table(measured: dict[int, dict[str, Spread]]) -> Table:
    """Returns the accuracies by number of images and method."""
    printed = Table(title=f"Test accuracy after calibration, in %: mean ± std over {DRAWS} draws of the images")
    for name in ("images", *METHODS):
        printed.add_column(name, justify="right")
    for n, found in measured.items():
        printed.add_row(f"{n:,}", *(one.text() for one in found.values()))
    return printed
