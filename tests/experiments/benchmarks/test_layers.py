"""The benchmark of layers: every arm computes batch norm, and records summarize the seconds correctly."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import Settings, arms, layers, limit, pytorch
from experiments.evidence import provenance
from jaxbn.testing import _oracle

SHAPES = ((6, 3, 2, 4), (12, 5))
# A few roundings of values up to 4, in both directions; Equinox takes means in bfloat16 too.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}


def exact(shape, dtype, activation):
    """Outputs and gradients with respect to x, scale and bias in float64, for scale 1 and bias 0."""
    x, dy = (np.asarray(array, np.float64) for array in arms.inputs(shape, dtype))
    scale, bias = np.ones(shape[-1]), np.zeros(shape[-1])
    y = _oracle.batch_norm(x, scale, bias)[0]
    if activation == "relu":
        y, dy = np.maximum(y, 0), dy * (y > 0)
    return y, *_oracle.gradients(x, scale, bias, dy)


def arm_called(name):
    try:
        return arms.ARMS[name]()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", arms.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}-D")
@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_computes_outputs_and_gradients_of_batch_norm(name, shape, activation, dtype):
    arm = arm_called(name)
    y, *middle, dx = arms.compiled(arm, "forward+backward", activation, *arms.inputs(shape, dtype))()
    assert y.dtype == dx.dtype == dtype
    exact_y, exact_dx, *parameters = exact(shape, dtype, activation)
    for actual, expected in ((y, exact_y), (dx, exact_dx)):
        actual = np.moveaxis(np.asarray(actual, np.float64), arm.features_axis, -1)
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE[dtype])
    actual = sorted(np.asarray(each, np.float64).ravel().tolist() for each in middle[-2:])  # in either order
    expected = sorted(each.tolist() for each in parameters)
    np.testing.assert_allclose(actual, expected, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", arms.ARMS)
def test_forward_pass_gives_the_outputs_and_a_new_state(name):
    arm = arm_called(name)
    y, *state = arms.compiled(arm, "forward", "none", *arms.inputs(SHAPES[1], "float32"))()
    np.testing.assert_allclose(np.moveaxis(y, arm.features_axis, -1), exact(SHAPES[1], "float32", "none")[0], atol=1e-5)
    before = arm.init(jnp.zeros(SHAPES[1]))[1]
    assert any(not np.array_equal(new, old) for new, old in zip(state, arms.jax.tree.leaves(before), strict=True))


@pytest.mark.parametrize("name", ["jaxbn", "Flax", "Flax, stable"])
def test_evaluation_uses_the_running_statistics(name):
    (x, dy), arm = arms.inputs(SHAPES[1], "float32"), arm_called(name)
    (y,) = arms.compiled(arm, "eval", "relu", x, dy)()
    np.testing.assert_allclose(y, np.maximum(x, 0), rtol=1e-4)  # of mean 0 and variance 1, at the start


def test_library_that_is_missing_is_left_out_and_named_once(monkeypatch, capsys):
    def missing():
        raise ImportError("No module named 'haiku'")

    monkeypatch.setattr(arms, "ARMS", {"jaxbn": arms.ARMS["jaxbn"], "Haiku": missing})
    layers._print_once.cache_clear()
    assert list(layers.available()) == list(layers.available()) == ["jaxbn"]
    said = "Haiku is left out: No module named 'haiku'; install it with pip install 'jaxbn[peers]'.\n"
    assert capsys.readouterr().err == said


def test_rows_are_every_pass_with_and_without_relu():
    actual = list(layers.rows((2, 3), "float32"))
    assert [(row["pass"], row["activation"]) for row in actual] == [
        (name, activation) for name in arms.PASSES for activation in ("none", "relu")
    ]
    assert all(row["shape"] == [2, 3] and row["dtype"] == "float32" for row in actual)


def test_pieces_are_every_shape_and_dtype():
    settings = Settings(shapes=((2, 3), (4, 5)), dtypes=("float32", "bfloat16"))
    assert list(layers.pieces(settings)) == ["float32 2x3", "bfloat16 2x3", "float32 4x5", "bfloat16 4x5"]


def test_record_holds_ratios_within_rounds_and_the_part_of_the_limit():
    row = {"pass": "eval", "activation": "none", "dtype": "float32", "shape": [500]}
    seconds = {"copy": [1e-6, 2e-6], "jaxbn": [2e-6, 4e-6], "Flax": [4e-6, 4e-6]}
    copy, ours, flax = layers.summarize(row, seconds)
    assert copy["arm"] == "copy" and copy["bandwidth"] == pytest.approx(2 * 4 * 500 / 1.5e-6)
    assert ours["ratio"]["median"] == 1 and ours["limit"]["median"] == 0.5  # eval moves what a copy moves
    assert flax["ratio"]["median"] == 0.75 and flax["seconds"]["median"] == 4e-6


def test_faster_of_the_ways_in_which_pytorch_waits_counts():
    seconds = {"jaxbn": [1.0], "PyTorch, active": [9.0, 2.0, 9.0], "PyTorch, passive": [3.0, 3.0, 3.0]}
    assert layers.faster_of_pytorch(seconds) == {"jaxbn": [1.0], "PyTorch": [3.0, 3.0, 3.0]}
    assert layers.faster_of_pytorch({"jaxbn": [1.0]}) == {"jaxbn": [1.0]}


def test_bytes_are_those_of_the_arrays_that_each_pass_reads_and_writes():
    assert [limit.bytes_moved(name, (10, 3), "bfloat16") for name in arms.PASSES] == [180, 480, 120]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_copy_writes_an_array_of_the_same_bytes(dtype):
    copied = limit.copy((4, 3), dtype)()
    assert copied.nbytes == 12 * jnp.dtype(dtype).itemsize and (copied == 1).all()


def test_bandwidth_counts_bytes_read_and_written():
    assert limit.bandwidth(2.0, (10,), "float32") == 2 * 40 / 2
    assert limit.memory_bandwidth((100, 100), rounds=2) > 0


ECHO = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(json.dumps({"error": "no such shape"} if row.get("shape") == [0] else {"seconds": 0.5} if not row else {}))
    sys.stdout.flush()
"""


def worker(program):
    return pytorch.Worker(at_least=0.0, command=[sys.executable, "-c", program])


def test_worker_is_asked_for_one_sample_at_a_time():
    with worker(ECHO) as running:
        assert running.prepare({"shape": [1]})() == 0.5
        with pytest.raises(RuntimeError, match="no such shape"):
            running.prepare({"shape": [0]})


@pytest.mark.parametrize(("waiting", "policy"), [("active", None), ("passive", "PASSIVE")])
def test_worker_is_told_how_its_threads_wait(monkeypatch, waiting, policy):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    tells = "import json, os; print(json.dumps({'error': str(os.environ.get('OMP_WAIT_POLICY'))}))"
    command = [sys.executable, "-c", tells]
    with pytorch.Worker(at_least=0.0, waiting=waiting, command=command) as running:
        with pytest.raises(RuntimeError, match=f"^{policy}$"):
            running.prepare({})


def test_worker_that_has_ended_is_an_error_that_says_so():
    with worker("pass") as running:
        running._process.wait()
        with pytest.raises(RuntimeError, match="its process has ended"):
            running.prepare({"shape": [1]})


def test_worker_does_not_import_jax():
    code = "import sys, experiments.benchmarks.pytorch; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=provenance.ROOT).returncode == 0


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}-D")
def test_pytorch_computes_outputs_and_gradients_of_batch_norm(shape, activation):
    torch = pytest.importorskip("torch")
    row = {"pass": "forward+backward", "activation": activation, "shape": list(shape), "dtype": "float32"}
    torch.manual_seed(0)
    x, dy = (torch.randn(shape).double().numpy() for _ in range(2))
    torch.manual_seed(0)
    y, dx, dscale, dbias = (each.detach().numpy() for each in pytorch.layer_call(row, "cpu")())
    x, scale, bias = 0.5 + 2 * x, np.ones(shape[-1]), np.zeros(shape[-1])
    expected = _oracle.batch_norm(x, scale, bias)[0]
    if activation == "relu":
        expected, dy = np.maximum(expected, 0), dy * (expected > 0)
    for actual, wanted in zip((dx, dscale, dbias), _oracle.gradients(x, scale, bias, dy), strict=True):
        np.testing.assert_allclose(np.moveaxis(actual, 1, -1) if actual.ndim > 1 else actual, wanted, atol=1e-5)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), expected, atol=1e-5)


@pytest.mark.parametrize("name", arms.PASSES)
def test_pytorch_works_channels_last_in_the_dtype_of_the_row(name):
    torch = pytest.importorskip("torch")
    row = {"pass": name, "activation": "relu", "shape": list(SHAPES[0]), "dtype": "bfloat16"}
    actual = pytorch.layer_call(row, "cpu")()
    for each in actual[:2] if name == "forward+backward" else [actual]:
        assert each.dtype == torch.bfloat16 and each.is_contiguous(memory_format=torch.channels_last)
