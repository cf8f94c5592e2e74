"""What the figures of a model's batch norms say: findings, each with its evidence and what to do.

Each threshold says what it lies between.  Healthy are a 7-layer net, ResNet-20 and an Inception net on CIFAR-10 at
16x16 pixels, and the first two on handwritten digits, with batches of 32 to 250.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from jaxbn._core.stats import BatchStats
from jaxbn.diagnose._summary import EXAMPLES, Layer, output_gap

# Of the output's standard deviation.  Healthy: up to 0.17, and 0.28 where the learning rate is still large; images at
# half the contrast, inverted, noisy, or at 0.7 of their brightness: 0.32 and more.
GAP = 0.3
ERRORS = 3  # standard errors: few examples differ from the running statistics by chance
# 1/noise^2: so many independent values have so exact a mean.  32 images: 42 and more, and 32 where each is one value;
# 2 images: 3 to 11.  Below 20, the mean of a batch is off by more than a fifth of a standard deviation.
INDEPENDENT_VALUES = 20
# However exact their mean is (in a shallow net, as if 2 images were 32 values): two or three examples decide over one
# another's outputs.  Wu and He 2018 (arXiv:1803.08494, section 4.1) lose 1 point with 8 images, 4 with 4, 11 with 2.
FEW_EXAMPLES = 4
# Healthy: up to 2.4, in few batches; images sorted by class, in batches of 32: 17 to 60, of 8: 4.5 and more.
EXCESS = 3.0
SCORE = NormalDist().inv_cdf(1 - 1e-4)  # healthy: up to 2; sorted: 6 in three batches, and more
# Part of the mismatch that goes away with the start of the running averages, and how much that must be worth.  Averages
# of 30, 100 and 300 steps at momentum 0.99: 0.32 to 1; 0.18 and more where the weights have moved further than the 0.05
# that is left of the start after 300 steps, of which some are missed.  Healthy nets: worth up to 0.01.
EXPLAINED = 0.3
EXPLAINED_GAP = 0.1
# Standard errors that it must be worth, too.  In few batches, with running statistics near the start, healthy nets
# come to 1, and none of 60 to 1.5; at 3, averages are missed.
ERRORS_OF_START = 2
ALONE = (
    " In a single layer shifted data may look the same: if training batches do not have this finding, it is a shift."
)
SHOWN = 8  # layers or features that are listed by name


class Finding(NamedTuple):
    """Something that is wrong.

    Attributes:
      name: what it is, in a few words.
      layers: paths of the layers concerned, in the order in which they are called.
      evidence: what was measured, in words.
      remedy: what to do.
      figures: what was measured, by name.
    """

    name: str
    layers: tuple[str, ...]
    evidence: str
    remedy: str
    figures: dict[str, float]


def listed(paths: tuple[str, ...]) -> str:
    """Returns paths in words; of many, the first and the last."""
    if len(paths) <= 3:
        return ", ".join(map(_name, paths))
    return f"{len(paths)} layers, {_name(paths[0])} to {_name(paths[-1])}"


def findings(layers: list[Layer], devices: int) -> list[Finding]:
    """Returns what is wrong, causes before their effects; what one finding explains is not said again."""
    unconverged, few, dependent = _not_converged(layers), _few_values(layers), _dependent(layers)
    # Averages that have not converged are off, those of small batches are noisy, and a part of sorted data is not like
    # the whole, without any shift.
    shifted = [] if unconverged or few or dependent else _shifted(layers)
    return [
        *_train_flag(layers),
        *_broken(layers),
        *_skipped(layers),
        *_never_updated(layers),
        *unconverged,
        *few,
        *_per_device(layers, devices),
        *dependent,
        *_dead(layers),
        *shifted,
    ]


def _finding(name, found, evidence, remedy, words=None, **figures):
    """Returns the finding in a list; words and figures are filled in where the evidence has them in braces."""
    figures = {key: float(value) for key, value in figures.items()}
    evidence = evidence.format(**(words or {}), **figures)
    return [Finding(name, tuple(layer.path for layer in found), evidence, remedy, figures)]


def _train_flag(layers):
    if not (found := [layer for layer in layers if layer.settings.training]):
        return []
    return _finding(
        "train flag left on",
        found,
        "{layers:.0f} of {of:.0f} batch norms normalise with the batch where call should evaluate: an output depends "
        "on the other examples of its batch.",
        "evaluate with train=False or use_running_average=True, whichever the model takes, as in "
        "call=lambda module, batch: module(batch, train=False); for an nnx model call model.eval() first. "
        "jaxbn.surgery.freeze makes layers evaluate always.",
        layers=len(found),
        of=len(layers),
    )


def _broken(layers):
    if not (found := [layer for layer in layers if layer.broken.any()]):
        return []
    return _finding(
        "statistics not finite",
        found,
        "the running statistics of {features:.0f} features are NaN or infinite, or their variance is negative.",
        "measure them anew with jaxbn.calibrate.layer_by_layer. A batch that is not finite is skipped by jaxbn's "
        "layers and averaged in by Flax's; jaxbn.surgery.replace exchanges them for the next training.",
        features=sum(layer.broken.sum() for layer in found),
    )


def _skipped(layers):
    if not (found := [layer for layer in layers if layer.skipped]):
        return []
    return _finding(
        "batches not finite",
        found,
        "{batches:.0f} of {of:.0f} batches are not finite, from {first} on; all other figures are of the others.",
        "look for NaN in the data, and for values that overflow in or before that layer. jaxbn's layers leave such "
        "batches out of the running statistics; Flax's become NaN and stay so (jaxbn.surgery.replace exchanges them).",
        words={"first": _name(found[0].path)},
        batches=found[0].skipped,
        of=found[0].batches,
    )


def _never_updated(layers):
    if not (found := [layer for layer in layers if layer.never.any()]):
        return []
    gaps = [
        output_gap(layer.running, layer.batch, layer.scale, layer.settings.epsilon, layer.never & ~layer.dead)
        for layer in found
    ]
    return _finding(
        "statistics never updated",
        found,
        "mean and variance are exactly 0 and 1, as they start, in {features:.0f} of {of:.0f} features; the output in "
        "evaluation is off by up to {gap:.2g} standard deviations.",
        "keep what training returns: in linen the updates of apply(..., mutable=['batch_stats']), in nnx the model "
        "that was called in training mode, under nnx.jit. For these weights, measure the statistics with "
        "jaxbn.calibrate.layer_by_layer on training data.",
        features=sum(layer.never.sum() for layer in found),
        of=sum(layer.features for layer in found),
        gap=_largest(gaps),
    )


def _not_converged(layers):
    """Fits running = w start + (1 - w) batch, the start being mean 0 and variance 1, to layers of the same momentum."""
    candidates = [layer for layer in layers if not layer.settings.counted and layer.comparable.any()]
    found = []
    for momentum in sorted({layer.settings.momentum for layer in candidates}):
        group = [layer for layer in candidates if layer.settings.momentum == momentum]
        start = _weight_of_start(group)
        before, after = (np.square([_gaps(layer, weight) for layer in group]) for weight in (0, start))
        # No other contradicts a layer alone: what is left of it counts in full, not as averaged with the start.
        left = after if len(group) > 1 else after / (1 - start) ** 2
        explained = np.min(1 - np.nansum(left, 0) / np.maximum(np.nansum(before, 0), 1e-30))
        worth = np.sqrt(np.nanmax((before - after)[:, 0], initial=0))
        chance = ERRORS_OF_START * _largest([layer.error for layer in group])
        if not (explained > EXPLAINED and worth > max(EXPLAINED_GAP, chance)):
            continue
        # All layers hold the same part of their start.  A shift of inputs far from 0 is along their mean, like a start,
        # but in training the first layer normalises it away.  Squared gaps behind it become 1.05 times as large (less
        # contrast, of which zero padding lets some through) to 1e5; those of averages 0.94 at most, or, where
        # the weights have moved, 2.1.
        if np.any(after > before):
            continue
        found += _finding(
            "averages not converged",
            group,
            "running statistics hold {start:.2g} of their start at mean 0 and variance 1, as after {steps:.0f} steps "
            "at momentum {momentum:g}; that explains {explained:.0%} of what separates them from the batches. The "
            "output in evaluation is off by up to {gap:.2g} standard deviations." + (ALONE if len(group) == 1 else ""),
            "measure the statistics with jaxbn.calibrate.layer_by_layer or one_pass on training data. For the next "
            "training: more steps, a lower momentum, or jaxbn's layer (jaxbn.surgery.replace) with debias=True or "
            "momentum=None, whose averages hold nothing of their start.",
            start=start,
            steps=np.log(start) / np.log(momentum) if 0 < momentum < 1 else np.nan,
            momentum=momentum,
            explained=explained,
            gap=_largest([gap for layer in group for gap in (layer.gap, layer.own_gap)]),
        )
    return found


@np.errstate(divide="ignore", invalid="ignore")
def _weight_of_start(layers):
    """Returns w of running - batch = w (start - batch), by least squares; no running variance may be below w."""
    above = below = 0.0
    for layer in layers:
        running, batch, chosen = layer.running, layer.batch, layer.comparable
        unit = running.var + batch.var + layer.settings.epsilon
        for gone, way, weight in (
            (running.mean - batch.mean, -batch.mean, 1 / unit),
            (running.var - batch.var, 1 - batch.var, 1 / unit**2),
        ):
            above += np.sum((np.conj(way) * gone).real * weight, where=chosen)
            below += np.sum(np.abs(way) ** 2 * weight, where=chosen)
    smallest = min(layer.running.var[layer.comparable].min() for layer in layers)
    return float(np.clip(above / max(below, 1e-30), 0, min(smallest, 1 - 1e-6)))


def _gaps(layer, start):
    """Returns the gap between the running statistics and batch and start averaged, seen from either of them.

    From the average alone, a running variance that is far too large would seem to leave little of any gap.
    """
    averaged = BatchStats((1 - start) * layer.batch.mean, start + (1 - start) * layer.batch.var)
    options = (layer.scale, layer.settings.epsilon, layer.comparable)
    return output_gap(layer.running, averaged, *options), output_gap(averaged, layer.running, *options)


def _few_values(layers):
    if not (found := [layer for layer in layers if _is_few(layer)]):
        return []
    worst = max(found, key=_noise)
    examples = "" if np.isnan(worst.examples) else "of {examples:.3g} examples "
    return _finding(
        "too few values per feature",
        found,
        "in {worst}, {values:.0f} values " + examples + "stand behind a feature in a batch; its mean is off by "
        "{noise:.2f} standard deviations, as if they were {independent:.1f} independent values.",
        "train with larger batches; over several devices, with axis_name. Where batches have to be small: group norm "
        "(jaxbn.surgery.replace_by_group_norm), batch renormalisation (jaxbn.surgery.replace with "
        "method=jaxbn.batch_renormalize), or for fine-tuning jaxbn.surgery.freeze. If training has other batches than "
        "these, diagnose with batches of that size.",
        words={"worst": _name(worst.path)},
        noise=_noise(worst),
        independent=1 / _noise(worst) ** 2,
        values=worst.values,
        examples=worst.examples,
    )


def _is_few(layer, share=1.0):
    """Says whether that share of a batch is too small for statistics of which training makes use."""
    if layer.settings.frozen or layer.settings.renormalised:
        return False
    if layer.settings.group_size is not None:
        share *= min(1, layer.settings.group_size / layer.examples)
    return share * layer.examples < FEW_EXAMPLES or share / _noise(layer) ** 2 < INDEPENDENT_VALUES


def _noise(layer):
    """Returns the noise of a batch's mean: at least that of independent values, which is known from a single batch."""
    return float(np.fmax(layer.noise, 1 / np.sqrt(layer.values)))


def _per_device(layers, devices):
    def share(layer):
        return (layer.settings.devices_in_group or devices) / devices if layer.settings.synchronised else 1 / devices

    large = [layer for layer in layers if not _is_few(layer)]
    if not (found := [layer for layer in large if _is_few(layer, share(layer))]):
        return []
    worst = max(found, key=lambda layer: _noise(layer) / np.sqrt(share(layer)))
    return _finding(
        "per-device batch too small and not synchronised",
        found,
        "over {devices:.0f} devices, statistics are taken over {share:.2g} of the batch: in {worst} the mean is off by "
        "{noise:.2f} standard deviations, instead of {whole:.2f} with the whole batch.",
        "take the statistics over all devices: with axis_name under shard_map, pmap or vmap "
        "(jaxbn.surgery.replace(..., axis_name='data')), or with a sharded batch under jit, which needs no name.",
        words={"worst": _name(worst.path)},
        devices=devices,
        share=share(worst),
        noise=_noise(worst) / np.sqrt(share(worst)),
        whole=_noise(worst),
    )


def _dependent(layers):
    trained = [layer for layer in layers if not layer.settings.frozen]
    if not (found := [layer for layer in trained if layer.excess > EXCESS and layer.score > SCORE]):
        return []
    worst = max(found, key=lambda layer: layer.excess)
    return _finding(
        "batches not independent",
        found,
        "in {worst} the means of batches vary {excess:.1f} times as much as those of independent examples would "
        "({batches:.0f} batches; {score:.1f} standard deviations beyond chance).",
        "shuffle. The examples of a batch are alike (sorted by class or source, or in the order of recording), and "
        "training uses what they share. Where they cannot be mixed, jaxbn.surgery.freeze keeps the statistics, and "
        "jaxbn.calibrate.layer_by_layer measures them over all data.",
        words={"worst": _name(worst.path)},
        excess=worst.excess,
        batches=worst.batches,
        score=worst.score,
    )


def _dead(layers):
    if not (found := [layer for layer in layers if layer.dead.any()]):
        return []
    which = "; ".join(f"{_name(layer.path)}: {_numbers(layer.dead)}" for layer in found[:SHOWN])
    died = next((place for place, layer in enumerate(layers) if layer.died.any()), len(layers))
    behind = _largest([layer.gap for layer in layers[died + 1 :] if _is_shifted(layer)])
    evidence = "{features:.0f} of {of:.0f} features have a scale near 0 beside others of their layer, or a variance "
    evidence += "near 0 ({which})."
    remedy = "they hand on a constant, and can be pruned. Look for inputs that never vary, units that never fire (a "
    remedy += "learning rate that was too large), and weight decay on scale (jaxbn.surgery.frozen_mask keeps it away)."
    if not np.isnan(behind):
        evidence += " Layers behind them are off by up to {behind:.2f} standard deviations: their statistics are from "
        evidence += "before, or their inputs have shifted for another reason."
        remedy += " Measure the statistics on training data (jaxbn.calibrate.layer_by_layer), and diagnose again."
    return _finding(
        "dead features",
        found,
        evidence,
        remedy,
        words={"which": which + ("; ..." if len(found) > SHOWN else "")},
        features=sum(layer.dead.sum() for layer in found),
        of=sum(layer.features for layer in layers),
        behind=behind,
    )


def _is_shifted(layer):
    enough = layer.batches * np.fmax(layer.examples, 1) >= EXAMPLES
    return enough and layer.gap > max(GAP, ERRORS * layer.error)


def _shifted(layers):
    found = []
    for layer in layers:
        if _is_shifted(layer):
            found.append(layer)
        if layer.died.any() and not found:
            return []  # what comes behind may be shifted by them, and is told with them
    if not found:
        return []
    first, worst = found[0], max(found, key=lambda layer: layer.gap)
    return _finding(
        "shifted inputs",
        found,
        "from {first} on; there the mean is {shift:.2f} standard deviations from the running mean and the variance "
        "{ratio:.2f} times the running variance, so that the output is off by {gap:.2f} standard deviations (by "
        "chance: {error:.2f}); most of all in {worst}, by {most:.2f}.",
        "see that these batches are a fair sample (of all classes, say), and compare the preprocessing with that of "
        "training. If these data are what will be served, measure the statistics on them: "
        "jaxbn.calibrate.layer_by_layer (AdaBN), and with few data jaxbn.calibrate.blend. If they are the training "
        "data, the weights have changed since the averages were taken (averaged weights, fine-tuning, pruning, a large "
        "learning rate): measure the statistics on them all the same.",
        words={"first": _name(first.path), "worst": _name(worst.path)},
        shift=first.shift,
        ratio=first.ratio,
        gap=first.gap,
        error=first.error,
        most=worst.gap,
    )


def _name(path):
    return path or "the model itself"


def _numbers(which):
    numbers = [str(number) for number in np.flatnonzero(which)]
    return ", ".join(numbers[:SHOWN]) + (f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else "")


def _largest(figures):
    """Returns the largest figure that is known; NaN if none is."""
    return max((figure for figure in figures if not np.isnan(figure)), default=np.nan)
