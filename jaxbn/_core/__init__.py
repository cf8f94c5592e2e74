"""Batch norm as functions on arrays.  Nothing here depends on Flax."""
