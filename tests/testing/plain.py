"""A plain batch norm that satisfies every law, with its variants.

It is written for clarity and shares no code with jaxbn.  Each method is a part that a mutant can replace.
"""

import jax.numpy as jnp
from jax import lax

from jaxbn.testing import AXIS, Adapter


class BatchNorm:
    """Statistics over all axes but the last, and over the device axis if it has a name."""

    epsilon, momentum, unbiased, debiased = 1e-5, 0.9, False, False

    def __init__(self, axis_name=None):
        self.axis_name = axis_name

    def total(self, x):
        """Adds up over examples, positions and devices."""
        x = x.sum(tuple(range(x.ndim - 1)))
        return x if self.axis_name is None else lax.psum(x, self.axis_name)

    def count(self, x, admitted):
        return self.total(jnp.broadcast_to(admitted, x.shape).astype(x.dtype))

    def admit(self, x, mask):
        """Returns the valid positions, and the inputs with zeros elsewhere."""
        admitted = jnp.ones(x.shape, bool) if mask is None else mask
        return admitted, jnp.where(admitted, x, 0)

    def moments(self, x, admitted):
        """Returns mean, variance and count; the mean in two parts, because one float is too coarse for a large mean."""
        count = self.count(x, admitted)
        m = jnp.maximum(count, 1)
        mean = self.total(x) / m
        rest = self.total(jnp.where(admitted, x - mean, 0)) / m
        var = self.total(jnp.where(admitted, x - mean - rest, 0) ** 2) / m
        return mean, rest, var, count

    def rsqrt(self, var):
        return lax.rsqrt(var + self.epsilon)

    def normalize(self, x, mean, rest, var, scale, bias):
        return (x - mean - rest) * self.rsqrt(var) * scale + bias

    def update(self, state, mean, var, count):
        """Returns the state after a batch with these moments."""
        accepted = (count > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
        return state | {
            "mean": self.move(state["mean"], mean, accepted),
            "var": self.move(state["var"], var, accepted),
        }

    def move(self, old, new, accepted):
        return jnp.where(accepted, self.momentum * old + (1 - self.momentum) * new, old).astype(old.dtype)

    # The functions of an adapter.

    def init(self, x):
        features = x.shape[-1]
        return {"mean": jnp.zeros(features), "var": jnp.ones(features)} | {
            "scale": jnp.ones(features),
            "bias": jnp.zeros(features),
        }

    def train(self, state, x, mask):
        dtype = x.dtype
        admitted, x = self.admit(self.widen(x), mask)
        mean, rest, var, count = self.moments(x, admitted)
        y = self.normalize(x, mean, rest, var, state["scale"], state["bias"])
        return y.astype(dtype), self.update(state, mean + rest, var, count)

    def widen(self, x):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def evaluate(self, state, x):
        mean, var = self.statistics(state)
        return self.normalize(self.widen(x), mean, 0, var, state["scale"], state["bias"]).astype(x.dtype)

    def statistics(self, state):
        return state["mean"], state["var"]

    @classmethod
    def adapter(cls):
        return cls()._adapter(over_devices=cls(AXIS)._adapter())

    def _adapter(self, over_devices=None):
        return Adapter(
            name=type(self).__name__,
            init=self.init,
            train=self.train,
            evaluate=self.evaluate,
            statistics=self.statistics,
            with_parameters=lambda state, scale, bias: state | {"scale": scale, "bias": bias},
            epsilon=self.epsilon,
            momentum=self.momentum,
            unbiased=self.unbiased,
            debiased=self.debiased,
            masks=True,
            over_devices=over_devices,
        )


class Unbiased(BatchNorm):
    """The running variance is multiplied by m/(m - 1)."""

    unbiased = True

    def update(self, state, mean, var, count):
        return super().update(state, mean, var * count / jnp.maximum(count - 1, 1), count)


class Debiased(BatchNorm):
    """The running statistics are corrected for their initial values, with the number of batches."""

    debiased = True

    def init(self, x):
        state = super().init(x)
        return state | {"var": jnp.zeros(x.shape[-1]), "batches": jnp.zeros(x.shape[-1], jnp.int32)}

    def update(self, state, mean, var, count):
        accepted = (count > 0) & jnp.isfinite(mean) & jnp.isfinite(var)
        return super().update(state, mean, var, count) | {"batches": state["batches"] + accepted}

    def statistics(self, state):
        seen = state["batches"]
        correction = jnp.where(seen > 0, 1 - self.momentum**seen, 1)
        return state["mean"] / correction, jnp.where(seen > 0, state["var"] / correction, 1)
