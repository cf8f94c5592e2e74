"""The laws of batch norm, runnable against any implementation through a small adapter.

An :class:`Adapter` says how an implementation is called and by which conventions it goes; :func:`check_batch_norm`
puts it to the laws.  Arrays go in and come out channels last, [N, ..., C]; the oracle is NumPy in float64.
"""

from jaxbn.testing._adapter import AXIS, Adapter, Law
from jaxbn.testing._report import LAWS, Finding, Report, check_batch_norm, judge, laws_for

__all__ = ["AXIS", "LAWS", "Adapter", "Finding", "Law", "Report", "check_batch_norm", "judge", "laws_for"]
