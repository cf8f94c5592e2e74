"""PyTorch's batch norm on the CPU; converts NumPy arrays, and moves the channels."""

import jax.numpy as jnp
import numpy as np
import torch

from experiments.scoreboard.peers import EPSILON, MOMENTUM
from jaxbn.testing import Adapter

LAYERS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}


def layer() -> Adapter:
    """Makes the adapter of ``torch.nn.BatchNorm1d``, 2d and 3d, whose state is their ``state_dict``."""

    def train(state, x, mask):
        del mask
        norm = _layer(state, x)
        with torch.no_grad():
            y = norm(_tensor(x))
        return _array(y), _state(norm)

    def evaluate(state, x):
        norm = _layer(state, x).eval()
        with torch.no_grad():
            return _array(norm(_tensor(x)))

    def gradients(state, x, scale, bias, dy, mask):
        del mask
        norm, x = _layer(with_parameters(state, scale, bias), x), _tensor(x).requires_grad_()
        norm(x).backward(_tensor(dy))
        return _array(x.grad), norm.weight.grad.numpy(), norm.bias.grad.numpy()

    def with_parameters(state, scale, bias):
        return state | {"weight": np.asarray(scale), "bias": np.asarray(bias)}

    return Adapter(
        name="torch",
        init=lambda x: _state(_make(x)),
        train=train,
        evaluate=evaluate,
        statistics=lambda state: (state["running_mean"], state["running_var"]),
        with_parameters=with_parameters,
        gradients=gradients,
        epsilon=EPSILON,
        momentum=MOMENTUM,
        unbiased=True,
        traceable=False,
    )


def _make(x) -> torch.nn.Module:
    dtype = torch.float64 if x.dtype == np.float64 else torch.float32  # float32 also for half precision
    # PyTorch's momentum is the weight of the new value.
    return LAYERS[np.ndim(x)](np.shape(x)[-1], eps=EPSILON, momentum=1 - MOMENTUM, dtype=dtype)


def _layer(state: dict, x) -> torch.nn.Module:
    norm = _make(x)
    norm.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return norm


def _state(norm: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in norm.state_dict().items()}


def _tensor(x) -> torch.Tensor:
    """Converts to channels first. PyTorch cannot read NumPy arrays in bfloat16, so it gets their bits."""
    x = np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1))
    return torch.tensor(x.view(np.int16)).view(torch.bfloat16) if x.dtype == jnp.bfloat16 else torch.tensor(x)


def _array(y: torch.Tensor) -> np.ndarray:
    """Converts to channels last; the inverse of `_tensor`."""
    y = y.detach()
    y = y.view(torch.int16).numpy().view(jnp.bfloat16) if y.dtype == torch.bfloat16 else y.numpy()
    return np.moveaxis(y, 1, -1)
