"""Writes pytorch.json: outputs, gradients and statistics of PyTorch's batch norm in five training steps.

python tests/golden/make_pytorch.py    # needs torch==2.13.0; reproducible with the same version and processor
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("pytorch.json")
STEPS = 5
MOMENTUM = 0.1  # in PyTorch the weight of the new value; None is the plain average of all batches
SHAPES = {"1d": (8, 3), "2d": (4, 3, 2, 2)}  # features on axis 1
CASES = {
    f"{layer}-{dtype}-{momentum}": (layer, dtype, momentum)
    for layer, dtype, momentum in [
        ("1d", "float32", MOMENTUM),
        ("1d", "float64", MOMENTUM),
        ("2d", "float32", MOMENTUM),
        ("2d", "float64", MOMENTUM),
        ("1d", "float32", None),
    ]
}


def inputs(case):
    """Returns weight and bias, and an input and an output cotangent for each step."""
    layer, dtype, _ = CASES[case]
    rng = np.random.default_rng(0)
    feature = (-1,) + (1,) * (len(SHAPES[layer]) - 2)
    spread, mean = (np.reshape(v, feature) for v in ([1.0, 3.0, 0.5], [0.0, 2.0, -5.0]))
    weight, bias = rng.normal(size=(2, 3)).astype(dtype)
    batches = rng.normal(size=(STEPS, 2, *SHAPES[layer]))
    return weight, bias, [((spread * x + mean).astype(dtype), dy.astype(dtype)) for x, dy in batches]


def run(case):
    """Runs a case; returns output, gradients and running statistics of each step, and a final evaluation."""
    import torch

    layer, dtype, momentum = CASES[case]
    weight, bias, batches = inputs(case)
    kind = {"1d": torch.nn.BatchNorm1d, "2d": torch.nn.BatchNorm2d}[layer]
    norm = kind(3, momentum=momentum, dtype=getattr(torch, dtype))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
        norm.bias.copy_(torch.tensor(bias))
    steps = []
    for x, dy in batches:
        x = torch.tensor(x, requires_grad=True)
        y = norm(x)
        dx, dweight, dbias = torch.autograd.grad(y, (x, norm.weight, norm.bias), torch.tensor(dy))
        values = {
            "y": y,
            "dx": dx,
            "dweight": dweight,
            "dbias": dbias,
            "mean": norm.running_mean,
            "var": norm.running_var,
        }
        steps.append({name: _listed(value) for name, value in values.items()})
    evaluated = norm.eval()(torch.tensor(batches[0][0]))
    return {"steps": steps, "evaluated": _listed(evaluated)}


def _listed(tensor):
    # The shortest text that reads back as the same number.
    return [float(str(value)) for value in tensor.detach().numpy().ravel()]


def main():
    """Writes the file."""
    import torch

    golden = {"torch": torch.__version__.split("+")[0], "cases": {case: run(case) for case in CASES}}
    FILE.write_text(json.dumps(golden).replace('], "', '],\n"') + "\n")  # one array per line


if __name__ == "__main__":
    main()
