"""Marked calls: one equation of a traced program for each call of a batch norm.

The equation's operands are the arrays of the call, and its parameters say which layer is called, and how.  Unless a
tool evaluates it by a rule of its own, it computes what the layer computes in evaluation.  Transformations keep it one
equation: under vmap, batched operands come first, and the parameter ``mapped`` says for each vmap, from the outermost
to the innermost, which operands have its axis.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbn._core.stats import BatchStats
from jaxbn._models.batch_norms import NormCall, evaluated

Mapped = tuple[tuple[bool, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """What is static in a marked call.

    Attributes:
      role: "norm" for a batch norm; "into" or "out of" for the input and the output of a linear layer, which is not
        evaluated by rules: the output's equation takes the kernel as its second operand.
      path: of the layer, as the trace saw it; blocks under nn.jit that are equal but for their names share a trace.
      layer: the linen module, unbound, or the class of the nnx module.
      names: of the operands.
      use_running_average: whether the call evaluates; None if neither the layer nor the call says.
      options: constructor arguments of the batch norm.
    """

    role: str
    path: tuple[Any, ...]
    layer: Any
    names: tuple[str, ...]
    use_running_average: bool | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_frozen(self) -> bool:
        """Whether the layer always evaluates and keeps its statistics, which Flax's layers cannot."""
        return self.options.get("frozen", False)

    def norm(self, operands: Sequence[Any]) -> NormCall:
        """Returns the call of a batch norm with these operands."""
        arrays = dict(zip(self.names, operands, strict=True))
        return NormCall(
            arrays["x"],
            arrays.get("mask"),
            self.use_running_average,
            BatchStats(arrays["mean"], arrays["var"]),
            arrays.get("scale"),
            arrays.get("bias"),
            self.options,
        )


call_p = Primitive("marked_call")
call_p.multiple_results = True


def mark_norm(norm: NormCall, path: tuple[Any, ...], layer: Any) -> jax.Array:
    """Returns the output of a batch norm in evaluation, by one equation."""
    arrays = {
        "x": norm.x,
        "mask": norm.mask,
        "mean": norm.stats.mean,
        "var": norm.stats.var,
        "scale": norm.scale,
        "bias": norm.bias,
    }
    arrays = {name: jnp.asarray(array) for name, array in arrays.items() if array is not None}
    site = Site("norm", path, layer, tuple(arrays), norm.use_running_average, norm.options)
    (y,) = call_p.bind(*arrays.values(), site=site, mapped=(), differentiated=False)
    return y


def mark_value(site: Site, *operands: jax.Array) -> jax.Array:
    """Returns the first operand, by one equation."""
    (y,) = call_p.bind(*operands, site=site, mapped=(), differentiated=False)
    return y


def over_maps(function: Callable, mapped: Mapped) -> Callable:
    """Maps ``function(operands, extra)`` over the axes of all vmaps, which ``extra`` has in front."""
    for flags in reversed(mapped):
        function = jax.vmap(function, in_axes=([0 if flag else None for flag in flags], 0))
    return function


def _evaluate(*operands: jax.Array, site: Site, mapped: Mapped, differentiated: bool) -> list[jax.Array]:
    del differentiated

    def plain(operands, _):
        return evaluated(site.norm(operands)) if site.role == "norm" else operands[0]

    return [over_maps(plain, mapped)([*operands], None)]


def _abstract(*operands: Any, **parameters: Any) -> list[Any]:
    return jax.make_jaxpr(lambda *arrays: _evaluate(*arrays, **parameters))(*operands).out_avals


def _batch(operands, dims, *, site, mapped, differentiated):
    flags = tuple(isinstance(dim, int) for dim in dims)
    moved = [jnp.moveaxis(x, dim, 0) if flag else x for x, dim, flag in zip(operands, dims, flags, strict=True)]
    outputs = call_p.bind(*moved, site=site, mapped=(flags, *mapped), differentiated=differentiated)
    return outputs, [0] * len(outputs)


def _differentiate(primals, tangents, **parameters):
    # The derivative is that of evaluation, whatever a rule makes of the output: see `Call.differentiated`.
    active = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_active(*arrays):
        operands = [*primals]
        for i, array in zip(active, arrays, strict=True):
            operands[i] = array
        return _evaluate(*operands, **parameters)

    _, tangents_out = jax.jvp(of_active, [primals[i] for i in active], [tangents[i] for i in active])
    return call_p.bind(*primals, **parameters | {"differentiated": True}), tangents_out


call_p.def_impl(_evaluate)
call_p.def_abstract_eval(_abstract)
mlir.register_lowering(call_p, mlir.lower_fun(_evaluate, multiple_results=True))
batching.primitive_batchers[call_p] = _batch
ad.primitive_jvps[call_p] = _differentiate
