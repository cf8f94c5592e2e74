"""From a PyTorch model to a served one: convert, fine-tune, calibrate, fold, save, export.

`run` takes the weights of a ResNet with the names and shapes of torchvision's, and goes through all the steps.
`main` does so with torchvision's ResNet-18, at random weights unless it is given a file.  docs/shipping.md explains the
steps.
"""

import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jaxbn.linen
from jaxbn import calibrate, interop, surgery

MODEL, PROGRAM, ONNX, OUTPUTS = "model.pickle", "program.bin", "model.onnx", "outputs.npz"
ROOT = Path(__file__).parent.parent.parent
TOLERANCE = 1e-4  # of outputs, relative to the largest


class Block(nn.Module):
    """Two convolutions and a shortcut: torchvision's BasicBlock."""

    width: int
    stride: int
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Computes the features of the block."""
        norm, bias = norm_layer(train, self.folded), self.folded
        y = nn.Conv(self.width, (3, 3), self.stride, padding=1, use_bias=bias, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = nn.Conv(self.width, (3, 3), padding=1, use_bias=bias, name="conv2")(y)
        y = norm(name="bn2")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.width, (1, 1), self.stride, use_bias=bias, name="downsample_0")(x)
            x = norm(name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet of basic blocks, with torchvision's names; by default ResNet-18.

    Attributes:
      stages: number of blocks by stage.
      width: number of features of the first stage.
      num_classes: number of logits.
      folded: whether the convolutions have biases, in place of batch norms; fits the variables of the folded network.
    """

    stages: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    num_classes: int = 1000
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Computes the logits of images of shape [N, height, width, 3]."""
        # As in PyTorch, a strided convolution pads both ends, which "SAME" does not.
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=self.folded, name="conv1")(x)
        x = nn.relu(norm_layer(train, self.folded)(name="bn1")(x))
        # Not by `padding=`, which jax2onnx ignores. After a ReLU, zeros do not change a maximum.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = Block(self.width * 2**i, stride, self.folded, name=f"layer{i + 1}_{j}")(x, train)
        return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def norm_layer(train: bool, folded: bool) -> Any:
    """Returns the constructor of batch norms with PyTorch's settings, or of nothing in a folded network."""
    if folded:
        return lambda name: lambda x: x
    options = interop.batch_norm_options_from_torch(momentum=0.1)
    return lambda name: jaxbn.linen.BatchNorm(use_running_average=not train, **options, name=name)


def evaluate(model: Any, images: jax.Array) -> jax.Array:
    """Calls a model as in evaluation."""
    return model(images, train=False)


def run(
    state_dict: Mapping[str, Any],
    net: ResNet,
    batches: Sequence[tuple[np.ndarray, np.ndarray]],
    folder: Path,
    *,
    onnx: bool,
) -> dict[str, np.ndarray]:
    """Goes all the way, and checks that each step computes the outputs of the one before.

    Args:
      state_dict: weights with the names of torchvision, tensors or arrays.
      net: the Flax model.
      batches: images, shape [N, height, width, 3], and labels, shape [N].
      folder: where to save the model.
      onnx: whether to export to ONNX as well, which needs jax2onnx and onnxruntime.

    Returns:
      The logits of the first images by step.
    """
    images = jnp.asarray(batches[0][0])
    logits = {}

    variables = convert(state_dict, net, images)
    logits["converted"] = net.apply(variables, images)

    variables = fine_tune(net, variables, batches)
    logits["fine-tuned"] = net.apply(variables, images)

    variables = calibrate.one_pass(net, variables, [x for x, _ in batches], call=evaluate)
    logits["calibrated"] = net.apply(variables, images)

    folded = surgery.fold(net, variables, images, call=evaluate)
    assert not folded.kept, folded.kept
    logits["folded"] = folded.model.apply(folded.variables, images)

    save(net, folded, images, folder, onnx=onnx)
    # In a process that has neither the weights nor the original model.
    np.save(folder / "images.npy", images)
    program = "import pathlib, sys; from experiments.demos import journey; journey.load(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(folder.resolve())], cwd=ROOT, check=True)
    logits |= np.load(folder / OUTPUTS)

    logits = {name: np.asarray(values) for name, values in logits.items()}
    expected = logits["calibrated"]
    for name in ("folded", "loaded", "program", *(["onnx"] if onnx else [])):
        np.testing.assert_allclose(logits[name], expected, rtol=0, atol=TOLERANCE * abs(expected).max(), err_msg=name)
    return logits


def convert(state_dict: Mapping[str, Any], net: ResNet, images: jax.Array) -> dict[str, Any]:
    """Returns the variables of the Flax model with the weights and statistics of the PyTorch model."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    layers = {name.rpartition(".")[0] for name in state_dict}
    # "layer1.0.downsample.1" in PyTorch is "layer1_0/downsample_1" here.
    paths = {name: re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/") for name in layers}
    return interop.from_torch(state_dict, shapes, paths)


def fine_tune(net: ResNet, variables: dict[str, Any], batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> Any:
    """Trains for a step on each batch, with the statistics and the parameters of the batch norms frozen."""
    frozen = surgery.freeze(net, variables, batches[0][0], call=evaluate)
    mask = surgery.frozen_mask(frozen.variables["params"], frozen.layers)
    optimizer = optax.transforms.selective_transform(optax.sgd(1e-2, momentum=0.9), freeze_mask=mask)

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple:
        def loss(params: Any) -> jax.Array:
            logits = frozen.model.apply(frozen.variables | {"params": params}, images, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = frozen.variables["params"]
    state = optimizer.init(params)
    for images, labels in batches:
        params, state = step(params, state, images, labels)
    return variables | {"params": params}


def save(net: ResNet, folded: surgery.Surgery, images: jax.Array, folder: Path, *, onnx: bool) -> None:
    """Saves a model in three ways: itself, as a program for any batch size, and as ONNX."""
    arrays = jax.tree.map(np.asarray, folded.variables)
    (folder / MODEL).write_bytes(pickle.dumps((folded.model, arrays)))

    def serve(images: jax.Array) -> jax.Array:
        return folded.model.apply(folded.variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    of_images = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    program = jax.export.export(jax.jit(serve), platforms=["cpu", "cuda", "tpu"])(of_images)
    (folder / PROGRAM).write_bytes(program.serialize())

    if onnx:
        import jax2onnx

        # jax2onnx calls the original convolutions, which have no biases; see docs/shipping.md.
        plain = net.clone(folded=True)
        model = jax2onnx.to_onnx(lambda x: plain.apply(folded.variables, x), [("batch", *images.shape[1:])])
        (folder / ONNX).write_bytes(model.SerializeToString())


def load(folder: Path) -> None:
    """Computes the outputs of all that `save` wrote, and writes them to a file."""
    images = np.load(folder / "images.npy")
    model, arrays = pickle.loads((folder / MODEL).read_bytes())
    logits = {"loaded": jax.jit(model.apply)(arrays, images)}
    logits["program"] = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes())).call(images)
    if (folder / ONNX).exists():
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / ONNX)
        (logits["onnx"],) = session.run(None, {session.get_inputs()[0].name: images})
    np.savez(folder / OUTPUTS, **logits)


def random_batches(num: int, size: int, num_classes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns batches of eight random images and labels, in place of a data set."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(num, 8, size, size, 3)).astype(np.float32)
    return [*zip(images, rng.integers(num_classes, size=(num, 8)), strict=True)]


def main(*, weights: Path | None) -> None:
    """Runs the journey of torchvision's ResNet-18, and prints how the outputs of the steps differ."""
    import torch
    import torchvision

    model = torchvision.models.resnet18()
    if weights:
        model.load_state_dict(torch.load(weights))
    with tempfile.TemporaryDirectory() as folder:
        logits = run(model.state_dict(), ResNet(), random_batches(4, 64, 1000), Path(folder), onnx=True)
    reference = logits["calibrated"]
    for name, values in logits.items():
        difference = abs(values - reference).max() / abs(reference).max()
        print(f"{name:12} differs from the calibrated model by {difference:.1e}")
