"""The summary of each batch norm: figures computed from the sums over all batches, in NumPy.

Convention: a figure is NaN if the batches do not determine it.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxbn._core.stats import BatchStats, Moments
from jaxbn.diagnose._anova import GroupSums, score
from jaxbn.diagnose._records import Record, usable
from jaxbn.diagnose._sums import Settings, Sums
from jaxbn.diagnose._thresholds import ACTIVE_VALUES, DEAD_SCALE, DEAD_VAR, EXAMPLES

AnyMoments = BatchStats | Moments


class LayerSummary(NamedTuple):
    """One batch norm and its figures.

    Attributes:
      path: its place in the model.
      settings: its options.
      features: number of features C.
      values: number of values per feature in a batch.
      examples: number of examples in a batch.
      batches: number of batches.
      skipped: number of batches that are not finite.
      scale: absolute value of the scale, shape [C]; ones where the layer has none.
      running: running statistics, shape [C].
      population: moments of all values, with the layers before this one in evaluation mode, shape [C].
      batch: mean over batches of their moments, with the layers before this one in training mode, shape [C].
      gap: rms difference between the outputs with the running statistics and with those of the population, as a
        fraction of the rms of the latter, bias aside; includes the effect of the layers before.
      own_gap: the same against training with these batches, for this layer alone.
      error: standard error of ``gap``, from the spread of the examples.
      shift: distance of the population's mean from the running mean, in running standard deviations, rms over features.
      ratio: population's variance over the running variance, geometric mean over features.
      noise: standard error of the mean of a batch, in standard deviations, median over features.
      excess: variance of the means of batches over that expected of independent examples, median over features.
      score: ``excess`` as a standard normal deviate: how unlikely it is for independent examples.
      comparable: features whose running statistics can be compared with the measured ones, bool, shape [C].
      never: features whose statistics are still at mean 0 and variance 1, bool, shape [C].
      broken: features whose statistics are not finite or have a negative variance, bool, shape [C].
      dead: features that are constant, bool, shape [C].
      died: dead features that the running statistics show as active, bool, shape [C].
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
def summarize(path: str, record: Record) -> LayerSummary:
    """Computes the figures of a layer."""
    settings, running, scale, evaluation, training, batches = record
    values, means = evaluation.values, evaluation.means
    epsilon = settings.epsilon
    # The output is as large with a scale of the opposite sign, or of another phase.
    scale = np.abs(scale)
    population = Moments(values.mean, values.var, values.count)
    batch = _batch_moments(training.values, settings.unbiased)
    # Exactly 0 and 1: no update leaves a running average there.
    never = np.asarray((running.mean == 0) & (running.var == 1))
    broken = ~(usable(running) | never)
    dead, died = _dead(running.var, never, population, means.count, scale)
    # Features that other findings report would only blur these figures.
    seen = (values.count > 0) & (batch.count > 0)
    comparable = seen & ~(never | broken | dead)
    noise, excess, chance = _spread(means, values.var, ~dead)
    return LayerSummary(
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
        gap=output_gap(running, population, scale, epsilon, comparable),
        own_gap=output_gap(running, batch, scale, epsilon, comparable),
        error=_error_of_gap(evaluation, scale, comparable),
        shift=_shift(running, population, epsilon, comparable),
        ratio=_ratio_of_variances(running, population, epsilon, comparable),
        noise=noise,
        excess=excess,
        score=chance,
        comparable=comparable,
        never=never,
        broken=broken,
        dead=dead,
        died=died,
    )


@np.errstate(divide="ignore", invalid="ignore")
def output_gap(running: AnyMoments, measured: AnyMoments, scale: Any, epsilon: float, features: Any) -> float:
    """Computes the rms difference between a layer's outputs with two sets of statistics, relative to their rms.

    With a = scale / sqrt(var + epsilon), the squared difference per feature is

      E|a_r (x - mean_r) - a_m (x - mean_m)|^2 = (a_r - a_m)^2 var_m + a_r^2 |mean_m - mean_r|^2

    where r stands for the running statistics, m for the measured ones, and x has the measured moments.
    """
    a_running = scale / np.sqrt(running.var + epsilon)
    a_measured = scale / np.sqrt(measured.var + epsilon)
    of_factor = (a_running - a_measured) ** 2 * measured.var
    of_mean = np.abs(a_running * (measured.mean - running.mean)) ** 2
    return _relative_rms(of_factor + of_mean, a_measured**2 * measured.var, features)


def _error_of_gap(evaluation: Sums, scale: Any, features: Any) -> float:
    """Computes the sampling error of the gap: how large it is by chance, where nothing has shifted.

    To first order, an error d of the mean moves the output by d / std, and an error d of the variance by d / (2 var).
    """
    var = evaluation.values.var
    # The variance over examples.  Where batches differ from one another, examples are not independent, and the
    # variance between batches is the larger one.
    of_means = np.fmax(*evaluation.means.mean_squares)
    of_squares = np.fmax(*evaluation.squares.mean_squares)
    errors = (of_means / var + of_squares / (4 * var**2)) / evaluation.means.count
    return _relative_rms(errors * scale**2, scale**2, features)


def _shift(running: AnyMoments, population: Moments, epsilon: float, features: Any) -> float:
    # As evaluation sees it, which divides by the running standard deviation.
    shifts = np.abs(population.mean - running.mean) ** 2 / (running.var + epsilon)
    return _relative_rms(shifts, np.ones_like(shifts), features)


def _ratio_of_variances(running: AnyMoments, population: Moments, epsilon: float, features: Any) -> float:
    if not features.any():
        return np.nan
    ratios = (population.var + epsilon) / (running.var + epsilon)
    return float(np.exp(np.log(ratios)[features].mean()))


def _spread(means: GroupSums, var: Any, alive: Any) -> tuple[float, float, float]:
    """Computes the noise of a batch's mean, the excess of batches over independent examples, and that as a score."""
    between, within = means.mean_squares
    free_between, free_within = means.free_between, means.free_within
    enough_examples = free_within >= EXAMPLES
    enough_batches = free_between >= EXAMPLES

    # Variance over examples.  With one example in each batch it is known between batches alone.
    spread = np.where(enough_examples, within, np.where(enough_batches, between, np.nan))
    # Variance of the mean of a batch, which has count / groups examples, as a fraction of the variance of a value.
    of_mean = spread * means.groups / means.count / var
    noise = float(np.sqrt(_median(of_mean[alive])))

    known = alive & (free_between >= 1) & enough_examples & (within > 0)
    if not known.any():
        return noise, np.nan, np.nan
    excess = _median((between / within)[known])
    return noise, excess, score(excess, _median(free_between[known]), _median(free_within[known]))


def _dead(running_var: Any, never: Any, population: Moments, examples: Any, scale: Any) -> tuple[Any, Any]:
    """Marks the features that are constant, and those among them that the running statistics show as active."""
    # The scale of a residual branch may start at 0: that is no sign of death in a layer that was never trained.
    no_scale = (scale < DEAD_SCALE * _large(scale)) & ~never
    constant = (examples >= EXAMPLES) & (population.var <= DEAD_VAR * _large(population.var))
    # A feature that is rarely active may be constant in these data by chance.  It is called dead where it was constant
    # in training too, or where training leads us to expect many active values among these.
    activity = running_var / np.fmax(_large(running_var), 1e-30)
    was_constant = activity <= DEAD_VAR
    constant &= was_constant | (activity * population.count >= ACTIVE_VALUES)
    return no_scale | constant, no_scale | (constant & ~was_constant)


def _batch_moments(values: GroupSums, unbiased: bool) -> Moments:
    """Computes the mean over batches of their moments, which is what running averages converge to."""
    count = values.count / np.maximum(values.groups, 1)
    var = values.within / np.maximum(values.count, 1)
    if unbiased:
        var = var * count / np.maximum(count - 1, 1)
    return Moments(values.mean, var, count)


def _large(values: Any) -> float:
    """Returns the 0.9 quantile, a size that is large but not exceptional among the features of a layer."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, 0.9) if finite.size else np.nan


def _median(values: Any) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else np.nan


def _relative_rms(squared: Any, reference: Any, features: Any) -> float:
    """Computes the square root of the ratio of two sums over features."""
    total = reference[features].sum()
    return float(np.sqrt(squared[features].sum() / total)) if total > 0 else np.nan
