"""Masks for Optax: which leaves of a model an optimizer should leave alone.

Both functions read names only: a leaf is known by its name and by that of the scope it is in.
"""

import collections
from typing import Any

import jax
from flax import nnx

from jaxbn.surgery._operation import LayerPaths, is_below

# The names that all of Flax's norms give to their parameters.
_SCALE_AND_BIAS = {"scale", "bias"}


def frozen_mask(tree: Any, layers: LayerPaths, *, scale_and_bias: bool = True) -> Any:
    """Returns a mask for Optax that is True for leaves to freeze: neither updated nor decayed.

    These are all statistics of batch norms, and the scale and bias of the given layers.  Pass the mask to
    ``optax.transforms.selective_transform(optimizer, freeze_mask=mask)``.  Do not use ``optax.masked``: where its mask
    is False, gradients are applied as updates.

    >>> params = {"dense": {"bias": jnp.ones(2)}, "norm": {"bias": jnp.ones(2)}}
    >>> jaxbn.surgery.frozen_mask(params, ["norm"])
    {'dense': {'bias': False}, 'norm': {'bias': True}}

    Args:
      tree: what the optimizer updates: params or variables of a linen model, or the State of an nnx model.
      layers: paths of batch norms, such as ``Surgery.layers``, or of modules that contain nothing else to train.
      scale_and_bias: False leaves scale and bias to the optimizer.

    Returns:
      A tree of booleans with the structure of ``tree``; for a State, one boolean for each variable, as
      ``nnx.Optimizer`` needs it.

    Raises:
      ValueError: if the tree lacks one of the layers.
    """
    chosen = [layers] if isinstance(layers, str) else list(layers)
    all_paths = set()

    def is_frozen(key_path, leaf):
        is_statistic, path, name = _place(key_path, leaf)
        all_paths.add(path)
        is_chosen = any(is_below(path, layer) for layer in chosen)
        return is_statistic or (scale_and_bias and name in _SCALE_AND_BIAS and is_chosen)

    mask = _map_variables(is_frozen, tree)
    missing = [layer for layer in chosen if not any(is_below(path, layer) for path in all_paths)]
    if missing:
        raise ValueError(
            f"the tree has no leaves at {', '.join(map(repr, missing))}; it has some at "
            f"{', '.join(map(repr, sorted(all_paths)))}; pass paths such as Surgery.layers, and the tree of the same "
            "model; leave out a layer that has neither scale nor bias."
        )
    return mask


def decay_mask(tree: Any, *, biases: bool = True) -> Any:
    """Returns a mask for Optax that is True for leaves with weight decay: all but scale and bias of the norms.

    The norms need no names: any scope with a scale or a bias, and no kernel or other parameter, is taken for one, and
    so is a scope that has running statistics in ``tree``.  These are batch, layer, group and RMS norms, and affine
    layers.  Statistics are not decayed.  The function can be the mask: ``optax.adamw(1e-3, mask=surgery.decay_mask)``.

    >>> params = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((3, 2))}, "norm": {"scale": jnp.ones(2)}}
    >>> jaxbn.surgery.decay_mask(params)
    {'dense': {'bias': True, 'kernel': True}, 'norm': {'scale': False}}

    Args:
      tree: what the optimizer updates: params or variables of a linen model, or the State of an nnx model; of a
        ``TrainState``, its ``params``.
      biases: False leaves out the biases of all other layers too.

    Returns:
      A tree of booleans with the structure of ``tree``; for a State, one boolean for each variable, as
      ``nnx.Optimizer`` needs it.
    """
    names, with_statistics = collections.defaultdict(set), set()

    def look(key_path, leaf):
        is_statistic, path, name = _place(key_path, leaf)
        if is_statistic:
            with_statistics.add(path)
        else:
            names[path].add(name)

    def is_decayed(key_path, leaf):
        is_statistic, path, name = _place(key_path, leaf)
        is_norm = path in with_statistics or names[path] <= _SCALE_AND_BIAS
        of_norm = is_norm and name in _SCALE_AND_BIAS
        return not (is_statistic or of_norm or (name == "bias" and not biases))

    _map_variables(look, tree)
    return _map_variables(is_decayed, tree)


def _map_variables(function: Any, tree: Any) -> Any:
    """Maps a function of key path and leaf over a tree, in which the Variables of nnx are leaves."""
    return jax.tree.map_with_path(function, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _place(key_path: tuple, leaf: Any) -> tuple[bool, str, str]:
    """Returns whether a leaf is a statistic, the path of its layer, and its name."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    is_statistic = keys[0] == "batch_stats" or isinstance(leaf, nnx.BatchStat)
    if keys[0] in ("params", "batch_stats"):  # the variables of a linen model, with their collection
        del keys[0]
    if key_path[-1] == jax.tree_util.GetAttrKey("value"):  # the array in a box with its sharding, as nn.Partitioned
        del keys[-1]
    *steps, name = keys
    return is_statistic, "/".join(steps), name
