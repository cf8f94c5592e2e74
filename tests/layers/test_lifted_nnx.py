"""nnx transformations and the bridge to linen: outputs, statistics and gradients are those with Flax's own layer.

Each function is called with a layer of both classes.  Flax's layer takes the variance from centered values here, so
that both are accurate to float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import jaxbn.linen
from jaxbn.nnx import BatchNorm
from tests.layers.nnx_layers import X, values

WEIGHTS = jnp.asarray(np.cos(np.arange(X.size)).reshape(X.shape), jnp.float32)
SIGN = float(np.sign(X.sum()))
# Rounding errors of a few layers in a row, in units of the largest value of an array.
CLOSE = 16 * np.finfo(np.float32).eps


def close(found, expected):
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        assert (value.shape, value.dtype) == (other.shape, other.dtype)
        np.testing.assert_allclose(value, other, rtol=0, atol=CLOSE * (1 + np.abs(other).max(initial=0)))


def layer_of(cls, **options):
    layer = cls(3, momentum=0.9, use_fast_variance=False, **options, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    nnx.update(layer, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape)), nnx.state(layer)))
    return layer


def stack_of(cls):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,))
    def stack(rngs):
        return cls(3, scale_init=nnx.initializers.uniform(2.0), use_fast_variance=False, rngs=rngs)

    return stack(nnx.Rngs(0))


def differentiate(function, layer):
    """Returns the gradients with respect to parameters and inputs, and the new state of the layer."""

    @nnx.jit
    def run(layer, x):
        return nnx.value_and_grad(lambda layer, x: (function(layer, x) * WEIGHTS).mean(), argnums=(0, 1))(layer, x)

    return jax.tree.leaves((run(layer, jnp.asarray(X)), nnx.state(layer, (nnx.Param, nnx.BatchStat))))


def call(layer, x):
    return layer(x)


def residual(layer, x):
    return x + jnp.tanh(layer(x))


def cond(layer, x, sign):
    return nnx.cond(sign * x.sum() > 0, call, lambda layer, x: 2 * x, layer, x)


def switch(layer, x):
    index = jnp.int32(1) + jnp.int32(SIGN * x.sum() < 0)
    return nnx.switch(index, [lambda layer, x: x, call, lambda layer, x: layer(2 * x)], layer, x)


def fori_loop(layer, x):
    return nnx.fori_loop(0, 3, lambda i, carry: (carry[0], residual(*carry)), (layer, x))[1]


def while_loop(layer, x):
    def body(carry):
        layer, x, i = carry
        return layer, residual(layer, x), i + 1

    return nnx.while_loop(lambda carry: carry[2] < 3, body, (layer, x, jnp.int32(0)))[1]


def over_time(layer, x):
    """A recurrent batch norm: the statistics are carried from step to step."""

    @nnx.scan(in_axes=(nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}), nnx.Carry, 1), out_axes=(nnx.Carry, 1))
    def steps(layer, carry, x):
        carry = jnp.tanh(layer(carry + x))
        return carry, carry

    return steps(layer, jnp.zeros((len(x), 3)), x)[1]


def over_layers(layers, x, wrap=lambda function: function):
    return nnx.scan(wrap(residual), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)


def ensemble(layers, x):
    return nnx.vmap(call, in_axes=(0, None))(layers, x).sum(0)


def named_axis(layer, x):
    return nnx.vmap(call, in_axes=(None, 0), axis_name="examples")(layer, x)


DIFFERENTIATED = {
    "cond, taken": (layer_of, functools.partial(cond, sign=SIGN)),
    "cond, not taken": (layer_of, functools.partial(cond, sign=-SIGN)),
    "switch": (layer_of, switch),
    "fori_loop": (layer_of, fori_loop),
    "scan over time": (layer_of, over_time),
    "scan over layers": (stack_of, over_layers),
    "scan over layers with remat": (stack_of, functools.partial(over_layers, wrap=nnx.remat)),
    "vmap": (stack_of, ensemble),
    "vmap with an axis name": (functools.partial(layer_of, axis_name="examples"), named_axis),
    "remat": (layer_of, nnx.remat(call)),
    "jit": (layer_of, nnx.jit(call)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_transformation_and_its_gradient(name):
    make, function = DIFFERENTIATED[name]
    close(*(differentiate(function, make(cls)) for cls in (BatchNorm, nnx.BatchNorm)))


def test_a_while_loop_carries_the_statistics():
    def run(cls):
        layer = layer_of(cls)
        return jax.tree.leaves((nnx.jit(while_loop)(layer, jnp.asarray(X)), values(layer)))

    close(run(BatchNorm), run(nnx.BatchNorm))


@pytest.mark.slow
def test_a_linen_model_as_an_nnx_module():
    def run(norm):
        model = bridge.ToNNX(norm(momentum=0.9, use_fast_variance=False), rngs=nnx.Rngs(0))
        model.lazy_init(X, use_running_average=False)

        def train(model, x):
            return model(x, use_running_average=False, mutable=["batch_stats"])

        results = differentiate(train, model)
        return [*results, model(X, use_running_average=True)]

    close(run(jaxbn.linen.BatchNorm), run(nn.BatchNorm))


@pytest.mark.slow
def test_an_nnx_layer_as_a_linen_model():
    def run(cls):
        model = bridge.ToLinen(cls, args=(3,), kwargs={"momentum": 0.9, "use_fast_variance": False})
        variables = model.init(jax.random.key(0), X)

        def loss(params, x):
            y, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return (y * WEIGHTS).mean(), (y, updates)

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], X))

    close(run(BatchNorm), run(nnx.BatchNorm))
