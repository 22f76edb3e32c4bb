"""95% intervals of what was measured on a sample."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Z = 1.96


def wilson(share: float, runs: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share of `runs` trials."""
    z2 = Z**2
    centre = (share + z2 / (2 * runs)) / (1 + z2 / runs)
    half = Z / (1 + z2 / runs) * np.sqrt(share * (1 - share) / runs + z2 / (4 * runs**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def normal(values: Iterable[float]) -> tuple[float, float]:
    """The 95% normal interval of a mean, mean ± 1.96 standard errors; NaN for fewer than two values."""
    numbers = np.asarray(list(values), dtype=float)
    if len(numbers) < 2:
        return float("nan"), float("nan")
    mean, half = numbers.mean(), Z * numbers.std(ddof=1) / np.sqrt(len(numbers))
    return float(mean - half), float(mean + half)


def student(values: Iterable[float]) -> tuple[float, float]:
    """The 95% interval of a mean of few values, by Student's t; NaN for fewer than two."""
    numbers = np.asarray(list(values), dtype=float)
    if len(numbers) < 2:
        return float("nan"), float("nan")
    from scipy.stats import t  # late: it takes as long to import as torch

    half = t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers))
    return float(numbers.mean() - half), float(numbers.mean() + half)


def geometric(values: Iterable[float], most: float = 1.0) -> tuple[float, float]:
    """The 95% interval of a geometric mean of errors, by Student's t of their logarithms; NaN for fewer than three.

    Two values may lie twelve decades apart, and 12.7 standard errors of their logarithms then say nothing; of three and
    more the interval ends at the most that the quantity can be.

    Args:
        values: above 0.
        most: that the quantity can be; images in [0, 1] differ by a mean squared error of at most 1.
    """
    logs = np.log(np.asarray(list(values), dtype=float))
    if len(logs) < 3:
        return float("nan"), float("nan")
    low, high = student(logs)
    most = max(most, float(np.exp(logs.max())))
    return float(np.exp(low)), float(np.exp(min(high, np.log(most))))


def of_median(values: Iterable[float]) -> tuple[float, float]:
    """An interval of a median at 95% or more, from the order of the values alone; infinite values are welcome.

    NaN for fewer than six values, whose range falls short of 95%.
    """
    ordered = np.sort(np.asarray(list(values), dtype=float))
    if len(ordered) < 6:
        return float("nan"), float("nan")
    from scipy.stats import binom

    below = int(binom.ppf(0.025, len(ordered), 0.5))
    return float(ordered[below - 1]), float(ordered[len(ordered) - below])
