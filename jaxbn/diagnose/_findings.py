"""A finding: a problem with the batch norms of a model, in words and in figures."""

from typing import NamedTuple

import numpy as np

from jaxbn.diagnose._summary import LayerSummary

SHOWN = 8  # layers or features that are listed by name


class Finding(NamedTuple):
    """A problem.

    Attributes:
      name: the problem in a few words.
      layers: paths of the layers concerned, in the order in which they are called.
      evidence: the evidence in words.
      remedy: what to do.
      figures: the measured values by name.
    """

    name: str
    layers: tuple[str, ...]
    evidence: str
    remedy: str
    figures: dict[str, float]


def listed(paths: tuple[str, ...]) -> str:
    """Lists paths in words; of more than three, the first and the last."""
    if len(paths) <= 3:
        return ", ".join(map(name_of, paths))
    return f"{len(paths)} layers, {name_of(paths[0])} to {name_of(paths[-1])}"


def finding(
    name: str,
    layers: list[LayerSummary],
    evidence: str,
    remedy: str,
    /,
    words: dict[str, str] | None = None,
    **figures: float,
) -> list[Finding]:
    """Makes a list of one finding.

    Args:
      name: what is wrong.
      layers: the layers concerned.
      evidence: a format string, whose braces are filled by ``words`` and ``figures``.
      remedy: what to do.
      words: words in the evidence.
      **figures: figures in the evidence, by name.
    """
    figures = {key: float(value) for key, value in figures.items()}
    evidence = evidence.format(**(words or {}), **figures)
    return [Finding(name, tuple(layer.path for layer in layers), evidence, remedy, figures)]


def unknown_layers(reasons: dict[str, str]) -> list[Finding]:
    """Lists the layers with a running mean and variance that are not known as batch norms, with the reason for each."""
    if not reasons:
        return []
    evidence = "; ".join(f"{name_of(path)}: {reason}" for path, reason in reasons.items())
    remedy = "register the class with jaxbn.surgery.register_batch_norm, and diagnose again."
    return [Finding("layers not diagnosed", tuple(reasons), f"{evidence}.", remedy, {})]


def name_of(path: str) -> str:
    """Returns a path in words; that of a model that is itself a layer is empty."""
    return path or "the model itself"


def numbers_of(features: np.ndarray) -> str:
    """Lists the numbers of the features that are True in ``features``; of many, the first."""
    numbers = [str(number) for number in np.flatnonzero(features)]
    more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
    return ", ".join(numbers[:SHOWN]) + more
