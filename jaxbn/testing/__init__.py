"""The laws of batch norm, which can be checked on any implementation through a small adapter.

An :class:`Adapter` says how an implementation is called and which conventions it follows; :func:`check_batch_norm`
checks the laws.  Arrays are channels-last, [N, ..., C]; the oracle is NumPy in float64.
"""

from jaxbn.testing._adapter import AXIS, Adapter, Law
from jaxbn.testing._report import LAWS, Outcome, Report, check_batch_norm, judge, laws_for

Finding = Outcome  # its former name

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
