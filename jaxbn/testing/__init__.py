"""Property tests ("laws") for any implementation of batch norm, called through a small adapter.

An :class:`Adapter` says how to call an implementation and which conventions it follows; :func:`check_batch_norm` tests
it.  Arrays are channels last, [N, ..., C], and the oracle is NumPy in float64.
"""

from jaxbn.testing._adapter import AXIS, Adapter, Law
from jaxbn.testing._report import LAWS, Outcome, Report, check_batch_norm, judge, laws_for

Finding = Outcome  # the former name

__all__ = [
    "AXIS",
    "LAWS",
    "Adapter",
    "Finding",
    "Law",
    "Outcome",
    "Report",
    "check_batch_norm",
    "judge",
    "laws_for",
]
