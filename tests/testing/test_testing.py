"""Our layers satisfy the laws of batch norm, and each law detects the mutants that break it."""

import dataclasses

import jax
import pytest

from jaxbn.testing import LAWS, check_batch_norm, judge
from jaxbn.testing._laws import values
from tests.testing import mutants, plain
from tests.testing.adapters import FLAX, FUNCTION, MOMENTUM, OURS, function

NAMES = [law.name for law in LAWS]
# Laws that compile many or large programs.  Fast tests in tests/core compare our function with the oracle on masks,
# devices, half precision and second derivatives.
EXPENSIVE = [
    "low_precision",
    "hessian_vector_products",
    "statistics_of_masked_data",
    "gradients_of_masked_data",
    "nan_in_masked_positions",
    "split_over_devices",
    "large_means_over_devices",
]
ABOUT_STATISTICS = [
    "running_statistics_equal_oracle",
    "evaluation_equals_training_on_constant_statistics",
    "running_average_converges",
    "one_nan_batch",
    "dtypes_are_stable",
    "batch_masked_everywhere",
    "devices_with_unequal_counts",
]


@pytest.mark.parametrize(
    "law", [pytest.param(law, id=law.name, marks=[pytest.mark.slow] * (law.name in EXPENSIVE)) for law in LAWS]
)
def test_our_function_satisfies_the_law(law):
    assert law.applies(FUNCTION)
    check_batch_norm(FUNCTION, [law])


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_our_layers_satisfy_the_law(name, law):
    assert law.applies(OURS[name])
    check_batch_norm(OURS[name], [law])


@pytest.mark.slow
@pytest.mark.parametrize("law", ABOUT_STATISTICS)
@pytest.mark.parametrize("options", [{"debias": True}, {"unbiased": True}, {"momentum": None, "debias": True}], ids=str)
def test_our_running_statistics_with_options_satisfy_the_law(options, law):
    adapter = function(**options)
    if options.get("momentum", MOMENTUM) is None:  # the average over all batches alike
        adapter = dataclasses.replace(adapter, momentum=1.0)
    check_batch_norm(adapter, [law])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [plain.BatchNorm, plain.Unbiased, plain.Debiased])
def test_the_base_classes_of_the_mutants_satisfy_every_law(kind):
    check_batch_norm(kind.adapter())


@pytest.mark.parametrize("kind", [plain.BatchNorm, mutants.EvaluationHalvesTheVariance])
def test_an_average_with_a_long_memory_is_tested_in_few_steps(monkeypatch, kind):
    steps, train = [], values.train
    monkeypatch.setattr(values, "train", lambda *arguments: steps.append(None) or train(*arguments))
    slow = type(kind.__name__, (kind,), {"momentum": 0.9999})
    report = judge(slow.adapter(), "evaluation_equals_training_on_constant_statistics")
    assert bool(report.broken) == (kind is not plain.BatchNorm), report
    assert 0 < len(steps) <= 2000


def test_every_law_has_a_mutant_that_breaks_it():
    assert list(mutants.BROKEN_BY) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "mutant"), [(law, mutant) for law, kinds in mutants.BROKEN_BY.items() for mutant in kinds]
)
def test_the_mutant_breaks_the_law(law, mutant):
    (finding,) = judge(mutant.adapter(), [law]).findings
    assert finding.outcome == "broken"
    assert finding.detail


def test_gradients_that_are_added_up_in_half_precision_are_found_in_the_gradients():
    (finding,) = judge(mutants.GradientsAddedInBfloat16.adapter(), "low_precision").findings
    assert finding.detail.startswith(("dx of", "dscale of", "dbias of"))


@pytest.mark.parametrize("law", ["large_means", "one_nan_batch", "nan_in_masked_positions"])
def test_flaxs_layer_breaks_the_law(law):
    assert judge(FLAX, [law]).broken


def test_flaxs_layer_satisfies_the_laws_about_ordinary_data():
    check_batch_norm(FLAX, NAMES[:4])


@pytest.mark.slow
def test_laws_leave_no_trace_in_the_configuration():
    check_batch_norm(FUNCTION, ["dtypes_are_stable"])
    assert not jax.config.jax_enable_x64
