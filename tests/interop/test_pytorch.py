"""Five steps of training and one of evaluation give what PyTorch's batch norm gives."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests.golden import make_pytorch

NAMES = ["y", "dx", "dweight", "dbias", "mean", "var"]


def golden(case):
    return json.loads(make_pytorch.FILE.read_text())["cases"][case]


@functools.cache
def live(case):
    pytest.importorskip("torch", reason="PyTorch is not installed; the golden file stands for it")
    return make_pytorch.run(case)


@functools.cache
def ours(case):
    _, dtype, momentum = make_pytorch.CASES[case]
    with jax.enable_x64(dtype == "float64"):
        weight, bias, batches = make_pytorch.inputs(case)
        stats = jaxbn.init_stats(3, counted=momentum is None)
        stats = stats._replace(mean=stats.mean.astype(dtype), var=stats.var.astype(dtype))
        momentum = None if momentum is None else 1 - momentum

        @jax.jit
        def step(x, stats, dy):
            def apply(x, weight, bias):
                return jaxbn.batch_norm(
                    x, stats, weight, bias, use_running_average=False, momentum=momentum, axis=1, unbiased=True
                )

            y, vjp, stats = jax.vjp(apply, x, weight, bias, has_aux=True)
            return dict(zip(NAMES, (y, *vjp(dy), stats.mean, stats.var), strict=True)), stats

        steps = []
        for x, dy in batches:
            found, stats = step(x, stats, dy)
            steps.append({name: np.asarray(value) for name, value in found.items()})
        x = jnp.asarray(batches[0][0])
        evaluated, _ = jaxbn.batch_norm(x, stats, weight, bias, use_running_average=True, axis=1)
        return {"steps": steps, "evaluated": np.asarray(evaluated)}


def assert_as_close_as_the_dtype_allows(found, expected, dtype):
    # Either side rounds each value some tens of times, and sums of up to 16 values cancel: 64 units of the largest.
    assert found.dtype == dtype
    expected = np.reshape(expected, found.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=64 * np.finfo(dtype).eps * abs(expected).max())


@pytest.mark.parametrize("source", [golden, live], ids=["golden", "live"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", make_pytorch.CASES)
def test_five_training_steps_give_pytorchs(case, name, source):
    steps = source(case)["steps"]
    for found, expected in zip(ours(case)["steps"], steps, strict=True):
        assert_as_close_as_the_dtype_allows(found[name], expected[name], make_pytorch.CASES[case][1])


@pytest.mark.parametrize("source", [golden, live], ids=["golden", "live"])
@pytest.mark.parametrize("case", make_pytorch.CASES)
def test_evaluation_after_training_gives_pytorchs(case, source):
    expected = source(case)["evaluated"]
    assert_as_close_as_the_dtype_allows(ours(case)["evaluated"], expected, make_pytorch.CASES[case][1])
