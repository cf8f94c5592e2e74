"""The programs that `accelerators` compiles, lowered for the target's devices.

Conventions: a row describes a program in plain values, and a record starts with the same keys. Parameters and
statistics are float32, inputs have the dtype of the row. The arm is the norm or its replacement.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
from experiments.benchmarks import arms, resnet50, steps
from experiments.config import Config

AFFINE, FOLDED, SHIFTED = "affine only", "folded", "jaxbn, shifted"
AXIS = "data"


def affine(dtype: Any = None, **options: Any) -> nn.Module:
    """Returns a scale and bias with the signature of batch norm; it ignores the options of the statistics."""
    learned = {name: options[name] for name in ("use_scale", "use_bias") if name in options}
    return jaxbn.linen.Affine(dtype=dtype, **learned)


shifted = functools.partial(jaxbn.linen.BatchNorm, method=jaxbn.shifted_normalize)
LAYERS = {**steps.ARMS, SHIFTED: shifted, AFFINE: affine}
# The norm alone, or between convolutions, which are matrix products if the inputs have two axes.
NORM, NORM_RELU, PAIR, BLOCK = "norm", "norm+ReLU", "conv+norm+ReLU", "conv+norm+ReLU+conv"


def lower(row: dict, devices: list[Any]) -> jax.stages.Lowered:
    """Lowers the program of a row.

    Args:
      row: from `accelerators.rows`.
      devices: from `targets.devices`, one for each chip of the row.
    """
    if row["kind"] == "step":
        return _lower_step(row, devices)
    shape, dtype = tuple(row["shape"]), jnp.dtype(row["dtype"])
    x = jax.ShapeDtypeStruct(shape, dtype)
    arm = arm_of(row["what"], row["arm"])
    params, state = jax.eval_shape(arm.init, x)
    # In a block, the ReLU stands between the norm and the second convolution, not at the end.
    activate = arms.ACTIVATIONS["none" if row["what"] in (NORM, BLOCK) else "relu"]
    run = functools.partial(arms.run_pass, arm, row["pass"], activate)
    dy = x if row["pass"] == "forward+backward" else None
    arguments = _shapes_on((params, state, x, dy), SingleDeviceSharding(devices[0]))
    return jax.jit(run, keep_unused=True).lower(*arguments)


def arm_of(what: str, name: str) -> arms.Arm:
    """Returns a norm, alone or between convolutions, with the interface of a layer.

    Args:
      what: `NORM`, `NORM_RELU`, `PAIR` or `BLOCK`; `arms.run_pass` applies the last ReLU of `NORM_RELU` and `PAIR`.
      name: key of `LAYERS`, or `FOLDED` for a convolution with bias and no norm.
    """
    if name in (FOLDED, steps.NONE):
        norm = _no_norm()
    else:
        norm = _affine() if name == AFFINE else arms.linen(LAYERS[name])
    if what in (NORM, NORM_RELU):
        return norm

    def init(x: jax.Array) -> tuple[dict, Any]:
        features = x.shape[-1]
        kernel = jnp.zeros((*(3, 3)[: x.ndim - 2], features, features))
        norm_params, state = norm.init(x)
        params = {"norm": norm_params, "first": kernel}
        if what == BLOCK:
            params["second"] = kernel
        if name == FOLDED:
            params["bias"] = jnp.zeros(features)
        return params, state

    def before(params: dict, x: jax.Array) -> jax.Array:
        y = convolve(x, params["first"])
        return y + params["bias"].astype(y.dtype) if "bias" in params else y

    def after(params: dict, y: jax.Array) -> jax.Array:
        return convolve(nn.relu(y), params["second"]) if "second" in params else y

    def train(params: dict, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, state = norm.train(params["norm"], state, before(params, x))
        return after(params, y), state

    def evaluate(params: dict, state: Any, x: jax.Array) -> jax.Array:
        return after(params, norm.evaluate(params["norm"], state, before(params, x)))

    return arms.Arm(init, train, evaluate)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves images [n, height, width, c] with a 3x3 kernel, or multiplies examples [n, c], in their dtype."""
    kernel = kernel.astype(x.dtype)
    if x.ndim == 2:
        return x @ kernel
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _no_norm() -> arms.Arm:
    """Returns the identity as an arm."""
    return arms.Arm(lambda x: ({}, {}), lambda params, state, x: (x, state), lambda params, state, x: x)


def _affine() -> arms.Arm:
    """Returns scale and bias as an arm, without statistics."""

    def init(x: jax.Array) -> tuple[dict, dict]:
        return affine().init(jax.random.key(0), x)["params"], {}

    def train(params: dict, state: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        return evaluate(params, state, x), state

    def evaluate(params: dict, state: dict, x: jax.Array) -> jax.Array:
        return affine(dtype=x.dtype).apply({"params": params}, x)

    return arms.Arm(init, train, evaluate)


def _lower_step(row: dict, devices: list[Any]) -> jax.stages.Lowered:
    """Lowers the training step of a network, with the batch split over the devices."""
    axis_name = AXIS if row["api"] == "shard_map" else None
    size = row["image_size"]
    images = jnp.zeros((row["batch_size"], size, size, 3), row["dtype"])
    step = _step(row, images, axis_name)
    mesh = Mesh(devices, AXIS, axis_types=(AxisType.Auto,))
    run: Callable = step.run
    if axis_name:
        state_specs = (P(), P(), P())
        in_specs = (*state_specs, P(AXIS), P(AXIS))
        run = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=state_specs, check_vma=False)
    if len(devices) == 1:
        replicated = split = SingleDeviceSharding(devices[0])
    else:
        replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    arguments = (*_shapes_on(step.state, replicated), *_shapes_on(step.batch, split))
    options = {"out_shardings": replicated} if row["chips"] > 1 else {}
    return jax.jit(run, donate_argnums=(0, 1, 2), **options).lower(*arguments)


def _step(row: dict, images: jax.Array, axis_name: str | None) -> steps.Step:
    """Makes the training step of one device."""
    layer = LAYERS[row["arm"]]
    if row["net"] == "ResNet-50":
        norm = layer and functools.partial(layer, **({"axis_name": axis_name} if axis_name else {}))
        return steps.step_of(resnet50.ResNet50(norm), images, resnet50.CLASSES, axis_name)
    name = {"ResNet-20": "resnet20", "Inception": "inception"}[row["net"]]
    config = Config(net=name, width=row["width"], batch_size=row["batch_size"])
    return steps.training_step(layer, config, images, axis_name)


def _shapes_on(tree: Any, sharding: Sharding) -> Any:
    """Returns the shapes of arrays with this sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
