"""The faults that a diagnosis looks for in the figures of a model's batch norms.

Each function looks for one fault in the summaries of all layers, and returns a list of findings, empty where it finds
nothing.  The thresholds are in `_thresholds.py`.
"""

from collections.abc import Iterable

import numpy as np

from jaxbn.diagnose._findings import SHOWN, Finding, finding, name_of, numbers_of
from jaxbn.diagnose._start import StartFit, fit_start
from jaxbn.diagnose._summary import LayerSummary, output_gap
from jaxbn.diagnose._thresholds import ERRORS, EXAMPLES, EXCESS, FEW_EXAMPLES, GAP, INDEPENDENT_VALUES, SCORE


def find_faults(layers: list[LayerSummary], devices: int) -> list[Finding]:
    """Finds what is wrong, causes before their effects; what one finding explains is not reported a second time."""
    # Layers that normalize with the batch on purpose do not use their running statistics.
    layers = [layer for layer in layers if layer.settings.tracking or not layer.settings.training]
    unconverged = _not_converged(layers)
    few = _few_values(layers)
    dependent = _dependent(layers)
    # Each of these makes the statistics of the data differ from the running ones without any shift: averages that have
    # not converged, noise of small batches, and a part of sorted data that is not like the whole.
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


def _train_flag(layers: list[LayerSummary]) -> list[Finding]:
    training = [layer for layer in layers if layer.settings.training]
    if not training:
        return []
    return finding(
        "train flag left on",
        training,
        "{layers:.0f} of {of:.0f} batch norms normalize with the batch although call should evaluate: the output for "
        "an example depends on the rest of its batch.",
        "evaluate with train=False or use_running_average=True, whichever the model takes, as in "
        "call=lambda module, batch: module(batch, train=False). For an nnx model, call model.eval() first. "
        "jaxbn.surgery.freeze makes layers evaluate always.",
        layers=len(training),
        of=len(layers),
    )


def _broken(layers: list[LayerSummary]) -> list[Finding]:
    broken = [layer for layer in layers if layer.broken.any()]
    if not broken:
        return []
    return finding(
        "statistics not finite",
        broken,
        "the running statistics of {features:.0f} features are NaN or infinite, or have a negative variance.",
        "recompute the statistics with jaxbn.calibrate.layer_by_layer. Flax's layers average a batch that is not "
        "finite into their statistics; jaxbn's skip it (jaxbn.surgery.replace exchanges layers before the next "
        "training).",
        features=sum(layer.broken.sum() for layer in broken),
    )


def _skipped(layers: list[LayerSummary]) -> list[Finding]:
    skipped = [layer for layer in layers if layer.skipped]
    if not skipped:
        return []
    first = skipped[0]
    return finding(
        "batches not finite",
        skipped,
        "{batches:.0f} of {of:.0f} batches are not finite, from {first} on; all other figures leave them out.",
        "look for NaN in the data, and for values that overflow in this layer or before it. jaxbn's layers leave such "
        "batches out of the running statistics; those of Flax's layers become NaN and stay NaN (jaxbn.surgery.replace "
        "exchanges layers).",
        words={"first": name_of(first.path)},
        batches=first.skipped,
        of=first.batches,
    )


def _never_updated(layers: list[LayerSummary]) -> list[Finding]:
    never = [layer for layer in layers if layer.never.any()]
    if not never:
        return []
    gaps = [
        output_gap(layer.running, layer.batch, layer.scale, layer.settings.epsilon, layer.never & ~layer.dead)
        for layer in never
    ]
    return finding(
        "statistics never updated",
        never,
        "mean and variance are exactly 0 and 1, their initial values, in {features:.0f} of {of:.0f} features; in "
        "evaluation the output is off by up to {gap:.2g} standard deviations.",
        "keep the updates that training returns: in linen those of apply(..., mutable=['batch_stats']), in nnx the "
        "model that was called in training mode, under nnx.jit. For these weights, recompute the statistics with "
        "jaxbn.calibrate.layer_by_layer on training data.",
        features=sum(layer.never.sum() for layer in never),
        of=sum(layer.features for layer in never),
        gap=_largest(gaps),
    )


def _not_converged(layers: list[LayerSummary]) -> list[Finding]:
    unconverged = []
    for momentum, group in sorted(_by_momentum(layers).items()):
        fit = fit_start(group)
        if fit.holds:
            unconverged += _holds_start(group, momentum, fit)
    return unconverged


def _by_momentum(layers: list[LayerSummary]) -> dict[float, list[LayerSummary]]:
    """Groups the layers whose averages are biased toward their start, since at one momentum the bias is the same."""
    groups = {}
    for layer in layers:
        momentum = layer.settings.momentum
        if momentum is None or layer.settings.counted or not layer.comparable.any():
            continue
        groups.setdefault(momentum, []).append(layer)
    return groups


def _holds_start(layers: list[LayerSummary], momentum: float, fit: StartFit) -> list[Finding]:
    evidence = (
        "the running statistics still contain a fraction {start:.2g} of their initial mean 0 and variance 1, as after "
        "{steps:.0f} steps at momentum {momentum:g}. That explains {explained:.0%} of their squared distance from the "
        "statistics of the batches. In evaluation the output is off by up to {gap:.2g} standard deviations."
    )
    if len(layers) == 1:
        evidence += " In a single layer, shifted inputs can look the same: if training batches do not have this "
        evidence += "finding, it is a shift."
    return finding(
        "averages not converged",
        layers,
        evidence,
        "recompute the statistics with jaxbn.calibrate.layer_by_layer or one_pass on training data. For the next "
        "training, take more steps, a lower momentum, or jaxbn's layer (jaxbn.surgery.replace) with debias=True or "
        "momentum=None, whose averages are not biased by their initial values.",
        start=fit.weight,
        # start = momentum^steps
        steps=np.log(fit.weight) / np.log(momentum) if 0 < momentum < 1 else np.nan,
        momentum=momentum,
        explained=fit.explained,
        gap=_largest(gap for layer in layers for gap in (layer.gap, layer.own_gap)),
    )


def _few_values(layers: list[LayerSummary]) -> list[Finding]:
    few = [layer for layer in layers if _is_few(layer)]
    if not few:
        return []
    worst = max(few, key=_noise)
    examples = "" if np.isnan(worst.examples) else "of {examples:.3g} examples "
    return finding(
        "too few values per feature",
        few,
        "in {worst}, a feature has {values:.0f} values " + examples + "in a batch; the mean of a batch is off by "
        "{noise:.2f} standard deviations, like the mean of {independent:.1f} independent values.",
        "train with larger batches; on several devices, with axis_name. Where batches must be small, use group norm "
        "(jaxbn.surgery.replace_by_group_norm), batch renormalization (jaxbn.surgery.replace with "
        "method=jaxbn.batch_renormalize), or for fine-tuning jaxbn.surgery.freeze. If training has larger batches than "
        "these, diagnose with batches of that size.",
        words={"worst": name_of(worst.path)},
        noise=_noise(worst),
        independent=1 / _noise(worst) ** 2,
        values=worst.values,
        examples=worst.examples,
    )


def _is_few(layer: LayerSummary, share: float = 1.0) -> bool:
    """Says whether that share of a batch is too small for the statistics that training takes from it."""
    if layer.settings.frozen or layer.settings.renormalized:
        return False  # training does not depend on the statistics of one batch
    if layer.settings.group_size is not None:
        share *= min(1, layer.settings.group_size / layer.examples)
    independent_values = share / _noise(layer) ** 2
    return share * layer.examples < FEW_EXAMPLES or independent_values < INDEPENDENT_VALUES


def _noise(layer: LayerSummary) -> float:
    """Returns the noise of a batch's mean, which is at least that of independent values.

    That bound is known from a single batch, where the noise may not be.
    """
    return float(np.fmax(layer.noise, 1 / np.sqrt(layer.values)))


def _per_device(layers: list[LayerSummary], devices: int) -> list[Finding]:
    def share(layer: LayerSummary) -> float:
        """Returns the part of the batch from which a device takes its statistics."""
        if not layer.settings.synchronized:
            return 1 / devices
        return (layer.settings.devices_in_group or devices) / devices

    def noise(layer: LayerSummary) -> float:
        return _noise(layer) / np.sqrt(share(layer))

    # Where the whole batch is too small already, `_few_values` says so.
    few = [layer for layer in layers if _is_few(layer, share(layer)) and not _is_few(layer)]
    if not few:
        return []
    worst = max(few, key=noise)
    return finding(
        "per-device batch too small and not synchronized",
        few,
        "on {devices:.0f} devices, statistics are taken from {share:.2g} of the batch: in {worst} the mean is off by "
        "{noise:.2f} standard deviations, instead of {whole:.2f} with the whole batch.",
        "take the statistics over all devices: with axis_name under shard_map, pmap or vmap "
        "(jaxbn.surgery.replace(..., axis_name='data')), or with a sharded batch under jit, which needs no name.",
        words={"worst": name_of(worst.path)},
        devices=devices,
        share=share(worst),
        noise=noise(worst),
        whole=_noise(worst),
    )


def _dependent(layers: list[LayerSummary]) -> list[Finding]:
    trained = [layer for layer in layers if not layer.settings.frozen]
    dependent = [layer for layer in trained if layer.excess > EXCESS and layer.score > SCORE]
    if not dependent:
        return []
    worst = max(dependent, key=lambda layer: layer.excess)
    return finding(
        "batches not independent",
        dependent,
        "in {worst}, the means of batches vary {excess:.1f} times as much as they would with independent examples "
        "({batches:.0f} batches; {score:.1f} standard deviations beyond chance).",
        "shuffle. The examples of a batch are alike (sorted by class or source, or in the order of recording), and "
        "training uses what they share. Where they cannot be mixed, jaxbn.surgery.freeze keeps the statistics, and "
        "jaxbn.calibrate.layer_by_layer measures them over all data.",
        words={"worst": name_of(worst.path)},
        excess=worst.excess,
        batches=worst.batches,
        score=worst.score,
    )


def _dead(layers: list[LayerSummary]) -> list[Finding]:
    dead = [layer for layer in layers if layer.dead.any()]
    if not dead:
        return []
    which = "; ".join(f"{name_of(layer.path)}: {numbers_of(layer.dead)}" for layer in dead[:SHOWN])
    which += "; ..." if len(dead) > SHOWN else ""
    evidence = (
        "{features:.0f} of {of:.0f} features have a scale or a variance near 0 compared with other features of their "
        "layer ({which})."
    )
    remedy = (
        "dead features output a constant and can be pruned. Look for inputs that never vary, units that never fire "
        "(a learning rate that was too large), and weight decay on scale (jaxbn.surgery.frozen_mask prevents it)."
    )
    # Where features have died since the averages were taken, later layers see shifted inputs for that reason.
    first_died = next((place for place, layer in enumerate(layers) if layer.died.any()), len(layers))
    behind = _largest(layer.gap for layer in layers[first_died + 1 :] if _is_shifted(layer))
    if not np.isnan(behind):
        evidence += " Later layers are off by up to {behind:.2f} standard deviations: their statistics date from "
        evidence += "before, or their inputs have shifted for another reason."
        remedy += " Recompute the statistics on training data (jaxbn.calibrate.layer_by_layer), and diagnose again."
    return finding(
        "dead features",
        dead,
        evidence,
        remedy,
        words={"which": which},
        features=sum(layer.dead.sum() for layer in dead),
        of=sum(layer.features for layer in layers),
        behind=behind,
    )


def _is_shifted(layer: LayerSummary) -> bool:
    enough = layer.batches * np.fmax(layer.examples, 1) >= EXAMPLES
    return bool(enough and layer.gap > max(GAP, ERRORS * layer.error))


def _shifted(layers: list[LayerSummary]) -> list[Finding]:
    shifted = []
    for layer in layers:
        if _is_shifted(layer):
            shifted.append(layer)
        if layer.died.any() and not shifted:
            return []  # dead features may have shifted the inputs of later layers; `_dead` reports it
    if not shifted:
        return []
    first = shifted[0]
    worst = max(shifted, key=lambda layer: layer.gap)
    return finding(
        "shifted inputs",
        shifted,
        "from {first} on; there the mean is {shift:.2f} standard deviations from the running mean and the variance "
        "{ratio:.2f} times the running variance, so the output is off by {gap:.2f} standard deviations ({error:.2f} "
        "would be chance); most of all in {worst}, by {most:.2f}.",
        "check that these batches are a fair sample (of all classes, for example), preprocessed as in training. If the "
        "model will be used on such data, recompute the statistics on them: with jaxbn.calibrate.layer_by_layer "
        "(AdaBN), or with jaxbn.calibrate.blend if there are few. If these are the training data, the weights have "
        "changed since the averages were taken (averaged weights, fine-tuning, pruning, a large learning rate): "
        "recompute the statistics on them in that case too.",
        words={"first": name_of(first.path), "worst": name_of(worst.path)},
        shift=first.shift,
        ratio=first.ratio,
        gap=first.gap,
        error=first.error,
        most=worst.gap,
    )


def _largest(figures: Iterable[float]) -> float:
    """Returns the largest figure that is known; NaN if none is."""
    return max((figure for figure in figures if not np.isnan(figure)), default=np.nan)
