"""Estimates how much running averages still contain of their initial mean 0 and variance 1.

After t steps at momentum p, a running average that is not debiased is  w start + (1 - w) batch,  w = p^t,  where
`batch` is an average over batches.  All layers of one momentum share w.  A shift of the inputs can resemble a start
where their mean is far from 0, but it does not fit all layers: in training the first layer normalizes it away.
"""

from typing import NamedTuple

import numpy as np

from jaxbn._core.stats import BatchStats
from jaxbn.diagnose._summary import LayerSummary, output_gap
from jaxbn.diagnose._thresholds import ERRORS_OF_START, EXPLAINED, EXPLAINED_GAP


class StartFit(NamedTuple):
    """The weight of the start that fits a group of layers best, and how well it fits.

    Attributes:
      weight: weight w of the start.
      before: squared gaps of the layers between the running statistics and the batch, shape [layers, 2]: relative to
        the output with the batch, and relative to the output with the running statistics.
      after: squared gaps between the running statistics and  w start + (1 - w) batch,  likewise.
      error: largest standard error of a gap.
    """

    weight: float
    before: np.ndarray
    after: np.ndarray
    error: float

    @property
    def explained(self) -> float:
        """Fraction of the squared gaps that the start explains, in the less favorable of the two views."""
        left = self.after
        if len(left) == 1:
            # One layer has no others to contradict it: what the start leaves counts in full, not averaged with it.
            left = left / (1 - self.weight) ** 2
        return np.min(1 - np.nansum(left, 0) / np.maximum(np.nansum(self.before, 0), 1e-30))

    @property
    def gain(self) -> float:
        """Largest gap that the start explains in a layer, in standard deviations of its output."""
        return np.sqrt(np.nanmax((self.before - self.after)[:, 0], initial=0))

    @property
    def is_contradicted(self) -> bool:
        """Whether the start makes the gap of any layer larger, as it does where inputs have shifted.

        After the first layer, a shift is gone in training mode, so adding a start there only does harm.  Measured for
        inputs far from 0, in tests/diagnose/test_thresholds.py: squared gaps grow more than 10-fold with a shift, and
        become 0.01 of what they were where averages do contain their start.
        """
        return bool(np.any(self.after > self.before))

    @property
    def holds(self) -> bool:
        """Whether the layers still contain some of their start."""
        beyond_chance = self.gain > max(EXPLAINED_GAP, ERRORS_OF_START * self.error)
        return self.explained > EXPLAINED and beyond_chance and not self.is_contradicted


def fit_start(layers: list[LayerSummary]) -> StartFit:
    """Fits the weight of the start to layers of the same momentum."""
    weight = _weight(layers)
    before = np.square([_gaps(layer, 0.0) for layer in layers])
    after = np.square([_gaps(layer, weight) for layer in layers])
    errors = [layer.error for layer in layers if not np.isnan(layer.error)]
    return StartFit(weight, before, after, max(errors, default=np.nan))


@np.errstate(divide="ignore", invalid="ignore")
def _weight(layers: list[LayerSummary]) -> float:
    """Solves  running - batch = w (start - batch)  for w by least squares, over all features of all layers."""
    # sum(weight |gone - w to_start|^2)  is least at
    #   w = sum(weight <to_start, gone>) / sum(weight |to_start|^2).
    above = below = 0.0
    for layer in layers:
        running, batch, features = layer.running, layer.batch, layer.comparable
        # Distances of means count in standard deviations, those of variances relative to the variance.
        var = running.var + batch.var + layer.settings.epsilon
        equations = (
            (running.mean - batch.mean, -batch.mean, 1 / var),
            (running.var - batch.var, 1 - batch.var, 1 / var**2),
        )
        for gone, to_start, weight in equations:
            above += np.sum((np.conj(to_start) * gone).real * weight, where=features)
            below += np.sum(np.abs(to_start) ** 2 * weight, where=features)
    # running.var = w + (1 - w) batch.var, and no variance is negative: w is at most the smallest running variance.
    smallest = min(layer.running.var[layer.comparable].min() for layer in layers)
    return float(np.clip(above / max(below, 1e-30), 0, min(smallest, 1 - 1e-6)))


def _gaps(layer: LayerSummary, weight: float) -> tuple[float, float]:
    """Computes the gap between the running statistics and the average of batch and start, relative to either of them.

    Relative to the average alone, hardly any gap would seem to be left where a running variance is far too large.
    """
    averaged = BatchStats((1 - weight) * layer.batch.mean, weight + (1 - weight) * layer.batch.var)
    options = (layer.scale, layer.settings.epsilon, layer.comparable)
    return output_gap(layer.running, averaged, *options), output_gap(averaged, layer.running, *options)
