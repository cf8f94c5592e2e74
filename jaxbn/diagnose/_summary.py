"""The figures of each batch norm of a model, from the sums over all batches.

Convention: a figure is NaN where the batches do not tell.
"""

from typing import NamedTuple

import numpy as np

from jaxbn._core.stats import BatchStats, Moments
from jaxbn.diagnose._anova import Groups, score
from jaxbn.diagnose._records import Record, Settings, usable

# Of the 0.9 quantile of the layer's features, so that neither a large epsilon nor a residual branch that starts at 0
# makes a layer dead.  Healthy: variances from 3e-2, scales from 0.4; a scale that happens to pass 0 is rarely so near.
DEAD_VAR = 1e-6
DEAD_SCALE = 1e-4
ACTIVE_VALUES = 20  # to be expected of a feature that was active in training, before it is called dead
EXAMPLES = 8  # or degrees of freedom: with fewer, nothing is said

AnyMoments = BatchStats | Moments


class Layer(NamedTuple):
    """One batch norm and its figures.

    Attributes:
      path: its place in the model.
      settings: what it is told.
      features: number of features C.
      values: number of values behind each feature in a batch.
      examples: number of examples in a batch.
      batches: number of batches.
      skipped: number of batches that are not finite.
      scale: its magnitude, shape [C]; ones where it has none.
      running: running statistics, shape [C].
      population: moments of all values, the layers before it evaluating, shape [C].
      batch: moments of a batch on average, the layers before it training, shape [C].
      gap: how far evaluation is from normalising with the population: rms difference of the output, in units of its
        rms; carries on what the layers before it do.
      own_gap: how far evaluation is from training with these batches, for this layer alone.
      error: standard error of ``gap``, from the spread of the examples.
      shift: population's mean from the running mean, in standard deviations, rms over features.
      ratio: population's variance over the running variance, geometric mean over features.
      noise: standard error of the mean of a batch, in standard deviations, median over features.
      excess: variance of the means of batches, over that of as many independent examples, median over features.
      score: that excess as a standard normal deviate, if there is none.
      comparable: features whose running statistics can be compared with what is measured, bool, shape [C].
      never: features whose statistics are as they start, bool, shape [C].
      broken: features whose statistics are not finite, or a negative variance, bool, shape [C].
      dead: features that carry nothing, bool, shape [C].
      died: dead features of which the running statistics do not know, bool, shape [C].
    """

    path: str
    settings: Settings
    features: int
    values: float
    examples: float
    batches: int
    skipped: int
    scale: np.ndarray
    running: BatchStats
    population: Moments
    batch: Moments
    gap: float
    own_gap: float
    error: float
    shift: float
    ratio: float
    noise: float
    excess: float
    score: float
    comparable: np.ndarray
    never: np.ndarray
    broken: np.ndarray
    dead: np.ndarray
    died: np.ndarray


@np.errstate(divide="ignore", invalid="ignore")
def figures(path: str, record: Record) -> Layer:
    """Returns the figures of a layer."""
    settings, running, scale, evaluation, training, batches = record
    scale = np.abs(scale)  # the output is as large with a scale of the other sign, or of another phase
    values, means = evaluation.values, evaluation.means
    population = Moments(values.mean, values.var, values.count)
    batch = _batch(training.values, settings.unbiased)
    never = np.asarray((running.mean == 0) & (running.var == 1))
    broken = ~(usable(running) | never)
    dead, died = _dead(running.var, never, population, means.count, scale)
    chosen = (values.count > 0) & (batch.count > 0) & ~(never | broken | dead)
    shift, ratio, error = _compared(running, evaluation, scale, settings.epsilon, chosen)
    noise, excess, chance = _spread(means, values.var, ~dead)
    return Layer(
        path=path,
        settings=settings,
        features=dead.size,
        values=_median(values.count / values.groups),
        examples=_median(means.count / means.groups) if settings.by_example else np.nan,
        batches=batches,
        skipped=int(max(evaluation.skipped.max(initial=0), training.skipped.max(initial=0))),
        scale=scale,
        running=running,
        population=population,
        batch=batch,
        gap=output_gap(running, population, scale, settings.epsilon, chosen),
        own_gap=output_gap(running, batch, scale, settings.epsilon, chosen),
        error=error,
        shift=shift,
        ratio=ratio,
        noise=noise,
        excess=excess,
        score=chance,
        comparable=chosen,
        never=never,
        broken=broken,
        dead=dead,
        died=died,
    )


@np.errstate(divide="ignore", invalid="ignore")
def output_gap(running: AnyMoments, measured: AnyMoments, scale, epsilon: float, chosen) -> float:
    """Returns the rms difference between a layer's outputs with two kinds of statistics, in units of its rms.

    Per feature, with a = scale / sqrt(var + epsilon) of each:  (a_r - a_m)^2 var_m + a_r^2 |mean_m - mean_r|^2.
    """
    a_running, a_measured = (scale / np.sqrt(stats.var + epsilon) for stats in (running, measured))
    squared = (a_running - a_measured) ** 2 * measured.var + np.abs(a_running * (measured.mean - running.mean)) ** 2
    return _rms(squared, a_measured**2 * measured.var, chosen)


def _compared(running, evaluation, scale, epsilon, chosen):
    """Returns the shift of the mean, the ratio of variances, and the sampling error of the gap."""
    mean, var = evaluation.values.mean, evaluation.values.var
    shifts = np.abs(mean - running.mean) ** 2 / (running.var + epsilon)
    ratios = np.log((var + epsilon) / (running.var + epsilon))[chosen]
    # Examples say less where their batches differ.
    of_means, of_squares = (np.fmax(*groups.mean_squares) for groups in (evaluation.means, evaluation.squares))
    errors = (of_means / var + of_squares / (4 * var**2)) / evaluation.means.count
    shift, error = _rms(shifts, np.ones_like(shifts), chosen), _rms(errors * scale**2, scale**2, chosen)
    return shift, float(np.exp(ratios.mean())) if chosen.any() else np.nan, error


def _spread(means: Groups, var, alive):
    """Returns the noise of a batch's mean, how much batches exceed independent examples, and that as a score."""
    between, within = means.mean_squares
    free_between, free_within = means.groups - 1, means.count - means.groups
    spread = np.where(free_within >= EXAMPLES, within, np.where(free_between >= EXAMPLES, between, np.nan))
    noise = float(np.sqrt(_median((spread * means.groups / means.count / var)[alive])))
    told = alive & (free_between >= 1) & (free_within >= EXAMPLES) & (within > 0)
    if not told.any():
        return noise, np.nan, np.nan
    excess = _median((between / within)[told])
    return noise, excess, score(excess, _median(free_between[told]), _median(free_within[told]))


def _dead(running_var, never, population, examples, scale):
    """Returns which features carry nothing, and which of them have come to that behind the running statistics' back."""
    no_scale = (scale < DEAD_SCALE * _large(scale)) & ~never  # untrained, a scale may start at 0
    constant = (examples >= EXAMPLES) & (population.var <= DEAD_VAR * _large(population.var))
    # A feature that is rarely active may be constant in these data by chance.
    activity = running_var / np.fmax(_large(running_var), 1e-30)
    known = activity <= DEAD_VAR
    constant &= known | (activity * population.count >= ACTIVE_VALUES)
    return no_scale | constant, no_scale | (constant & ~known)


def _batch(values: Groups, unbiased):
    """Returns the mean over batches of their moments, as the running averages tend to it."""
    count = values.count / np.maximum(values.groups, 1)
    var = values.within / np.maximum(values.count, 1)
    return Moments(values.mean, var * count / np.maximum(count - 1, 1) if unbiased else var, count)


def _large(values):
    """Returns what counts as large among the features of a layer."""
    return np.quantile(values[np.isfinite(values)], 0.9) if np.isfinite(values).any() else np.nan


def _median(values):
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else np.nan


def _rms(squared, scale, chosen):
    """Returns the root of the ratio of two sums over features."""
    total = scale[chosen].sum()
    return float(np.sqrt(squared[chosen].sum() / total)) if total > 0 else np.nan
