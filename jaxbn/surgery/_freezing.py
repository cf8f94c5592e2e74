"""Frozen batch norms: they evaluate always, and their parameters stay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxbn._models.intercept import call_model
from jaxbn.surgery._operation import Layers, Surgery, is_below
from jaxbn.surgery._replacing import replace


def freeze(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: Layers | None = None,
) -> Surgery:
    """Makes batch norms evaluate always, whatever ``train`` flags, ``train()`` and ``eval()`` say: for fine-tuning.

    The same as ``replace(..., frozen=True)``; ``replace(..., frozen=False)`` undoes it.  Scale and bias are still
    learned; :func:`frozen_mask` keeps them from an optimizer.

    >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> done = jaxbn.surgery.freeze(net, None, jnp.ones((8, 3)))
    >>> done.model.train()
    >>> y = done.model(jnp.ones((8, 3)))
    >>> done.model.layers[1].mean[...]
    Array([0., 0., 0., 0.], dtype=float32)

    Args:
      model: a linen or nnx module.
      variables: of the linen module; None for nnx.
      sample: a batch, as ``call`` takes it.
      call: how the model evaluates a batch.
      layers: paths of batch norms, or of modules that contain them; None for all.

    Returns:
      The new model.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    return replace(model, variables, sample, call=call, layers=layers, frozen=True)


def frozen_mask(tree: Any, layers: Layers, *, scale_and_bias: bool = True) -> Any:
    """Returns a mask for Optax: True for leaves that are to stay, neither updated nor decayed.

    True are all statistics of batch norms, and scale and bias of the layers given.  It is for
    ``optax.transforms.selective_transform(optimizer, freeze_mask=mask)``; mind that ``optax.masked`` passes gradients
    on, as updates, where its mask is False.

    >>> params = {"dense": {"bias": jnp.ones(2)}, "norm": {"bias": jnp.ones(2)}}
    >>> jaxbn.surgery.frozen_mask(params, ["norm"])
    {'dense': {'bias': False}, 'norm': {'bias': True}}

    Args:
      tree: what the optimizer gets: params or variables of a linen model, or the State of an nnx model.
      layers: paths of batch norms, such as ``Surgery.layers``, or of modules that contain nothing else to train.
      scale_and_bias: False leaves scale and bias to the optimizer.

    Returns:
      A tree of booleans with the structure of ``tree``; of a State, one in the place of each variable, as
      ``nnx.Optimizer`` wants it.

    Raises:
      ValueError: for layers of which the tree has none.
    """
    layers = [layers] if isinstance(layers, str) else list(layers)
    met = set()

    def frozen(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        is_statistic = names[0] == "batch_stats" or isinstance(leaf, nnx.BatchStat)
        *layer, name = names[1:] if names[0] in ("params", "batch_stats") else names
        met.add("/".join(layer))
        chosen = any(is_below("/".join(layer), one) for one in layers)
        return is_statistic or (scale_and_bias and name in ("scale", "bias") and chosen)

    mask = jax.tree.map_with_path(frozen, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    if layers and not any(is_below(layer, one) for layer in met for one in layers):
        raise ValueError(
            f"the tree has no leaves at {', '.join(map(repr, layers))}; it has some at "
            f"{', '.join(map(repr, sorted(met)))}; pass paths such as Surgery.layers, and the tree of the same model."
        )
    return mask
