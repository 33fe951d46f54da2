"""Means over seeds, differences paired over seeds with 95% intervals, and a study's comparison."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from experiments.study.plan import Study, Variant
from experiments.study.records import StudyRecord


@dataclass(frozen=True)
class Summary:
    """Values of several seeds."""

    count: int
    mean: float
    std: float | None
    """Standard deviation with n - 1 in the denominator; None for one value."""

    def text(self, digits: int) -> str:
        """As tables show it."""
        text = f"{self.mean:.{digits}f}"
        return text if self.std is None else f"{text} ± {self.std:.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """The mean of the differences over the seeds that both have."""

    mean: float
    half_width: float | None
    """Half of the two-sided 95% interval by Student's t; None for one seed."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its two ends."""
        if self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarise(values: Mapping[int, float]) -> Summary | None:
    """Mean and standard deviation of seed -> value; None for no value."""
    if not values:
        return None
    found = list(values.values())
    std = statistics.stdev(found) if len(found) > 1 else None
    return Summary(len(found), statistics.fmean(found), std)


def paired_difference(
    values: Mapping[int, float], reference: Mapping[int, float]
) -> Difference | None:
    """Values minus reference, over the seeds that both have; None if they share none.

    The interval is that of the paired t-test: mean ± t(0.975, n - 1) · s / √n, s the standard
    deviation of the n differences.
    """
    seeds = [seed for seed in values if seed in reference]
    if not seeds:
        return None
    differences = [values[seed] - reference[seed] for seed in seeds]
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Difference(mean, None)
    quantile = float(stdtrit(count - 1, 0.975))
    return Difference(mean, quantile * statistics.stdev(differences) / math.sqrt(count))


@dataclass(frozen=True)
class Standing:
    """One variant beside the plain one.

    Attributes:
        variant: which.
        other: the variant that it is compared with beside the plain one, or None.
        top1: over the seeds, per cent, or None if nothing is done yet.
        by_seed: top-1 of each seed.
        to_plain: top-1 minus that of the plain variant, or None for that one itself.
        to_other: top-1 minus that of `other`, or None without one.
        loss: over the seeds.
        mixed_share: share of the samples that HTM mixed in the last epoch, mean over the seeds.
        tokens_mixed: tokens replaced in an easy sample, likewise.
    """

    variant: Variant
    other: str | None
    top1: Summary | None
    by_seed: dict[int, float]
    to_plain: Difference | None
    to_other: Difference | None
    loss: Summary | None
    mixed_share: float | None
    tokens_mixed: float | None


@dataclass(frozen=True)
class Comparison:
    """A study and the results so far."""

    study: Study
    records: list[StudyRecord]
    standings: list[Standing]

    @property
    def wanted(self) -> int:
        """The number of trainings of the study."""
        return len(self.study.variants) * len(self.study.seeds)

    @property
    def has_others(self) -> bool:
        """Whether some variant is compared with another one than the plain one."""
        return any(standing.other for standing in self.standings)


def compare(study: Study, records: Sequence[StudyRecord]) -> Comparison:
    """Compare the variants over the seeds; records of removed variants and seeds are left out."""
    known = [r for r in records if r.variant in study.variants and r.seed in study.seeds]
    top1 = {name: {r.seed: r.top1 for r in known if r.variant == name} for name in study.variants}
    standings = []
    for name, variant in study.variants.items():
        own = [record for record in known if record.variant == name]
        other = variant.against if variant.against != study.plain else None
        plain = None if name == study.plain else paired_difference(top1[name], top1[study.plain])
        standings.append(
            Standing(
                variant=variant,
                other=other,
                top1=summarise(top1[name]),
                by_seed=top1[name],
                to_plain=plain,
                to_other=paired_difference(top1[name], top1[other]) if other else None,
                loss=summarise({record.seed: record.loss for record in own}),
                mixed_share=_mean(own, "mixed_share"),
                tokens_mixed=_mean(own, "tokens_mixed"),
            )
        )
    return Comparison(study, known, standings)


def _mean(records: list[StudyRecord], leaf: str) -> float | None:
    """Mean of a statistic over its layers and the records."""
    values = [
        value
        for record in records
        for name, value in record.statistics.items()
        if name.rpartition("/")[2] == leaf
    ]
    return statistics.fmean(values) if values else None
