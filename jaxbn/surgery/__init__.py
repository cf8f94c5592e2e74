"""Surgery on the batch norms of a whole model: freeze them, make them affine, fold them away, replace them.

Each operation takes a linen module with its variables, or an nnx module with None, and a sample batch to run the model
on.  ``call(module, batch)`` says how the model evaluates a batch; the default is ``module(batch)``.  The batch norms,
Flax's or jaxbn's, are found by running the model; their names do not matter.  The arguments do not change: an operation
returns a new model, and the largest change of its outputs in evaluation.  If it is not possible, it raises a ValueError
with the reason.
"""

from jaxbn._models.batch_norms import register_batch_norm
from jaxbn.surgery._affine import to_affine
from jaxbn.surgery._domains import replace_by_domain_norm
from jaxbn.surgery._folding import fold
from jaxbn.surgery._freezing import freeze
from jaxbn.surgery._masks import decay_mask, frozen_mask
from jaxbn.surgery._operation import Surgery
from jaxbn.surgery._replacing import replace, replace_by_group_norm

__all__ = [
    "Surgery",
    "decay_mask",
    "fold",
    "freeze",
    "frozen_mask",
    "register_batch_norm",
    "replace",
    "replace_by_domain_norm",
    "replace_by_group_norm",
    "to_affine",
]
