"""Batch norms inside of a Flax model, linen or nnx: found, intercepted and measured."""
