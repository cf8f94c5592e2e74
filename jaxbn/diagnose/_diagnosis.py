"""The diagnosis of a model: a table of its layers, and a list of problems."""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from jax.typing import ArrayLike

from jaxbn._core import checks
from jaxbn._models.intercept import call_model
from jaxbn._models.model import split
from jaxbn.diagnose._faults import find_faults
from jaxbn.diagnose._findings import Finding, listed, unknown_layers
from jaxbn.diagnose._records import record_layers
from jaxbn.diagnose._summary import LayerSummary, summarize

COLUMNS = ("layer", "features", "values", "gap", "alone", "shift", "ratio", "noise", "excess", "notes")
LEFT = ("layer", "notes")  # columns that are aligned to the left
WIDTH = 120  # characters in a line of text
LEGEND = (
    "values: number of values per feature in a batch. gap: how far the output in evaluation is from the output "
    "with the moments of these data, in its standard deviations. alone: how far it is from training with these "
    "batches, for this layer alone. shift, ratio: mean and variance of the data relative to the running statistics, in "
    "standard deviations and as a factor. noise: error of the mean of a batch, in standard deviations. excess: "
    "variance of the means of batches relative to that of independent examples."
)


class Diagnosis(NamedTuple):
    """The measurements and findings; ``print`` shows both.

    Attributes:
      layers: the figures of each batch norm, in the order in which they are first called.
      findings: the problems, causes before their effects; empty for a healthy model.
    """

    layers: list[LayerSummary]
    findings: list[Finding]

    def table(self) -> list[dict[str, str]]:
        """Formats the figures as text: a dict for each layer, from column to cell."""
        return [_row(layer) for layer in self.layers]

    def text(self, width: int = WIDTH) -> str:
        """Formats the findings as text, in lines of at most ``width`` characters."""
        paragraphs = [_paragraphs(finding, width) for finding in self.findings]
        return "\n\n".join(paragraphs) or "No problems found."

    def __str__(self) -> str:
        """Formats table, legend and findings as plain text."""
        head = {column: column for column in COLUMNS}
        rows = [head, *self.table()]
        widths = {column: max(len(row[column]) for row in rows) for column in COLUMNS}
        lines = [_line(row, widths) for row in rows]
        return "\n".join([*lines, "", textwrap.fill(LEGEND, WIDTH), "", self.text()])


def diagnose(
    model: Any,
    variables: Mapping | None,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    call: Callable[[Any, Any], Any] = call_model,
    mask: Callable[[Any], ArrayLike] | None = None,
    devices: int = 1,
) -> Diagnosis:
    """Diagnoses the batch norms of a model on some batches.

    It finds a train flag that was left on, running statistics or batches that are not finite, statistics that were
    never updated, averages that have not converged, too few values per feature in a batch or on each device, batches
    that are not independent samples (such as sorted ones), dead features, and inputs that have shifted away from the
    running statistics.  Problems that so few batches cannot show are not reported.  Training is assumed to normalize
    with the batch, or with the groups of ``jaxbn.ghost_normalize``; ``alone`` assumes whole batches.

    >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    >>> batches = [jax.random.normal(key, (64, 2)) for key in jax.random.split(jax.random.key(0), 4)]
    >>> variables = model.init(jax.random.key(1), batches[0])
    >>> for finding in jaxbn.diagnose.diagnose(model, variables, batches).findings:
    ...     print(finding.name, finding.layers)
    statistics never updated ('layers_1',)

    Each batch goes through the model twice, once with its layers in evaluation mode and once in training mode, and is
    then dropped.  The passes are compiled once for each ``call``, ``mask`` and shape, so define the two once.

    Args:
      model: a linen or nnx module.
      variables: variables of a linen module, with ``batch_stats``; None for an nnx module.
      batches: an iterable of batches, or a function that returns one.  Use at least 8, preferably 20.  Training batches
        also show problems of batch size and composition; test data show shifts.
      call: how the model evaluates a batch; a call that trains instead is a finding.
      mask: ``mask(batch)`` returns booleans [n], the examples that count; None: all.
      devices: number of devices that training splits such a batch over, if each has its own statistics, as under
        shard_map, pmap or vmap; 1 if statistics are those of the whole batch, as of one array, sharded or not.

    Returns:
      The figures of each layer, and the findings.  A layer of a stack, as ``nn.scan``, ``nn.vmap``, ``nnx.scan`` and
      ``nnx.vmap`` make them, is listed by its path and its place in the stack, as in "blocks/norm[2]".

    Raises:
      ValueError: for no batches, a model without batch norm, variables without statistics, a mask that does not fit,
        a train flag that is set nowhere, or a layer in a loop without a fixed number of turns.

    References:
      Wu and Johnson 2021, arXiv:2105.07576, on what goes wrong; Fisher 1925, Statistical methods for research workers,
      on variance between and within groups.
    """
    checks.whole("devices", devices, least=1)
    records, unknown = record_layers(split(model, variables), batches, call, mask)
    layers = [summarize(path, record) for path, record in records.items()]
    return Diagnosis(layers, [*find_faults(layers, devices), *unknown_layers(unknown)])


def _paragraphs(finding: Finding, width: int) -> str:
    head = f"{finding.name}: {listed(finding.layers)}"
    lines = [
        textwrap.fill(head, width, subsequent_indent="  "),
        textwrap.fill(f"Evidence: {finding.evidence}", width, initial_indent="  ", subsequent_indent="  "),
        textwrap.fill(f"Remedy: {finding.remedy}", width, initial_indent="  ", subsequent_indent="  "),
    ]
    return "\n".join(lines)


def _line(row: dict[str, str], widths: dict[str, int]) -> str:
    cells = [cell.ljust(widths[name]) if name in LEFT else cell.rjust(widths[name]) for name, cell in row.items()]
    return "  ".join(cells).rstrip()


def _row(layer: LayerSummary) -> dict[str, str]:
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
        _cell(layer.values, digits=0),
        *(_cell(figure, digits=2) for figure in figures),
        ", ".join(note for note, holds in notes.items() if holds),
    )
    return dict(zip(COLUMNS, cells, strict=True))


def _cell(figure: float, digits: int) -> str:
    return "-" if math.isnan(figure) else f"{figure:.{digits}f}"
