"""Freezes batch norms: they always evaluate."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxbn._models.intercept import call_model
from jaxbn.surgery._operation import LayerPaths, Surgery
from jaxbn.surgery._replacing import replace


def freeze(
    model: Any,
    variables: Mapping[str, Any] | None,
    sample: Any,
    *,
    call: Callable[[Any, Any], Any] = call_model,
    layers: LayerPaths | None = None,
    check: bool = True,
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
      check: whether to run the model before and after, for ``difference`` and ``scale``; both are NaN without.

    Returns:
      The new model.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    return replace(model, variables, sample, call=call, layers=layers, check=check, frozen=True)
