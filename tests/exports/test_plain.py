"""Evaluation is a program of plain operations, which programs that read other programs know."""

import collections
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import jet, sparse

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests.exports.nets import NAMES, X, programs

ARITHMETIC = {"sub", "mul", "add", "rsqrt"}
LAYOUT = {"convert_element_type", "broadcast_in_dim"}
MASKS = {"is_finite", "or", "select_n", "reshape"}
OF_THE_NET = {"conv_general_dilated", "max", "reduce_sum", "div", "dot_general", "reshape"}
STATS = jaxbn.BatchStats(mean=jnp.arange(5.0), var=jnp.arange(1.0, 6.0))
VECTOR = jnp.linspace(-1, 2, 5)
BATCH = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 5)), jnp.float32)
MASK = BATCH[..., :1] > 0
CALL = jax.make_jaxpr(jax.jit(jnp.sin))(1.0).eqns[0].primitive


def primitives(function, *arguments):
    """Returns the names of all primitives in the program of a function, also of those in calls by ``jit``.

    Which functions of jax.numpy are such calls depends on the version of JAX.
    """
    found, waiting = collections.Counter(), [jax.make_jaxpr(function)(*arguments).jaxpr]
    while waiting:
        for equation in waiting.pop().eqns:
            if equation.primitive is not CALL:
                found[equation.primitive.name] += 1
            waiting += jax.extend.core.jaxprs_in_params(equation.params)
    return found


def evaluations():
    """Returns evaluation of a layer by name, as functions of the batch and the mask."""
    linen = jaxbn.linen.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)
    variables = {"params": {"scale": VECTOR, "bias": VECTOR}, "batch_stats": STATS._asdict()}
    norm = jaxbn.nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    norm.eval()
    affine, fixed = jaxbn.linen.Affine(dtype=jnp.bfloat16), jaxbn.nnx.Affine(5, fixed=True)
    return {
        "function": lambda x, mask: jaxbn.batch_norm(x, STATS, VECTOR, VECTOR, use_running_average=True, mask=mask)[0],
        "normalize": lambda x, mask: jaxbn.normalize(x, *STATS),
        "linen": lambda x, mask: linen.apply(variables, x, mask=mask),
        "frozen": lambda x, mask: linen.copy(frozen=True).apply(variables, x, mask=mask),
        "nnx": lambda x, mask: norm(x, mask=mask),
        "affine": lambda x, mask: affine.apply({"params": variables["params"]}, x, mask=mask),
        "nnx affine": lambda x, mask: fixed(x, mask=mask),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", evaluations())
def test_a_layer_in_evaluation_is_plain_arithmetic(name, dtype):
    x, evaluate = BATCH.astype(dtype), evaluations()[name]
    assert set(primitives(evaluate, x, None)) <= ARITHMETIC | LAYOUT
    assert set(primitives(evaluate, x, MASK)) <= ARITHMETIC | LAYOUT | MASKS


@pytest.mark.parametrize("name", NAMES)
def test_a_net_in_evaluation_is_plain_arithmetic(name):
    found = primitives(programs()[name], X)
    assert set(found) <= ARITHMETIC | LAYOUT | OF_THE_NET
    assert found["conv_general_dilated"] == 1


def test_the_gradient_of_the_scale_keeps_the_batch_alone():
    # Not x - mean as well, which would be a second array of the size of the batch.
    def kept(scale):
        return jax.vjp(lambda s, x: jaxbn.normalize(x, *STATS, s), scale, BATCH)[1]

    sizes = [value.size for value in jax.tree.leaves(jax.eval_shape(kept, VECTOR))]
    assert sizes.count(BATCH.size) == 1
    gradient = jax.jit(jax.grad(lambda scale: jaxbn.normalize(BATCH, *STATS, scale).sum()))
    recorded = jax.grad(jax.jit(lambda scale: jaxbn.normalize(BATCH, *STATS, scale).sum()))  # plain operations
    expected = (np.asarray(BATCH, np.float64) - np.arange(5)).sum((0, 1)) / np.sqrt(np.arange(1, 6) + 1e-5)
    np.testing.assert_allclose(gradient(VECTOR), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(recorded(VECTOR), expected, rtol=0, atol=1e-5)


def test_taylor_series_pass_through_evaluation():
    # Affine in x: each coefficient is multiplied by the slope, and only the first is shifted.
    series = [jnp.ones_like(BATCH), 2 * BATCH, BATCH**2]
    slope = np.asarray(VECTOR, np.float64) / np.sqrt(np.arange(1, 6) + 1e-5)
    y, coefficients = jet.jet(lambda x: evaluations()["function"](x, None), (BATCH,), (series,))
    np.testing.assert_allclose(y, evaluations()["function"](BATCH, None))
    for given, found in zip(series, coefficients, strict=True):
        np.testing.assert_allclose(found, given * slope, rtol=1e-5)


@pytest.mark.slow
def test_sparse_arrays_pass_by_evaluation():
    dense = sparse.BCOO.fromdense(jnp.eye(3))
    y = sparse.sparsify(lambda x, other: evaluations()["function"](x, None) * other.sum())(BATCH, dense)
    np.testing.assert_allclose(y, 3 * evaluations()["function"](BATCH, None), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_operations_of_evaluation_are_counted_like_those_of_flax(library):
    def flops(layer, table, *key):
        text = table(layer, *key, BATCH, compute_flops=True, console_kwargs={"width": 200, "no_color": True})
        (row,) = re.findall(r"│ +│ (?:BatchNorm) +│.*", text)
        return next(int(cell) for cell in row.split("│") if cell.strip().isdigit())

    if library == "linen":
        ours, theirs = (kind(use_running_average=True) for kind in (jaxbn.linen.BatchNorm, nn.BatchNorm))
        table, key = (lambda layer, key, x, **options: layer.tabulate(key, x, **options)), [jax.random.key(0)]
    else:
        kinds = jaxbn.nnx.BatchNorm, nnx.BatchNorm
        ours, theirs = (kind(5, use_running_average=True, rngs=nnx.Rngs(0)) for kind in kinds)
        table, key = nnx.tabulate, []
    assert flops(ours, table, *key) == flops(theirs, table, *key) > 0
