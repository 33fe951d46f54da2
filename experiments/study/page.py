"""What a study came to, in Markdown: results/studies/STUDY/README.md, and blocks of documents.

Every figure comes from a record; nothing here is typed by hand.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.documents.markdown import aligned_table
from experiments.errors import DataError
from experiments.files import write_atomically
from experiments.study.comparison import Comparison, Line, compare, other_of
from experiments.study.plan import Study, read_study
from experiments.study.records import StudyRecord, read_records, records_path
from experiments.study.statistics import Difference, Summary

STUDIES = Path("configs/studies")
PAGE, PICTURE = "README.md", "study"

_METHOD = (
    "Top-1 after the last epoch, never the best of several, in per cent of the evaluated images, "
    "mean ± standard deviation over the seeds (n - 1 in the denominator). A seed gives all "
    "variants the same initial weights of the host and the same batches, so differences are taken "
    "seed by seed: their mean, in points, with the two-sided 95% interval of the paired t-test "
    "over the n seeds that both have. An interval that includes 0 does not show a difference. "
    "Intervals are not corrected for how many of them there are: of twenty differences that are "
    "none, one is expected to look like one. Samples mixed and tokens mixed are of the training "
    "steps of the last epoch; tokens mixed counts the tokens replaced in an easy sample."
)


def write_report(study: Study, results: Path) -> list[Path]:
    """Write a study's page and picture from its records; gives their paths.

    Raises:
        DataError: there are no records, they are damaged, or the page cannot be written.
    """
    from experiments.study.figure import draw

    path = records_path(results, study.name)
    comparison = compare(study, read_records(path))
    if not comparison.records:
        raise DataError(
            f"{path}: holds no record yet; train: python -m experiments.study --study {study.file}"
        )
    paths = draw(comparison, path.parent)
    page = path.parent / PAGE
    try:
        write_atomically(page, markdown(comparison).encode())
    except OSError as error:
        raise DataError(f"{page}: cannot write the page: {error.strerror}") from None
    return [page, *paths]


def block(name: str, results: Path, root: Path) -> str:
    """What a document shows of a study: state, table, and what the intervals say.

    Raises:
        DataError: there is no such study.
    """
    file = STUDIES / f"{name}.yaml"
    if not (root / file).is_file():
        raise DataError(f"generated: got study {name}; allowed: a file of {STUDIES}")
    study = read_study(root / file)
    comparison = compare(study, read_records(records_path(results, name)))
    return "\n".join([state(comparison) + "\n", table(comparison), verdict(comparison)])


def markdown(comparison: Comparison) -> str:
    """The whole page."""
    study = comparison.study
    parts = [
        f"# {study.title}\n",
        f"{study.about}\n",
        f"{state(comparison)}\n",
        table(comparison),
        f"{_METHOD}\n",
        verdict(comparison),
        f"![Top-1 of each seed, and differences with their intervals]({PICTURE}.svg)\n",
        "## The variants\n",
        "\n".join(f"- {_described(comparison, line)}" for line in comparison.lines) + "\n",
        "## Every training\n",
        "Top-1 of each seed, per cent; – where the training has not been done.\n",
        every_training(comparison),
        "## Where the figures come from\n",
        "\n".join(f"- {text}" for text in sources(comparison)) + "\n",
    ]
    return "\n".join(parts)


def state(comparison: Comparison) -> str:
    """How much of the study is done."""
    done, wanted = len(comparison.records), comparison.wanted
    if done == wanted:
        return f"All {wanted} trainings are done."
    return (
        f"**{done} of {wanted} trainings are done**: the study is not complete, and each line "
        "counts the seeds that it has."
    )


def table(comparison: Comparison) -> str:
    """A line for every variant, none left out."""
    study = comparison.study
    head = ["variant", "n", "top-1", "difference to plain"]
    if comparison.has_others:
        head += ["against", "difference to that"]
    head += ["loss", "samples mixed", "tokens mixed"]
    rows = []
    for line in comparison.lines:
        row = [line.variant.name, str(line.top1.count if line.top1 else 0)]
        row += [_summary(line.top1, 2), _difference(line.to_plain)]
        if comparison.has_others:
            row += [other_of(study, line.variant) or "", _difference(line.to_other)]
        row += [
            _summary(line.loss, 3),
            "–" if line.mixed_share is None else f"{100 * line.mixed_share:.0f}%",
            "–" if line.tokens_mixed is None else f"{line.tokens_mixed:.1f}",
        ]
        rows.append(row)
    return aligned_table(head, rows, [n for n, name in enumerate(head) if n and name != "against"])


def verdict(comparison: Comparison) -> str:
    """What the intervals say, in words: which differences there are, and how many are none."""
    plain = comparison.study.plain
    texts = [_verdict(f"to {plain}", [(line, line.to_plain) for line in comparison.lines])]
    if comparison.has_others:
        pairs = [(line, line.to_other) for line in comparison.lines]
        texts.append(_verdict("to the variant of the column “against”", pairs))
    return "\n".join(f"- {text}" for text in texts) + "\n"


def _verdict(whom: str, pairs: Sequence[tuple[Line, Difference | None]]) -> str:
    judged = [(line, d) for line, d in pairs if d is not None and d.half_width is not None]
    found = [f"{line.variant.name} ({_signed(d.mean)})" for line, d in judged if d.excludes_zero]
    text = f"Differences {whom}: {len(found)} of {len(judged)} intervals exclude 0"
    return f"{text}: {'; '.join(found)}." if found else f"{text}."


def every_training(comparison: Comparison) -> str:
    """Seeds in lines, variants in columns."""
    head = ["seed", *comparison.study.variants]
    rows = [
        [
            str(seed),
            *(
                f"{line.by_seed[seed]:.2f}" if seed in line.by_seed else "–"
                for line in comparison.lines
            ),
        ]
        for seed in comparison.study.seeds
    ]
    return aligned_table(head, rows, range(len(head)))


def sources(comparison: Comparison) -> list[str]:
    """Command, images, hardware, versions, commits, days and times of the records."""
    records = comparison.records
    if not records:
        return []
    own = [record for record in records if record.taken_from is None]
    taken = [record for record in records if record.taken_from is not None]
    days = sorted({record.time.partition("T")[0] for record in records})
    images = sorted({(r.train_images, r.val_images) for r in records})
    lines = [
        f"command: `python -m experiments.study --study {comparison.study.file}`; each record "
        "holds the command of its training alone",
        *(f"trained on {train:,} images, evaluated on {val:,}" for train, val in images),
        *(f"hardware: {name}" for name in sorted({r.hardware for r in records})),
        *(f"versions: {text}" for text in sorted({_versions(r) for r in records})),
        f"commits: {', '.join(sorted({r.commit or 'none' for r in records}))}",
        f"days: {' to '.join([days[0], days[-1]] if len(days) > 1 else days)}",
    ]
    if own:
        hours = sum(record.cpu_seconds for record in own) / 3600
        lines.append(
            f"time: {hours:.2f} hours of processor time in {len(own)} trainings; wall times are in "
            "the records, and say little where other work ran beside"
        )
    if taken:
        names = sorted({record.taken_from for record in taken if record.taken_from})
        lines.append(
            f"{len(taken)} trainings are the same as in {', '.join(names)}, and are taken from "
            "there"
        )
    overrides = sorted({f"--{k} {v}" for r in records for k, v in r.overrides.items()})
    if overrides:
        lines.append(f"set on the command line: {', '.join(overrides)}")
    return lines


def _described(comparison: Comparison, line: Line) -> str:
    variant = line.variant
    text = f"**{variant.name}**"
    if variant.about != variant.name:
        text += f": {variant.about}"
    if variant.substitutions:
        text += f"; in the place of the library's: {', '.join(variant.substitutions)}"
    study = comparison.study
    other = other_of(study, variant) or study.plain
    differences = study.differences(variant, other)
    if differences:
        shown = ", ".join(f"{key}: {_yaml(value)}" for key, value in differences.items())
        text += f"; beside {other}: `{shown}`"
    return text


def _yaml(value: Any) -> str:
    """A value as a config would have it."""
    return json.dumps(value).strip('"')


def _versions(record: StudyRecord) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _summary(summary: Summary | None, digits: int) -> str:
    if summary is None:
        return "–"
    text = f"{summary.mean:.{digits}f}"
    return text if summary.std is None else f"{text} ± {summary.std:.{digits}f}"


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    text = _signed(difference.mean)
    interval = difference.interval
    if interval is None:
        return f"{text} (one seed)"
    return f"{text} [{_signed(interval[0])}, {_signed(interval[1])}]"


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "−")
    return "0.00" if text[1:] == "0.00" else text
