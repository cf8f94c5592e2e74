"""One-way analysis of variance, in NumPy: whether groups of numbers differ more than independent numbers would."""

from typing import Any, NamedTuple, Self

import numpy as np


class Groups(NamedTuple):
    """Sums over numbers in groups, for each feature: of one number for each example, in batches.

    Attributes:
      groups: number of groups, shape [C].
      count: of numbers, shape [C].
      mean: of all numbers, shape [C].
      between: sum over the numbers of |mean of its group - mean|^2, shape [C].
      within: sum over the numbers of |number - mean of its group|^2, shape [C].
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
    def mean_squares(self) -> tuple[Any, Any]:
        """Mean squares between and within groups, alike for independent numbers; NaN where there are too few."""
        free, inside = self.groups - 1, self.count - self.groups
        between = np.where(free > 0, self.between / np.maximum(free, 1), np.nan)
        return between, np.where(inside > 0, self.within / np.maximum(inside, 1), np.nan)

    def add(self, other: Self) -> Self:
        """Returns the sums over the groups of both (Chan, Golub and LeVeque 1983)."""
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


def score(ratio: float, free_above: float, free_below: float) -> float:
    """Returns a ratio of mean squares as a standard normal deviate, if the numbers are independent (Paulson 1942).

    Args:
      ratio: mean squares between, over those within groups.
      free_above: degrees of freedom of the first.
      free_below: degrees of freedom of the second.
    """
    a, b = 2 / (9 * free_above), 2 / (9 * free_below)
    root = np.cbrt(ratio)
    return float(((1 - b) * root - (1 - a)) / np.sqrt(b * root**2 + a))
