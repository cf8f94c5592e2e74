"""The programs that `accelerators` compiles, lowered for the devices that they are given.

Conventions: a row says which program; its keys are those of a record, which are all plain values. Parameters and
statistics are float32, inputs have the dtype of the row. The arm is the norm, or what stands in its place.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
from experiments.benchmarks import arms, resnet50, steps
from experiments.config import Config

AFFINE, FOLDED, SHIFTED = "affine only", "folded", "jaxbn, shifted"
AXIS = "data"


def affine(dtype: Any = None, **options: Any) -> nn.Module:
    """Returns a scale and bias that is called as batch norm is; the options of statistics are without effect."""
    learned = {name: options[name] for name in ("use_scale", "use_bias") if name in options}
    return jaxbn.linen.Affine(dtype=dtype, **learned)


shifted = functools.partial(jaxbn.linen.BatchNorm, method=jaxbn.shifted_normalize)
LAYERS = {**steps.ARMS, SHIFTED: shifted, AFFINE: affine}
# What surrounds the norm: nothing, or convolutions, which are products where inputs have two axes.
NORM, NORM_RELU, PAIR, BLOCK = "norm", "norm+ReLU", "conv+norm+ReLU", "conv+norm+ReLU+conv"


def lower(row: dict, devices: list[Any]) -> jax.stages.Lowered:
    """Returns the program of a row, lowered for devices.

    Args:
      row: what `accelerators.rows` yields.
      devices: of `targets.devices`; as many as the row has chips.
    """
    if row["kind"] == "step":
        return _lower_step(row, devices)
    shape, dtype = tuple(row["shape"]), jnp.dtype(row["dtype"])
    x = jax.ShapeDtypeStruct(shape, dtype)
    arm = arm_of(row["what"], row["arm"])
    params, state = jax.eval_shape(arm.init, x)
    activate = arms.ACTIVATIONS["none" if row["what"] in (NORM, BLOCK) else "relu"]
    run = functools.partial(arms.run_pass, arm, row["pass"], activate)
    dy = x if row["pass"] == "forward+backward" else None
    arguments = _placed((params, state, x, dy), SingleDeviceSharding(devices[0]))
    return jax.jit(run, keep_unused=True).lower(*arguments)


def arm_of(what: str, name: str) -> arms.Arm:
    """Returns a norm, alone or among convolutions, as something that is called like a layer.

    Args:
      what: `NORM`, `NORM_RELU`, `PAIR` (both without a last ReLU, which `arms.run_pass` applies) or `BLOCK`.
      name: of the norm, in `LAYERS`, or `FOLDED`: the convolution has a bias, and there is no norm.
    """
    norm = _nothing() if name in (FOLDED, steps.NONE) else _affine() if name == AFFINE else arms.linen(LAYERS[name])
    if what in (NORM, NORM_RELU):
        return norm

    def init(x):
        features = x.shape[-1]
        kernel = jnp.zeros((*(3, 3)[: x.ndim - 2], features, features))
        params, state = norm.init(x)
        params = {"norm": params, "first": kernel} | ({"second": kernel} if what == BLOCK else {})
        return params | ({"bias": jnp.zeros(features)} if name == FOLDED else {}), state

    def first(params, x):
        y = convolve(x, params["first"])
        return y + params["bias"].astype(y.dtype) if "bias" in params else y

    def train(params, state, x):
        y, state = norm.train(params["norm"], state, first(params, x))
        return (convolve(nn.relu(y), params["second"]) if what == BLOCK else y), state

    def evaluate(params, state, x):
        y = norm.evaluate(params["norm"], state, first(params, x))
        return convolve(nn.relu(y), params["second"]) if what == BLOCK else y

    return arms.Arm(init, train, evaluate)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns a 3x3 convolution of images [n, height, width, c], or a product with examples [n, c], in their dtype."""
    kernel = kernel.astype(x.dtype)
    if x.ndim == 2:
        return x @ kernel
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _nothing():
    """No norm, as an arm."""
    return arms.Arm(lambda x: ({}, {}), lambda params, state, x: (x, state), lambda params, state, x: x)


def _affine():
    """Scale and bias, as an arm."""

    def evaluate(params, state, x):
        return affine(dtype=x.dtype).apply({"params": params}, x)

    def init(x):
        return affine().init(jax.random.key(0), x)["params"], {}

    return arms.Arm(init, lambda params, state, x: (evaluate(params, state, x), state), evaluate)


def _lower_step(row, devices):
    """The training step of a net, whose batch is spread over the devices."""
    axis_name = AXIS if row["api"] == "shard_map" else None
    size = row["image_size"]
    images = jnp.zeros((row["batch_size"], size, size, 3), row["dtype"])
    step = _step(row, images, axis_name)
    mesh = Mesh(devices, AXIS, axis_types=(AxisType.Auto,))
    run: Callable = step.run
    if axis_name:
        specs = (P(), P(), P())
        run = jax.shard_map(run, mesh=mesh, in_specs=(*specs, P(AXIS), P(AXIS)), out_specs=specs, check_vma=False)
    # All of the state is on every device; one device needs no mesh.
    whole, parts = (NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS)))
    if len(devices) == 1:
        whole = parts = SingleDeviceSharding(devices[0])
    arguments = (*_placed(step.state, whole), *_placed(step.batch, parts))
    results = {"out_shardings": whole} if row["chips"] > 1 else {}
    return jax.jit(run, donate_argnums=(0, 1, 2), **results).lower(*arguments)


def _step(row, images, axis_name):
    """The training step before it is spread over devices."""
    layer = LAYERS[row["arm"]]
    if row["net"] == "ResNet-50":
        norm = layer and functools.partial(layer, **({"axis_name": axis_name} if axis_name else {}))
        return steps.step_of(resnet50.ResNet50(norm), images, resnet50.CLASSES, axis_name)
    name = {"ResNet-20": "resnet20", "Inception": "inception"}[row["net"]]
    config = Config(net=name, width=row["width"], batch_size=row["batch_size"])
    return steps.training_step(layer, config, images, axis_name)


def _placed(tree, sharding):
    """The shapes of arrays that lie on devices."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
