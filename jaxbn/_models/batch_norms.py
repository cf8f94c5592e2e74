"""What an intercepted call of a batch norm or a linear layer has: inputs, arrays and settings."""

import inspect
from typing import Any, NamedTuple, Self

import flax.linen
import jax
from flax.core.meta import unbox

import jaxbn.linen
import jaxbn.nnx
from jaxbn._core.functional import batch_norm
from jaxbn._core.stats import BatchStats
from jaxbn._models.intercept import Call
from jaxbn._models.model import shapes

WITH_BATCH_NORM = (
    "accepted are models that call flax.linen.BatchNorm, flax.nnx.BatchNorm or those of jaxbn, or subclasses with the "
    "same __call__"
)


class Norm(NamedTuple):
    """What a call gives to a batch norm, and what the layer has.

    Attributes:
      x: inputs, shape [..., C].
      mask: booleans that broadcast to ``x``, or None.
      use_running_average: whether this call evaluates; None where nobody says.
      stats: running statistics, shape [C].
      scale: shape [C], or None.
      bias: shape [C], or None.
      options: as :func:`settings_of` returns them.
    """

    x: jax.Array
    mask: jax.Array | None
    use_running_average: bool | None
    stats: BatchStats
    scale: jax.Array | None
    bias: jax.Array | None
    options: dict[str, Any]

    def without_arrays(self) -> Self:
        """Returns it with shapes and dtypes for its arrays, which are tracers."""
        return shapes(self._replace(options={}))._replace(options=self.options)


def norm_of(call: Call) -> Norm:
    """Returns the inputs, arrays and settings of a batch norm that is called."""

    def given(x, use_running_average=None, *, mask=None):
        return x, use_running_average, mask

    layer = call.layer
    x, use_running_average, mask = given(*call.args, **call.kwargs)
    mode = layer.use_running_average if use_running_average is None else use_running_average
    if isinstance(layer, flax.linen.Module):
        mean, var = (unbox(layer.get_variable("batch_stats", name)) for name in BatchStats._fields)
        scale, bias = (unbox(layer.get_variable("params", name)) for name in ("scale", "bias"))
    else:
        mean, var = (getattr(layer, name)[...] for name in BatchStats._fields)
        scale, bias = (None if v is None else v[...] for v in (layer.scale, layer.bias))
    needed = {"mean": mean, "var": var}
    needed |= {"scale": scale} if layer.use_scale else {}
    needed |= {"bias": bias} if layer.use_bias else {}
    if missing := [name for name, value in needed.items() if value is None]:
        raise ValueError(
            f"variables have no {', '.join(map(repr, missing))} of {call.path or 'the model'}; accepted are those of "
            "this model, in 'params' and 'batch_stats'; pass what model.init returns, or what training has made of it."
        )
    frozen = getattr(layer, "frozen", False)
    return Norm(x, mask, frozen or mode, BatchStats(mean, var), scale, bias, settings_of(layer))


def settings_of(layer: Any) -> dict[str, Any]:
    """Returns the arguments with which our batch norm of the same framework does what this one does."""
    ours = jaxbn.linen.BatchNorm if isinstance(layer, flax.linen.Module) else jaxbn.nnx.BatchNorm
    names = [name for name in inspect.signature(ours.__init__).parameters if name not in ("parent", "name")]
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def evaluated(norm: Norm) -> jax.Array:
    """Returns the inputs of a batch norm, normalised with its running statistics."""
    y, _ = batch_norm(
        norm.x,
        norm.stats,
        norm.scale,
        norm.bias,
        use_running_average=True,
        epsilon=norm.options["epsilon"],
        axis=norm.options["axis"],
        mask=norm.mask,
    )
    return y if norm.options["dtype"] is None else y.astype(norm.options["dtype"])


def kernel_of(layer: Any) -> jax.Array:
    """Returns the kernel that a linear layer uses in this call."""
    if isinstance(layer, flax.linen.Module):
        return unbox(layer.get_variable("params", "kernel"))
    return layer.kernel[...]
