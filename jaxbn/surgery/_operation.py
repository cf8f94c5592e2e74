"""What the operations of :mod:`jaxbn.surgery` share: look at a model, choose layers, exchange them, compare."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._models.batch_norms import WITH_BATCH_NORM, NormCall, evaluated, norm_of
from jaxbn._models.intercept import evaluation
from jaxbn._models.model import BATCH_NORMS, Model, join, split
from jaxbn.surgery._exchange import NewLayer, exchange

# A program that runs once: optimizing it takes longer than running it as it is.
_ONCE = {"xla_backend_optimization_level": 0}
Layers = str | Sequence[str]
Evaluate = Callable[[Any, Any], Any]
Found = dict[str, NormCall]


class Surgery(NamedTuple):
    """A model after an operation.

    Attributes:
      model: a linen module with the same methods, or an nnx module.
      variables: of the linen module; None for an nnx module, which holds its own.
      layers: paths of the batch norms that were changed.
      kept: batch norms that were left as they are, by path, and why.
      difference: largest difference of an output in evaluation, over the sample.
      scale: largest output in magnitude, before.
    """

    model: Any
    variables: Any
    layers: tuple[str, ...]
    kept: dict[str, str]
    difference: float
    scale: float

    def __repr__(self) -> str:
        """Returns it without the model and the variables, which are long."""
        return (
            f"Surgery(layers={self.layers}, kept={self.kept}, difference={self.difference:.1e}, scale={self.scale:.1e})"
        )


def find_batch_norms(
    model: Any, variables: Mapping[str, Any] | None, sample: Any, call: Evaluate
) -> tuple[Model, Found]:
    """Returns the model in two parts, and what its batch norms have, by path, with shapes for arrays."""
    before, found = split(model, variables), {}

    def handle(one):
        norm = norm_of(one)
        found.setdefault(one.path, norm.without_arrays())
        return evaluated(norm), None

    jax.eval_shape(evaluation(before, call, handle, BATCH_NORMS), before.arrays, sample)
    must_be_operable(before, found, sample, call)
    return before, found


def must_be_operable(model: Model, found: Found, sample: Any, call: Evaluate) -> None:
    """Refuses a model without batch norms, and linen blocks that nn.jit compiles once, and would not compile anew."""
    if not found:
        raise ValueError(
            f"no batch norm was called, so that there is nothing to change; {WITH_BATCH_NORM}; check that call "
            "runs the whole model on the sample."
        )
    if not isinstance(model.definition, flax.linen.Module):
        return

    def paths():
        seen = set()

        def note(proceed, args, kwargs, context):
            if context.module.scope is not None:  # without one, a module has no variables, and no path
                seen.add("/".join(context.module.path))
            return proceed(*args, **kwargs)

        with flax.linen.intercept_methods(note):
            apply = functools.partial(model.definition.apply, method=call, mutable=True)
            jax.eval_shape(apply, model.arrays, sample)
        return seen

    first = paths()
    if hidden := sorted({*first, *found} - paths()):
        raise ValueError(
            f"{hidden[0]} runs inside of nn.jit, which keeps what it compiled before; take nn.jit off the block and "
            "compile the whole model with jax.jit instead."
        )


def select(found: Found, layers: Layers | None) -> Found:
    """Returns the batch norms at these paths or below them; all for None."""
    if layers is None:
        return found
    layers = [layers] if isinstance(layers, str) else list(layers)
    if not layers:
        raise ValueError(
            f"layers is empty; it names batch norms to change: {', '.join(map(repr, found))}; None is all."
        )
    for layer in layers:
        if not any(is_below(path, layer) for path in found):
            raise ValueError(
                f"the model has no batch norm at {layer!r}; it has {', '.join(map(repr, found))}; "
                "give one of these, or the path of a module that contains it."
            )
    return {path: norm for path, norm in found.items() if any(is_below(path, layer) for layer in layers)}


def operate(
    before: Model,
    new: Mapping[str, NewLayer],
    changed: Sequence[str],
    kept: dict[str, str],
    sample: Any,
    call: Evaluate,
) -> Surgery:
    """Puts new layers in, and compares the outputs."""
    after = exchange(before, new)
    old_outputs, new_outputs = (_outputs(model, sample, call) for model in (before, after))
    difference = max((abs(a - b).max() for a, b in zip(old_outputs, new_outputs, strict=True)), default=0.0)
    scale = max((abs(a).max() for a in old_outputs), default=0.0)
    return Surgery(*join(after), tuple(changed), kept, float(difference), float(scale))


def _outputs(model, sample, call):
    """Returns the arrays of numbers that the model gives in evaluation."""

    def handle(one):
        norm = norm_of(one)  # the layer itself where it evaluates, since it may round as ours does not
        return one.proceed(*one.args, **one.kwargs) if norm.use_running_average else evaluated(norm), None

    compiled = jax.jit(evaluation(model, call, handle, BATCH_NORMS), compiler_options=_ONCE)
    leaves = jax.tree.leaves(compiled(model.arrays, sample))
    return [np.asarray(leaf, np.complex128) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size]


def is_below(path: str, layer: str) -> bool:
    """Says whether a path is that of a layer, or of something in it."""
    return layer == "" or f"{path}/".startswith(f"{layer}/")
