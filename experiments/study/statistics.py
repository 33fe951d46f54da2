"""Means over seeds, and differences that are paired over seeds, with 95% intervals."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values of several seeds."""

    count: int
    mean: float
    std: float | None
    """Standard deviation with n - 1 in the denominator; None of one value."""


@dataclass(frozen=True)
class Difference:
    """The mean of the differences of the seeds that both have."""

    count: int
    mean: float
    half_width: float | None
    """Half of the two-sided 95% interval by Student's t; None of one seed."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its two ends."""
        if self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval lies on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarise(values: Mapping[int, float]) -> Summary | None:
    """Mean and standard deviation of seed -> value; None of no value."""
    if not values:
        return None
    found = list(values.values())
    std = statistics.stdev(found) if len(found) > 1 else None
    return Summary(len(found), statistics.fmean(found), std)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float]
) -> Difference | None:
    """Values minus reference, over the seeds that both have; None where they share none.

    The interval is that of the paired t-test: mean ± t(0.975, n - 1) · s / √n, s the standard
    deviation of the n differences.
    """
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Difference(count, mean, None)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Difference(count, mean, quantile * statistics.stdev(differences) / math.sqrt(count))
