"""Checks of a training run before its first step: its start, its sizes, and the agreement of all processes."""

import dataclasses
import hashlib

import jax
import numpy as np

from experiments.config import Config
from experiments.data.datasets import Dataset
from experiments.evidence import provenance
from experiments.processes import distributed
from experiments.training.programs import steps_per_epoch


def check_start(config: Config, start_variables: dict | None) -> None:
    """Refuses variables to start from if the run needs none, and a run that lacks them."""
    if (config.start is None) != (start_variables is None):
        variables, start = (
            "None" if value is None else kind
            for value, kind in ((start_variables, "variables"), (config.start, "a run"))
        )
        raise ValueError(
            "start_variables must be given if and only if config.start is set, got "
            f"start_variables={variables} and config.start={start}; pass the variables that config.start trained."
        )


def agree_on_the_run(config: Config, dataset: Dataset) -> None:
    """Refuses processes that would train different runs; `compile_programs` compares their programs."""
    if jax.process_count() == 1:
        return  # saves the time of hashing all images
    images = hashlib.sha256()
    for array in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels):
        images.update(np.ascontiguousarray(array))
    facts = dataclasses.asdict(config) | {"images": f"{dataset.name} {images.hexdigest()[:16]}"}
    distributed.agree(facts, remedy="start all processes with the same command, and the same images.")
    distributed.agree(provenance.versions(), remedy="start all processes in the same environment.")


def check_sizes(config: Config, dataset: Dataset) -> None:
    """Refuses a batch, groups or a number of evaluations that do not fit the number of training images."""
    n = len(dataset.train_images)
    if n < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is larger than the {n} training images of {dataset.name}; "
            "lower it, since a step needs a whole batch."
        )
    if config.group_size is not None and n % config.batch_size % config.group_size:
        raise ValueError(
            f"group_size={config.group_size} does not divide the last batch of an epoch, which has "
            f"{n % config.batch_size} images; set train_images to {n - n % config.batch_size}, or choose another "
            "group_size."
        )
    steps = steps_per_epoch(config, n)
    if config.evaluations > steps:
        raise ValueError(
            f"evaluations={config.evaluations} per epoch, but an epoch has only {steps} steps; "
            f"choose at most {steps} evaluations, or lower batch_size."
        )
