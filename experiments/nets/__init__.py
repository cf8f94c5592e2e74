"""The nets of the studies, in linen and in nnx."""
