"""Blocks of pages: made from the files of measurements alone, and the committed ones are what the files give."""

import re

import pytest
from PIL import Image

from experiments import __main__ as cli
from experiments.__main__ import MEASUREMENTS, PROJECT
from experiments.benchmarks import calibration, collectives, folding, layers, numerics, steps, throughput
from experiments.evidence import files
from experiments.report import pages

PAGES = pages.pages(PROJECT)
HEADER = {
    "settings": {
        "rounds": 7,
        "step_processes": 2,
        "step_rounds": 3,
        "image_size": 32,
        "growth": [8, 64],
        "features": 64,
    },
    "date": "2001-01-01",
    "versions": {"python": "3.11", "jax": "0.10", "flax": "0.12"},
    "hardware": {"platform": "cpu", "device": "cpu", "cpu": "Z80", "cpu_count": 2, "largest_cache": "64K"},
    "commit": "c0ffee",
    "copy_bandwidth": 5e9,
}
ORIGIN = "on 2 cores of Z80, with jax 0.10, flax 0.12."


def spread(value):
    return {"median": value, "lower": value / 2, "upper": value * 2}


def layer_records(shape=(1024, 1024)):
    """Two rows of one pass: jaxbn takes half and twice the time of Flax's layer, and reaches half of the limit."""
    records = []
    for activation, ratio in (("none", 0.5), ("relu", 2.0)):
        row = {"pass": "forward", "activation": activation, "dtype": "float32", "shape": list(shape)}
        records += [
            {**row, "arm": "copy", "seconds": spread(1e-3), "bandwidth": 4e9},
            {**row, "arm": "jaxbn", "seconds": spread(2e-3), "ratio": spread(1.0), "limit": spread(0.5)},
            {**row, "arm": "Flax", "seconds": spread(4e-3), "ratio": spread(ratio), "limit": spread(0.25)},
        ]
    return records


def step_records(flax=(1.4, 1.4)):
    """Two processes, and the seconds of Flax's step in both; jaxbn adds a tenth of the net without a norm."""
    seconds = {"none": (1.0, 1.0), "Flax": flax, "jaxbn": (1.1, 1.1)}
    net = {"net": "ResNet-20", "width": 1.0, "batch_size": 128, "image_size": 32, "dtype": "float32"}
    before = {"none": (1.0, 1.0), "Flax": (2.0, 4.0), "jaxbn": (1.0, 3.0)}
    return [
        {
            **net,
            "arm": arm,
            "process": process + 1,
            "seconds": [seconds[arm][process]] * 3,
            "trace_seconds": 1.0,
            "compile_seconds": before[arm][process],
            "temporaries": 100 * seconds[arm][0],
        }
        for process in range(2)
        for arm in seconds
    ]


def api_record(api, layer, error, collective=1):
    cost = {"collectives": int(collective), "conditional": 0, "bytes": 512}
    return {
        "api": api,
        "layer": layer,
        "devices": 8,
        "forward": cost,
        "forward+backward": cost | {"collectives": 2 * collective, "conditional": 1},
        "errors": {"4, 4, 4, 1": error},
    }


def growth_records():
    cost = {"collectives": 2, "conditional": 0}
    return [
        {"layer": layer, "growth": devices, "forward+backward": cost | {"bytes": size * (10 if devices > 8 else 1)}}
        for devices in (8, 64)
        for layer, size in zip(collectives.LAYERS, (0, 1024, 1280), strict=True)
    ]


def compiled_records():
    """A layer on one chip, which moves 50, 100 and 150 MB."""
    row = {"target": "v6e", "kind": "layer", "what": "norm+ReLU", "shape": [256, 56, 56, 64], "dtype": "float32"}
    row |= {"pass": "forward", "chips": 1, "api": "jit"}
    counts = {"kernels": 3, "copied": 0, "temporaries": 2e6, "peak": 1e8, "conditionals": 0, "whiles": 0}
    counts |= {"collectives": 0, "rare_collectives": 0, "collective_bytes": 0, "rare_bytes": 0, "rare_kernels": 0}
    arms = {"jaxbn": 50e6, "Flax": 100e6, "Flax, stable": 150e6}
    return [{**row, "arm": arm, "compiled": True, "bytes": moved, **counts} for arm, moved in arms.items()]


def run_of(records, **header):
    return {"header": HEADER | header, "records": records}


@pytest.fixture
def folder(tmp_path):
    """A folder with measurements of the layers and the steps alone."""
    files.write(tmp_path / "bench-layers.jsonl", HEADER, layer_records())
    files.write(tmp_path / "bench-steps.jsonl", HEADER, step_records())
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_committed_page_shows_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    assert pages.rewrite(text, MEASUREMENTS) == text, "run `python -m experiments table` and commit the file"


@pytest.mark.parametrize("name", pages.BLOCKS)
def test_every_block_is_on_one_page_once_it_is_measured(name):
    shown = sum(page.read_text(encoding="utf-8").count(f"<!-- measured: {name} -->") for page in PAGES)
    assert shown == (MEASUREMENTS / f"{pages.BLOCKS[name].file}.jsonl").is_file()


def test_committed_rows_and_figure_show_what_was_measured():
    run = files.read_records(MEASUREMENTS / "bench-layers.jsonl")
    hint = "run `python -m experiments table` and commit the files"
    assert (PROJECT / layers.PAGE).read_text(encoding="utf-8") == layers.page(run, pages.MORE), hint
    assert Image.open(PROJECT / layers.FIGURE).text["Description"] == f"results {layers.digest(run)}", hint


def test_committed_page_of_compiled_programs_shows_what_was_counted():
    path, page = MEASUREMENTS / "bench-accelerators.jsonl", PROJECT / pages.COMPILED
    assert page.is_file() == path.is_file()
    if path.is_file():
        written = pages.compiled_page(files.read_records(path))
        assert page.read_text(encoding="utf-8") == written, "run `python -m experiments table` and commit the file"


def test_what_stands_outside_of_blocks_is_left_as_it_is(folder):
    text = "before\n<!-- measured: steps -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    written = pages.rewrite(text, folder)
    assert written.startswith("before\n<!-- measured: steps -->\n\n|") and written.endswith("\nafter <!-- end -->\n")
    assert "old" not in written


@pytest.mark.parametrize("name", pages.BLOCKS)
def test_committed_measurements_are_of_code_that_is_committed(name):
    path = MEASUREMENTS / f"{pages.BLOCKS[name].file}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not measured; if a page showed it, another test would fail")
    header = files.read_records(path)["header"]
    assert re.fullmatch("[0-9a-f]{40}", header["commit"])


def test_rewriting_twice_changes_nothing(folder):
    written = pages.rewrite("<!-- measured: steps -->\n<!-- end -->\n<!-- measured: layers -->\n<!-- end -->", folder)
    assert pages.rewrite(written, folder) == written


def test_block_ends_with_the_command_that_measures_it_and_the_machine(folder):
    text = pages.block("steps", folder)
    assert " ".join(text.split()).endswith(f"From `.venv/bin/python -m experiments bench steps`, {ORIGIN}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- measured: nothing -->\n<!-- end -->",
            "must be one of numerics, .*got `<!-- measured: nothing -->`",
        ),
        (
            "<!-- measured: numerics -->\n<!-- end -->",
            "numerics.jsonl does not exist.*bench numerics` writes it",
        ),
        ("<!-- measured: steps -->\n", "has no `<!-- end -->`"),
        ("<!-- measured: steps -->\n<!-- measured: layers -->\n<!-- end -->", "has no `<!-- end -->`"),
    ],
)
def test_block_that_cannot_be_made_is_an_error_that_says_what_to_do(folder, text, message):
    with pytest.raises(ValueError, match=message):
        pages.rewrite(text, folder)


def test_what_was_measured_is_printed_as_a_page_shows_it(folder, capsys):
    cli._show(["steps"], folder)
    printed = capsys.readouterr().out
    assert "ResNet-20, float32" in printed and "experiments bench steps" in " ".join(printed.split())


def test_page_and_figure_are_written_next_to_the_readme(folder):
    (folder / "README.md").write_text("<!-- measured: layers -->\n<!-- end -->\n")
    written = pages.write(folder, folder)
    assert written == [folder / "README.md", folder / layers.PAGE, folder / layers.FIGURE]
    assert all(path.is_file() for path in written)
    text = " ".join((folder / layers.PAGE).read_text().split())
    assert "copies large arrays at 5.0 GB/s" in text and pages.COMPILED.name not in text


def test_page_of_compiled_programs_is_written_where_they_were_counted_and_linked(folder):
    compilers = {"libtpu": "0.0.1"}
    header = HEADER | {"versions": HEADER["versions"] | {"jaxlib": "0.10"}, "compilers": compilers, "targets": ["v6e"]}
    files.write(folder / "bench-accelerators.jsonl", header, compiled_records())
    written = pages.write(folder, folder)
    assert written[-1] == folder / pages.COMPILED and f"]({pages.COMPILED.name})" in (folder / layers.PAGE).read_text(
        encoding="utf-8"
    )
    text = " ".join(written[-1].read_text(encoding="utf-8").split())
    assert "with jax 0.10, jaxlib 0.10, flax 0.12, libtpu 0.0.1, at commit c0ffee" in text
    shown = " ".join(pages.block("accelerators", folder).split())
    assert shown.endswith("bench accelerators`, compiled with jax 0.10, flax 0.12, libtpu 0.0.1.")


def test_guide_with_a_block_is_written_and_one_without_is_not(folder):
    guides = folder / "docs"
    guides.mkdir()
    for name, text in (("with.md", "<!-- measured: steps -->\n<!-- end -->\n"), ("without.md", "text\n")):
        (guides / name).write_text(text)
    written = pages.write(folder, folder)
    assert guides / "with.md" in written and guides / "without.md" not in written
    assert "experiments bench steps" in " ".join((guides / "with.md").read_text().split())


def test_layers_are_geometric_means_with_the_worst_row():
    text = layers.block(run_of(layer_records()))
    assert "| Flax | 1.00 (2.00) |" in text and "| *fraction of the limit* | 0.50 |" in text


def test_limit_is_left_out_where_all_arrays_are_small():
    assert "*fraction of the limit* | - |" in layers.block(run_of(layer_records(shape=(10, 10))))


def test_arm_that_was_left_out_of_a_row_is_a_dash():
    other = {"pass": "eval", "activation": "none", "dtype": "float32", "shape": [2, 3]}
    ours = {**other, "arm": "jaxbn", "seconds": spread(1e-3), "ratio": spread(1.0), "limit": spread(1.0)}
    copy = {**other, "arm": "copy", "seconds": spread(1e-3), "bandwidth": 1e9}
    records = [*layer_records(), copy, ours, {**ours, "activation": "relu"}, {**copy, "activation": "relu"}]
    records.append({**ours, "arm": "Flax", "activation": "relu"})
    assert "| Flax | 1.00 (2.00) | 1.00 (1.00) |" in layers.block(run_of(records))
    assert "| 2x3 | none | 1.000 | 1.00 | 1.0 | - |" in layers.all_rows(run_of(records))


def test_page_shows_every_row_with_quartiles():
    text = layers.all_rows(run_of(layer_records()))
    assert "## forward, float32" in text
    assert "| 1024x1024 | none | 2.000 | 0.50 | 4.0 | 0.50 (0.25 to 1.00) |" in text
    assert "| 1024x1024 | relu | 2.000 | 0.50 | 4.0 | 2.00 (1.00 to 4.00) |" in text


def test_steps_show_what_each_norm_adds_next_to_flaxs():
    text = steps.block(run_of(step_records()))
    assert "| ResNet-20, float32 | Flax | 40 % (40 to 40) | 1.00 (1.00 to 1.00) | 1.40 | 1.00 / 1.00 |" in text
    assert "| ResNet-20, float32 | jaxbn | 10 % (10 to 10) | 0.25 (0.25 to 0.25) | 1.10 | 0.62 / 1.00 |" in text
    assert "| none |" not in text and "ResNet-20 at width 1 and batch 128" in text
    assert "2 processes, and 3 rounds in each" in " ".join(text.split())


@pytest.mark.parametrize(
    ("flax", "cells"),
    [
        ((0.9, 0.9), "| Flax | -10 % (-10 to -10) | - |"),
        ((0.9, 1.4), "| Flax | 15 % (-10 to 40) | - |"),
        ((0.998, 0.998), "| Flax | 0 % (0 to 0) | - |"),
    ],
)
def test_share_is_left_out_where_flaxs_norm_may_add_nothing(flax, cells):
    text = steps.block(run_of(step_records(flax)))
    assert cells in text and "| jaxbn | 10 % (10 to 10) | - |" in text


def test_apis_that_do_the_same_share_a_line():
    apis = ("jit", "shard_map", "shard_map, check_vma=False", "vmap")
    same = [api_record(api, "jaxbn", 0.0, collective=api != "vmap") for api in apis]
    other = [api_record(api, "Flax", 0.0 if api == "jit" else 35.2, collective=api != "vmap") for api in apis]
    text = collectives.block(run_of([*same, *other, *growth_records()]))
    assert "| jaxbn, every API | 1 | 2 (+1) | 0 |" in text
    assert "| Flax, `jit` | 1 | 2 (+1) | 0 |" in text
    assert "| Flax, `shard_map`, `vmap` | 1 | 2 (+1) | 35 % |" in text


def test_bytes_are_told_once_where_they_do_not_grow():
    text = collectives.block(run_of([api_record("jit", "jaxbn", 0.0), *growth_records()]))
    assert (
        "on 8, 64 devices (a single number: the same on all): jaxbn 0; Flax 1,024, 10,240; Flax, stable 1,280" in text
    )


def test_throughput_is_a_sentence():
    def record(timed, arm, seconds, over_plain):
        found = {"timed": timed, "arm": arm, "seconds": seconds, "images_over_plain": spread(over_plain)}
        return found | {"seconds_over_at_hand": spread(seconds)}

    records = [record("step", throughput.FIT, 1.03, 1.2), record("run", throughput.FIT, 9.0, 1.1)]
    text = throughput.block(run_of(records))
    assert "processes 1.10 times as many images" in text and "adds 3.0 % to a step" in text


def test_folding_is_told_by_net_and_api():
    found = {"norms": 54, "folded": 53, "difference": 3.2e-6, "ratio": {"median": 0.8, "lower": 0.72, "upper": 0.91}}
    record = {"net": "Inception", "api": "nnx", "width": 0.25, **found}
    text = folding.block(run_of([record], settings={"batch_size": 50, "image_size": 32, "rounds": 9}))
    assert "| Inception at width 0.25, nnx | 54 | 53 | 3e-6 | 0.80 (0.72 to 0.91) |" in text
    assert "batches of 50 images of 32 x 32" in text


@pytest.fixture
def calibrated():
    """Statistics with two accuracies at each number of images, of which the net without calibration has one."""
    settings = {
        "config": {"net": "cnn7", "epochs": 4, "image_size": 16},
        "data": "Images, made up",
        "train_images": 10_000,
        "test_images": 2_000,
        "draws": 2,
        "added_to_means": 3,
        "times_variances": 10,
    }
    alone = [
        {"statistics": name, "accuracies": [value]}
        for name, value in ((calibration.TRAINED, 51.14), (calibration.WRECKED, 10.0))
    ]
    records = [
        {"statistics": name, "images": n, "accuracies": [50.0, value]}
        for n in (10, 1_000)
        for name, value in (("one pass", 52.0), ("layer by layer", 50.0))
    ]
    return run_of([*alone, *records], settings=settings)


def test_accuracies_after_calibration_are_told_by_images_with_their_spread(calibrated):
    text = calibration.block(calibrated)
    assert "| images | one pass | layer by layer |" in text and "over 2 draws" in text
    assert "| 10 | 51.0 ± 1.4 | 50.0 ± 0.0 |" in text and "| 1,000 | 51.0 ± 1.4 | 50.0 ± 0.0 |" in text


def test_accuracies_without_calibration_are_told_in_words(calibrated):
    text = calibration.block(calibrated)
    assert "for 4 epochs on 10,000 images at 16 x 16 pixels (Images, made up)" in text
    assert "accuracy is 51.1 % with the running averages" in text and "10.0 % with corrupted ones" in text
    assert "means 3 too large, variances 10 times too large" in text


def test_errors_are_told_by_mean():
    record = {"mean": 1e5, "implementation": "jaxbn", "output": 5.2e-7, "gradient": 3.0}
    text = numerics.block(run_of([record, record | {"implementation": "Flax"}]))
    assert "| mean/std | jaxbn | Flax |" in text and "| 1e5 | 5e-7 / 3e0 | 5e-7 / 3e0 |" in text
