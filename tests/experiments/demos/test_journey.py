"""The journey from PyTorch to a served model: each step computes what the one before does."""

import importlib.util
import sys

import jax
import numpy as np
import pytest

from experiments.demos import journey
from jaxbn import interop

pytestmark = pytest.mark.slow
SMALL = journey.ResNet(stages=(1, 1), width=8, num_classes=10)


def small_state_dict():
    """Random arrays with the names and layouts of PyTorch, statistics away from their initial values."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def value(a):
        values = rng.normal(size=a.shape) / np.sqrt(a.size / a.shape[-1])
        return (abs(rng.normal(size=a.shape)) + 0.5 if a.ndim == 1 else values).astype(np.float32)

    variables = jax.tree.map(value, shapes)
    paths = {"/".join(key.key for key in path[1:-1]) for path, _ in jax.tree.flatten_with_path(variables)[0]}
    return interop.to_torch(variables, {torch_name(path): path for path in paths})


def torch_name(path):
    names = path.split("/")
    return ".".join(name.replace("_", ".") for name in names)


def test_a_state_dict_of_arrays_goes_all_the_way(tmp_path):
    state_dict = small_state_dict()
    assert state_dict["layer2.0.downsample.1.running_var"].shape == (16,)
    batches = journey.random_batches(3, 32, 10)
    logits = journey.run(state_dict, SMALL, batches, tmp_path, onnx=False)  # compares the later steps
    assert {"converted", "fine-tuned", "calibrated", "folded", "loaded", "program"} == logits.keys()
    # Fine-tuning and calibration do something.
    steps = [logits[name] for name in ("converted", "fine-tuned", "calibrated")]
    for before, after in zip(steps, steps[1:], strict=False):
        assert abs(before - after).max() > 1e-3 * abs(before).max()


def import_torchvision(torch):
    """Imports torchvision, also its wheel for GPUs next to a PyTorch for CPUs, where its compiled operators lack.

    Models do not need these, but the import fails where it describes two of them.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.torchvision_operators = library  # they last as long as this object
        return importlib.import_module("torchvision")


def test_torchvision_resnet18_goes_all_the_way(tmp_path):
    torch = pytest.importorskip("torch")
    onnx = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))
    torchvision = import_torchvision(torch)
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    batches = journey.random_batches(2, 64, 1000)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))  # statistics away from their initial values
        expected = model.eval()(torch.from_numpy(batches[0][0]).permute(0, 3, 1, 2)).numpy()
    logits = journey.run(model.state_dict(), journey.ResNet(), batches, tmp_path, onnx=onnx)
    atol = journey.TOLERANCE * abs(expected).max()
    np.testing.assert_allclose(logits["converted"], expected, rtol=0, atol=atol)
    assert ("onnx" in logits) == onnx  # compared by `run`
