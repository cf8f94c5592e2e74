"""Writes pytorch_training.npz: the state of a PyTorch model after 5 and 10 steps, and outputs of single layers.

python tests/golden/make_pytorch_training.py    # needs torch==2.13.0; reproducible with the same version and processor
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("pytorch_training.npz")
DTYPES = ["float32", "float64"]
STEPS = 5  # in PyTorch before the conversion, and again after it
LEARNING_RATE, MOMENTUM = 0.05, 0.9
BATCH, CLASSES, IMAGE, FLATTENED = 16, 5, (3, 8, 6), (8, 4, 3)  # channels, height, width
SHAPES = {
    "conv1.weight": (6, 3, 3, 5),
    "bn1.weight": (6,),
    "bn1.bias": (6,),
    "conv2.weight": (8, 3, 3, 3),
    "conv2.bias": (8,),
    "bn2.weight": (8,),
    "bn2.bias": (8,),
    "fc.weight": (CLASSES, 96),
    "fc.bias": (CLASSES,),
}
NORM = ["weight", "bias", "running_mean", "running_var"]
# Name of a case -> kind of layer, shape of the weight, has a bias, options, shape of the input.
LAYERS = {
    "conv-1d": ("Conv1d", (4, 3, 5), True, {"stride": 2, "padding": 2}, (2, 3, 9)),
    "conv-2d-grouped": ("Conv2d", (6, 2, 3, 2), False, {"groups": 2, "dilation": (2, 1)}, (2, 4, 7, 6)),
    "conv-2d-depthwise": ("Conv2d", (6, 1, 3, 3), True, {"groups": 3, "padding": 1}, (2, 3, 5, 4)),
    "conv-3d": ("Conv3d", (4, 3, 2, 3, 1), True, {"padding": (1, 1, 0)}, (2, 3, 4, 5, 3)),
    "conv-transpose-1d": ("ConvTranspose1d", (3, 4, 5), True, {"stride": 2}, (2, 3, 6)),
    "conv-transpose-2d": (
        "ConvTranspose2d",
        (3, 4, 3, 2),
        True,
        {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
        (2, 3, 5, 4),
    ),
    "conv-transpose-2d-dilated": (
        "ConvTranspose2d",
        (3, 3, 3, 3),
        False,
        {"stride": 2, "padding": 2, "output_padding": 1, "dilation": 2},
        (2, 3, 4, 5),
    ),
    "conv-transpose-3d": (
        "ConvTranspose3d",
        (2, 3, 2, 3, 1),
        True,
        {"stride": 2, "padding": (1, 2, 0)},
        (2, 2, 3, 4, 2),
    ),
    "dense": ("Linear", (3, 7), True, {}, (2, 7)),
}
# Name of a chain -> kind, arguments and shapes of the entries of each layer, shape of the input.
CHAINS = {
    "flattened": (
        [
            ("Conv2d", (3, 4, 3), {"weight": (4, 3, 3, 3), "bias": (4,)}),
            ("Flatten", (), {}),
            ("BatchNorm1d", (24,), dict.fromkeys(NORM, (24,))),
            ("Linear", (24, 7), {"weight": (7, 24), "bias": (7,)}),
        ],
        (2, 3, 4, 5),
    ),
    "unflattened": (
        [
            ("Linear", (5, 24), {"weight": (24, 5), "bias": (24,)}),
            ("BatchNorm1d", (24,), dict.fromkeys(NORM, (24,))),
            ("Unflatten", (1, (4, 2, 3)), {}),
            ("BatchNorm2d", (4,), dict.fromkeys(NORM, (4,))),
            ("ConvTranspose2d", (4, 3, (3, 2)), {"weight": (4, 3, 3, 2), "bias": (3,)}),
        ],
        (2, 5),
    ),
}


def start(dtype):
    """Returns the parameters before the first step."""
    rng = np.random.default_rng(0)
    fans = {name: np.prod(shape[1:]) if len(shape) > 1 else 16 for name, shape in SHAPES.items()}
    values = {name: rng.normal(size=shape) / np.sqrt(fans[name]) for name, shape in SHAPES.items()}
    return {name: (value + ("bn" in name and "weight" in name)).astype(dtype) for name, value in values.items()}


def batches(dtype):
    """Returns images [N, C, H, W] and labels for each of the ten steps."""
    rng = np.random.default_rng(1)
    images = rng.normal(loc=0.5, size=(2 * STEPS, BATCH, *IMAGE)).astype(dtype)
    return list(zip(images, rng.integers(CLASSES, size=(2 * STEPS, BATCH)), strict=True))


def layer_inputs(case):
    """Returns the ``state_dict`` entries of a layer, and its input."""
    _, shape, has_bias, _, input_shape = LAYERS[case]
    rng = np.random.default_rng(2)
    entries = {"weight": rng.normal(size=shape)}
    if has_bias:
        entries["bias"] = rng.normal(size=shape["transpose" in case])  # the axis of output features
    return entries, rng.normal(size=input_shape)


def run_layer(case):
    """Returns the float64 output of a layer."""
    import torch

    kind, shape, has_bias, options, input_shape = LAYERS[case]
    entries, x = layer_inputs(case)
    features = (input_shape[1], shape["transpose" in case])
    size = (shape[2:],) if len(shape) > 2 else ()
    layer = getattr(torch.nn, kind)(*features, *size, bias=has_bias, dtype=torch.float64, **options)
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in entries.items()})
    return layer(torch.from_numpy(x)).detach().numpy()


def chain_inputs(case):
    """Returns the entries of a chain of layers, all positive because some are variances, and its input."""
    layers, input_shape = CHAINS[case]
    rng = np.random.default_rng(3)
    shapes = {f"{i}.{name}": shape for i, layer in enumerate(layers) for name, shape in layer[2].items()}
    return {name: rng.uniform(0.5, 2, size=shape) for name, shape in shapes.items()}, rng.normal(size=input_shape)


def run_chain(case):
    """Returns the float64 output of a chain of layers in evaluation."""
    import torch

    entries, x = chain_inputs(case)
    chain = torch.nn.Sequential(*(getattr(torch.nn, kind)(*arguments) for kind, arguments, _ in CHAINS[case][0]))
    chain = chain.double().eval()
    chain.load_state_dict({name: torch.from_numpy(value) for name, value in entries.items()}, strict=False)
    return chain(torch.from_numpy(x)).detach().numpy()


def make_model(dtype):
    """Returns the model and its optimizer."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 6, (3, 5), padding=(1, 2), bias=False)
            self.bn1 = nn.BatchNorm2d(6)
            self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
            self.bn2 = nn.BatchNorm2d(8, momentum=None)
            self.fc = nn.Linear(96, CLASSES)

        def forward(self, x):
            x = self.bn1(self.conv1(x)).relu()
            x = self.bn2(self.conv2(x)).relu()
            return self.fc(x.flatten(1))

    model = Net().to(getattr(torch, dtype))
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def state_of(model, optimizer):
    """Returns copies of the ``state_dict`` and of the momentum buffers, by name of the parameter."""
    momenta = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    return tuple({n: t.detach().numpy().copy() for n, t in tree.items()} for tree in (model.state_dict(), momenta))


def set_state(model, optimizer, entries, momenta):
    """Restores the state that :func:`state_of` returned."""
    import torch

    model.load_state_dict({name: torch.from_numpy(value) for name, value in entries.items()})
    for name, p in model.named_parameters():
        optimizer.state[p]["momentum_buffer"] = torch.from_numpy(momenta[name])


def train(model, optimizer, steps):
    """Trains on the given batches; returns the loss of each step."""
    import torch

    losses = []
    for x, labels in steps:
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(dtype):
    """Trains for ten steps; returns losses, entries and momenta of each half."""
    import torch

    model, optimizer = make_model(dtype)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in start(dtype).items()}, strict=False)
    halves = []
    for steps in (batches(dtype)[:STEPS], batches(dtype)[STEPS:]):
        losses = train(model, optimizer, steps)
        entries, momenta = state_of(model, optimizer)
        halves.append({"losses": np.array(losses, dtype), "entries": entries, "momenta": momenta})
    return halves


def main():
    """Writes the file."""
    import torch

    arrays = {f"layers/{case}": run_layer(case) for case in LAYERS} | {"torch": np.array(torch.__version__)}
    arrays |= {f"chains/{case}": run_chain(case) for case in CHAINS}
    for dtype in DTYPES:
        for half, state in enumerate(run(dtype)):
            arrays[f"{dtype}/{half}/losses"] = state["losses"]
            for tree in ("entries", "momenta"):
                arrays |= {f"{dtype}/{half}/{tree}/{name}": value for name, value in state[tree].items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
