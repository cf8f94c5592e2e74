"""`python -m tests.numerics_table`: errors of batch norm against float64 as the mean grows, ours beside Flax's.

One training step in float32 on inputs with 2 to 5 axes and standard deviation 1.  The inputs are rounded first, and
the oracle sees the rounded values: what is measured is what the arithmetic adds.  Of the output, the largest absolute
error; of the gradients with respect to x, scale and bias, the largest error over the largest entry.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from tests import reference

SHAPES = ((512, 6), (64, 9, 6), (32, 5, 7, 6), (16, 3, 4, 5, 6))


def sample(shape, mean, dtype=np.float32, seed=0):
    """Returns x of std 1, scale, bias and dy; x has the dtype, all are rounded to it or to float32."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) + mean).astype(dtype)
    scale, bias = rng.normal(1, 0.3, shape[-1]), rng.normal(0, 1, shape[-1])
    return x, scale.astype(np.float32), bias.astype(np.float32), rng.normal(size=shape).astype(np.float32)


@jax.jit
def ours(x, scale, bias, dy):
    y, vjp, moments = jax.vjp(lambda *a: jaxbn.batch_normalize(*a), x, scale, bias, has_aux=True)
    return y, vjp(dy.astype(y.dtype)), moments


@functools.partial(jax.jit, static_argnames="fast")
def flax(x, scale, bias, dy, *, fast):
    layer = nn.BatchNorm(use_running_average=False, use_fast_variance=fast, dtype=jnp.float32)
    stats = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}

    def apply(x, scale, bias):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        return layer.apply(variables, x, mutable=["batch_stats"])

    y, vjp, _ = jax.vjp(apply, x, scale, bias, has_aux=True)
    return y, vjp(dy)


def errors(implementation, x, scale, bias, dy):
    """Returns the largest output error, and the largest error of the gradients relative to their largest entry."""
    y, gradients, *_ = implementation(x, scale, bias, dy)
    exact_gradients = reference.gradients(x, scale, bias, dy)
    return (
        abs(np.float64(y) - reference.batch_norm(x, scale, bias)[0]).max(),
        max(abs(np.float64(g) - e).max() / abs(e).max() for g, e in zip(gradients, exact_gradients, strict=True)),
    )


def table(ratios):
    """Returns rows: mean/std, and the worst (output error, gradient error) over the shapes of each implementation."""
    return [
        (
            ratio,
            *(np.max([errors(f, *sample(shape, ratio)) for shape in SHAPES], axis=0) for f in IMPLEMENTATIONS.values()),
        )
        for ratio in ratios
    ]


IMPLEMENTATIONS = {
    "jaxbn": ours,
    "Flax": functools.partial(flax, fast=True),
    "Flax, `use_fast_variance=False`": functools.partial(flax, fast=False),
}


def main():
    """Prints the table in Markdown."""
    print("| mean/std |", " | ".join(IMPLEMENTATIONS), "|")
    print("|---" * (1 + len(IMPLEMENTATIONS)) + "|")
    for ratio, *found in table((0, 1, 1.9, 2.1, 5, 10, 1e2, 1e3, 1e4, 1e5, 1e6)):
        print(f"| {ratio:g} |", " | ".join(f"{output:.0e} / {gradient:.0e}" for output, gradient in found), "|")


if __name__ == "__main__":
    main()
