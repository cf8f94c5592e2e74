"""Surgery on the batch norms of a whole model: freeze them, make them affine, fold them away, replace them.

Every operation takes a linen module with its variables, or an nnx module with None, and a sample batch on which the
model is tried.  ``call(module, batch)`` says how the model evaluates a batch; by default ``module(batch)``.  Layers are
found by running the model, whatever they are called in it; Flax's batch norms and ours are.  Nothing that is given
changes: what comes back is a new model, with the largest difference of its outputs in evaluation.  An operation that
cannot be done raises a ValueError with the reason.
"""

from jaxbn.surgery._affine import to_affine
from jaxbn.surgery._folding import fold
from jaxbn.surgery._freezing import freeze, frozen_mask
from jaxbn.surgery._operation import Surgery
from jaxbn.surgery._replacing import replace, replace_by_group_norm

__all__ = ["Surgery", "fold", "freeze", "frozen_mask", "replace", "replace_by_group_norm", "to_affine"]
