"""Starts a run from a trained network: with a new last layer, and batch norms as the run requires."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.training.evaluation import evaluate
from jaxbn import surgery

LAST = "Dense_0"  # name of the last layer in every network


def transplant(config: Config, trained: dict, fresh: dict, sample: jax.Array) -> dict:
    """Returns the initial `params` and `batch_stats` of a run that starts from a trained network.

    Args:
      config: the run; `start` is the run that trained the network, `tuning` tells what happens to the batch norms.
      trained: variables of the trained network.
      fresh: random initial variables of the run's network, for the last layer.
      sample: images of the run, float32 [n, height, width, channels], to trace the network with.

    Raises:
      ValueError: the variables of the two networks do not match.
    """
    if config.tuning != "trained":
        # Folds the running statistics into an affine map, which the run learns or keeps.
        net = linen_nets.build(config.start, num_classes=trained["params"][LAST]["bias"].size)
        learnable = config.tuning == "affine"
        trained = surgery.to_affine(net, trained, jnp.asarray(sample), call=evaluate, learnable=learnable).variables
    moved = {
        "params": {**trained["params"], LAST: fresh["params"][LAST]},
        "batch_stats": trained.get("batch_stats", {}),
    }
    _must_match(moved, fresh)
    return moved


def _must_match(moved: Any, fresh: Any) -> None:
    """Refuses variables whose structure or shapes differ from those of the run's network."""
    shapes, expected = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (moved, fresh)
    )
    different = [path for path in sorted({**shapes, **expected}) if shapes.get(path) != expected.get(path)]
    if different:
        path = different[0]
        raise ValueError(
            f"The network to start from does not match that of this run: {len(different)} variables differ, the first "
            f"is {path} with shape {shapes.get(path)}, expected {expected.get(path)}. Start from the same kind of "
            "network, trained on images with the same number of channels."
        )
