"""Sums and broadcasts in pairs: those of NumPy, in one reading, and under every transformation of JAX.

Inputs are small whole numbers.  Their sums and products are exact in float32, in any order, so that results equal the
oracle, and derivatives equal those of JAX's own sums and broadcasts.
"""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.benchmarks import hlo
from jaxbn._core.sums import broadcast, pair_broadcast, pair_sum

DEVICES, PLATFORMS = 8, ("cpu", "cuda", "tpu")
LAYOUTS = [  # shape, and the axes that are summed over
    ((1, 3), (0,)),
    ((31, 3), (0,)),
    ((10007, 2), (0,)),
    ((65536, 2), (0,)),
    ((6, 5, 3), (0, 1)),
    ((3, 10, 5, 2), (0, 1, 2)),
    ((5, 3, 1, 4, 2), (0, 1, 2, 3)),
    ((32, 2, 3), (0,)),
    ((3, 32), (1,)),
    ((4, 3, 8, 2), (0, 2)),
    ((8, 12), (0, 1)),
    ((0, 4, 3), (0, 1)),
    ((4, 0, 3), (0, 1)),
]


def numbers(*shapes, seed=0):
    """Returns arrays of small whole numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.integers(-3, 4, shape), jnp.float32) for shape in shapes]


def plain_sum(a, b, reduced):
    return jnp.sum(a, reduced), jnp.sum(b, reduced)


def plain_broadcast(a, b, x, reduced):
    return tuple(jnp.broadcast_to(jnp.expand_dims(value, reduced), x.shape) for value in (a, b))


def broadcast_each(a, b, x, reduced):
    return broadcast(a, x, reduced), broadcast(b, x, reduced)


SHAPE, REDUCED = (6, 4, 3), (0, 1)
A, B, V, W = numbers(SHAPE, SHAPE, SHAPE, SHAPE)


def energy(a, b, add=pair_sum, broadcast=pair_broadcast):
    """A number that is neither linear nor symmetric in a and b."""
    p, q = add(a * a, a * b, REDUCED)
    p, q = broadcast(p, q - p, a, REDUCED)
    return (p * a + 2 * q * b).sum()


plain_energy = functools.partial(energy, add=plain_sum, broadcast=plain_broadcast)


# Values


@pytest.mark.parametrize(("shape", "reduced"), LAYOUTS)
def test_sums_are_those_of_numpy(shape, reduced):
    a, b = numbers(shape, shape)
    expected = tuple(np.sum(np.asarray(v), reduced, dtype=np.float64) for v in (a, b))
    for add in (pair_sum, jax.jit(pair_sum, static_argnums=2)):
        chex.assert_trees_all_equal(add(a, b, reduced), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "reduced"), LAYOUTS)
@pytest.mark.parametrize("function", [pair_broadcast, broadcast_each])
def test_broadcasts_are_those_of_numpy(function, shape, reduced):
    x, features = jnp.zeros(shape), np.delete(shape, reduced)
    a, b = numbers(features, features)
    expected = tuple(np.broadcast_to(np.expand_dims(v, reduced), shape) for v in (a, b))
    for call in (function, jax.jit(function, static_argnums=3)):
        chex.assert_trees_all_equal(tuple(v + x for v in call(a, b, x, reduced)), expected)


def test_cotangents_of_two_dtypes_are_summed_each_in_its_own():
    def loss(scale, bias):
        y = pair_broadcast(scale, bias, jnp.zeros(SHAPE), REDUCED)
        return (y[0] * A).sum() + (y[1] * B).sum()

    with jax.enable_x64(True):
        of_scale, of_bias = jax.jit(jax.grad(loss, (0, 1)))(np.ones(3, np.float32), np.ones(3, np.float64))
        chex.assert_type([of_scale, of_bias], [jnp.float32, jnp.float64])
        chex.assert_trees_all_equal((of_scale, of_bias), tuple(np.sum(np.asarray(v), REDUCED) for v in (A, B)))


# Memory


def sums(x):
    """The sums of x and x^2."""
    wide = x.astype(jnp.float32)
    return pair_sum(wide, wide * wide, tuple(range(x.ndim - 1)))


def scaled(x, scale, bias, broadcast=pair_broadcast):
    wide = x.astype(jnp.float32)
    scale, bias = broadcast(scale, bias, wide, tuple(range(x.ndim - 1)))
    return (wide * scale + bias).astype(x.dtype)


def sums_backward(x, dy, broadcast=pair_broadcast):
    """The sums of x dy and dy."""
    one = jnp.ones(x.shape[-1])
    return jax.vjp(functools.partial(scaled, x, broadcast=broadcast), one, one)[1](dy)


HALF = [(sums, 1), (sums_backward, 2)]  # and their numbers of inputs


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers lay out memory in other ways")
@pytest.mark.parametrize("shape", [(512, 64), (32, 8, 8, 16), (16, 7, 7, 32), (8, 4, 4, 4, 16)])
@pytest.mark.parametrize(("function", "inputs"), HALF)
def test_half_precision_is_summed_without_a_wide_copy_of_the_batch(function, inputs, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    compiled = jax.jit(function).lower(*[x] * inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < np.prod(shape) * 4 / 2  # of float32


# Transformations


@pytest.mark.parametrize(("shape", "reduced"), LAYOUTS)
def test_sum_and_broadcast_are_each_the_transpose_of_the_other(shape, reduced):
    features = np.delete(shape, reduced)
    a, b, c, d = numbers(features, features, shape, shape)
    added = jax.linear_transpose(lambda a, b: pair_broadcast(a, b, c, reduced), a, b)((c, d))
    chex.assert_trees_all_equal(added, plain_sum(c, d, reduced))
    broadcast = jax.linear_transpose(lambda c, d: pair_sum(c, d, reduced), c, d)((a, b))
    chex.assert_trees_all_equal(broadcast, plain_broadcast(a, b, c, reduced))


def reverse_over_reverse(f):
    return jax.grad(lambda a, b: sum(map(jnp.vdot, jax.grad(f, (0, 1))(a, b), (V, W))), (0, 1))(A, B)


def gradients_of_a_scan(f):
    def steps(a, b):
        return lax.scan(lambda total, pair: (total + f(*pair), None), 0.0, (a, b))[0]

    return jax.grad(steps, (0, 1))(jnp.stack([A, V]), jnp.stack([B, W]))


DERIVATIVES = {
    "gradient in a": lambda f: jax.grad(f)(A, B),
    "gradient in b": lambda f: jax.grad(f, 1)(A, B),
    "gradients of remat": lambda f: jax.grad(jax.checkpoint(f), (0, 1))(A, B),
    "tangent": lambda f: jax.jvp(f, (A, B), (V, W)),
    "tangent in b": lambda f: jax.jvp(functools.partial(f, A), (B,), (W,)),
    "forward over reverse": lambda f: jax.jvp(jax.grad(f, (0, 1)), (A, B), (V, W)),
    "reverse over reverse": reverse_over_reverse,
    "gradients of a scan": gradients_of_a_scan,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_are_those_of_plain_sums_and_broadcasts(name):
    differentiate = DERIVATIVES[name]
    expected = differentiate(plain_energy)
    chex.assert_trees_all_equal(differentiate(energy), expected)
    chex.assert_trees_all_equal(jax.jit(lambda: differentiate(energy))(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 0), (1, 1), (1, 0), (1, None), (None, 0)])
def test_vmap_equals_one_after_the_other(axes):
    def results(a, b, add=pair_sum, loss=energy):
        return add(a, b, REDUCED), jax.grad(loss, (0, 1))(a, b)

    mapped = list(zip(((A, V), (B, W)), axes, strict=True))
    each = zip(*((pair[0],) * 2 if axis is None else pair for pair, axis in mapped), strict=True)
    one_by_one = [results(*pair, add=plain_sum, loss=plain_energy) for pair in each]
    expected = jax.tree.map(lambda *values: np.stack(values), *one_by_one)
    together = jax.vmap(results, axes)(*(pair[0] if axis is None else jnp.stack(pair, axis) for pair, axis in mapped))
    chex.assert_trees_all_equal(together, expected)


@pytest.mark.parametrize("function", [energy, jax.grad(energy, (0, 1))], ids=["value", "gradients"])
def test_pairs_lower_for_cpu_gpu_and_tpu(function):
    assert jax.export.export(jax.jit(function), platforms=PLATFORMS)(A, B).platforms == PLATFORMS


# Devices


EXAMPLES = (2 * DEVICES, 3, 4)  # six positions on a device: a run of twelve would lie on two of them


def mesh(axis_type="Auto"):
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType[axis_type],))


def share(a, b, c, add=pair_sum, broadcast=pair_broadcast):
    """Part of a loss: a differs from device to device; b and c are the same, of the shape of a and of its features."""
    p, q = add(a * a, b, (0, 1))
    p, q = broadcast(p + q, c, a, (0, 1))
    return (p * a + 2 * q * a * a).sum()


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_over_devices_are_those_on_one(check_vma):
    a, b, c = numbers(EXAMPLES, (2, *EXAMPLES[1:]), EXAMPLES[-1:])

    def step(a, b, c):
        if check_vma:
            return jax.grad(lambda *arguments: lax.psum(share(*arguments), "d"), (0, 1, 2))(a, b, c)
        da, *others = jax.grad(share, (0, 1, 2))(a, b, c)
        return da, *lax.psum(others, "d")

    def whole(a, b, c):
        return sum(share(part, b, c, plain_sum, plain_broadcast) for part in jnp.split(a, DEVICES))

    specs = P("d"), P(), P()
    step = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=specs, check_vma=check_vma))
    chex.assert_trees_all_equal(jax.device_get(step(a, b, c)), jax.grad(whole, (0, 1, 2))(a, b, c))


@pytest.mark.parametrize("broadcast", [pair_broadcast, broadcast_each])
def test_under_shard_map_sums_are_added_over_devices_and_not_batches(broadcast):
    def step(x, dy, scale, bias):
        return jax.grad(lambda *p: lax.psum(jnp.vdot(scaled(x, *p, broadcast), dy), "d"), (0, 1))(scale, bias)

    step = jax.shard_map(step, mesh=mesh(), in_specs=(P("d"), P("d"), P(), P()), out_specs=P())
    compiled = jax.jit(step).lower(*numbers(EXAMPLES, EXAMPLES, 4, 4)).compile()
    assert hlo.executed_bytes(hlo.collectives(compiled.as_text())) == 2 * 4 * 4


@pytest.mark.parametrize("shape", [EXAMPLES, (DEVICES, 8, 8, 4)])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("function", "inputs"), [*HALF, (functools.partial(sums_backward, broadcast=broadcast_each), 2)]
)
def test_under_jit_a_batch_is_summed_where_it_lies(function, inputs, axis_type, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh(axis_type), P("d")))
    compiled = jax.jit(function).lower(*[x] * inputs).compile()
    assert hlo.collectives(compiled.as_text()) == [hlo.Collective("all-reduce", 2 * 4 * 4, False)]
