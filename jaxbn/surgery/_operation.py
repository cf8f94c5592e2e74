"""The steps that all operations consist of: find batch norms, select some, exchange them, and compare outputs."""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen
import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from jaxbn._models.batch_norms import WITH_BATCH_NORM, NormCall, evaluated, norm_of
from jaxbn._models.intercept import evaluation
from jaxbn._models.model import BATCH_NORMS, Model, join, like, modules, split
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


class Found(NamedTuple):
    """A model and its batch norms.

    Attributes:
      model: the model, split.
      norms: the first call of each batch norm, by path.
      classes: classes of the layers that were called, or of all in nnx, by path.
      given: the variables as they were given.
      sample: a batch.
      call: how the model evaluates a batch.
    """

    model: Model
    norms: Norms
    classes: dict[str, type]
    given: Any
    sample: Any
    call: Call


def find_batch_norms(model: Any, variables: Mapping[str, Any] | None, sample: Any, call: Call) -> Found:
    """Splits the model, and finds its batch norms in a trace, with shapes instead of arrays."""
    before = split(model, variables)
    norms: Norms = {}

    def handle(intercepted):
        norm = norm_of(intercepted)
        norms.setdefault(intercepted.path, norm.without_arrays())
        return evaluated(norm), None

    jax.eval_shape(evaluation(before, call, handle, BATCH_NORMS), before.arrays, sample)
    return found(before, norms, variables, sample, call)


def found(model: Model, norms: Norms, given: Any, sample: Any, call: Call) -> Found:
    """Refuses a model without batch norms, and a linen model with layers under nn.jit."""
    if isinstance(model.definition, flax.linen.Module):
        classes = _called_modules(model, sample, call)
    else:
        classes = {path: type(layer) for path, layer in modules(model).items()}
    if not norms:
        unknown = _not_operated(model, norms, classes)
        reasons = "".join(f" {path or 'The model'} has batch_stats: {reason}." for path, reason in unknown.items())
        raise ValueError(
            f"no batch norm was called, so there is nothing to change; {WITH_BATCH_NORM}; check that call runs the "
            f"whole model on the sample.{reasons}"
        )
    # An edited model intercepts calls, which nn.jit hides if it has traced their block before.  The first trace shows
    # all modules, or else it fills the cache of nn.jit; what the second one does not show is hidden.
    if isinstance(model.definition, flax.linen.Module) and (
        hidden := sorted({*classes, *norms} - {*_called_modules(model, sample, call)})
    ):
        raise ValueError(
            f"{hidden[0]} is called inside of nn.jit, which keeps what it traced before, so a new layer would have no "
            "effect; remove nn.jit from the block, and compile the whole model with jax.jit instead."
        )
    return Found(model, norms, classes, given, sample, call)


def _called_modules(model: Model, sample: Any, call: Call) -> dict[str, type]:
    """Returns the class of each linen module that a trace of the model calls, by path."""
    classes = {}

    def note(proceed, args, kwargs, context):
        if context.module.scope is not None:  # without a scope, a module has no variables and no path
            classes.setdefault("/".join(context.module.path), type(context.module))
        return proceed(*args, **kwargs)

    with flax.linen.intercept_methods(note):
        apply = functools.partial(model.definition.apply, method=call, mutable=True)
        jax.eval_shape(apply, model.arrays, sample)
    return classes


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
    before: Found,
    new_layers: Mapping[str, NewLayer],
    changed: Sequence[str],
    kept: dict[str, str],
    *,
    check: bool,
) -> Surgery:
    """Exchanges the layers, and compares the outputs before and after if ``check``."""
    after = exchange(before.model, new_layers)
    difference, scale = math.nan, math.nan
    if check:
        difference, scale = compare(before.model, after, before.sample, before.call)
    others = _not_operated(before.model, before.norms, before.classes)
    others = {path: reason for path, reason in others.items() if path not in changed}
    model, variables = join(after)
    return Surgery(model, like(variables, before.given), tuple(changed), others | kept, difference, scale)


def _not_operated(model: Model, norms: Norms, classes: dict[str, type]) -> dict[str, str]:
    """Returns why an operation leaves out the batch norms, and what else has running statistics, by path."""
    reasons = dict.fromkeys(norms, "it is not among the layers that were named")
    for path, names in _owners_of_statistics(model).items():
        if path in norms or names <= {"scale", "bias"}:  # an affine layer that is fixed
            continue
        cls = classes.get(path)
        if cls is None or issubclass(cls, BATCH_NORMS):
            reasons[path] = "it was not called on the sample"
        else:
            reasons[path] = f"{cls.__name__} is no batch norm that is known here"
    return reasons


def _owners_of_statistics(model: Model) -> dict[str, set[str]]:
    """Returns the names of the running statistics of each layer that has some, by path."""
    owners = collections.defaultdict(set)
    if isinstance(model.definition, flax.linen.Module):
        for *path, name in flatten_dict(model.arrays["batch_stats"]):
            owners["/".join(path)].add(name)
        return owners
    for path, layer in modules(model).items():
        for name, value in vars(layer).items():
            if isinstance(value, nnx.BatchStat):
                owners[path].add(name)
    return owners
