"""The arguments of `diagnose`, its printed output, and its errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxbn.diagnose import diagnose
from tests.calibrate.test_programs import count_compilations
from tests.diagnose.nets import (
    LAYER,
    STANDARD,
    forget,
    held_out,
    model_of,
    names,
    normal,
    planted,
    trained,
)


class NoNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


@pytest.mark.parametrize("front_end", ["linen", "nnx"])
def test_arguments_are_not_changed(front_end):
    model, variables = model_of(front_end, jax.tree.map(jnp.copy, trained()))
    batches = held_out()

    def arguments():
        of_model = nnx.to_pure_dict(nnx.state(model)) if variables is None else variables
        return jax.tree.map(np.array, (of_model, batches))

    before = arguments()
    diagnose(model, variables, batches, call=forget)
    jax.tree.map(np.testing.assert_array_equal, before, arguments())


def test_batches_are_read_once_and_programs_are_compiled_once():
    traced = []

    def call(layer, x):
        traced.append(x.shape)
        return layer(x)

    def number_of_traces(count):
        traced.clear()
        batches = (normal(64, 3, seed=k) for k in range(count))
        assert diagnose(LAYER, STANDARD, batches, call=call).layers[0].batches == count
        return len(traced)

    assert number_of_traces(2) == 1
    with count_compilations() as compilations:
        assert number_of_traces(7) == 1
    assert compilations == []


def test_a_function_may_return_the_batches():
    assert names(diagnose(LAYER, STANDARD, lambda: iter([normal(64, 3)]))) == []


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_nnx_model_is_diagnosed_in_the_mode_in_which_it_was_left(mode):
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    getattr(model, mode)()
    found = "train flag left on" in names(diagnose(model, None, [normal(64, 3)] * 8))
    assert found == (mode == "train")


def test_text_shows_a_row_for_each_layer_and_all_of_a_finding():
    diagnosis = planted("train flag left on")
    head, *lines = str(diagnosis).splitlines()
    assert re.split(" +", head) == [
        *("layer", "features", "values", "gap", "alone", "shift", "ratio", "noise", "excess", "notes")
    ]
    assert re.fullmatch(r"second +8 +2048( +\d\.\d\d){6}  trains", lines[0])
    assert re.fullmatch(r"first +16 +512( +\d\.\d\d){6}  trains", lines[1])
    finding = diagnosis.findings[0]
    for words in (finding.name, finding.evidence, finding.remedy):
        assert words in " ".join(str(diagnosis).split())
    assert max(map(len, diagnosis.text(60).splitlines())) <= 60


@pytest.mark.parametrize(
    ("model", "variables", "batches", "options", "message"),
    [
        (LAYER, STANDARD, [], {}, "batches is empty; .*at least one batch"),
        (
            LAYER,
            STANDARD,
            normal(32, 3),
            {},
            r"batches is an array of shape .*, which looks like a single batch; .*pass \[batch\]",
        ),
        (LAYER, STANDARD, [normal(32, 3)], {"devices": 0}, "devices must be at least 1, got 0"),
        (LAYER, {"params": {}}, [normal(32, 3)], {}, "'batch_stats', .* got .*; pass the result of model.init"),
        (LAYER.apply, STANDARD, [normal(32, 3)], {}, "the model must be .* or an nnx.Module, got a method"),
        (
            nn.BatchNorm(),
            STANDARD,
            [normal(32, 3)],
            {},
            "use_running_average of the model is set neither by the model nor by call",
        ),
        (NoNorm(), {"params": {}, "batch_stats": {}}, [normal(32, 3)], {}, "no batch norm was called"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_arguments_are_refused(model, variables, batches, options, message):
    if isinstance(model, NoNorm):
        variables = NoNorm().init(jax.random.key(0), batches[0]) | {"batch_stats": {}}
    with pytest.raises(ValueError, match=message):
        diagnose(model, variables, batches, **options)


def test_variables_beside_an_nnx_model_are_refused():
    with pytest.raises(ValueError, match="variables must be None for an nnx model"):
        diagnose(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {}, [normal(32, 3)])
