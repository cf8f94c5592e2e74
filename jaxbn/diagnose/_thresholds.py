"""All thresholds of the diagnosis, and why they are where they are."""

from statistics import NormalDist

GAP = 0.3
ERRORS = 3
INDEPENDENT_VALUES = 20
FEW_EXAMPLES = 4
EXCESS = 3.0
SCORE = NormalDist().inv_cdf(1 - 1e-4)
EXPLAINED = 0.3
EXPLAINED_GAP = 0.1
ERRORS_OF_START = 2
DEAD_VAR = 1e-6
DEAD_SCALE = 1e-4
ACTIVE_VALUES = 20
EXAMPLES = 8
