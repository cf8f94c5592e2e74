"""How a trained net becomes the start of another run: a new last layer, and its batch norms as the run wants them."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments.config import Config
from experiments.nets import linen as linen_nets
from experiments.training.evaluation import evaluate
from jaxbn import surgery

LAST = "Dense_0"  # the name of every net's last layer


def transplant(config: Config, trained: dict, fresh: dict, sample: jax.Array) -> dict:
    """Returns the `params` and `batch_stats` with which a run begins that starts from a trained net.

    Args:
      config: the run; its `start` is the run that trained the net, its `tuning` says what becomes of the batch norms.
      trained: variables of the trained net.
      fresh: variables of the run's own net as random weights give them; the last layer is taken from here.
      sample: images of the run, float32 [n, height, width, channels], to find the batch norms with.

    Raises:
      ValueError: the trained net does not fit the run's.
    """
    if config.tuning != "trained":
        net = linen_nets.build(config.start, num_classes=trained["params"][LAST]["bias"].size)
        learnable = config.tuning == "affine"
        trained = surgery.to_affine(net, trained, jnp.asarray(sample), call=evaluate, learnable=learnable).variables
    moved = {
        "params": {**trained["params"], LAST: fresh["params"][LAST]},
        "batch_stats": trained.get("batch_stats", {}),
    }
    _must_fit(moved, fresh)
    return moved


def _must_fit(moved: Any, fresh: Any) -> None:
    """Refuses variables of another structure or other shapes than the net's."""
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (moved, fresh)
    )
    if different := [path for path in sorted({**found, **wanted}) if found.get(path) != wanted.get(path)]:
        path = different[0]
        raise ValueError(
            f"the net to start from does not fit that of this run at {len(different)} of its variables, the first of "
            f"them {path}: shape {found.get(path)}, and this run wants {wanted.get(path)}; start from a net of the "
            "same kind, trained on images with as many channels."
        )
