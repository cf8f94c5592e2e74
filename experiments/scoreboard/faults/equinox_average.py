"""Equinox: for hundreds of batches, evaluation divides by more than the standard deviation of any batch.

With `mode="batch"`, the hidden average of the variance starts at 1, but is divided by 1 - momentum^t, which is right
only for an average that starts at 0. This adds momentum^t / (1 - momentum^t): 99 after the first batch with the default
momentum.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, axis_name="batch", mode="batch")
train, evaluate = (
    jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for layer in (norm, eqx.nn.inference_mode(norm))
)
x = jnp.array([[-2.0], [2.0]])  # mean 0, variance 4: normalized to -1 and 1 in training
for batches in range(1, 101):
    y, state = train(x, state)
    if batches in (1, 10, 100):
        in_evaluation, in_training = evaluate(x, state)[0][1, 0], y[1, 0]
        print(f"after {batches} times the same batch: {in_evaluation:.2f} in evaluation, {in_training:.2f} in training")
