"""Training and evaluation steps of a small model, lowered for CPU, GPU and TPU on any machine."""

import functools

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

PLATFORMS = ("cpu", "cuda", "tpu")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6, 6, 2)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0], np.int32)
SGD = optax.sgd(0.1, momentum=0.9)


class LinenNet(nn.Module):
    """Convolution, batch norm, ReLU, a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(jaxbn.linen.BatchNorm(momentum=0.9)(x, use_running_average=not train))
        return nn.Dense(3)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    """Convolution, batch norm, ReLU, a dense layer."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, train):
        x = nnx.relu(self.norm(self.conv(x), use_running_average=not train))
        return self.dense(x.mean((1, 2)))


def linen_net():
    net = LinenNet()
    variables = jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), X)

    def train(params, stats, x):
        return net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])

    def evaluate(params, stats, x):
        return net.apply({"params": params, "batch_stats": stats}, x, train=False)

    return variables["params"], variables["batch_stats"], lambda *a: _unpacked(*train(*a)), evaluate


def _unpacked(logits, updates):
    return logits, updates["batch_stats"]


def nnx_net():
    graph, params, stats = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def train(params, stats, x):
        net = nnx.merge(graph, params, stats)
        logits = net(x, train=True)
        return logits, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))

    def evaluate(params, stats, x):
        return nnx.merge(graph, params, stats)(x, train=False)

    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats), train, evaluate


def function_net(method):
    params = {"dense": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "scale": jnp.ones(3), "bias": jnp.zeros(3)}

    def net(params, stats, x, train):
        h = x @ params["dense"]
        y, stats = jaxbn.batch_norm(
            h, stats, params["scale"], params["bias"], use_running_average=not train, momentum=0.9, method=method
        )
        return jax.nn.relu(y).mean((1, 2)), stats

    train = functools.partial(net, train=True)
    return params, jaxbn.init_stats(3), train, lambda *arguments: net(*arguments, train=False)[0]


NETS = {
    "linen": linen_net,
    "nnx": nnx_net,
    "ghost": functools.partial(function_net, functools.partial(jaxbn.ghost_normalize, group_size=2)),
    "renorm": functools.partial(function_net, jaxbn.batch_renormalize),
}


@functools.cache
def program(net, step):
    """Returns a jitted step, its arguments, and the step exported for all platforms."""
    params, stats, train, evaluate = NETS[net]()

    def train_step(params, stats, momenta, x, labels):
        def loss(params):
            logits, new_stats = train(params, stats, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new_stats

        (value, new_stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, momenta = SGD.update(gradients, momenta)
        return optax.apply_updates(params, updates), new_stats, momenta, value

    if step == "train":
        function, arguments = jax.jit(train_step), (params, stats, SGD.init(params), X, LABELS)
    else:
        function, arguments = jax.jit(evaluate), (params, stats, X)
    # Plain lists cross the border: a serialised program knows no classes.
    leaves, treedef = jax.tree.flatten(arguments)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*treedef.unflatten(leaves))))
    return flat, leaves, jax.export.export(flat, platforms=PLATFORMS)(*leaves)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["train", "eval"])
@pytest.mark.parametrize("net", NETS)
def test_a_step_lowers_for_cpu_gpu_and_tpu(net, step):
    _, _, exported = program(net, step)
    assert exported.platforms == PLATFORMS


@pytest.mark.slow
@pytest.mark.parametrize("step", ["train", "eval"])
@pytest.mark.parametrize("net", NETS)
def test_a_lowered_step_calls_no_code_of_one_platform(net, step):
    # The text tells where each operation was traced, and so may hold this test's name.
    _, _, exported = program(net, step)
    assert "custom_call" not in exported.mlir_module()


@pytest.mark.parametrize(
    ("net", "step"),
    [
        ("linen", "train"),
        pytest.param("nnx", "eval", marks=pytest.mark.slow),
        pytest.param("linen", "eval", marks=pytest.mark.slow),
        pytest.param("nnx", "train", marks=pytest.mark.slow),
    ],
)
def test_a_lowered_step_survives_serialization(net, step):
    _, _, exported = program(net, step)
    try:
        copy = jax.export.deserialize(exported.serialize())
    except ImportError as error:
        pytest.skip(f"newer versions of JAX need a package for this: {error}")
    assert (copy.mlir_module(), copy.platforms) == (exported.mlir_module(), PLATFORMS)


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compares on the CPU")
@pytest.mark.parametrize("step", ["train", "eval"])
@pytest.mark.parametrize("net", NETS)
def test_a_lowered_step_gives_what_the_jitted_step_gives(net, step):
    flat, leaves, exported = program(net, step)
    # The same program compiled twice, but for its choice of platform: some roundings at values of at most 10.
    chex.assert_trees_all_close(exported.call(*leaves), flat(*leaves), rtol=0, atol=16 * 10 * np.finfo(np.float32).eps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_can_be_exported_for_batches_of_any_size(dtype):
    def loss(scale, x):
        y, _ = jaxbn.batch_norm(x, jaxbn.init_stats(2), scale, use_running_average=False)
        return (y**3).sum()

    (n,) = jax.export.symbolic_shape("n")
    of_scale, of_x = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((n, 6, 6, 2), dtype)
    exported = jax.export.export(jax.jit(jax.grad(loss)))(of_scale, of_x)
    for x in (X.astype(dtype), X[:3].astype(dtype)):
        expected = jax.grad(loss)(jnp.ones(2), x)
        chex.assert_trees_all_close(exported.call(jnp.ones(2), x), expected, rtol=64 * np.finfo(np.float32).eps)
