"""Training steps of the benchmark: mixed precision as promised, separate processes, and the texts about the seconds."""

import os
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.mark.slow
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
    actual = steps.rounded({"ConvNorm_0": {"Conv_0": {"kernel": one}, "BatchNorm_0": {"scale": one}}}, jnp.bfloat16)
    assert actual["ConvNorm_0"]["Conv_0"]["kernel"].dtype == jnp.bfloat16
    assert actual["ConvNorm_0"]["BatchNorm_0"]["scale"].dtype == jnp.float32


class Lowered:
    """Stands for a step, and for its program that is not compiled yet."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def lower(self):
        return self

    def compile(self):
        self.order.append(self.name)
        return self.name


def steps_that_record(order):
    """A step for each arm, which only says when it is compiled."""
    return {name: Lowered(name, order) for name in steps.ARMS}


def test_all_arms_are_compiled_in_the_order_of_the_process():
    orders = []
    for process in range(1, 9):
        order = []
        compiled, seconds = steps.compile_in_turn(steps_that_record(order), random.Random(process))
        assert compiled == {name: name for name in steps.ARMS} and sorted(order) == sorted(steps.ARMS)
        assert all(set(actual) == {"trace_seconds", "compile_seconds"} for actual in seconds.values())
        orders.append(tuple(order))
    assert len(set(orders)) > 4


def test_pieces_are_both_nets_in_every_dtype_as_often_as_there_are_processes():
    settings = Settings(dtypes=DTYPES, step_processes=2)
    assert list(steps.pieces(settings)) == [
        f"{net}, {dtype}, process {process}"
        for net in ("ResNet-20", "Inception")
        for dtype in DTYPES
        for process in (1, 2)
    ]


@pytest.mark.slow
def test_pieces_are_measured_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(steps, "measure", process_of)
    settings = Settings(step_processes=2)
    actual = [piece() for piece in list(steps.pieces(settings).values())[:2]]
    assert [process for _, process in actual] == [1, 2]
    assert len({os.getpid(), *(number for number, _ in actual)}) == 3


def process_of(name, config, dtype, process, **_):
    """Stands for `measure`, and says where it was called."""
    return os.getpid(), process


def record(arm, seconds, temporaries, **before):
    return {"arm": arm, "seconds": [seconds] * 3, "temporaries": temporaries, **before}


def test_summary_says_what_a_norm_adds_over_what_flaxs_adds():
    records = [
        record("none", 1.0, 100, trace_seconds=1.0, compile_seconds=1.0),
        record("Flax", 1.4, 150, trace_seconds=2.0, compile_seconds=2.0),
        record("jaxbn", 1.1, 101, trace_seconds=3.0, compile_seconds=3.0),
        record("none", 2.0, 100, trace_seconds=1.0, compile_seconds=1.0),
        record("Flax", 2.8, 150, trace_seconds=2.0, compile_seconds=4.0),
        record("jaxbn", 2.2, 101, trace_seconds=3.0, compile_seconds=3.0),
    ]
    none, flax, ours = steps.summarize(records)
    assert none["added"]["value"] == none["share"]["value"] == 0
    assert flax["added"]["value"] == pytest.approx(0.4) and flax["share"]["value"] == 1
    assert ours["added"]["value"] == pytest.approx(0.1) and ours["share"]["value"] == pytest.approx(0.25)
    assert ours["temporaries"] == 1.01
    assert ours["trace"]["median"] == 1.5 and ours["compile"]["median"] == (1.5 + 0.75) / 2


def test_share_is_what_one_arm_adds_over_what_the_other_adds():
    assert steps.share(1.2, 1.4) == pytest.approx(0.5)
    assert steps.share([1.2, 0.9], [1.4, 1.1]).tolist() == pytest.approx([0.5, -1])


def test_share_of_nothing_is_not_a_number():
    assert np.isnan(steps.share([1.2, 1.2], [0.9, 1.0])).all()
