"""What adapters may declare, and what happens if an implementation returns something else."""

import dataclasses

import pytest

from jaxbn.testing import LAWS, check_batch_norm, judge, laws_for
from tests.testing import mutants
from tests.testing.adapters import FUNCTION, in_numpy


@pytest.fixture(scope="module")
def numpy_adapter():
    return in_numpy(FUNCTION)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
        ({"momentum": None}, "momentum must be a number, got None; use the weight of the old value"),
        ({"epsilon": -1e-5}, "epsilon must not be negative, got -1e-05; use for example 1e-5"),
        ({"train": "train"}, "train must be a function, got 'train'; the docstring of Adapter has its signature"),
        ({"traceable": False}, "gradients must be a function if traceable=False, got None"),
        ({"half_precision": "bfloat16"}, "half_precision must be a sequence of .*, got 'bfloat16'"),
        ({"half_precision": ("float32",)}, "must be a sequence of floating-point dtypes below 32 bits"),
        ({"half_precision": ("half-ish",)}, "must be a sequence of floating-point dtypes below 32 bits"),
        ({"over_devices": True}, "over_devices must be a traceable Adapter or None, got True"),
    ],
)
def test_impossible_declarations_are_refused(declared, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FUNCTION, **declared)


def transposed(adapter):
    return lambda state, x, mask: (adapter.train(state, x, mask)[0].T, state)


@pytest.mark.parametrize(
    ("law", "wrong", "message"),
    [
        ("output_equals_oracle", {"train": transposed(FUNCTION)}, "y of train has shape (4, 48), expected (48, 4)"),
        (
            "output_equals_oracle",
            {"train": lambda state, x, mask: x},
            "train returned one array, expected (y, state)",
        ),
        ("output_equals_oracle", {"train": lambda state, x, mask: (x,)}, "train returned 1 value, expected (y, state)"),
        ("evaluation_equals_oracle", {"evaluate": lambda state, x: x[0]}, "y of evaluate has shape (4,)"),
        (
            "running_statistics_equal_oracle",
            {"statistics": lambda state: (state[0].mean[None], state[0].var[None])},
            "the running mean has shape (1, 4), expected one value per feature, [C]",
        ),
        (
            "running_statistics_equal_oracle",
            {"statistics": lambda state: 1.0},
            "statistics returned one value of type float",
        ),
        ("gradients_equal_oracle", {"gradients": lambda *a: a[1:3]}, "gradients returned 2 values, expected (dx, dsc"),
        ("gradients_equal_oracle", {"gradients": lambda *a: (a[2], a[2], a[2])}, "dx has shape (4,), expected (48, 4)"),
        ("gradients_equal_oracle", {"init": lambda x: 1 / 0}, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_return_value_is_reported(law, wrong, message):
    (finding,) = judge(dataclasses.replace(FUNCTION, **wrong), [law]).findings
    assert finding.outcome == "broken"
    assert message in finding.detail


def test_training_that_changes_its_argument_is_reported(numpy_adapter):
    def train(state, x, mask):
        y, state["inner"] = numpy_adapter.train(state["inner"], x, mask)
        return y, state

    adapter = dataclasses.replace(
        numpy_adapter,
        init=lambda x: {"inner": numpy_adapter.init(x)},
        train=train,
        statistics=lambda state: numpy_adapter.statistics(state["inner"]),
        with_parameters=lambda state, *arguments: {"inner": numpy_adapter.with_parameters(state["inner"], *arguments)},
    )
    (finding,) = judge(adapter, ["output_equals_oracle"]).findings
    assert finding.detail == "train changed the running statistics of the state it was given; return a new state"


def test_laws_about_undeclared_features_do_not_apply():
    plain = dataclasses.replace(FUNCTION, masks=False, over_devices=None, half_precision=())
    without = {law.name for law in LAWS} - {law.name for law in laws_for(plain)}
    assert without == {
        "low_precision",
        "statistics_of_masked_data",
        "gradients_of_masked_data",
        "mask_of_one_feature",
        "nan_in_masked_positions",
        "batch_masked_everywhere",
        "split_over_devices",
        "large_means_over_devices",
        "devices_with_unequal_counts",
    }
    assert [finding.outcome for finding in judge(plain, sorted(without)).findings] == ["not declared"] * len(without)


def test_a_crash_in_float64_breaks_the_law_unless_the_adapter_declares_that_it_takes_none():
    adapter = mutants.TakesNoFloat64.adapter()
    assert judge(adapter, "dtypes_are_stable").broken[0].detail == "TypeError: float64 is too wide"
    check_batch_norm(dataclasses.replace(adapter, float64=False), "dtypes_are_stable")


@pytest.mark.slow
@pytest.mark.parametrize("law", laws_for(in_numpy(FUNCTION)), ids=lambda law: law.name)
def test_an_implementation_that_is_not_written_in_jax_can_be_tested(numpy_adapter, law):
    check_batch_norm(numpy_adapter, [law])
