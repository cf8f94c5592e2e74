"""Freezes batch norms: they always evaluate, and an optimizer can leave their parameters as they are."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxbn._models.intercept import call_model
from jaxbn.surgery._operation import LayerPaths, Surgery, is_below
from jaxbn.surgery._replacing import replace


def freeze(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: LayerPaths | None = None,
) -> Surgery:
    """Makes batch norms always evaluate, regardless of ``train`` flags, ``train()`` and ``eval()``: for fine-tuning.

    The same as ``replace(..., frozen=True)``; ``replace(..., frozen=False)`` undoes it.  Scale and bias are still
    trained, unless :func:`frozen_mask` tells the optimizer not to.

    >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> done = jaxbn.surgery.freeze(net, None, jnp.ones((8, 3)))
    >>> done.model.train()
    >>> y = done.model(jnp.ones((8, 3)))
    >>> done.model.layers[1].mean[...]
    Array([0., 0., 0., 0.], dtype=float32)

    Args:
      model: a linen or nnx module.
      variables: variables of the linen module; None for an nnx module.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.

    Returns:
      The new model.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    return replace(model, variables, sample, call=call, layers=layers, frozen=True)


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
      ValueError: if the tree has none of the layers.
    """
    chosen = [layers] if isinstance(layers, str) else list(layers)
    all_paths = set()

    def is_frozen(key_path, leaf):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
        is_statistic = keys[0] == "batch_stats" or isinstance(leaf, nnx.BatchStat)
        if keys[0] in ("params", "batch_stats"):  # the variables of a linen model, with their collection
            del keys[0]
        *steps, name = keys
        path = "/".join(steps)
        all_paths.add(path)
        is_chosen = any(is_below(path, layer) for layer in chosen)
        return is_statistic or (scale_and_bias and name in ("scale", "bias") and is_chosen)

    mask = jax.tree.map_with_path(is_frozen, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if chosen and not any(is_below(path, layer) for path in all_paths for layer in chosen):
        raise ValueError(
            f"the tree has no leaves at {', '.join(map(repr, chosen))}; it has some at "
            f"{', '.join(map(repr, sorted(all_paths)))}; pass paths such as Surgery.layers, and the tree of the same "
            "model."
        )
    return mask
