"""Intercepted calls of batch norms and linear layers: their inputs, arrays and options, alike for linen and nnx."""

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

# A clause of the messages about models in which no batch norm is called.
WITH_BATCH_NORM = (
    "the model must call flax.linen.BatchNorm, flax.nnx.BatchNorm, one of jaxbn's, or a subclass with the same __call__"
)


class NormCall(NamedTuple):
    """One call of a batch norm.

    Attributes:
      x: inputs, shape [..., C].
      mask: booleans that broadcast to ``x``, or None.
      use_running_average: whether this call evaluates; None if neither the layer nor the call says.
      stats: running statistics, shape [C].
      scale: shape [C], or None.
      bias: shape [C], or None.
      options: constructor arguments, see :func:`settings_of`.
    """

    x: jax.Array
    mask: jax.Array | None
    use_running_average: bool | None
    stats: BatchStats
    scale: jax.Array | None
    bias: jax.Array | None
    options: dict[str, Any]

    @property
    def is_frozen(self) -> bool:
        """Whether the layer always evaluates and keeps its statistics, which Flax's layers cannot."""
        return self.options.get("frozen", False)

    def cast(self, y: jax.Array) -> jax.Array:
        """Casts an output to the layer's dtype, if it has one."""
        dtype = self.options["dtype"]
        return y if dtype is None else y.astype(dtype)

    def without_arrays(self) -> Self:
        """Replaces the arrays, which are tracers and must not outlive their trace, with shapes and dtypes."""
        # The options are not arrays, but some have a shape, as NumPy dtypes do.
        return shapes(self._replace(options={}))._replace(options=self.options)


def norm_of(call: Call) -> NormCall:
    """Reads inputs, arrays and options of a batch norm that is being called."""

    # The signature of all four layers, which binds the arguments.
    def bind(x, use_running_average=None, *, mask=None):
        return x, use_running_average, mask

    layer = call.layer
    x, use_running_average, mask = bind(*call.args, **call.kwargs)
    if use_running_average is None:
        use_running_average = layer.use_running_average
    # A frozen layer evaluates even where the call asks it to train.
    use_running_average = getattr(layer, "frozen", False) or use_running_average
    required = {"mean": True, "var": True, "scale": layer.use_scale, "bias": layer.use_bias}
    arrays = {name: _array_of(layer, name) for name in required}
    if missing := [name for name, array in arrays.items() if required[name] and array is None]:
        raise ValueError(
            f"variables have no {', '.join(map(repr, missing))} of {call.path or 'the model'}; they must be those of "
            "this model, with 'params' and 'batch_stats'; pass the result of model.init, or of training."
        )
    stats = BatchStats(arrays["mean"], arrays["var"])
    return NormCall(x, mask, use_running_average, stats, arrays["scale"], arrays["bias"], settings_of(layer))


def kernel_of(layer: Any) -> jax.Array:
    """Returns the kernel that a linear layer uses in this call."""
    return _array_of(layer, "kernel")


def _array_of(layer: Any, name: str) -> Any:
    """Returns an array of a layer that is being called, or None if the layer has none of this name."""
    if isinstance(layer, flax.linen.Module):
        # Read as a variable, not as an attribute: inside of the layer's own call it would be declared first, but that
        # call may never happen.
        collection = "batch_stats" if name in BatchStats._fields else "params"
        return unbox(layer.get_variable(collection, name))
    variable = getattr(layer, name)
    return None if variable is None else variable[...]


def settings_of(layer: Any) -> dict[str, Any]:
    """Returns constructor arguments with which jaxbn's layer of the same framework computes what this layer does."""
    ours = jaxbn.linen.BatchNorm if isinstance(layer, flax.linen.Module) else jaxbn.nnx.BatchNorm
    names = [name for name in inspect.signature(ours.__init__).parameters if name not in ("parent", "name")]
    # Flax's layers lack some, whose defaults do what Flax does.
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def evaluated(norm: NormCall) -> jax.Array:
    """Normalizes the inputs of a batch norm with its running statistics."""
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
    return norm.cast(y)
