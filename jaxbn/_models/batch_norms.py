"""Calls of batch norms and linear layers: their inputs, arrays and options, alike for linen and nnx."""

import inspect
from typing import Any, NamedTuple, Self

import flax.linen
import jax
from flax import nnx
from flax.core.meta import unbox

import jaxbn.linen
import jaxbn.nnx
from jaxbn._core import checks
from jaxbn._core.functional import batch_norm
from jaxbn._core.stats import BatchStats
from jaxbn._models.model import BATCH_NORMS, shapes

# A clause of the messages about models in which no batch norm is called.
WITH_BATCH_NORM = (
    "the model must call flax.linen.BatchNorm, flax.nnx.BatchNorm, one of jaxbn's, or a subclass that calls theirs"
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


class Names(NamedTuple):
    """Where a class of batch norms has its arrays and settings: names of variables and attributes.

    Attributes:
      mean: variable of the running mean.
      var: variable of the running variance.
      scale: variable of the scale; need not exist.
      bias: variable of the bias; need not exist.
      epsilon: attribute, or the number itself.
      axis: attribute, or the feature axis itself.
      momentum: attribute; need not exist.
      dtype: attribute of the result's dtype; need not exist.
    """

    mean: str = "mean"
    var: str = "var"
    scale: str = "scale"
    bias: str = "bias"
    epsilon: str | float = "epsilon"
    axis: str | int = "axis"
    momentum: str = "momentum"
    dtype: str = "dtype"


_kinds: dict[type, Names] = dict.fromkeys(BATCH_NORMS, Names())


def register_batch_norm(
    cls: type,
    *,
    mean: str = "mean",
    var: str = "var",
    scale: str = "scale",
    bias: str = "bias",
    epsilon: str | float = "epsilon",
    axis: str | int = "axis",
    momentum: str = "momentum",
    dtype: str = "dtype",
) -> type:
    """Makes a class of layers known as a batch norm, to :mod:`jaxbn.calibrate` and :mod:`jaxbn.diagnose`.

    For copies of batch norm that are no subclass of Flax's or ours.  The class's ``__call__`` takes the inputs first,
    perhaps a ``mask`` by name, and in evaluation computes :func:`jaxbn.normalize` with its running statistics.

    >>> class Norm(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         mean = self.variable("batch_stats", "ra_mean", jnp.zeros, x.shape[-1:]).value
    ...         var = self.variable("batch_stats", "ra_var", jnp.ones, x.shape[-1:]).value
    ...         return jaxbn.normalize(x, mean, var, epsilon=1e-3)
    >>> _ = jaxbn.surgery.register_batch_norm(Norm, mean="ra_mean", var="ra_var", epsilon=1e-3, axis=-1)
    >>> x = jnp.array([[1., 2.], [3., 6.]])
    >>> variables = Norm().init(jax.random.key(0), x)
    >>> jaxbn.calibrate.one_pass(Norm(), variables, [x])["batch_stats"]["ra_mean"]
    Array([2., 4.], dtype=float32)

    Args:
      cls: a class of linen or nnx modules.
      mean: variable of the running mean, shape [C], in ``batch_stats`` in linen.
      var: variable of the running variance, shape [C], likewise.
      scale: variable of the scale, if there is one, in ``params`` in linen.
      bias: variable of the bias, if there is one, likewise.
      epsilon: attribute, or the number itself.
      axis: attribute, or the feature axis itself.
      momentum: attribute with the weight of the old statistics, if there is one.
      dtype: attribute with the dtype of the result, if there is one.

    Returns:
      The class.

    Raises:
      ValueError: for anything else than a class of modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, flax.linen.Module | nnx.Module)):
        raise ValueError(f"cls must be a class of linen or nnx modules, got {cls!r}; pass the class itself.")
    _kinds[cls] = Names(mean, var, scale, bias, epsilon, axis, momentum, dtype)
    return cls


def kinds() -> tuple[type, ...]:
    """Returns the classes of batch norms: Flax's, ours, and those that were registered."""
    return tuple(_kinds)


def read_norm(layer: Any, kind: type, args: tuple, kwargs: dict, path: str) -> NormCall:
    """Reads inputs, arrays and options of a batch norm whose ``kind.__call__`` is called with these arguments."""
    # Flax keeps the function behind the methods of linen modules, whose own signature has no names.
    bound = inspect.signature(inspect.unwrap(kind.__call__)).bind(layer, *args, **kwargs).arguments
    _, x, *_ = bound.values()
    use_running_average = bound.get("use_running_average")
    if use_running_average is None:
        use_running_average = getattr(layer, "use_running_average", None)
    # A frozen layer evaluates even where the call asks it to train.
    use_running_average = getattr(layer, "frozen", False) or use_running_average
    if use_running_average is not None:
        checks.boolean("use_running_average", use_running_average)
    names = _kinds[kind]
    arrays = {name: _array_of(layer, names, name) for name in ("mean", "var", "scale", "bias")}
    required = {"mean": True, "var": True} | {name: getattr(layer, f"use_{name}", False) for name in ("scale", "bias")}
    if missing := [name for name, array in arrays.items() if required[name] and array is None]:
        raise ValueError(
            f"variables have no {', '.join(map(repr, missing))} of {path or 'the model'}; they must be those of "
            "this model, with 'params' and 'batch_stats'; pass the result of model.init, or of training."
        )
    stats = BatchStats(arrays["mean"], arrays["var"])
    options = settings_of(layer) if kind in BATCH_NORMS else _foreign_settings(layer, names, arrays)
    if bound.get("update_stats") is not None:  # the call goes before the constructor
        options = options | {"update_stats": bound["update_stats"]}
    return NormCall(x, bound.get("mask"), use_running_average, stats, arrays["scale"], arrays["bias"], options)


def norm_of(call: Any) -> NormCall:
    """Reads an intercepted call of one of Flax's or our batch norms."""
    kind = next(cls for cls in type(call.layer).__mro__ if cls in BATCH_NORMS)
    return read_norm(call.layer, kind, call.args, call.kwargs, call.path)


def _foreign_settings(layer: Any, names: Names, arrays: dict[str, Any]) -> dict[str, Any]:
    def setting(name, default=None):
        return getattr(layer, name, default) if isinstance(name, str) else name

    return {
        "axis": setting(names.axis, -1),
        "epsilon": setting(names.epsilon),
        "momentum": setting(names.momentum),
        "dtype": setting(names.dtype),
        "use_scale": arrays["scale"] is not None,
        "use_bias": arrays["bias"] is not None,
    }


def kernel_of(layer: Any) -> jax.Array:
    """Returns the kernel that a linear layer uses in this call."""
    if isinstance(layer, flax.linen.Module):
        return unbox(layer.get_variable("params", "kernel"))
    return layer.kernel[...]


def _array_of(layer: Any, names: Names, name: str) -> Any:
    """Returns an array of a batch norm that is being called, or None if the layer has none of this name."""
    variable_name = getattr(names, name)
    if isinstance(layer, flax.linen.Module):
        # Read as a variable, not as an attribute: inside of the layer's own call it would be declared first, but that
        # call may never happen.
        collection = "batch_stats" if name in BatchStats._fields else "params"
        return unbox(layer.get_variable(collection, variable_name))
    variable = getattr(layer, variable_name, None)
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
