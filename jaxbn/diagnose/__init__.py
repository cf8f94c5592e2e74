"""Diagnoses the batch norms of a model on some batches: a table of all layers, and a list of problems in words.

``model`` is a linen module with its ``variables``, or an nnx module, with None for ``variables``.
``call(module, batch)`` says how the model evaluates a batch, as in
``lambda module, batch: module(batch["image"], train=False)``.  The batch norms may be Flax's or jaxbn's, at any depth,
under remat and jit.  Arguments are never changed.
"""

from jaxbn.diagnose._diagnosis import Diagnosis, diagnose
from jaxbn.diagnose._findings import Finding
from jaxbn.diagnose._summary import LayerSummary

Layer = LayerSummary  # its former name

__all__ = ["Diagnosis", "Finding", "Layer", "LayerSummary", "diagnose"]
