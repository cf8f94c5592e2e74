"""Haiku: the variance can be negative, because E[x^2] - E[x]^2 is not clipped; below -epsilon, y is NaN."""

import haiku as hk
import jax.numpy as jnp

norm = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=True))
x = jnp.array([[1000.1], [1000.2]])
y, state = norm.apply(*norm.init(None, x), None, x)
print(f"running variance {state['batch_norm/~/var_ema']['average'].item():.1f}, y {y.ravel()}")
