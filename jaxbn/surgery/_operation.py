"""The steps that all operations consist of: find batch norms, select some, exchange them, and compare outputs."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen
import jax

from jaxbn._models.batch_norms import WITH_BATCH_NORM, NormCall, evaluated, norm_of
from jaxbn._models.intercept import evaluation
from jaxbn._models.model import BATCH_NORMS, Model, join, like, split
from jaxbn.surgery._comparison import compare
from jaxbn.surgery._exchange import exchange
from jaxbn.surgery._new_layers import NewLayer

LayerPaths = str | Sequence[str]
Call = Callable[[Any, Any], Any]  # evaluates a batch: call(module, batch)
Norms = dict[str, NormCall]  # by path


class Surgery(NamedTuple):
    """A model after an operation.

    Attributes:
      model: a linen module with the same methods, or an nnx module.
      variables: of the linen module; None for an nnx module, which holds its own.
      layers: paths of the batch norms that were changed.
      kept: reasons why other batch norms were kept as they are, by path.
      difference: largest change of an output in evaluation, on the sample; NaN where an output is NaN, and with
        ``check=False``.
      scale: largest absolute value of an output before the operation; likewise.
    """

    model: Any
    variables: Any
    layers: tuple[str, ...]
    kept: dict[str, str]
    difference: float
    scale: float

    def __repr__(self) -> str:
        """Leaves out the model and the variables, which are long."""
        return (
            f"Surgery(layers={self.layers}, kept={self.kept}, difference={self.difference:.1e}, scale={self.scale:.1e})"
        )


def find_batch_norms(model: Any, variables: Mapping[str, Any] | None, sample: Any, call: Call) -> tuple[Model, Norms]:
    """Splits the model, and finds its batch norms in a trace, with shapes instead of arrays."""
    before = split(model, variables)
    norms: Norms = {}

    def handle(intercepted):
        norm = norm_of(intercepted)
        norms.setdefault(intercepted.path, norm.without_arrays())
        return evaluated(norm), None

    jax.eval_shape(evaluation(before, call, handle, BATCH_NORMS), before.arrays, sample)
    check_operable(before, norms, sample, call)
    return before, norms


def check_operable(model: Model, norms: Norms, sample: Any, call: Call) -> None:
    """Refuses a model without batch norms, and a linen model with layers under nn.jit."""
    if not norms:
        raise ValueError(
            f"no batch norm was called, so there is nothing to change; {WITH_BATCH_NORM}; check that call runs the "
            "whole model on the sample."
        )
    if not isinstance(model.definition, flax.linen.Module):
        return
    # An edited model intercepts calls, which nn.jit hides if it has traced their block before.  The first trace shows
    # all modules, or else it fills the cache of nn.jit; what the second one does not show is hidden.
    called = _called_modules(model, sample, call)
    if hidden := sorted({*called, *norms} - _called_modules(model, sample, call)):
        raise ValueError(
            f"{hidden[0]} is called inside of nn.jit, which keeps what it traced before, so a new layer would have no "
            "effect; remove nn.jit from the block, and compile the whole model with jax.jit instead."
        )


def _called_modules(model: Model, sample: Any, call: Call) -> set[str]:
    """Returns the paths of the linen modules that a trace of the model calls."""
    paths = set()

    def note(proceed, args, kwargs, context):
        if context.module.scope is not None:  # without a scope, a module has no variables and no path
            paths.add("/".join(context.module.path))
        return proceed(*args, **kwargs)

    with flax.linen.intercept_methods(note):
        apply = functools.partial(model.definition.apply, method=call, mutable=True)
        jax.eval_shape(apply, model.arrays, sample)
    return paths


def select(norms: Norms, layers: LayerPaths | None) -> Norms:
    """Returns the batch norms at these paths or below them; all of them for None."""
    if layers is None:
        return norms
    layers = [layers] if isinstance(layers, str) else list(layers)
    if not layers:
        raise ValueError(
            f"layers must name at least one batch norm of {', '.join(map(repr, norms))}; pass None for all of them."
        )
    for layer in layers:
        if not any(is_below(path, layer) for path in norms):
            raise ValueError(
                f"the model has no batch norm at {layer!r}; it has {', '.join(map(repr, norms))}; "
                "give one of these, or the path of a module that contains it."
            )
    return {path: norm for path, norm in norms.items() if any(is_below(path, layer) for layer in layers)}


def is_below(path: str, layer: str) -> bool:
    """Tests whether ``path`` is that of a layer or of a part of it."""
    return layer == "" or f"{path}/".startswith(f"{layer}/")


def operate(
    before: Model,
    new_layers: Mapping[str, NewLayer],
    changed: Sequence[str],
    kept: dict[str, str],
    sample: Any,
    call: Call,
    *,
    given: Any,
    check: bool,
) -> Surgery:
    """Exchanges the layers, and compares the outputs before and after if ``check``; ``given`` are the variables."""
    after = exchange(before, new_layers)
    difference, scale = compare(before, after, sample, call) if check else (math.nan, math.nan)
    new_model, new_variables = join(after)
    return Surgery(new_model, like(new_variables, given), tuple(changed), kept, difference, scale)
