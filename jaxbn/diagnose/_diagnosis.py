"""The diagnosis of a model: a table of its layers, and what is found to be wrong."""

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._models.intercept import call_model
from jaxbn._models.model import split
from jaxbn.diagnose._findings import Finding, findings, listed
from jaxbn.diagnose._records import record_layers
from jaxbn.diagnose._summary import Layer, figures

COLUMNS = ("layer", "features", "values", "gap", "alone", "shift", "ratio", "noise", "excess", "notes")
LEFT = ("layer", "notes")  # aligned
WIDTH = 120  # of the text
LEGEND = (
    "values: behind a feature, in a batch. gap: how far the output in evaluation is from that with the moments of "
    "these data, in its standard deviations; alone: how far from training with these batches, by this layer alone. "
    "shift, ratio: mean and variance of the data against the running statistics, in standard deviations and as a "
    "factor. noise: how far the mean of a batch is off, in standard deviations. excess: variance of the means of "
    "batches over that of independent examples."
)


class Diagnosis(NamedTuple):
    """What was measured and what it says; ``print`` shows both.

    Attributes:
      layers: the figures of each batch norm, in the order in which they are called first.
      findings: what is wrong, causes before their effects; none in a healthy model.
    """

    layers: list[Layer]
    findings: list[Finding]

    def table(self) -> list[dict[str, str]]:
        """Returns the figures of the layers as text: a dict for each of them, column to cell."""
        return [_row(layer) for layer in self.layers]

    def text(self, width: int = WIDTH) -> str:
        """Returns the findings in words, in lines of that many characters, or that nothing is wrong."""
        return "\n\n".join(map(functools.partial(_paragraphs, width), self.findings)) or "Nothing is found to be wrong."

    def __str__(self) -> str:
        """Returns table, legend and findings as plain text."""
        rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *self.table()]
        widths = {name: max(len(row[name]) for row in rows) for name in COLUMNS}
        lines = (
            "  ".join(f"{row[name]:{'<' if name in LEFT else '>'}{width}}" for name, width in widths.items()).rstrip()
            for row in rows
        )
        return "\n".join((*lines, "", textwrap.fill(LEGEND, WIDTH), "", self.text()))


def diagnose(
    model: Any,
    variables: Mapping | None,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    call: Callable[[Any, Any], Any] = call_model,
    mask: Callable[[Any], ArrayLike] | None = None,
    devices: int = 1,
) -> Diagnosis:
    """Looks for what is wrong with the batch norms of a model, with these batches.

    It finds: a train flag left on; running statistics or batches that are not finite; statistics that were never
    updated; averages that still hold their start; too few values per feature, in a batch or on each device; batches
    that are not independent samples, such as sorted ones; dead features; and inputs that have shifted against the
    running statistics.  What cannot be told from so few batches is left out.  Training is taken to normalise with the
    batch, or with the groups of ``jaxbn.ghost_normalize``; ``alone`` knows of whole batches only.

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> batches = [jax.random.normal(key, (64, 2)) for key in jax.random.split(jax.random.key(0), 4)]
    >>> variables = model.init(jax.random.key(1), batches[0])
    >>> for finding in jaxbn.diagnose.diagnose(model, variables, batches).findings:
    ...     print(finding.name, finding.layers)
    statistics never updated ('layers_1',)

    Each batch goes through the model twice, with its layers in evaluation and in training, whatever ``call`` says, and
    is then dropped; shapes that repeat are compiled once for each ``call`` and ``mask``, so define those once.

    Args:
      model: a linen or nnx module.
      variables: of a linen module, with ``batch_stats``; None for an nnx module.
      batches: an iterable of batches, or a function that returns one.  As in training, since their size and how they
        are composed is judged too; with test data, whether they have shifted.  At least 8 of them, better 20.
      call: how the model evaluates a batch; whether it does is judged too.
      mask: ``mask(batch)`` returns booleans [n], the examples that count; None: all.
      devices: number of devices over which training splits such a batch with statistics of their own, as under
        shard_map, pmap or vmap; 1 where the whole batch is in one array, sharded or not.

    Returns:
      The figures of each layer, and the findings.

    Raises:
      ValueError: for no batches, a model without batch norm, variables without statistics, a mask that does not fit,
        a train flag that is given nowhere, or a layer in a loop.

    References:
      Wu and Johnson 2021, arXiv:2105.07576, on what goes wrong; Fisher 1925, Statistical methods for research workers,
      on variance between and within groups.
    """
    checks.whole("devices", devices, least=1)
    records = record_layers(split(model, variables), batches, call, mask)
    layers = [figures(path, record) for path, record in records.items()]
    return Diagnosis(layers, findings(layers, devices))


def _paragraphs(width: int, finding: Finding) -> str:
    parts = (f"{finding.name}: {listed(finding.layers)}", f"Evidence: {finding.evidence}", f"Remedy: {finding.remedy}")
    return "\n".join(
        textwrap.fill(part, width, initial_indent=indent, subsequent_indent="  ")
        for part, indent in zip(parts, ("", "  ", "  "), strict=True)
    )


def _row(layer: Layer) -> dict[str, str]:
    notes = {
        "trains": layer.settings.training,
        "frozen": layer.settings.frozen,
        f"{layer.never.sum()} never updated": layer.never.any(),
        f"{layer.broken.sum()} not finite": layer.broken.any(),
        f"{layer.dead.sum()} dead": layer.dead.any(),
        f"{layer.skipped} batches skipped": layer.skipped,
    }
    figures = (layer.gap, layer.own_gap, layer.shift, layer.ratio, layer.noise, layer.excess)
    cells = (
        layer.path or "(the model)",
        str(layer.features),
        "-" if math.isnan(layer.values) else f"{layer.values:.0f}",
        *("-" if math.isnan(figure) else f"{figure:.2f}" for figure in figures),
        ", ".join(note for note, holds in notes.items() if holds),
    )
    return dict(zip(COLUMNS, cells, strict=True))
