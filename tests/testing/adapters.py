"""Adapters of our own batch norms, and of one that hides that it is written in JAX."""

import dataclasses

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.testing import AXIS, Adapter

MOMENTUM = 0.9


def function(axis_name=None, *, debias=False, **options):
    def init(x):
        return jaxbn.init_stats(x.shape[-1], counted=debias), jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])

    def train(state, x, mask):
        options_of_training = {"momentum": MOMENTUM, "axis_name": axis_name, "mask": mask, **options}
        y, stats = jaxbn.batch_norm(x, *state, use_running_average=False, **options_of_training)
        return y, (stats, *state[1:])

    return Adapter(
        "function",
        init,
        train,
        evaluate=lambda state, x: jaxbn.batch_norm(x, *state, use_running_average=True)[0],
        statistics=lambda state: state[0],
        with_parameters=lambda state, scale, bias: (state[0], scale, bias),
        momentum=MOMENTUM,
        unbiased=options.get("unbiased", False),
        debiased=debias,
        masks=True,
        over_devices=function(AXIS, debias=debias, **options) if axis_name is None else None,
    )


def linen(layer=jaxbn.linen.BatchNorm, axis_name=None):
    norm = layer(momentum=MOMENTUM, axis_name=axis_name)

    def train(variables, x, mask):
        y, updates = norm.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
        return y, variables | updates

    return Adapter(
        "linen",
        init=lambda x: norm.init(jax.random.key(0), x, use_running_average=True),
        train=train,
        evaluate=lambda variables, x: norm.apply(variables, x, use_running_average=True),
        statistics=lambda variables: (variables["batch_stats"]["mean"], variables["batch_stats"]["var"]),
        with_parameters=lambda variables, scale, bias: variables | {"params": {"scale": scale, "bias": bias}},
        momentum=MOMENTUM,
        masks=True,
        over_devices=linen(layer, AXIS) if axis_name is None else None,
    )


def nnx_layer(axis_name=None):
    def train(state, x, mask):
        norm = nnx.merge(*state, copy=True)
        y = norm(x, use_running_average=False, mask=mask)
        return y, nnx.split(norm)

    def statistics(state):
        norm = nnx.merge(*state, copy=True)
        return norm.mean[...], norm.var[...]

    def with_parameters(state, scale, bias):
        norm = nnx.merge(*state, copy=True)
        norm.scale[...], norm.bias[...] = scale, bias
        return nnx.split(norm)

    return Adapter(
        "nnx",
        init=lambda x: nnx.split(
            jaxbn.nnx.BatchNorm(x.shape[-1], momentum=MOMENTUM, axis_name=axis_name, rngs=nnx.Rngs(0))
        ),
        train=train,
        evaluate=lambda state, x: nnx.merge(*state, copy=True)(x, use_running_average=True),
        statistics=statistics,
        with_parameters=with_parameters,
        momentum=MOMENTUM,
        masks=True,
        over_devices=nnx_layer(AXIS) if axis_name is None else None,
    )


FUNCTION = function()
OURS = {"function": FUNCTION, "linen": linen(), "nnx": nnx_layer()}
FLAX = linen(flax.linen.BatchNorm)


def in_numpy(adapter):
    """Returns the same implementation as if it were written in another framework, with NumPy arrays."""

    def numpy(tree):
        return jax.tree.map(np.asarray, tree)

    step = jax.jit(adapter.train)

    @jax.jit
    def gradients(state, x, scale, bias, dy, mask):
        def output(x, scale, bias):
            return adapter.train(adapter.with_parameters(state, scale, bias), x, mask)[0]

        y, vjp = jax.vjp(output, x, scale, bias)
        return vjp(dy.astype(y.dtype))

    return dataclasses.replace(
        adapter,
        name="numpy",
        init=lambda x: numpy(adapter.init(x)),
        train=lambda state, x, mask: numpy(step(state, x, mask)),
        evaluate=lambda state, x: numpy(adapter.evaluate(state, x)),
        gradients=lambda *arguments: numpy(gradients(*arguments)),
        traceable=False,
        over_devices=None,
    )
