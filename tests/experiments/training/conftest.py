"""A small network for the tests of training, and interruptions."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.nets import linen as linen_nets
from experiments.nets.blocks import Block, ConvNorm
from experiments.training import programs


class Small(nn.Module):
    """One convolution and a dense layer. The loop does the same for all networks, and this one compiles quickly.

    It is smooth: with a ReLU, differences in rounding could turn a unit on or off, and runs would diverge.
    """

    num_classes: int
    norm: str

    @nn.compact
    def __call__(self, x, train, mask=None):
        x = nn.silu(ConvNorm(4, 3, Block(self.norm), activate=False)(x, train, mask))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


# A cache apart from the one of the real networks.
compile_small = functools.lru_cache(programs._compile.__wrapped__)


@pytest.fixture
def small_net(monkeypatch):
    """Trains `Small` instead of the network of the config."""
    monkeypatch.setattr(linen_nets, "build", lambda config, num_classes: Small(num_classes, config.norm))
    monkeypatch.setattr(programs, "_compile", compile_small)


class Stop(Exception):
    """Ends a run like an interruption."""


def stop_at(step):
    def on_progress(progress):
        if progress.step >= step:
            raise Stop

    return on_progress


def without_seconds(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_curve(rows, others):
    # Different rounding of float32 sums, by 1e-7, accumulates; an image between two classes may change its prediction.
    tolerances = {"train_loss": (1e-5, 0), "test_loss": (1e-5, 0), "train_accuracy": (0, 1 / 64)}
    for name, (rtol, atol) in tolerances.items():
        pair = ([row[name] for row in curve] for curve in (rows, others))
        np.testing.assert_allclose(*pair, rtol=rtol, atol=atol)
