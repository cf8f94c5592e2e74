"""Batch norm as functions on arrays. Nothing here knows of Flax."""
