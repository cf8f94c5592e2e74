"""Averages that still contain some of their start are found, and distinguished from shifted inputs."""

import pytest

import jaxbn.linen
from jaxbn.diagnose import diagnose
from tests.diagnose.nets import (
    LAYER,
    MOMENTUM,
    Net,
    evaluate,
    far,
    held_out,
    holding_start,
    names,
    normal,
    state_of,
    updated,
)


@pytest.mark.parametrize("steps", [2, 8, 15])
def test_averages_that_contain_their_start_are_found_and_its_weight_is_fitted(steps):
    """The weights do not change, so the weight of the start is momentum^steps: 0.81, 0.43 and 0.21."""
    (finding,) = diagnose(Net(), updated(steps), held_out(), call=evaluate).findings
    assert finding.name == "averages not converged"
    assert 0.9 < finding.figures["start"] / MOMENTUM**steps < 1.1
    assert abs(finding.figures["steps"] - steps) <= 1


@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        ("mean 5", lambda x: 2 * x + 1),
        ("mean 5", lambda x: x + 1),
        ("0..255", lambda x: x + 20),
    ],
)
def test_shifted_inputs_far_from_zero_are_not_taken_for_averages_that_hold_their_start(inputs, change):
    net, variables, batches = far(inputs)
    assert names(diagnose(net, variables, batches, call=evaluate)) == []
    assert names(diagnose(net, variables, [change(x) for x in batches], call=evaluate)) == ["shifted inputs"]


@pytest.mark.parametrize(
    ("inputs", "steps"),
    [
        *(("mean 5", steps) for steps in (30, 100, 300)),
        *(("0..255", steps) for steps in (30, 100, 200)),  # zero padding adds variance, so that a start counts less
    ],
)
def test_averages_that_contain_their_start_are_found_for_inputs_far_from_zero(inputs, steps):
    net, variables, batches = far(inputs)
    start = 0.99**steps
    (finding,) = diagnose(net, holding_start(variables, start), batches, call=evaluate).findings
    assert finding.name == "averages not converged" and "single layer" not in finding.evidence
    assert 0.9 < finding.figures["start"] / start < 1.1


def test_evidence_says_that_a_single_layer_cannot_tell_a_start_from_a_shift():
    shifted = diagnose(LAYER, state_of([5, 5, 5], [1, 1, 1]), [6 + normal(64, 3, seed=k) for k in range(9)])
    assert names(shifted) == ["averages not converged"]
    assert "if training batches do not have this finding, it is a shift" in shifted.findings[0].evidence


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)
def test_averages_without_bias_are_never_found_to_hold_their_start(options):
    half_way = state_of([0.5 * 3] * 3, [0.5 + 0.5 * 4] * 3)
    batches = [3 + 2 * normal(64, 3, seed=k) for k in range(9)]
    assert names(diagnose(LAYER, half_way, batches)) == ["averages not converged"]
    assert names(diagnose(jaxbn.linen.BatchNorm(True, **options), half_way, batches)) == ["shifted inputs"]
