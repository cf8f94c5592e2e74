"""Batch norm compiles ahead of time for TPUs and GPUs, and moves no more bytes than it should.

Skipped if the compilers are not installed: `pip install 'jaxbn[aot]'` installs them. Each program is compiled in a
separate process, so that a compiler that dies fails only one test.
"""

import functools
import os
import signal
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

import jaxbn.linen
import jaxbn.nnx

pytest.importorskip("optax", reason="the benchmarks need jaxbn[experiments]")

from experiments.benchmarks import aot, kernels, programs, targets

TARGETS = ("v6e", "h100")
DTYPES = ("float32", "bfloat16")
PASSES = ("training", "evaluation")
SHAPE = (64, 28, 28, 128)
# The bytes that the layer with ReLU moves forward and backward, and its kernels, over those of Flax's layer: at most
# these. The batch fits on the chip of a TPU; a larger one is read once more there than by Flax's layer.
BOUNDS = {"bytes": 1.0, "kernels": 1.0}


@pytest.fixture(params=TARGETS)
def target(request):
    if reason := targets.missing(request.param):
        pytest.skip(f"{request.param}: {reason}; {targets.HINT}")
    return request.param


class Linen(nn.Module):
    """A convolution, the layer and ReLU."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(SHAPE[-1], (3, 3), dtype=x.dtype)(x)
        return nn.relu(jaxbn.linen.BatchNorm(dtype=x.dtype)(x, use_running_average=not train))


class Nnx(nnx.Module):
    """The same in nnx."""

    def __init__(self, dtype, rngs):
        self.conv = nnx.Conv(SHAPE[-1], SHAPE[-1], (3, 3), dtype=dtype, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(SHAPE[-1], dtype=dtype, rngs=rngs)

    def __call__(self, x, train):
        return nnx.relu(self.norm(self.conv(x), use_running_average=not train))


def in_linen(x):
    """Returns parameters, statistics, and the model as a function of both, the inputs, and whether it trains."""
    net = Linen()
    variables = jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), x)

    def apply(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        if not train:
            return net.apply(variables, x, train=False), stats
        y, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, updated["batch_stats"]

    return variables["params"], variables["batch_stats"], apply


def in_nnx(x):
    """Returns the same for the model in nnx."""
    net = nnx.eval_shape(lambda: Nnx(x.dtype, nnx.Rngs(0)))
    graph, params, stats = nnx.split(net, nnx.Param, ...)

    def apply(params, stats, x, train):
        net = nnx.merge(graph, params, stats, copy=True)  # of this trace
        y = net(x, train)
        return y, nnx.state(net, nnx.Not(nnx.Param))

    return params, stats, apply


FRONT_ENDS = {"linen": in_linen, "nnx": in_nnx}


def lower(front_end, name, dtype, devices):
    """Lowers a model for the first device: evaluation, or a forward and backward pass that updates the statistics."""
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    params, stats, apply = FRONT_ENDS[front_end](x)

    def train(params, stats, x):
        def loss(params, x):
            y, updated = apply(params, stats, x, train=True)
            return jnp.square(y.astype(jnp.float32)).mean(), updated

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    program = train if name == "training" else functools.partial(apply, train=False)
    sharding = SingleDeviceSharding(devices[0])
    place = functools.partial(
        jax.tree.map, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    )
    return jax.jit(program).lower(*place((params, stats, x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_convolution_norm_and_relu_compile(target, front_end, name, dtype):
    compiled = aot.compile_apart(functools.partial(lower, front_end, name, dtype), target)
    assert kernels.count(compiled.hlo).kernels > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_code_is_generated_for_a_tpu(dtype):
    if reason := targets.missing("v6e"):
        pytest.skip(f"v6e: {reason}; {targets.HINT}")
    row = {"kind": "block", "what": programs.BLOCK, "shape": (16, 8, 8, 128), "dtype": dtype, "arm": "jaxbn"}
    program = functools.partial(programs.lower, row | {"pass": "forward+backward"})
    assert aot.compile_apart(program, "v6e", generate_code=True).peak > 0


def layer(arm, dtype, target):
    """Counts what the layer with ReLU does forward and backward."""
    row = {"kind": "layer", "what": programs.NORM_RELU, "shape": SHAPE, "dtype": dtype, "pass": "forward+backward"}
    compiled = aot.compile_apart(functools.partial(programs.lower, row | {"arm": arm}), target)
    return kernels.count(compiled.hlo)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_with_relu_moves_no_more_than_flaxs(target, dtype):
    ours, flax = layer("jaxbn", dtype, target), layer("Flax", dtype, target)
    for name, bound in BOUNDS.items():
        assert getattr(ours, name) <= bound * getattr(flax, name), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_is_no_conditional_over_the_batch(target, dtype):
    ours = layer("jaxbn", dtype, target)
    assert (ours.conditionals, ours.whiles) == (0, 0)


def die(devices):
    os.kill(os.getpid(), signal.SIGILL)


def sleep(devices):
    time.sleep(60)


@pytest.mark.parametrize(
    ("program", "timeout", "reason"),
    [(die, 60, r"the compiler died \(SIGILL\)"), (sleep, 2, "not compiled within 2 s")],
)
def test_compiler_that_dies_or_takes_too_long_is_an_error(target, program, timeout, reason):
    with pytest.raises(aot.CompilationError, match=f"^{reason}$"):
        aot.compile_apart(program, target, timeout=timeout)
