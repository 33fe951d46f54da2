"""Means over seeds, differences paired over seeds with 95% intervals, and a study's comparison."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy.special import stdtr, stdtrit

from experiments.study.plan import Claims, Study, Variant
from experiments.study.records import LabelRecord, StudyRecord


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
    p_value: float | None
    """Of the two-sided paired t-test; None for one seed."""
    by_seed: dict[int, float] = field(default_factory=dict)
    """The difference of each seed."""

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

    def text(self, digits: int) -> str:
        """As tables show it."""
        if self.interval is None:
            return f"{signed(self.mean, digits)} (one seed)"
        low, high = (signed(end, digits) for end in self.interval)
        return f"{signed(self.mean, digits)} [{low}, {high}]"


def signed(value: float, digits: int) -> str:
    """With a plus or a minus, except what is rounded to zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text[1:].strip("0.") else text[1:]


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
    by_seed = {seed: values[seed] - reference[seed] for seed in values if seed in reference}
    if not by_seed:
        return None
    count, mean = len(by_seed), statistics.fmean(by_seed.values())
    if count < 2:
        return Difference(mean, None, None, by_seed)
    error = statistics.stdev(by_seed.values()) / math.sqrt(count)
    if error == 0:
        p_value = 0.0 if mean else 1.0
    else:
        p_value = 2 * float(stdtr(count - 1, -abs(mean) / error))
    return Difference(mean, float(stdtrit(count - 1, 0.975)) * error, p_value, by_seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: below alpha, the chance of any error is at most alpha.

    The k-th smallest of m, k from 0, becomes the largest of (m - j) p_j over j <= k, at most 1.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


@dataclass(frozen=True)
class Contrast:
    """One pair of a study's claims, and what the records say of it.

    Attributes:
        variant: the first of the pair.
        other: the variant that is subtracted.
        difference: in top-1, points.
        p_value: Holm's for a primary claim, that of the difference alone for any other.
        verdict: of `VERDICTS`.
    """

    variant: str
    other: str
    difference: Difference | None
    p_value: float | None
    verdict: str


ALPHA = 0.05
VERDICTS = ("equal", "better", "worse", "undecided")


def judge(difference: Difference | None, p_value: float | None, margin: float) -> str:
    """One of `VERDICTS`, by the rule that a study states before its first training.

    `equal` if the whole 95% interval lies within the margin, whatever the p-value; else `better` or
    `worse` if p < 0.05; else `undecided`.
    """
    if difference is None or difference.interval is None or p_value is None:
        return "undecided"
    low, high = difference.interval
    if -margin <= low and high <= margin:
        return "equal"
    if p_value >= ALPHA:
        return "undecided"
    return "better" if difference.mean > 0 else "worse"


@dataclass(frozen=True)
class Outcome:
    """What became of a study's claims.

    Attributes:
        primary: corrected together.
        beside: each on its own.
        control: likewise.
    """

    primary: list[Contrast]
    beside: list[Contrast]
    control: Contrast

    @property
    def sensitive(self) -> bool:
        """Whether the study could see the effect of its positive control."""
        return self.control.verdict == "better"


def outcome(claims: Claims, top1: Mapping[str, Mapping[int, float]]) -> Outcome:
    """Judge the claims of a study by variant -> seed -> top-1."""

    def measured(pair: tuple[str, str]) -> Difference | None:
        return paired_difference(top1[pair[0]], top1[pair[1]])

    def contrast(pair: tuple[str, str], p_value: float | None) -> Contrast:
        found = measured(pair)
        return Contrast(*pair, found, p_value, judge(found, p_value, claims.margin))

    def alone(pair: tuple[str, str]) -> Contrast:
        found = measured(pair)
        return contrast(pair, found.p_value if found else None)

    found = [(pair, measured(pair)) for pair in claims.primary]
    p_values = [1.0 if d is None or d.p_value is None else d.p_value for _, d in found]
    return Outcome(
        [contrast(pair, p) for pair, p in zip(claims.primary, holm(p_values), strict=True)],
        [alone(pair) for pair in claims.beside],
        alone(claims.control),
    )


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
        by_epoch: statistics of HTM, mean over layers and seeds, by the evaluated epoch as text, and
            under "all" over all steps; empty for records without them.
        curve: top-1 on the validation images, over the seeds, by the evaluated epoch.
        measures: of the final weights, over the seeds, "loss" among them; empty without a test
            split.
        measures_to: differences of the measures, by the variant that is subtracted: plain, `other`.
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
    by_epoch: dict[str, dict[str, float]]
    curve: dict[str, Summary]
    measures: dict[str, Summary]
    measures_to: dict[str, dict[str, Difference]]
    agreement: dict[float, dict[str, Summary]]


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
    def complete(self) -> bool:
        """Whether all of them are done."""
        return len(self.records) == self.wanted

    @property
    def outcome(self) -> Outcome | None:
        """The study's claims judged, once all trainings are done; None without claims."""
        if self.study.claims is None or not self.complete:
            return None
        return outcome(self.study.claims, {s.variant.name: s.by_seed for s in self.standings})

    @property
    def has_others(self) -> bool:
        """Whether some variant is compared with another one than the plain one."""
        return any(standing.other for standing in self.standings)


def compare(
    study: Study, records: Sequence[StudyRecord], labels: Sequence[LabelRecord] = ()
) -> Comparison:
    """Compare the variants over the seeds; records of removed variants and seeds are left out."""
    known = [r for r in records if r.variant in study.variants and r.seed in study.seeds]
    of = {name: [r for r in known if r.variant == name] for name in study.variants}
    top1 = {name: {r.seed: r.top1 for r in own} for name, own in of.items()}
    measures = {name: _measures(own) for name, own in of.items()}
    standings = []
    for name, variant in study.variants.items():
        own = of[name]
        last_epoch = _means([record.statistics for record in own])
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
                mixed_share=last_epoch.get("mixed_share"),
                tokens_mixed=last_epoch.get("tokens_mixed"),
                by_epoch=_by_epoch(own),
                curve=_summaries(_by_seed({r.seed: r.top1_by_epoch for r in own})),
                measures=_summaries(measures[name]),
                measures_to={
                    reference: _differences(measures[name], measures[reference])
                    for reference in dict.fromkeys((study.plain, other))
                    if reference not in (None, name)
                },
                agreement=_agreement([r for r in labels if r.variant == name]),
            )
        )
    return Comparison(study, known, standings)


def best_of_arms(comparison: Comparison) -> dict[str, Standing | None]:
    """Of each arm the variant of the best mean top-1, the first of equal ones.

    None as long as not all trainings of the arm are done.
    """
    study, found = comparison.study, dict[str, Standing | None]()
    for arm in study.arms:
        own = [s for s in comparison.standings if s.variant.name in study.arm(arm)]
        done = all(s.top1 is not None and s.top1.count == len(study.seeds) for s in own)
        found[arm] = max(own, key=lambda s: s.top1.mean if s.top1 else 0) if done else None
    return found


def layers_of(comparison: Comparison) -> list[int]:
    """The layers whose saliency was measured in the final weights."""
    names = {n.partition("/")[0] for s in comparison.standings for n in s.measures if "/" in n}
    return sorted(int(name.removeprefix("layer")) for name in names)


def _means(statistics_of: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each statistic of HTM over its layers and the records."""
    values: dict[str, list[float]] = {}
    for given in statistics_of:
        for name, value in given.items():
            if name.startswith("htm/"):
                values.setdefault(name.rpartition("/")[2], []).append(value)
    return {leaf: statistics.fmean(found) for leaf, found in values.items()}


def _by_epoch(records: Sequence[StudyRecord]) -> dict[str, dict[str, float]]:
    epochs = dict.fromkeys(epoch for record in records for epoch in record.statistics_by_epoch)
    found = {e: _means([r.statistics_by_epoch.get(e, {}) for r in records]) for e in epochs}
    return {epoch: means for epoch, means in found.items() if means}


def _measures(records: Sequence[StudyRecord]) -> dict[str, dict[int, float]]:
    """Each measure of the final weights, the test loss among them, by seed."""
    return _by_seed({r.seed: {**r.measures, "loss": r.loss} for r in records if r.measures})


def _agreement(records: Sequence[LabelRecord]) -> dict[float, dict[str, Summary]]:
    """What a judge saw of one variant's labels, over the seeds, by rho."""
    values = {
        rho: {r.seed: r.agreement for r in records if r.rho == rho}
        for rho in sorted({r.rho for r in records})
    }
    known = {
        rho: {seed: {n: v for n, v in each.items() if v is not None} for seed, each in own.items()}
        for rho, own in values.items()
    }
    return {rho: _summaries(_by_seed(own)) for rho, own in known.items()}


def _by_seed(found: Mapping[int, Mapping[str, float]]) -> dict[str, dict[int, float]]:
    """The values of each name by seed, from those of each seed by name."""
    names = dict.fromkeys(name for values in found.values() for name in values)
    return {n: {seed: v[n] for seed, v in found.items() if n in v} for n in names}


def _summaries(values: Mapping[str, Mapping[int, float]]) -> dict[str, Summary]:
    return {name: s for name, each in values.items() if (s := summarise(each)) is not None}


def _differences(
    values: Mapping[str, Mapping[int, float]], reference: Mapping[str, Mapping[int, float]]
) -> dict[str, Difference]:
    found = {n: paired_difference(each, reference.get(n, {})) for n, each in values.items()}
    return {name: d for name, d in found.items() if d is not None}
