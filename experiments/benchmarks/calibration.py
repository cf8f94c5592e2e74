"""How many images calibration needs: a net whose running statistics were wrecked gets them back from a few images.

A trained net is tested with the running averages of its training, with wrecked ones, and with statistics measured on
images drawn at random from those that it was trained on.  Nothing is downloaded.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.evidence import files, provenance
from experiments.evidence.text import markdown
from experiments.evidence.verdicts import spread
from experiments.nets import linen as linen_nets
from experiments.training import evaluation, loop, small_run
from experiments.training.progress import Display
from jaxbn import calibrate

NAME = "calibration"
TRAINED, WRECKED = "running averages of the training", "wrecked"
ADDED_TO_MEANS, TIMES_VARIANCES = 3, 10  # by wrecking
IMAGES = (10, 30, 100, 300, 1000, 3000)
DRAWS = 5
RATE = 0.1
BATCH = 100
METHODS = {  # name: function, images in a batch
    "one pass, batches of 10": (calibrate.one_pass, 10),
    f"one pass, batches of {BATCH}": (calibrate.one_pass, BATCH),
    "layer by layer": (calibrate.layer_by_layer, BATCH),
}


def run(*, data_dir: Path | None, out: Path) -> None:
    """Trains the net, calibrates it on more and more images, and writes the file.

    Args:
      data_dir: where CIFAR-10 is.
      out: folder of the file.
    """
    began = time.perf_counter()
    console = Console(width=120)
    dataset, why = small_run.choose_data(data_dir)
    config = small_run.CONFIGS[dataset.name].replace(norm="batch", learning_rate=RATE)
    console.print(f"Data: {dataset.source}. {why}", soft_wrap=True, highlight=False, markup=False)
    settings = {
        "config": dataclasses.asdict(config),
        "data": dataset.provenance,
        "train_images": len(dataset.train_images),
        "test_images": len(dataset.test_images),
        "draws": DRAWS,
        "added_to_means": ADDED_TO_MEANS,
        "times_variances": TIMES_VARIANCES,
    }
    pieces = {config.net: functools.partial(measure, config, dataset, console)}
    files.measure_in_pieces(out / f"{NAME}.jsonl", provenance.measurement_header(settings), pieces)
    console.print(f"Time in all: {time.perf_counter() - began:.0f} s", highlight=False)


def measure(config: Config, dataset: Dataset, console: Console) -> list[dict]:
    """Trains the net, and returns a record for each kind of statistics: the test accuracies with them, in %.

    Args:
      config: the run.
      dataset: its images.
      console: shows how far the training is.
    """
    with Display(1, console) as display:
        variables = loop.fit(config, dataset, on_progress=display.run("7-layer net")).variables
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
    """Returns running statistics that are far off: all means too large, and all variances too."""
    changes = {"mean": lambda mean: mean + ADDED_TO_MEANS, "var": lambda var: TIMES_VARIANCES * var}
    return jax.tree_util.tree_map_with_path(lambda path, value: changes[path[-1].key](value), batch_stats)


def accuracies(net: Any, variables: dict, dataset: Dataset, n: int, function: Callable, batch_size: int) -> list[float]:
    """Returns the test accuracies, in %, after a calibration on n images, one for each draw."""

    def calibrated(draw):
        # RandomState, because NumPy promises never to change its stream.
        images = dataset.train_images[np.random.RandomState(draw).permutation(len(dataset.train_images))[:n]]
        return function(net, variables, evaluation.split(images, batch_size), call=evaluation.call)

    return [accuracy(net, calibrated(draw), dataset) for draw in range(DRAWS)]


def accuracy(net: Any, variables: dict, dataset: Dataset) -> float:
    """Returns the accuracy on the test set, in %."""
    return 100 * evaluation.score(evaluation.predict(net, variables, dataset.test_images), dataset.test_labels).accuracy


def block(run: dict) -> str:
    """Returns the test accuracies by number of images and method, and those without calibration."""
    lines, uncalibrated, settings = {}, {}, run["header"]["settings"]
    for record in run["records"]:
        found = spread(record["accuracies"])
        if "images" in record:
            line = lines.setdefault(record["images"], {"images": f"{record['images']:,}"})
            line[record["statistics"]] = found.text()
        else:
            uncalibrated[record["statistics"]] = f"{found.mean:.1f} %"
    config = settings["config"]
    return (
        f"{markdown(list(lines.values()))}\n\nTest accuracy in %, mean ± std over {settings['draws']} draws of the "
        f"images. The net, `{config['net']}`, was trained for {config['epochs']} epochs on "
        f"{settings['train_images']:,} images at {config['image_size']} x {config['image_size']} pixels "
        f"({settings['data']}). Of {settings['test_images']:,} test images it classifies "
        f"{uncalibrated[TRAINED]} correctly with the running averages of its training, and "
        f"{uncalibrated[WRECKED]} with wrecked ones (means {settings['added_to_means']} too large, "
        f"variances {settings['times_variances']} times too large)."
    )
