"""The laws of batch norm: our layers keep them, and each of them finds what is wrong in mutants that do not."""

import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.testing import AXIS, LAWS, Adapter, Law, check_batch_norm, judge, laws_for
from jaxbn.testing._laws import values
from tests.testing import mutants

MOMENTUM = 0.9


def function(axis_name=None, *, debias=False, **options):
    def init(x):
        return jaxbn.init_stats(x.shape[-1], counted=debias), jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])

    def train(state, x, mask):
        options_of_training = {"momentum": MOMENTUM, "axis_name": axis_name, "mask": mask, **options}
        y, stats = jaxbn.batch_norm(x, *state, use_running_average=False, **options_of_training)
        return y, (stats, *state[1:])

    return Adapter(
        "function",
        init,
        train,
        evaluate=lambda state, x: jaxbn.batch_norm(x, *state, use_running_average=True)[0],
        statistics=lambda state: state[0],
        with_parameters=lambda state, scale, bias: (state[0], scale, bias),
        momentum=MOMENTUM,
        unbiased=options.get("unbiased", False),
        debiased=debias,
        masks=True,
        over_devices=function(AXIS, debias=debias, **options) if axis_name is None else None,
    )


def linen(layer=jaxbn.linen.BatchNorm, axis_name=None):
    norm = layer(momentum=MOMENTUM, axis_name=axis_name)

    def train(variables, x, mask):
        y, updates = norm.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
        return y, variables | updates

    return Adapter(
        "linen",
        init=lambda x: norm.init(jax.random.key(0), x, use_running_average=False),
        train=train,
        evaluate=lambda variables, x: norm.apply(variables, x, use_running_average=True),
        statistics=lambda variables: (variables["batch_stats"]["mean"], variables["batch_stats"]["var"]),
        with_parameters=lambda variables, scale, bias: variables | {"params": {"scale": scale, "bias": bias}},
        momentum=MOMENTUM,
        masks=True,
        over_devices=linen(layer, AXIS) if axis_name is None else None,
    )


def nnx_layer(axis_name=None):
    def train(state, x, mask):
        norm = nnx.merge(*state, copy=True)
        y = norm(x, use_running_average=False, mask=mask)
        return y, nnx.split(norm)

    def statistics(state):
        norm = nnx.merge(*state, copy=True)
        return norm.mean[...], norm.var[...]

    def with_parameters(state, scale, bias):
        norm = nnx.merge(*state, copy=True)
        norm.scale[...], norm.bias[...] = scale, bias
        return nnx.split(norm)

    return Adapter(
        "nnx",
        init=lambda x: nnx.split(
            jaxbn.nnx.BatchNorm(x.shape[-1], momentum=MOMENTUM, axis_name=axis_name, rngs=nnx.Rngs(0))
        ),
        train=train,
        evaluate=lambda state, x: nnx.merge(*state, copy=True)(x, use_running_average=True),
        statistics=statistics,
        with_parameters=with_parameters,
        momentum=MOMENTUM,
        masks=True,
        over_devices=nnx_layer(AXIS) if axis_name is None else None,
    )


FUNCTION = function()
OURS = {"function": FUNCTION, "linen": linen(), "nnx": nnx_layer()}
NAMES = [law.name for law in LAWS]
ABOUT_STATISTICS = [
    "running_statistics_equal_oracle",
    "evaluation_equals_training_on_constant_statistics",
    "running_average_converges",
    "one_nan_batch",
    "dtypes_are_stable",
    "batch_masked_everywhere",
    "devices_with_unequal_counts",
]


def in_numpy(adapter):
    """Returns the same implementation without JAX to be seen, as one in another framework would be."""

    def numpy(tree):
        return jax.tree.map(np.asarray, tree)

    step = jax.jit(adapter.train)

    @jax.jit
    def gradients(state, x, scale, bias, dy, mask):
        def output(x, scale, bias):
            return adapter.train(adapter.with_parameters(state, scale, bias), x, mask)[0]

        y, vjp = jax.vjp(output, x, scale, bias)
        return vjp(dy.astype(y.dtype))

    return dataclasses.replace(
        adapter,
        name="numpy",
        init=lambda x: numpy(adapter.init(x)),
        train=lambda state, x, mask: numpy(step(state, x, mask)),
        evaluate=lambda state, x: numpy(adapter.evaluate(state, x)),
        gradients=lambda *arguments: numpy(gradients(*arguments)),
        traceable=False,
        over_devices=None,
    )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize(
    "name", ["function", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linen", "nnx"))]
)
def test_our_batch_norm_keeps_the_law(name, law):
    assert law.applies(OURS[name])
    check_batch_norm(OURS[name], [law])


@pytest.mark.slow
@pytest.mark.parametrize("law", ABOUT_STATISTICS)
@pytest.mark.parametrize("options", [{"debias": True}, {"unbiased": True}, {"momentum": None, "debias": True}], ids=str)
def test_the_options_of_our_running_statistics_keep_the_law(options, law):
    adapter = function(**options)
    if options.get("momentum", MOMENTUM) is None:  # the average over all batches alike
        adapter = dataclasses.replace(adapter, momentum=1.0)
    check_batch_norm(adapter, [law])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [mutants.BatchNorm, mutants.Unbiased, mutants.Debiased])
def test_what_the_mutants_are_made_of_keeps_every_law(kind):
    check_batch_norm(kind.adapter())


@pytest.mark.parametrize("kind", [mutants.BatchNorm, mutants.EvaluationHalvesTheVariance])
def test_an_average_with_a_long_memory_is_judged_in_few_steps(monkeypatch, kind):
    steps, train = [], values.train
    monkeypatch.setattr(values, "train", lambda *arguments: steps.append(None) or train(*arguments))
    slow = type(kind.__name__, (kind,), {"momentum": 0.9999})
    report = judge(slow.adapter(), "evaluation_equals_training_on_constant_statistics")
    assert bool(report.broken) == (kind is not mutants.BatchNorm), report
    assert 0 < len(steps) <= 2000


def test_every_law_has_a_mutant_that_breaks_it():
    assert list(mutants.BROKEN_BY) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "mutant"), [(law, mutant) for law, found in mutants.BROKEN_BY.items() for mutant in found]
)
def test_the_mutant_breaks_the_law(law, mutant):
    (finding,) = judge(mutant.adapter(), [law]).findings
    assert finding.outcome == "broken"
    assert finding.detail


def test_gradients_that_are_added_up_in_half_precision_are_found_in_the_gradients():
    (finding,) = judge(mutants.GradientsAddedInBfloat16.adapter(), "low_precision").findings
    assert finding.detail.startswith(("dx of", "dscale of", "dbias of"))


def test_a_crash_in_float64_breaks_the_law_unless_the_adapter_declares_that_it_takes_none():
    adapter = mutants.TakesNoFloat64.adapter()
    assert judge(adapter, "dtypes_are_stable").broken[0].detail == "TypeError: float64 is too wide"
    check_batch_norm(dataclasses.replace(adapter, float64=False), "dtypes_are_stable")


@pytest.mark.parametrize("law", ["large_means", "one_nan_batch", "nan_in_masked_positions"])
def test_flaxs_layer_breaks_the_law(law):
    assert judge(linen(flax.linen.BatchNorm), [law]).broken


def test_flaxs_layer_keeps_the_laws_of_ordinary_data():
    check_batch_norm(linen(flax.linen.BatchNorm), NAMES[:4])


@pytest.fixture(scope="module")
def numpy_adapter():
    return in_numpy(FUNCTION)


@pytest.mark.slow
@pytest.mark.parametrize("law", laws_for(in_numpy(FUNCTION)), ids=lambda law: law.name)
def test_an_implementation_that_is_not_made_of_jax_can_be_judged(numpy_adapter, law):
    check_batch_norm(numpy_adapter, [law])


def test_laws_that_an_adapter_declares_nothing_of_are_not_put_to_it():
    plain = dataclasses.replace(FUNCTION, masks=False, over_devices=None, half_precision=())
    without = set(NAMES) - {law.name for law in laws_for(plain)}
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


# Reports


def holds(adapter):
    del adapter


def broken(adapter):
    raise AssertionError(f"y of {adapter.name}: error 2, allowed 1\nand more")


def crashes(adapter):
    raise TypeError("no such thing")


THREE = [
    Law("first", "It holds.", lambda adapter: True, holds),
    Law("the_second", "It is broken.", lambda adapter: True, broken),
    Law("third", "It does not apply.", lambda adapter: False, broken),
    Law("fourth", "It raises.", lambda adapter: True, crashes),
]


def test_a_report_has_a_line_for_each_law():
    assert str(judge(FUNCTION, THREE)).splitlines() == [
        "function: 4 laws: 1 holds, 2 broken, 1 not declared",
        "first       holds",
        "the_second  broken        y of function: error 2, allowed 1",
        "third       not declared",
        "fourth      broken        TypeError: no such thing",
    ]


def test_a_report_of_no_laws_has_its_first_line_alone():
    assert str(judge(FUNCTION, [])) == "function: 0 laws: 0 holds, 0 broken, 0 not declared"


def test_a_broken_law_fails_the_check_with_a_line_for_it():
    with pytest.raises(AssertionError) as raised:
        check_batch_norm(FUNCTION, THREE)
    assert str(raised.value).splitlines() == [
        "function breaks 2 of 3 laws of batch norm:",
        "the_second  broken  y of function: error 2, allowed 1",
        "fourth      broken  TypeError: no such thing",
    ]


@pytest.mark.parametrize("one", ["gradient_sums_to_zero", LAWS[NAMES.index("gradient_sums_to_zero")]], ids=type)
def test_a_single_law_may_stand_alone(one):
    report = check_batch_norm(FUNCTION, one)
    assert str(report).splitlines() == [
        "function: 1 law: 1 holds, 0 broken, 0 not declared",
        "gradient_sums_to_zero  holds",
    ]


def test_a_single_broken_law_is_counted_in_the_singular():
    with pytest.raises(AssertionError, match="function breaks 1 of 1 law of batch norm:"):
        check_batch_norm(FUNCTION, THREE[1])


def test_a_check_that_passes_returns_its_report():
    report = check_batch_norm(FUNCTION, [THREE[0], THREE[2]])
    assert report.broken == ()
    assert [finding.law for finding in report.findings] == ["first", "third"]


def test_a_broken_law_says_quantity_case_error_and_tolerance():
    (finding,) = judge(mutants.FastVariance.adapter(), ["large_means"]).findings
    assert finding.detail.startswith("y of shape (48, 4) at mean/std 1000: error 0.")
    assert "allowed 0.01 (found " in finding.detail


def test_a_name_that_no_law_has_is_an_error_that_lists_close_ones():
    with pytest.raises(ValueError, match="'large_mean' is not a law; did you mean large_means"):
        judge(FUNCTION, ["large_mean"])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_a_law_is_one_sentence(law):
    assert law.name.isidentifier()
    assert law.statement.endswith(".") and "\n" not in law.statement


# What adapters declare and return


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"momentum": 1.5}, "momentum=1.5 is outside"),
        ({"momentum": None}, "momentum=None is not a number"),
        ({"epsilon": -1e-5}, "epsilon=-1e-05 is negative"),
        ({"train": "train"}, "train='train' is not a function"),
        ({"traceable": False}, "traceable=False without gradients"),
        ({"half_precision": "bfloat16"}, "half_precision='bfloat16' is not a sequence"),
        ({"half_precision": ("float32",)}, "is not a sequence of floating-point dtypes below 32 bits"),
        ({"half_precision": ("half-ish",)}, "is not a sequence of floating-point dtypes below 32 bits"),
        ({"over_devices": True}, "over_devices=True is not a traceable Adapter"),
    ],
)
def test_an_adapter_that_declares_what_cannot_be_is_refused(declared, message):
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
def test_what_comes_back_wrong_is_said(law, wrong, message):
    (finding,) = judge(dataclasses.replace(FUNCTION, **wrong), [law]).findings
    assert finding.outcome == "broken"
    assert message in finding.detail


def test_training_that_changes_the_state_it_was_given_is_said(numpy_adapter):
    def train(state, x, mask):
        y, state["inner"] = numpy_adapter.train(state["inner"], x, mask)
        return y, state

    adapter = dataclasses.replace(
        numpy_adapter,
        init=lambda x: {"inner": numpy_adapter.init(x)},
        train=train,
        statistics=lambda state: numpy_adapter.statistics(state["inner"]),
        with_parameters=lambda state, *given: {"inner": numpy_adapter.with_parameters(state["inner"], *given)},
    )
    (finding,) = judge(adapter, ["output_equals_oracle"]).findings
    assert finding.detail == "train changed the running statistics of the state it was given; return a new state"


@pytest.mark.slow
def test_laws_leave_no_trace_in_the_configuration():
    check_batch_norm(FUNCTION, ["dtypes_are_stable"])
    assert not jax.config.jax_enable_x64
