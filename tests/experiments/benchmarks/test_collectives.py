"""Collectives of a layer: their number on each parallel API, and bytes that do not grow with the devices."""

import math
import types

import pytest

from experiments.benchmarks import collectives, hlo, parts
from experiments.benchmarks.collectives import RECIPES, VALID, compile_layer, error_of_variance
from experiments.benchmarks.hlo import Collective, executed_bytes

LAYER = collectives.LAYERS["jaxbn"]
PROGRAM = """
HloModule example

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%rare (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.1 = f32[4]{0} all-reduce(%p), to_apply=%add
}

%often (p: f32[4]) -> f32[4] {
  ROOT %copy = f32[4]{0} copy(%p)
}

%called (p: bf16[2,3]) -> bf16[16,3] {
  ROOT %all-gather.1 = bf16[16,3]{1,0} all-gather(%p), dimensions={0}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %all-reduce.2 = (f32[4]{0}, f32[], s32[2]{0}) all-reduce(%p, %q, %r), to_apply=%add
  %call = bf16[16,3]{1,0} call(%h), to_apply=%called
  ROOT %conditional = f32[4]{0} conditional(%i, %p, %p), branch_computations={%rare, %often}
}
"""


DEVICES = 8


def executed_and_rare(api, **options):
    all_of_them = hlo.collectives(compile_layer(LAYER, api, devices=DEVICES, **options).as_text())
    executed = len(hlo.executed(all_of_them))
    return [executed, len(all_of_them) - executed]


def test_collectives_are_found_in_called_computations_and_branches():
    assert hlo.collectives(PROGRAM) == [
        Collective("all-reduce", 4 * 4 + 4 + 2 * 4, False),
        Collective("all-gather", 16 * 3 * 2, False),
        Collective("all-reduce", 4 * 4, True),
    ]


def test_a_branch_is_not_counted_among_what_every_step_executes():
    assert executed_bytes(hlo.collectives(PROGRAM)) == 28 + 96


@pytest.mark.slow
@pytest.mark.parametrize(("api", "masked"), [("jit", False), *((api, True) for api in RECIPES if api != "vmap")])
def test_a_forward_pass_executes_one_collective_and_the_backward_pass_one_more(api, masked):
    assert executed_and_rare(api, masked=masked) == [1, 1]
    assert executed_and_rare(api, masked=masked, backward=True) == [2, 1]


def test_bytes_do_not_grow_with_the_devices():
    programs = [compile_layer(LAYER, "shard_map", devices=devices, backward=True) for devices in (2, DEVICES)]
    sent = [executed_bytes(hlo.collectives(program.as_text())) for program in programs]
    # Sum and sum of squares forward, two sums backward; in float32.
    assert sent == [4 * 4 * collectives.FEATURES] * 2


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("api", RECIPES)
def test_variance_of_unequal_parts_is_that_of_the_whole_batch(api, valid):
    assert error_of_variance(LAYER, api, valid, DEVICES) < 1e-4  # %: some ten roundings


def test_averaging_over_devices_without_counts_shows_as_an_error():
    errors = [error_of_variance(collectives.LAYERS["Flax"], "vmap", valid, DEVICES) for valid in VALID]
    assert errors[0] > 10 and math.isnan(errors[1])


def test_cost_counts_what_every_step_executes_apart_from_the_rest():
    program = types.SimpleNamespace(as_text=lambda: PROGRAM)
    assert collectives.cost(program) == {"collectives": 2, "conditional": 1, "bytes": 28 + 96}


def test_environment_simulates_enough_devices():
    assert parts.ENVIRONMENTS["collectives"]["JAX_NUM_CPU_DEVICES"] == str(max(collectives.GROWTH))


@pytest.mark.slow
def test_there_is_a_record_for_each_api_and_layer_and_a_line_in_the_tables(monkeypatch):
    monkeypatch.setattr(collectives, "RECIPES", {"jit": "grad(loss)", "vmap": "pmean(grad(loss))"})
    monkeypatch.setattr(collectives, "LAYERS", {"jaxbn": LAYER})
    records = collectives.measure_apis(DEVICES)
    assert [(record["api"], record["layer"]) for record in records] == [("jit", "jaxbn"), ("vmap", "jaxbn")]
    assert records[0]["forward+backward"]["collectives"] == 2
    assert collectives.table_of_apis(records).row_count == 2
    assert collectives.table_of_growth(collectives.measure_growth([8])).row_count == 2  # and one for the groups
