"""Equinox: evaluation divides by more than the deviation of any batch; by default, for hundreds of batches.

With `mode="batch"`, the hidden average of the variance starts at 1, but is divided by 1 - momentum^t, as one that
starts at 0 must be. That adds momentum^t / (1 - momentum^t): 99 after the first batch with the default momentum.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(1, axis_name="batch", mode="batch")
train, evaluate = (
    jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    for one in (norm, eqx.nn.inference_mode(norm))
)
x = jnp.array([[-2.0], [2.0]])  # mean 0, variance 4: training makes it -1 and 1
for batches in range(1, 101):
    y, state = train(x, state)
    if batches in (1, 10, 100):
        in_evaluation, in_training = evaluate(x, state)[0][1, 0], y[1, 0]
        print(f"after {batches} times the same batch: {in_evaluation:.2f} in evaluation, {in_training:.2f} in training")
