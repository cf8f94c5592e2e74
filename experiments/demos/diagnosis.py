"""Diagnoses the batch norms of a network from a checkpoint, on its training images and on the test images.

Convention: batches are as large as in training, but images are not augmented.  For a network trained with augmentation,
the diagnosis therefore shows how far its statistics are from those of plain images.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.nets import linen as linen_nets
from experiments.training import checkpoints, evaluation, runs
from jaxbn.diagnose import Diagnosis, diagnose
from jaxbn.diagnose._diagnosis import COLUMNS, LEFT, LEGEND, WIDTH

BATCHES = 20  # of the training images, and as many of the test images: enough for every finding


def run(checkpoint: Path, *, data_dir: Path | None = None, console: Console | None = None) -> None:
    """Prints the table and the findings, once for the training images and once for the test images.

    Args:
      checkpoint: folder with the checkpoints of a run.
      data_dir: folder of CIFAR-10.
      console: where to print; by default the terminal.

    Raises:
      ValueError: there is no checkpoint, or its network has no batch norm.
    """
    config, variables = checkpoints.load(checkpoint)
    if config.norm != "batch":
        raise ValueError(
            f"the network in {checkpoint} was trained with norm={config.norm!r} and has no batch norm; "
            "pass the checkpoint of one that was trained with norm='batch'."
        )
    console = console or Console()
    dataset = runs.load_data(config, data_dir)
    net = linen_nets.build(config, len(dataset.class_names))
    for name, images in (("training images", dataset.train_images), ("test images", dataset.test_images)):
        batches = first_batches(images, config.batch_size)
        title = f"{config.net} on {len(batches)} batches of {len(batches[0])} {name} of {dataset.name}"
        show(console, title, diagnose(net, variables, batches, call=evaluation.call))


def first_batches(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns up to `BATCHES` full batches, in the order of the images; all images where they do not fill a batch."""
    last_start = max(len(images) - batch_size, 0)
    starts = range(0, last_start + 1, batch_size)[:BATCHES]
    return [images[start : start + batch_size] for start in starts]


def show(console: Console, title: str, diagnosis: Diagnosis) -> None:
    """Prints a diagnosis, with a drawn table on a terminal and as plain text elsewhere."""
    if not console.is_terminal:
        # Without soft_wrap, rich would break lines at the width that it assumes for a file.
        console.print(f"{title}\n\n{diagnosis}\n", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(title=title, caption=LEGEND)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
    for row in diagnosis.table():
        table.add_row(*row.values())
    console.print(table)
    for line in diagnosis.text(min(console.width, WIDTH)).splitlines():
        is_name_of_finding = not line.startswith(" ")
        console.print(line, style="bold" if is_name_of_finding else None, highlight=False, markup=False)
    console.print()
