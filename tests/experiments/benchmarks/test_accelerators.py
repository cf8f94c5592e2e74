"""Programs for accelerators: their rows, the process that compiles one, and its results; needs no compiler."""

import json
import signal

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmarks
from experiments.benchmarks import Settings, accelerators, aot, programs, targets

ALL = Settings()
ALONE = (programs.NORM, programs.NORM_RELU)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(targets, "missing", lambda name: None)


def test_names_in_the_settings_are_those_that_exist():
    assert tuple(targets.TARGETS) == benchmarks.TARGETS
    assert set(programs.LAYERS) == set(benchmarks.ARMS)
    assert set(accelerators.LARGE) < set(benchmarks.NETS)


@pytest.mark.parametrize("name", [name for name, target in targets.TARGETS.items() if target.platform == "cuda"])
def test_every_gpu_has_a_description(name):
    assert "gpu_device_info" in (targets.HERE / f"{name}.txtpb").read_text()


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="Unknown target v9 on 1 chips; choose one of: v5e on 1, 16, 256; v5p"):
        targets.devices("v9")


def test_target_without_its_compiler_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(targets, "_version", lambda package: None if package == "libtpu" else "1.0")
    accelerators._print_once.cache_clear()
    assert accelerators.available(("v6e", "h100")) == ["h100"]
    said = "v6e is left out: libtpu not installed; install the compilers with pip install 'jaxbn[aot]'.\n"
    assert capsys.readouterr().err == said
    with pytest.raises(
        ModuleNotFoundError,
        match="no compiler for any target: libtpu not installed; install the compilers with pip install 'jaxbn",
    ):
        accelerators.available(("v6e", "v5e"))


def test_piece_is_a_target_kind_shape_or_net_and_dtype(installed):
    settings = Settings(targets=("v6e", "h100"), compiled_shapes=((4, 2),), dtypes=("float32",), nets=("ResNet-20",))
    names = [f"{target} {kind} 4x2 float32" for target in settings.targets for kind in ("layer", "block", "inference")]
    names += [f"{target} step ResNet-20 on 1 float32" for target in settings.targets]
    names += [f"h100 step ResNet-20 on {chips} float32" for chips in (8, 16)]
    assert set(accelerators.pieces(settings)) == set(names)


def test_row_is_there_once():
    for target in benchmarks.TARGETS:
        rows = [json.dumps(row, sort_keys=True) for row in accelerators.rows(target, ALL)]
        assert len(set(rows)) == len(rows)


def test_large_nets_and_several_chips_are_compiled_for_few_targets():
    nets = {target: {row.get("net") for row in accelerators.rows(target, ALL)} for target in benchmarks.TARGETS}
    assert [target for target, values in nets.items() if "ResNet-50" in values] == ["v6e", "h100"]
    chips = {target: {row["chips"] for row in accelerators.rows(target, ALL)} for target in benchmarks.TARGETS}
    assert {target: values for target, values in chips.items() if values != {1}} == {
        "v5e": {1, 16, 256},
        "h100": {1, 8, 16},
    }


def test_every_chip_has_its_images():
    rows = [row for row in accelerators.rows("v5e", ALL) if row["chips"] > 1]
    assert all(row["batch_size"] >= 8 * row["chips"] and row["batch_size"] % row["chips"] == 0 for row in rows)


def test_choices_restrict_the_rows():
    settings = Settings(kinds=("inference",), arms=("Flax",), dtypes=("bfloat16",))
    rows = list(accelerators.rows("v6e", settings))
    assert rows and {(row["kind"], row["arm"], row["dtype"]) for row in rows} == {("inference", "Flax", "bfloat16")}
    ours = accelerators.rows("v6e", Settings(kinds=("inference",), arms=("jaxbn",)))
    assert {row["arm"] for row in ours} == {"jaxbn", programs.FOLDED}


def small_rows():
    settings = Settings(
        compiled_shapes=((4, 3, 3, 2), (6, 5)),
        dtypes=("bfloat16",),
        batch_size=2,
        width=1 / 16,
        large_image_size=32,
        nets=("ResNet-20", "ResNet-50"),
        arms=("jaxbn", "affine only", "none"),
    )
    return [row for row in accelerators.rows("v6e", settings) if row["chips"] == 1]


def row_id(row):
    of = row.get("net") or "x".join(map(str, row["shape"]))
    return " ".join([row["kind"], row["what"], row["pass"], of, row["arm"]])


def is_slow(row):
    """A training step takes seconds to trace; the layer and the block need a fraction of that."""
    return row["kind"] == "step"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row_id(row), marks=[pytest.mark.slow] * is_slow(row))
        for row in small_rows()
        if row.get("net") != "ResNet-50"
    ],
)
def test_every_program_can_be_lowered_and_works_in_its_dtype(row):
    text = programs.lower(row, jax.local_devices()[:1]).as_text()
    assert "xbf16>" in text and ("convolution" in text or "dot_general" in text) == (row["what"] not in ALONE)


@pytest.mark.parametrize("kind", ["layer", pytest.param("step", marks=pytest.mark.slow)])
def test_program_is_lowered_for_the_devices_that_are_given(kind):
    row = next(row for row in reversed(small_rows()) if row["kind"] == kind and row.get("net") != "ResNet-50")
    device = jax.local_devices()[3]
    placed = jax.tree.leaves(programs.lower(row, [device]).compile().input_shardings)
    assert all(sharding.device_set == {device} for sharding in placed)


@pytest.mark.parametrize("api", accelerators.APIS)
def test_step_on_several_devices_shares_out_the_batch(api):
    row = next(row for row in small_rows() if row.get("net") == "ResNet-20" and row["arm"] == "jaxbn")
    text = programs.lower(row | {"chips": 2, "api": api}, jax.local_devices()[:2]).as_text()
    assert "num_partitions = 2" in text and ("all_reduce" in text) == (api == "shard_map")


@pytest.mark.slow
def test_resnet_50_has_53_norms_and_its_parameters():
    row = next(row for row in small_rows() if row.get("net") == "ResNet-50" and row["arm"] == "jaxbn")
    step = programs._step(row, jnp.zeros((2, 32, 32, 3), jnp.bfloat16), None)
    params, stats, _ = step.state
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032  # those of torchvision's
    assert len(jax.tree.leaves(stats)) == 2 * 53


def lower_nothing(devices):
    """Is not called: there are no devices."""
    raise AssertionError


def test_error_in_the_process_that_compiles_comes_back_as_one_line(installed, monkeypatch):
    monkeypatch.setattr(targets, "TARGETS", targets.TARGETS | {"here": targets.Target("tpu", {})})
    with pytest.raises(aot.CompilationError, match="^KeyError: 'here'$"):
        aot.compile_apart(lower_nothing, "here")  # which the other process does not know


def test_process_that_takes_too_long_is_ended(installed):
    with pytest.raises(aot.CompilationError, match="^not compiled within 0 s$"):
        aot.compile_apart(lower_nothing, "v6e", timeout=0)


def test_process_that_leaves_nothing_has_died(tmp_path):
    (tmp_path / aot.LOG).write_text("I0000 begins\n")
    with pytest.raises(aot.CompilationError, match=r"^the compiler died \(SIGILL\)$"):
        aot._result(tmp_path, -signal.SIGILL, None)


def dumped(folder, program):
    """Writes what libtpu leaves of a program in a folder."""
    (folder / "module_0000.jit_f.cl_1.after_optimizations-buffer-assignment.txt").write_text(
        "allocation 0: size 7, preallocated-temp:\n"
    )
    (folder / "module_0000.jit_f.cl_1.after_optimizations_after_buffer_assignment.txt").write_text(program)


@pytest.mark.parametrize("status", [0, -signal.SIGILL])
def test_program_that_was_written_counts_however_the_process_ended(tmp_path, status):
    dumped(tmp_path, "HloModule f {\n}\n")
    assert aot._result(tmp_path, status, None) == aot.Compiled("HloModule f {\n}\n", temporaries=7, peak=7)


def test_program_that_is_cut_off_or_came_with_an_error_or_too_late_does_not_count(tmp_path):
    (tmp_path / aot.LOG).touch()
    dumped(tmp_path, "HloModule f {\n  half")
    with pytest.raises(aot.CompilationError, match="died"):
        aot._result(tmp_path, 0, None)
    dumped(tmp_path, "HloModule f {\n}\n")
    with pytest.raises(aot.CompilationError, match="not compiled within 2 s"):
        aot._result(tmp_path, None, "not compiled within 2 s")
    (tmp_path / aot.ERROR).write_text("ValueError: no")
    with pytest.raises(aot.CompilationError, match="ValueError: no"):
        aot._result(tmp_path, 0, None)


def test_reasons_say_how_a_process_ended():
    log = "I0000 begins\nF0000 shape.cc:7] Check failed: rank == 2\n"
    assert aot.crash_reason(-6, log) == "the compiler died (SIGABRT): F0000 shape.cc:7] Check failed: rank == 2"
    assert aot.crash_reason(-signal.SIGILL, "") == "the compiler died (SIGILL)"
    assert aot.crash_reason(3, "") == "the compiler died (exit status 3)"


def test_reason_is_one_line_that_is_not_long():
    assert aot.one_line("no\n  such   operation\n") == "no such operation"
    assert len(aot.one_line("word " * 100)) == 200


def test_buffers_are_added_by_what_they_hold():
    text = """BufferAssignment:
allocation 0: size 1000, parameter 0, shape |f32[250]|, maybe-live-out at ShapeIndex {}:
allocation 1: size 200, maybe-live-out:
allocation 2: size 30, preallocated-temp:
allocation 3: size 4000, color 1, preallocated-temp:
allocation 4: size 50, color 0, preallocated-temp:
allocation 5: size 6, thread-local:
"""
    assert aot.buffers(text) == {"temporaries": 80, "peak": 1280}


def test_compiler_that_is_missing_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(targets, "_version", lambda package: None)
    with pytest.raises(
        ModuleNotFoundError,
        match="cannot compile for v6e: libtpu not installed; install the compilers with pip install 'jaxbn",
    ):
        aot.compile_apart(lower_nothing, "v6e")
