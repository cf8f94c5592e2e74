"""A network before and after its batch norms are folded: the outputs, and the time of an evaluation."""

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


class BeforeAndAfter(NamedTuple):
    """A network before and after folding.

    Attributes:
      norms: number of batch norms before.
      folded: how many of them are folded.
      before: jitted, images -> logits.
      after: the same of the folded network.
    """

    norms: int
    folded: int
    before: Callable[[jax.Array], jax.Array]
    after: Callable[[jax.Array], jax.Array]


def fold_net(model: nn.Module | nnx.Module, variables: Any, images: jax.Array) -> BeforeAndAfter:
    """Folds the batch norms of a network.

    Args:
      model: a linen or nnx network of the studies.
      variables: of the linen network; None for nnx.
      images: to trace the network with, shape [n, height, width, channels].
    """
    folded = surgery.fold(model, variables, images, call=evaluate)
    return BeforeAndAfter(
        norms=len(folded.layers) + len(folded.kept),
        folded=len(folded.layers),
        before=_compiled(model, variables),
        after=_compiled(folded.model, folded.variables),
    )


def difference(before: jax.Array, after: jax.Array) -> float:
    """Returns the largest difference of a logit, relative to the largest logit in magnitude."""
    before, after = (np.asarray(logits, np.float64) for logits in (before, after))
    return float(abs(after - before).max() / abs(before).max())


def timings(net: BeforeAndAfter, images: jax.Array, rounds: int) -> tuple[list[float], list[float]]:
    """Times evaluations of the images in turns; returns the seconds before and after, one for each round."""
    calls = {"before": functools.partial(net.before, images), "after": functools.partial(net.after, images)}
    seconds = timing.time_calls(calls, rounds)
    return seconds["before"], seconds["after"]


def _compiled(model: nn.Module | nnx.Module, variables: Any) -> Callable[[jax.Array], jax.Array]:
    # The variables are arguments, as in most programs: XLA precomputes what depends on constants alone.
    if isinstance(model, nnx.Module):
        graphdef, variables = nnx.split(model)
        evaluated = jax.jit(lambda variables, images: evaluate(nnx.merge(graphdef, variables), images))
    else:
        evaluated = _jitted(model)
    return functools.partial(evaluated, variables)


@functools.lru_cache(maxsize=16)  # more than a study has between two uses of the same network
def _jitted(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Jits the evaluation of a linen network, once for all its weights."""
    return jax.jit(functools.partial(model.apply, method=evaluate))
