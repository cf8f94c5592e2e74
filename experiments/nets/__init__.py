"""The networks of the studies, in linen and in nnx."""
