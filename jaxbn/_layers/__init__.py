"""Layers that jaxbn.linen and jaxbn.nnx export."""
