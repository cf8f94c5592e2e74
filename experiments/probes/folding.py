"""A net before and after its batch norms are folded: the outputs, and the time of an evaluation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from experiments.evidence import timing
from experiments.training.evaluation import evaluate
from jaxbn import surgery


class BeforeAfter(NamedTuple):
    """A net before and after.

    Attributes:
      norms: number of batch norms before.
      folded: how many of them are folded.
      before: jitted, images -> logits.
      after: the same of the folded net.
    """

    norms: int
    folded: int
    before: Callable[[jax.Array], jax.Array]
    after: Callable[[jax.Array], jax.Array]


def fold_net(model: nn.Module | nnx.Module, variables: Any, images: jax.Array) -> BeforeAfter:
    """Folds a net.

    Args:
      model: a linen or nnx net of the studies.
      variables: of the linen net; None for nnx.
      images: to try it on, shape [n, height, width, channels].
    """
    done = surgery.fold(model, variables, images, call=evaluate)
    compiled = (_compiled(model, variables), _compiled(done.model, done.variables))
    return BeforeAfter(len(done.layers) + len(done.kept), len(done.layers), *compiled)


def difference(before: jax.Array, after: jax.Array) -> float:
    """Returns the largest difference of a logit, over the largest logit in magnitude."""
    before, after = (np.asarray(logits, np.float64) for logits in (before, after))
    return float(abs(after - before).max() / abs(before).max())


def timings(networks: BeforeAfter, images: jax.Array, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of evaluations of the images before and after, `rounds` of each in turns."""
    calls = {name: functools.partial(getattr(networks, name), images) for name in ("before", "after")}
    return tuple(timing.time_calls(calls, rounds).values())


def _compiled(model: nn.Module | nnx.Module, variables: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns the jitted evaluation of a net."""
    if isinstance(model, nnx.Module):
        definition, variables = nnx.split(model)
        evaluated = jax.jit(lambda variables, images: evaluate(nnx.merge(definition, variables), images))
    else:
        evaluated = _jitted(model)
    return functools.partial(evaluated, variables)


@functools.lru_cache(maxsize=16)  # more than a study has between two uses of a net
def _jitted(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the jitted evaluation of a linen net, the same for the same net with other weights."""
    return jax.jit(functools.partial(model.apply, method=evaluate))
