"""Mistakes are refused with the reason, and with what to do."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn import calibrate, surgery
from tests import reference
from tests.calibrate.models import (
    BATCHES,
    CHAIN,
    CHAIN_VARIABLES,
    FEATURES,
    LAYER,
    VARIABLES,
    NnxNet,
    X,
    assert_close,
    layer_variables,
    random_variables,
)

WRONG = {
    "an iterator": (dict(batches=iter([X])), "batches is a list_iterator, which can be read only once"),
    "a generator": (dict(batches=(x for x in [X])), "batches is a generator, which can be read only once"),
    "no batches": (dict(batches=[]), "batches is empty"),
    "one batch": (dict(batches=X), r"batches is an array of shape .*, which looks .* pass \[batch\]"),
    "one dict": (dict(batches={"x": X}), r"batches is a dict, which looks .* pass \[batch\]"),
    "a number": (dict(batches=3), "batches must be an iterable of batches or .*, got a int; pass for example a list"),
    "no statistics": (dict(variables={"params": {}}), r"the collection 'batch_stats', .* got \['params'\]; pass"),
    "other statistics": (dict(variables={"batch_stats": {}}), "variables have no 'mean', 'var'"),
    "a function": (dict(model=LAYER.apply), "the model must be a flax.linen.Module or an nnx.Module, got a method"),
    "a class": (dict(model=type(LAYER)), "the model must be .*, got the class BatchNorm; pass the module itself"),
    "no batch norm": (
        dict(model=nn.Sequential([nn.relu])),
        "no batch norm was called, so there is nothing to measure; the model must call flax.linen.BatchNorm",
    ),
    "all frozen": (dict(model=jaxbn.linen.BatchNorm(frozen=True)), "every batch norm that was called is frozen"),
    "long mask": (
        dict(mask=lambda x: np.ones(3, bool)),
        r"mask must return a boolean for each example, .* an array of shape \(3,\), and the inputs of",
    ),
    "a weight mask": (
        dict(mask=lambda x: np.ones(len(x))),
        "mask must hold booleans, or integers 0 and 1, got dtype float",
    ),
    "nothing counts": (dict(mask=lambda x: np.zeros(len(x), bool)), "4 of the 4 features of .* have no values"),
    "NaN": (dict(batches=[X, np.where(X > 8, np.nan, X)]), "the inputs of .* are not finite in"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_with_a_reason(wrong, message):
    with pytest.raises(ValueError, match=message):
        calibrate.layer_by_layer(**{"model": LAYER, "variables": layer_variables(), "batches": [X]} | wrong)


def test_an_nnx_model_takes_no_variables():
    with pytest.raises(ValueError, match="variables must be None for an nnx model"):
        calibrate.measure(NnxNet(), VARIABLES, X)


def test_the_first_layer_with_inputs_that_are_not_finite_is_named():
    broken = jax.tree.map(np.array, CHAIN_VARIABLES)
    broken["params"]["left"]["Dense_0"]["bias"] = np.full(FEATURES, np.nan, np.float32)
    for function in (calibrate.one_pass, calibrate.layer_by_layer):
        with pytest.raises(ValueError, match="the inputs of left/norm are not finite in 4 of 4 features"):
            function(CHAIN, broken, BATCHES)
        with pytest.raises(ValueError, match="the inputs of first/norm are not finite"):
            function(CHAIN, CHAIN_VARIABLES, [BATCHES[0] + np.inf])


def test_data_that_change_from_pass_to_pass_are_refused():
    reads = iter([BATCHES, BATCHES[:1]])
    with pytest.raises(ValueError, match="batches gave 2 batches at first and 1 when read again"):
        calibrate.layer_by_layer(CHAIN, CHAIN_VARIABLES, lambda: next(reads))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer, state = nn.BatchNorm(True), 0
        for step in range(x.shape[1]):
            state = layer(x[:, step] + state)
        return state


def test_batches_with_other_calls_are_refused():
    sequences = np.zeros((2, 3, FEATURES), np.float32)
    variables = {collection: {"BatchNorm_0": arrays} for collection, arrays in layer_variables().items()}
    with pytest.raises(ValueError, match="batch 2 calls layers more or less often than the first batch"):
        calibrate.one_pass(Recurrent(), variables, [sequences[:, :1], sequences])


# How the model is called.


class WithFlag(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(not train)(nn.Dense(2)(x))


FLAG_VARIABLES = random_variables(WithFlag(), train=False)


def test_a_model_with_more_arguments_asks_for_call():
    message = (
        r"WithFlag cannot be called as model\(batch\): missing a required argument: 'train'; .*"
        r"call=lambda module, batch: module\(batch, train=False\)."
    )
    for function, batches in ((calibrate.one_pass, [X]), (calibrate.layer_by_layer, [X]), (calibrate.measure, X)):
        with pytest.raises(ValueError, match=message):
            function(WithFlag(), FLAG_VARIABLES, batches)


def test_a_call_that_does_not_call_the_model_passed_to_it_is_refused():
    def call(module, batch):
        return WithFlag().apply(FLAG_VARIABLES, batch, train=False)

    for function, data in ((calibrate.one_pass, [X]), (surgery.fold, X)):
        with pytest.raises(ValueError, match="call did not call the WithFlag"):
            function(WithFlag(), FLAG_VARIABLES, data, call=call)


class Encoder(nn.Module):
    def setup(self):
        self.dense, self.norm = nn.Dense(2), nn.BatchNorm(True)

    def encode(self, x):
        return self.norm(self.dense(x))


def test_a_call_may_use_another_method_or_a_part_of_the_model():
    variables = random_variables(Encoder(), method="encode")
    for call in (lambda module, batch: module.encode(batch), lambda module, batch: module.norm(module.dense(batch))):
        assert list(calibrate.measure(Encoder(), variables, X, call=call)) == ["norm"]
    with pytest.raises(ValueError, match="Encoder has no __call__; .*call=lambda module, batch"):
        calibrate.measure(Encoder(), variables, X)


@pytest.mark.filterwarnings("ignore:shape requires ndarray or scalar arguments:DeprecationWarning")
def test_an_error_of_the_model_on_a_batch_of_several_arrays_mentions_call():
    with pytest.raises(TypeError) as error:
        calibrate.one_pass(WithFlag(), FLAG_VARIABLES, [(X, X)], call=lambda model, batch: model(batch, train=False))
    note, *_ = error.value.__notes__
    assert "batch is a tuple" in note and "call=lambda module, batch: module(batch[0])." in note


# Layers that are not known, and loops without a fixed number of turns.


class Foreign(nn.Module):
    """A batch norm that is none of Flax's."""

    stats: tuple[str, str] = ("ra_mean", "ra_var")

    @nn.compact
    def __call__(self, x):
        mean, var = (self.variable("batch_stats", name, jnp.ones, x.shape[-1:]).value for name in self.stats)
        return (x - mean) / jnp.sqrt(var + 1e-5)


class Beside(nn.Module):
    stats: tuple[str, str]

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True)(Foreign(self.stats, name="foreign")(x))


def test_statistics_of_an_unknown_layer_beside_batch_norms_are_refused_if_they_may_be_mean_and_variance():
    model = Beside(("ra_mean", "ra_var"))
    with pytest.raises(ValueError, match="statistics of foreign cannot be measured: Foreign is not known .* register"):
        calibrate.one_pass(model, model.init(jax.random.key(0), X), [X])
    model = Beside(("u", "sigma"))  # as nn.SpectralNorm has them
    calibrate.one_pass(model, model.init(jax.random.key(0), X), [X])


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.BatchNorm(True)
        if self.is_initializing():
            return layer(x)
        return jax.lax.while_loop(lambda y: y.sum() > 0, lambda y: layer(y) - 1, x)


def test_a_layer_in_a_loop_without_a_fixed_number_of_turns_is_refused():
    variables = {collection: {"BatchNorm_0": arrays} for collection, arrays in layer_variables().items()}
    with pytest.raises(ValueError, match="BatchNorm_0 is called inside of while, .* nn.scan"):
        calibrate.one_pass(Repeated(), variables, [X])


class Energy(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.BatchNorm(True)
        layer(x)
        return jax.grad(lambda x: jnp.square(layer(x)).sum())(x)


def test_a_derivative_of_a_layer_is_refused_unless_it_evaluates():
    variables = {collection: {"BatchNorm_0": arrays} for collection, arrays in layer_variables().items()}
    with pytest.raises(ValueError, match="the model takes a derivative of BatchNorm_0"):
        calibrate.one_pass(Energy(), variables, [X])
    measured = calibrate.measure(Energy(), variables, X)["BatchNorm_0"]
    assert_close({"": measured[:2]}, {"": reference.moments(X)[:2]})
