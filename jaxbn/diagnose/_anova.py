"""One-way analysis of variance in NumPy: do groups of numbers differ more than independent numbers would?"""

from typing import Any, NamedTuple, Self

import numpy as np


class GroupSums(NamedTuple):
    """Sums over numbers in groups, for each feature.  A number stands for an example, and a group for a batch.

    Attributes:
      groups: number of groups, shape [C].
      count: number of numbers in all groups, shape [C].
      mean: mean of all numbers, shape [C].
      between: sum over all numbers of |mean of its group - mean|^2, shape [C].
      within: sum over all numbers of |number - mean of its group|^2, shape [C].
    """

    groups: Any
    count: Any
    mean: Any
    between: Any
    within: Any

    @property
    def var(self) -> Any:
        """Biased variance of all numbers, shape [C]."""
        return (self.between + self.within) / np.maximum(self.count, 1)

    @property
    def free_between(self) -> Any:
        """Degrees of freedom between groups, shape [C]."""
        return self.groups - 1

    @property
    def free_within(self) -> Any:
        """Degrees of freedom within groups, shape [C]."""
        return self.count - self.groups

    @property
    def mean_squares(self) -> tuple[Any, Any]:
        """Mean squares between and within groups, shape [C]; NaN without degrees of freedom.

        For independent numbers, both estimate the variance.
        """
        return _ratio(self.between, self.free_between), _ratio(self.within, self.free_within)

    def add(self, other: Self) -> Self:
        """Combines the sums over two sets of groups (Chan, Golub and LeVeque 1983, for means and sums of squares)."""
        # Groups are never split between the two sets.  So the squares within groups add up, and those between groups
        # grow by the distance of the two means.
        count = self.count + other.count
        weight = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return self._replace(
            groups=self.groups + other.groups,
            count=count,
            mean=self.mean + weight * delta,
            between=self.between + other.between + self.count * weight * np.abs(delta) ** 2,
            within=self.within + other.within,
        )


def score(ratio: float, free_between: float, free_within: float) -> float:
    """Converts an F ratio to a standard normal deviate (Paulson 1942).

    The cube root of a chi-square variable divided by its n degrees of freedom is close to normal, with mean
    1 - 2/(9 n) and variance 2/(9 n) (Wilson and Hilferty 1931).  F is the ratio of two such variables.

    Args:
      ratio: mean square between groups over that within groups.
      free_between: degrees of freedom between groups.
      free_within: degrees of freedom within groups.
    """
    a = 2 / (9 * free_between)
    b = 2 / (9 * free_within)
    root = np.cbrt(ratio)
    return float(((1 - b) * root - (1 - a)) / np.sqrt(b * root**2 + a))


def _ratio(squares: Any, free: Any) -> Any:
    return np.where(free > 0, squares / np.maximum(free, 1), np.nan)
