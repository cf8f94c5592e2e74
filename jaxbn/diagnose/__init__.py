"""What is wrong with the batch norms of a model, on these data: a table per layer, and findings in plain language.

``model`` is a linen module with its ``variables``, or an nnx module with None in their place.  ``call(module, batch)``
says how the model evaluates a batch, as in ``lambda module, batch: module(batch["image"], train=False)``.  Its batch
norms are Flax's or ours, at any depth, under remat and jit.  Nothing that is given changes.
"""

from jaxbn.diagnose._diagnosis import Diagnosis, diagnose
from jaxbn.diagnose._findings import Finding
from jaxbn.diagnose._summary import Layer

__all__ = ["Diagnosis", "Finding", "Layer", "diagnose"]
