"""The lines of a study's table: every variant, from the records that there are."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.study.plan import Study, Variant
from experiments.study.records import StudyRecord
from experiments.study.statistics import Difference, Summary, paired_difference, summarise


@dataclass(frozen=True)
class Line:
    """One variant beside the plain one.

    Attributes:
        variant: which.
        top1: over the seeds, per cent, or None where nothing is done yet.
        by_seed: top-1 of each seed.
        to_plain: top-1 minus that of the plain variant, or None for that one itself.
        to_other: top-1 minus that of `variant.against`, or None where there is no such.
        loss: over the seeds.
        mixed_share: share of the samples that HTM mixed in the last epoch, mean over the seeds.
        tokens_mixed: tokens replaced in a sample that may be mixed, likewise.
    """

    variant: Variant
    top1: Summary | None
    by_seed: dict[int, float]
    to_plain: Difference | None
    to_other: Difference | None
    loss: Summary | None
    mixed_share: float | None
    tokens_mixed: float | None


@dataclass(frozen=True)
class Comparison:
    """A study and what it has come to."""

    study: Study
    records: list[StudyRecord]
    lines: list[Line]

    @property
    def wanted(self) -> int:
        """How many trainings the study has."""
        return len(self.study.variants) * len(self.study.seeds)

    @property
    def has_others(self) -> bool:
        """Whether some variant is compared with another one than the plain one."""
        return any(other_of(self.study, line.variant) for line in self.lines)


def compare(study: Study, records: Sequence[StudyRecord]) -> Comparison:
    """Compare the variants over the seeds; records of what is no longer in the study are left."""
    known = [r for r in records if r.variant in study.variants and r.seed in study.seeds]
    top1 = {name: {r.seed: r.top1 for r in known if r.variant == name} for name in study.variants}
    lines = []
    for name, variant in study.variants.items():
        own = [r for r in known if r.variant == name]
        other = other_of(study, variant)
        lines.append(
            Line(
                variant=variant,
                top1=summarise(top1[name]),
                by_seed=top1[name],
                to_plain=None
                if name == study.plain
                else paired_difference(top1[name], top1[study.plain]),
                to_other=paired_difference(top1[name], top1[other]) if other else None,
                loss=summarise({r.seed: r.loss for r in own}),
                mixed_share=_mean(own, "mixed_share"),
                tokens_mixed=_mean(own, "tokens_mixed"),
            )
        )
    return Comparison(study, known, lines)


def other_of(study: Study, variant: Variant) -> str | None:
    """The variant that one is compared with besides the plain one."""
    return variant.against if variant.against != study.plain else None


def _mean(records: list[StudyRecord], leaf: str) -> float | None:
    """Mean of a statistic over its layers and the records."""
    values = [
        value
        for record in records
        for name, value in record.statistics.items()
        if name.rpartition("/")[2] == leaf
    ]
    return statistics.fmean(values) if values else None
