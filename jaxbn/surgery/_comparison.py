"""Compares the outputs of a model before and after an operation, on the sample."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._core.functional import batch_normalize
from jaxbn._models.batch_norms import NormCall, evaluated, norm_of
from jaxbn._models.intercept import evaluation
from jaxbn._models.model import BATCH_NORMS, Model

# Outputs are computed once, so XLA's optimizations would take longer than they save.
_COMPILED_QUICKLY = {"xla_backend_optimization_level": 0}


def compare(before: Model, after: Model, sample: Any, call: Callable) -> tuple[float, float]:
    """Returns the largest change of an output in evaluation, and the largest absolute value before.

    Both are NaN if an output is.  Layers do as the model calls them, so that one that evaluates before and trains after
    shows in the difference.  Only those that train before, although the model evaluates, are made to evaluate in both.
    """
    leaves, structure = jax.tree.flatten(before.arrays)
    leaves_after, structure_after = jax.tree.flatten(after.arrays)
    # What both have is passed once, so that XLA sees which parts of the two are the same, and compiles them once.
    places = {id(leaf): place for place, leaf in enumerate(leaves)}
    new = [leaf for leaf in leaves_after if id(leaf) not in places]
    places |= {id(leaf): place for place, leaf in enumerate(new, start=len(leaves))}
    places_after = [places[id(leaf)] for leaf in leaves_after]

    @jax.jit(compiler_options=_COMPILED_QUICKLY)
    def difference_and_scale(passed, sample):
        arrays = jax.tree.unflatten(structure, passed[: len(leaves)])
        arrays_after = jax.tree.unflatten(structure_after, [passed[place] for place in places_after])
        trained: set[str] = set()
        outputs = _outputs(before._replace(arrays=arrays), sample, call, trained, learn=True)
        outputs_after = _outputs(after._replace(arrays=arrays_after), sample, call, trained)
        changes = [abs(a - b).max() for a, b in zip(outputs, outputs_after, strict=True)]
        # Reduced here, to numbers that every process can read if the sample is spread over several.  Python's max
        # would lose a NaN.
        return [jnp.stack(each).max() if each else jnp.zeros(()) for each in (changes, [abs(y).max() for y in outputs])]

    difference, scale = difference_and_scale([*leaves, *new], sample)
    return float(difference), float(scale)


def _outputs(model: Model, sample: Any, call: Callable, trained: set[str], *, learn: bool = False) -> list[jax.Array]:
    """Computes the outputs of a model in evaluation; those of integers, which have no rounding, are left out.

    Args:
      model: the model.
      sample: a batch.
      call: how the model evaluates a batch.
      trained: paths of the layers to evaluate although they are called to train.
      learn: whether to add all such layers to ``trained``.
    """

    def handle(intercepted):
        norm = norm_of(intercepted)
        if norm.use_running_average:  # the layer itself, because its rounding may differ from ours
            return intercepted.proceed(*intercepted.args, **intercepted.kwargs), None
        if learn:
            trained.add(intercepted.path)
        return evaluated(norm) if intercepted.path in trained else _trained(norm), None

    leaves = jax.tree.leaves(evaluation(model, call, handle, BATCH_NORMS)(model.arrays, sample))
    return [_wide(leaf) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size]


def _trained(norm: NormCall) -> jax.Array:
    """Normalizes the inputs of a batch norm with this batch, without its axes of devices, which are not bound here."""
    normalize = norm.options.get("method", batch_normalize)
    options = {"axis": norm.options["axis"], "epsilon": norm.options["epsilon"], "mask": norm.mask}
    y, _ = normalize(norm.x, norm.scale, norm.bias, stats=norm.stats, axis_name=None, **options)
    return norm.cast(y)


def _wide(y: jax.Array) -> jax.Array:
    """Returns an output in at least float32, so that differences are not rounded to its dtype."""
    return jnp.asarray(y, jnp.promote_types(y.dtype, jnp.float32))
