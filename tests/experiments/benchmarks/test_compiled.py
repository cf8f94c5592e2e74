"""The page and the block of compiled programs: rows, ratios to Flax, and programs that were not compiled."""

from experiments.benchmarks import compiled

LAYER = {"kind": "layer", "what": "norm+ReLU", "shape": [256, 56, 56, 64], "pass": "forward", "chips": 1, "api": "jit"}
STEP = {"kind": "step", "what": "training step", "net": "ResNet-20", "batch_size": 128, "pass": "forward+backward"}
NOTHING = {"copied": 0, "temporaries": 0, "peak": 0, "collectives": 0, "rare_collectives": 0, "collective_bytes": 0}


def record(row, arm, moved, *, target="v6e", dtype="float32", kernels=3, **counts):
    return {
        **row,
        "target": target,
        "dtype": dtype,
        "arm": arm,
        "compiled": True,
        "bytes": moved,
        "kernels": kernels,
        **NOTHING,
        **counts,
    }


def dead(row, arm, target="v6e"):
    fields = {**row, "target": target, "dtype": "float32", "arm": arm}
    return fields | {"compiled": False, "error": "the compiler died (SIGILL)"}


def page(records):
    return compiled.page({"records": records}, command="measure", origin="with XLA 1")


def test_page_begins_by_saying_that_nothing_was_run():
    title, first, *_ = page([record(LAYER, "Flax", 1e8)]).split("\n\n")
    assert title.startswith("# ") and "They were not run" in first.split("\n")[0] and "with XLA 1" in first


def test_line_shows_each_arm_over_flaxs_and_kernels_and_temporaries_of_both():
    records = [
        record(LAYER, "jaxbn", 1e8, kernels=5, temporaries=2_500_000, copied=5e7),
        record(LAYER, "Flax", 2e8),
        record(LAYER, "Flax, stable", 3e8),
    ]
    text = page(records)
    assert "| program | pass | shape | dtype | jaxbn, MB | Flax, MB | Flax, stable, MB |" in text
    row = "| norm+ReLU | forward | 256x56x56x64 | float32 | 150 (0.75) | 200 | 300 (1.50) | 5 / 3 | 2.5 / 0.0 |"
    assert row in text and "Not compiled" not in text


def test_each_target_and_kind_has_a_table():
    text = page([record(LAYER, "Flax", 1e8), record(STEP | {"chips": 1, "api": "jit"}, "Flax", 1e8, target="h100")])
    assert "## v6e\n\n### The layer alone, and with ReLU, v6e\n\n|" in text
    assert "## h100\n\n### Training steps, h100\n\n|" in text


def test_steps_on_several_chips_show_collectives_and_those_that_are_rare():
    row = STEP | {"chips": 16, "api": "shard_map"}
    ours = record(row, "jaxbn", 1e6, collectives=39, rare_collectives=19, collective_bytes=1234)
    text = page([ours, record(row, "Flax", 2e6, collectives=39, collective_bytes=2345)])
    assert "| ResNet-20, batch 128 | float32 | 16, `shard_map` | 1.0 (0.50) | 2.0 |" in text
    assert "| 39 (+19) / 39 | 1,234 / 2,345 |" in text


def test_program_that_was_not_compiled_is_named_with_its_reason():
    text = page([dead(LAYER, "jaxbn"), record(LAYER, "Flax", 1e8), dead(LAYER | {"pass": "eval"}, "jaxbn")])
    assert "| not compiled | 100 | - / 3 | - / 0.0 |" in text
    first, second = (f"norm+ReLU, {name}, 256x56x56x64, float32" for name in ("forward", "eval"))
    assert f"| v6e | jaxbn | {first}; {second} | the compiler died (SIGILL) |" in text


def test_ratio_is_left_out_where_flaxs_was_not_compiled():
    assert "| 100 | not compiled | 3 / - |" in page([record(LAYER, "jaxbn", 1e8), dead(LAYER, "Flax")])


def test_block_shows_nets_before_layers_and_a_dash_for_an_arm_that_is_missing():
    row = STEP | {"chips": 1, "api": "jit"}
    records = [record(LAYER, "Flax", 3e8), record(LAYER, "jaxbn", 2e8, kernels=7)]
    records += [
        record(row, arm, moved, target="h100", dtype="bfloat16") for arm, moved in (("none", 1e6), ("Flax", 2e6))
    ]
    text = compiled.block({"records": records})
    net = "| ResNet-20, step | H100, bfloat16 | 1.0 | 2.0 | - | 3 / 3 / - |"
    layer = "| norm and ReLU, forward | TPU v6e, float32 | - | 300 | 200 | - / 3 / 7 |"
    assert text.index(net) < text.index(layer) and "not run" in text


def test_block_leaves_out_other_targets_shapes_and_several_chips():
    records = [
        record(LAYER, "Flax", 1e8, target="v5e"),
        record(LAYER | {"shape": [2, 3]}, "Flax", 1e8),
        record(STEP | {"chips": 16, "api": "jit"}, "Flax", 1e8, target="h100"),
    ]
    assert compiled.block({"records": records}).startswith("These programs are not measured yet.")


def test_megabytes_have_a_decimal_where_they_are_few():
    assert [compiled.megabytes(size) for size in (0, 1.25e6, 99.94e6, 99.96e6, 12.3e9)] == [
        "0.0",
        "1.2",
        "99.9",
        "100",
        "12,300",
    ]
