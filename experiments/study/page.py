"""A study's results in Markdown: results/studies/STUDY/README.md, and blocks of documents.

Every figure comes from a record.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.documents.markdown import Makers, aligned_table
from experiments.errors import DataError
from experiments.files import write_atomically
from experiments.provenance import ROOT
from experiments.study.plan import Claims, Study, read_study
from experiments.study.records import StudyRecord, label_records, study_records
from experiments.study.statistics import (
    Comparison,
    Contrast,
    Difference,
    Standing,
    best_of_arms,
    compare,
    layers_of,
    signed,
)
from experiments.study.tables import agreement, measures

_ARMS = ("HTM", "VTM", "HTM + VTM")
PAGE, PICTURE, SALIENCY_PICTURE, LABELS_PICTURE = "README.md", "study", "saliency", "labels"

_TOP1 = (
    "Top-1 is measured after the last epoch, never the best epoch, in per cent of the evaluated "
    "images: mean ± standard deviation over the seeds (n - 1 in the denominator). "
)
_DIFFERENCES = (
    "All variants with the same seed start from the same weights of the host and see the same "
    "batches, so differences are taken per seed: their mean, in points, with the two-sided 95% "
    "interval of the paired t-test over the n seeds that both have. An interval that includes 0 "
    "shows neither a difference nor that there is none. No interval is corrected for multiple "
    "comparisons: of twenty comparisons without any effect, one is expected to exclude 0. "
)
_MIXED = (
    "Samples mixed and tokens mixed are means over the training steps of the last epoch; tokens "
    "mixed counts the replaced tokens per easy sample."
)


def write_report(study: Study, results: Path) -> list[Path]:
    """Write a study's page and picture from its records, and return their paths.

    Raises:
        DataError: there are no records, they are damaged, or the page cannot be written.
    """
    from experiments.study.figure import draw, draw_labels, draw_saliency

    path, comparison = study_records(results, study.name).path, comparison_of(study, results)
    if not comparison.records:
        raise DataError(
            f"{path}: holds no record yet; train: python -m experiments.study --study {study.file}"
        )
    page = path.parent / PAGE
    try:
        paths = draw(comparison, path.parent / PICTURE)
        if layers_of(comparison):
            paths += draw_saliency(comparison, path.parent / SALIENCY_PICTURE)
        if any(standing.agreement for standing in comparison.standings):
            paths += draw_labels(comparison, path.parent / LABELS_PICTURE)
        write_atomically(page, markdown(comparison).encode())
    except OSError as error:
        raise DataError(f"{page}: cannot write the page: {error.strerror}") from None
    return [page, *paths]


def comparison_of(study: Study, results: Path) -> Comparison:
    """A study compared by its records."""
    labels = label_records(results, study.name).read()
    return compare(study, study_records(results, study.name).read(), labels)


def makers(results: Path) -> Makers:
    """What makes the blocks of the documents.

    `study NAME` is state, table and verdict; `study summary` a table of all studies that compare
    HTM, VTM and both with the plain model; `claims NAME` one of the control and the primary claims.
    """

    def compared(name: str) -> Comparison:
        return comparison_of(read_study(ROOT / "configs" / "studies" / f"{name}.yaml"), results)

    def block(name: str) -> str:
        if name == "summary":
            return summary(results)
        comparison = compared(name)
        return "\n".join([state(comparison) + "\n", table(comparison), verdict(comparison)])

    return {"study": block, "claims": lambda name: claims_table(compared(name))}


def summary(results: Path) -> str:
    """One line per study of HTM, VTM and both: the plain model's top-1, and the differences."""
    rows = []
    for path in sorted((ROOT / "configs" / "studies").glob("*.yaml")):
        records = study_records(results, path.stem)
        study = read_study(path) if records.path.exists() else None
        if study is None or tuple(study.variants) != (study.plain, *_ARMS):
            continue
        plain, *others = compare(study, records.read()).standings
        cells = [plain.top1.text(2), str(plain.top1.count)] if plain.top1 else ["–", "0"]
        rows.append([study.title, *cells, *(_difference(one.to_plain) for one in others)])
    return aligned_table(("study", "plain, top-1", "seeds", *_ARMS), rows, range(1, 6))


def markdown(comparison: Comparison) -> str:
    """The whole page."""
    study = comparison.study
    parts = [
        f"# {study.title}\n",
        f"{study.about}\n",
        f"{state(comparison)}\n",
        table(comparison),
        f"{_TOP1}{'' if study.arms else _DIFFERENCES}{_MIXED}\n",
        verdict(comparison),
        *measures(comparison, SALIENCY_PICTURE),
        *agreement(comparison, LABELS_PICTURE),
        f"![Top-1 per seed{'' if study.arms else ', and differences'}]({PICTURE}.svg)\n",
        "## The variants\n",
        "\n".join(f"- {_described(study, s)}" for s in comparison.standings) + "\n",
        "## Every training\n",
        "Top-1 per seed, in per cent; – marks a training that is not done.\n",
        every_training(comparison),
        "## Where the figures come from\n",
        "\n".join(f"- {text}" for text in sources(comparison)) + "\n",
    ]
    return "\n".join(parts)


def state(comparison: Comparison) -> str:
    """How many trainings of the study are done."""
    done, wanted = len(comparison.records), comparison.wanted
    if comparison.complete:
        return f"All {wanted} trainings are done."
    return (
        f"**{done} of {wanted} trainings are done**: the study is not complete; n is the number of "
        "seeds that a variant has."
    )


def table(comparison: Comparison) -> str:
    """One line per variant."""
    head = ["variant", "n", "top-1"]
    if not comparison.study.arms:  # few seeds choose in a search: its intervals would be noise
        head += [f"difference to {comparison.study.plain}"]
    if comparison.has_others:
        head += ["against", "difference to that"]
    head += ["loss", "samples mixed", "tokens mixed"]
    rows = []
    for s in comparison.standings:
        row = [s.variant.name, str(s.top1.count if s.top1 else 0)]
        row += [s.top1.text(2) if s.top1 else "–"]
        if not comparison.study.arms:
            row += [_difference(s.to_plain)]
        if comparison.has_others:
            row += [s.other or "", _difference(s.to_other)]
        row += [
            s.loss.text(3) if s.loss else "–",
            "–" if s.mixed_share is None else f"{100 * s.mixed_share:.0f}%",
            "–" if s.tokens_mixed is None else f"{s.tokens_mixed:.1f}",
        ]
        rows.append(row)
    return aligned_table(head, rows, [n for n, name in enumerate(head) if n and name != "against"])


def verdict(comparison: Comparison) -> str:
    """In words, which differences have an interval that excludes 0.

    For a study with claims, what becomes of them; for a search, the best of each arm.
    """
    if comparison.study.claims is not None:
        return _judged(comparison, comparison.study.claims)
    if comparison.study.arms:
        return _chosen(comparison)
    plain = comparison.study.plain
    texts = [_verdict(f"to {plain}", [(s, s.to_plain) for s in comparison.standings])]
    if comparison.has_others:
        pairs = [(s, s.to_other) for s in comparison.standings]
        texts.append(_verdict("to the variant of the column “against”", pairs))
    return "\n".join(f"- {text}" for text in texts) + "\n"


def claims_table(comparison: Comparison) -> str:
    """One line for the positive control and each primary claim; none until all trainings end."""
    found, seeds = comparison.outcome, len(comparison.study.seeds)
    contrasts = [found.control, *found.primary] if found else []
    rows = [
        [f"{one.variant} against {one.other}", _difference(one.difference), one.verdict]
        for one in contrasts
    ]
    head = (f"{comparison.study.title}, {seeds} seeds", "points of top-1 (95% interval)", "verdict")
    return aligned_table(head, rows, [1])


def _verdict(whom: str, pairs: Sequence[tuple[Standing, Difference | None]]) -> str:
    judged = [(s, d) for s, d in pairs if d is not None and d.half_width is not None]
    found = [f"{s.variant.name} ({signed(d.mean, 2)})" for s, d in judged if d.excludes_zero]
    text = f"Differences {whom}: {len(found)} of {len(judged)} intervals exclude 0"
    return f"{text}: {'; '.join(found)}." if found else f"{text}."


def _judged(comparison: Comparison, claims: Claims) -> str:
    found = comparison.outcome
    if found is None:
        return "- The claims are judged when all trainings are done.\n"
    control, pairs = found.control, [*found.primary, *found.beside]
    what = f"{control.variant} against {control.other}, the positive control: {_shown(control)}"
    if found.sensitive:
        lines = [f"{what}. It is better, so the study is sensitive to an effect of that size."]
    else:
        lines = [
            f"{what}. It is not called better, so **the study is insensitive**: nothing below "
            "shows that a method does not help."
        ]
    words = {
        "equal": f"equal within {claims.margin:g} points",
        "better": "better",
        "worse": "worse",
        "undecided": f"undecided, as neither a difference nor equality within {claims.margin:g} "
        "points is shown",
    }
    for number, pair in enumerate(pairs):
        who = f"{pair.variant} against {pair.other}"
        if number < len(found.primary):
            who, how = f"**{who}**", "corrected by Holm's method"
        else:
            who, how = f"{who}, beside them", "uncorrected, which decides nothing"
        lines.append(f"{who}: {_shown(pair)}, {how}: {words[pair.verdict]}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _shown(contrast: Contrast) -> str:
    p = contrast.p_value
    assert p is not None, "each variant of a complete study has several seeds"
    return f"{_difference(contrast.difference)}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"


def _chosen(comparison: Comparison) -> str:
    lines = []
    for arm, best in best_of_arms(comparison).items():
        if best is None or best.top1 is None:
            lines.append(f"{arm}: not all of its trainings are done.")
        else:
            lines.append(f"Best of {arm}: {best.variant.name}, {best.top1.text(2)}.")
    return "\n".join(f"- {line}" for line in lines) + "\n"


def every_training(comparison: Comparison) -> str:
    """Top-1 of each seed, with one column per variant."""
    head = ["seed", *comparison.study.variants]
    rows = [
        [
            str(seed),
            *(f"{s.by_seed[seed]:.2f}" if seed in s.by_seed else "–" for s in comparison.standings),
        ]
        for seed in comparison.study.seeds
    ]
    return aligned_table(head, rows, range(len(head)))


def sources(comparison: Comparison) -> list[str]:
    """Command, images, hardware, versions, commits, days and times of the records."""
    records = comparison.records
    own = [record for record in records if record.taken_from is None]
    taken = [record for record in records if record.taken_from is not None]
    days = sorted({record.time.partition("T")[0] for record in records})
    images = sorted({(r.train_images, r.val_images) for r in records})
    lines = [
        f"command: `python -m experiments.study --study {comparison.study.file}`; each record "
        "holds the command of its own training",
        *(f"trained on {train:,} images, evaluated on {val:,}" for train, val in images),
        *(f"hardware: {name}" for name in sorted({r.hardware for r in records})),
        *(f"versions: {text}" for text in sorted({_versions(r) for r in records})),
        f"commits: {', '.join(sorted({r.commit or 'none' for r in records}))}",
        f"days: {' to '.join([days[0], days[-1]] if len(days) > 1 else days)}",
    ]
    if own:
        hours = sum(record.cpu_seconds for record in own) / 3600
        lines.append(
            f"time: {hours:.2f} hours of processor time in {len(own)} trainings; the records "
            "also hold wall times, which include waiting for other work on the machine"
        )
    if taken:
        names = sorted({record.taken_from for record in taken if record.taken_from})
        lines.append(
            f"{len(taken)} trainings are those of {', '.join(names)}: same settings, same seed"
        )
    overrides = sorted({f"--{k} {v}" for r in records for k, v in r.overrides.items()})
    if overrides:
        lines.append(f"set on the command line: {', '.join(overrides)}")
    return lines


def _described(study: Study, standing: Standing) -> str:
    variant, other = standing.variant, standing.other or study.plain
    text = f"**{variant.name}**"
    if variant.about != variant.name:
        text += f": {variant.about}"
    if variant.substitutions:
        text += f"; in place of the library's rules: {', '.join(variant.substitutions)}"
    differences = study.differences(variant, other)
    if differences:
        shown = ", ".join(f"{key}: {_yaml(value)}" for key, value in differences.items())
        text += f"; compared with {other}: `{shown}`"
    return text


def _yaml(value: Any) -> str:
    """A value as a config writes it."""
    return json.dumps(value).strip('"')


def _versions(record: StudyRecord) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _difference(difference: Difference | None) -> str:
    return "–" if difference is None else difference.text(2)
