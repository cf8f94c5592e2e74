"""What is wrong with the batch norms of a net from a checkpoint: on its training images, and on the test images.

Convention: batches have the size of the run's, and images are not augmented, so that a net trained with augmentation
shows how far its statistics are from those of plain images.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.nets import linen as linen_nets
from experiments.training import checkpoints, evaluation, runs
from jaxbn.diagnose import Diagnosis, diagnose
from jaxbn.diagnose._diagnosis import COLUMNS, LEFT, LEGEND, WIDTH

BATCHES = 20  # of each set of images: enough for every finding


def run(checkpoint: Path, *, data_dir: Path | None = None, console: Console | None = None) -> None:
    """Prints the table and the findings, once for the training images and once for the test images.

    Args:
      checkpoint: folder of the checkpoints of a run.
      data_dir: where CIFAR-10 is.
      console: where to print; by default the terminal.

    Raises:
      ValueError: there is no checkpoint, or its net has no batch norm.
    """
    config, variables = checkpoints.load(checkpoint)
    if config.norm != "batch":
        raise ValueError(
            f"the net in {checkpoint} was trained with norm={config.norm!r}; accepted are nets with norm='batch'; "
            "train one, or name its checkpoint."
        )
    console = console or Console()
    dataset = runs.load_data(config, data_dir)
    net = linen_nets.build(config, len(dataset.class_names))
    for name, images in (("training images", dataset.train_images), ("test images", dataset.test_images)):
        batches = split(images, config.batch_size)
        title = f"{config.net} on {len(batches)} batches of {len(batches[0])} {name} of {dataset.name}"
        show(console, title, diagnose(net, variables, batches, call=evaluation.call))


def split(images: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Returns up to `BATCHES` batches in the order of the images, or one where there are fewer images than that."""
    starts = range(0, max(len(images) - batch_size, 0) + 1, batch_size)[:BATCHES]
    return [images[start : start + batch_size] for start in starts]


def show(console: Console, title: str, diagnosis: Diagnosis) -> None:
    """Prints a diagnosis: with a drawn table on a terminal, as plain text elsewhere."""
    if not console.is_terminal:
        console.print(f"{title}\n\n{diagnosis}\n", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(title=title, caption=LEGEND)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right", overflow="fold")
    for row in diagnosis.table():
        table.add_row(*row.values())
    console.print(table)
    for line in diagnosis.text(min(console.width, WIDTH)).splitlines():
        console.print(line, style="bold" if not line.startswith(" ") else None, highlight=False, markup=False)
    console.print()
