"""Training steps of the benchmark: mixed precision as promised, compilations in turns, and what the seconds say."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import Settings, steps
from experiments.config import Config

NET = Config(net="resnet20", width=1 / 16, batch_size=2)
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module", params=DTYPES)
def lowered(request):
    """The program of a step with Flax's norm, before compilation, and its dtype as the program writes it."""
    step = steps.training_step(steps.ARMS[steps.FLAX], NET, jnp.zeros((2, 8, 8, 3), request.param))
    return step.lower().as_text(), {"float32": "f32", "bfloat16": "bf16"}[request.param]


def test_convolutions_work_in_the_dtype_of_the_images(lowered):
    text, dtype = lowered
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert convolutions
    for line in convolutions:
        assert set(re.findall(r"tensor<[\dx]+x(\w+)>", line.rpartition(" : ")[2])) == {dtype}


def test_outputs_of_the_norms_have_the_dtype_of_the_images(lowered):
    text, dtype = lowered
    relus = re.findall(r"@relu.*?\(%arg0: tensor<[\dx]+x(\w+)>", text)
    assert relus and set(relus) == {dtype}


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_stays_float32(dtype):
    step = steps.training_step(steps.ARMS[steps.OURS], NET, jnp.zeros((2, 8, 8, 3), dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(step.state)} == {jnp.dtype("float32")}


def test_parameters_of_norms_are_not_rounded():
    one = jnp.ones(1)
    found = steps.rounded({"ConvNorm_0": {"Conv_0": {"kernel": one}, "BatchNorm_0": {"scale": one}}}, jnp.bfloat16)
    assert found["ConvNorm_0"]["Conv_0"]["kernel"].dtype == jnp.bfloat16
    assert found["ConvNorm_0"]["BatchNorm_0"]["scale"].dtype == jnp.float32


class Lowered:
    """Stands for a program that is not compiled yet."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def compile(self):
        self.order.append(self.name)
        return self.name


def test_compared_arms_are_compiled_in_turns_and_the_others_once():
    order = []
    plan = {name: steps.Step(lambda name=name: Lowered(name, order), (), ()) for name in steps.ARMS}
    compiled, seconds = steps.compile_in_turns(plan, 3)
    assert compiled == {name: name for name in steps.ARMS}
    assert {name: len(each) for name, each in seconds.items()} == {"none": 1, "Flax": 3, "Flax, stable": 1, "jaxbn": 3}
    assert sorted(order[:4]) == sorted(steps.ARMS) and sorted(order[4:6]) == sorted(order[6:]) == ["Flax", "jaxbn"]


def test_pieces_are_both_nets_in_every_dtype():
    settings = Settings(dtypes=DTYPES)
    assert list(steps.pieces(settings)) == [f"{net} {dtype}" for net in ("ResNet-20", "Inception") for dtype in DTYPES]


def record(arm, seconds, temporaries, compile_seconds):
    found = {"arm": arm, "seconds": [seconds] * 3, "temporaries": temporaries}
    return found | {"compile_seconds": compile_seconds}


def test_summary_says_what_a_norm_adds_over_what_flaxs_adds():
    records = [
        record("none", 1.0, 100, [1.0]),
        record("Flax", 1.4, 150, [2.0, 4.0]),
        record("jaxbn", 1.1, 101, [3.0, 6.0]),
    ]
    none, flax, ours = steps.summarize(records)
    assert none["added"]["value"] == 0 and flax["added"]["value"] == 1
    assert ours["added"]["value"] == pytest.approx(0.25)
    assert ours["temporaries"] == 1.01 and ours["compile"]["median"] == 1.5 and none["compile"]["median"] == 0.5
