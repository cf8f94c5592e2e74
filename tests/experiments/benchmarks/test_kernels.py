"""Counting kernels and bytes: each rule on a handwritten program of a few lines."""

import pytest

from experiments.benchmarks import kernels

SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""


def count(entry, computations=""):
    """Counts a program with inputs x: f32[100] and i: s32[]; the lines of `entry` may use them."""
    head = "HloModule example, is_scheduled=true\n"
    inputs = "  %x = f32[100]{0} parameter(0)\n  %i = s32[] parameter(1)\n"
    body = "".join(f"  {line}\n" for line in entry)
    return kernels.count(f"{head}{computations}\nENTRY %main (x: f32[100], i: s32[]) -> f32[] {{\n{inputs}{body}}}\n")


def kernels_and_bytes(*arguments):
    counted = count(*arguments)
    return counted.kernels, counted.bytes


def test_kernel_reads_each_distinct_operand_once_and_writes_its_result():
    assert kernels_and_bytes(["ROOT %y = bf16[100]{0:T(256)} multiply(%x, %x)"]) == (1, 400 + 200)


def test_results_in_a_tuple_are_added_and_a_scalar_has_one_element():
    assert kernels_and_bytes(["ROOT %y = (f32[10,2]{1,0}, pred[7]{0}, s32[]) custom-call(%x)"]) == (1, 400 + 80 + 7 + 4)


def test_comments_and_layouts_in_a_shape_are_not_arrays():
    entry = ["ROOT %y = (f32[10]{0:T(256)}, /*index=1*/f32[5]{0}) custom-call(%x, /*index=1*/%i)"]
    assert kernels_and_bytes(entry) == (1, 404 + 60)


def test_names_for_arrays_execute_nothing():
    entry = [
        "%flat = f32[10,10]{1,0} bitcast(%x)",
        "%both = (f32[100]{0}, s32[]) tuple(%x, %i)",
        '%memory = f32[100]{0} custom-call(), custom_call_target="AllocateBuffer"',
        "ROOT %same = f32[100]{0} get-tuple-element(%both), index=0",
    ]
    assert kernels_and_bytes(entry) == (0, 0)


def test_arrays_on_the_chip_do_not_count():
    entry = ["%y = f32[100]{0:T(256)S(1)} negate(%x)", "ROOT %z = f32[100]{0} exponential(%y)"]
    assert kernels_and_bytes(entry) == (2, 400 + 400)


def test_copy_to_the_chip_is_counted_apart_by_what_it_moves_in_device_memory():
    entry = [
        "%start = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%x)",
        "ROOT %done = f32[100]{0:S(1)} copy-done(%start)",
    ]
    counted = count(entry)
    assert (counted.kernels, counted.bytes, counted.copied) == (0, 0, 400)


def test_copy_back_from_the_chip_moves_what_it_writes():
    entry = [
        "%y = f32[100]{0:S(1)} negate(%x)",
        "%start = (f32[100]{0}, f32[100]{0:S(1)}, u32[]{:S(2)}) copy-start(%y)",
        "ROOT %done = f32[100]{0} copy-done(%start)",
    ]
    counted = count(entry)
    assert (counted.kernels, counted.bytes, counted.copied) == (1, 400, 400)


def test_slice_to_the_chip_moves_the_slice():
    entry = [
        "%start = ((f32[100]{0}), f32[25]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:25]}",
        "ROOT %done = f32[25]{0:S(1)} slice-done(%start)",
    ]
    assert count(entry).copied == 100


@pytest.mark.parametrize(
    "branches", ["branch_computations={%usual, %rare}", "true_computation=%rare, false_computation=%usual"]
)
def test_first_branch_of_a_conditional_counts_and_the_others_are_rare(branches):
    computations = """
%usual (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %copy = f32[100]{0} copy(%p)
}

%rare (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  %once = f32[100]{0} negate(%q)
  ROOT %twice = f32[50]{0} custom-call(%once)
}
"""
    counted = count([f"ROOT %y = f32[100]{{0}} conditional(%i, %x, %x), {branches}"], computations)
    assert (counted.conditionals, counted.kernels, counted.bytes) == (1, 1, 800)
    assert (counted.rare.kernels, counted.rare.bytes) == (2, 800 + 600)


BODY = """
%body (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %next = f32[100]{0} negate(%p)
}

%condition (p: f32[100]) -> pred[] {
  %p = f32[100]{0} parameter(0)
  ROOT %more = pred[] custom-call(%p)
}
"""


@pytest.mark.parametrize(
    ("turns", "executed"), [('backend_config={"known_trip_count":{"n":"3"}}', (3, 2400)), ("metadata={}", (0, 0))]
)
def test_loop_runs_as_often_as_is_known(turns, executed):
    loop = f"ROOT %y = f32[100]{{0}} while(%x), condition=%condition, body=%body, {turns}"
    assert kernels_and_bytes([loop], BODY) == executed
    assert count([loop], BODY).whiles == 1


def test_called_computation_is_counted_where_it_is_called():
    assert kernels_and_bytes(["ROOT %y = f32[100]{0} call(%x), to_apply=%body"], BODY) == (1, 800)


def fusion(*lines):
    """A fused computation whose first operand is f32[100] and whose second is an index."""
    body = "".join(f"  {line}\n" for line in lines)
    inputs = "  %p = f32[100]{0} parameter(0)\n  %at = s32[] parameter(1)\n"
    return f"%fused (p: f32[100], at: s32[]) -> f32[10] {{\n{inputs}{body}}}\n"


CALL = ["ROOT %y = f32[10]{0} fusion(%x, %i), kind=kLoop, calls=%fused"]


def test_fusion_is_one_kernel_that_reads_its_operands():
    fused = fusion("%n = f32[100]{0} negate(%p)", "ROOT %s = f32[10]{0} slice(%n), slice={[0:10]}")
    assert kernels_and_bytes(CALL, fused) == (1, 400 + 40)


@pytest.mark.parametrize(
    "cut",
    [
        "slice(%p), slice={[0:10]}",
        "dynamic-slice(%p, %at), dynamic_slice_sizes={10}",
        "gather(%p, %at), slice_sizes={10}",
    ],
)
def test_operand_of_which_a_fusion_only_cuts_slices_counts_as_the_slices(cut):
    fused = fusion(f"%s = f32[10]{{0}} {cut}", "ROOT %n = f32[10]{0} negate(%s)")
    scalar = 4 if "%at" in cut else 0
    assert kernels_and_bytes(CALL, fused) == (1, 40 + scalar + 40)


def test_slices_are_seen_through_reshapes_and_conversions_and_keep_the_bytes_of_the_operand():
    fused = fusion(
        "%r = f32[10,10]{1,0} bitcast(%p)",
        "%c = bf16[10,10]{1,0} convert(%r)",
        "%s = bf16[1,10]{1,0} slice(%c), slice={[0:1], [0:10]}",
        "ROOT %b = f32[10]{0} custom-call(%s)",
    )
    assert kernels_and_bytes(CALL, fused) == (1, 40 + 40)


def test_all_slices_count_but_no_more_than_the_operand():
    cut = [f"%s{k} = f32[30]{{0}} slice(%p), slice={{[{k}:{k + 30}]}}" for k in range(3)]
    whole = "ROOT %b = f32[10]{0} custom-call(%s0, %s1, %s2)"
    assert kernels_and_bytes(CALL, fusion(*cut, whole)) == (1, 3 * 120 + 40)
    more = [*cut, "%s3 = f32[90]{0} slice(%p), slice={[0:90]}", whole]
    assert kernels_and_bytes(CALL, fusion(*more)) == (1, 400 + 40)


def test_operand_that_is_also_used_whole_counts_whole():
    fused = fusion("%s = f32[10]{0} slice(%p), slice={[0:10]}", "ROOT %b = f32[10]{0} custom-call(%s, %p)")
    assert kernels_and_bytes(CALL, fused) == (1, 400 + 40)


def test_operand_that_comes_out_again_counts_whole():
    fused = fusion("ROOT %r = f32[10,10]{1,0} bitcast(%p)")
    assert kernels_and_bytes(CALL, fused) == (1, 400 + 40)


def test_slices_are_seen_in_a_nested_fusion():
    inner = fusion("ROOT %s = f32[10]{0} slice(%p), slice={[0:10]}").replace("%fused", "%inner")
    outer = fusion("ROOT %n = f32[10]{0} fusion(%p, %at), kind=kLoop, calls=%inner")
    assert kernels_and_bytes(CALL, inner + outer) == (1, 40 + 40)


@pytest.mark.parametrize(
    ("kernel", "scalar"), [("slice(%x), slice={[0:10]}", 0), ("dynamic-slice(%x, %i), dynamic_slice_sizes={10}", 4)]
)
def test_slice_that_stands_alone_moves_the_slice(kernel, scalar):
    assert kernels_and_bytes([f"ROOT %y = f32[10]{{0}} {kernel}"]) == (1, 40 + scalar + 40)


def test_collectives_are_counted_apart_with_the_bytes_that_a_device_hands_over():
    entry = [
        "%sums = (f32[100]{0}, s32[]) all-reduce-start(%x, %i), to_apply=%sum",
        "%done = (f32[100]{0}, s32[]) all-reduce-done(%sums)",
        "ROOT %y = f32[800]{0} all-gather(%x), dimensions={0}",
    ]
    counted = count(entry, SUM)
    assert (counted.collectives, counted.collective_bytes, counted.kernels, counted.bytes) == (2, 404 + 400, 0, 0)


def test_collective_inside_a_fusion_or_an_asynchronous_start_is_found():
    fused = fusion("%r = f32[100]{0} all-reduce(%p), to_apply=%sum", "ROOT %s = f32[10]{0} slice(%r), slice={[0:10]}")
    for opcode in ("fusion(%x, %i), kind=kCustom", "async-start(%x, %i)"):
        counted = count([f"ROOT %y = f32[10]{{0}} {opcode}, calls=%fused"], SUM + fused)
        assert (counted.collectives, counted.collective_bytes, counted.kernels) == (1, 404, 0)


def test_collective_in_a_branch_is_rare():
    rare = """
%usual (p: f32[100]) -> f32[100] {
  ROOT %p = f32[100]{0} parameter(0)
}

%rare (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  ROOT %r = f32[100]{0} all-reduce(%q), to_apply=%sum
}
"""
    counted = count(["ROOT %y = f32[100]{0} conditional(%i, %x, %x), branch_computations={%usual, %rare}"], SUM + rare)
    assert (counted.collectives, counted.rare.collectives, counted.rare.collective_bytes) == (0, 1, 400)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="the program has no ENTRY computation; pass the text of optimized HLO"):
        kernels.count("HloModule nothing\n")
