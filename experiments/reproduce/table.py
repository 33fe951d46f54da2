"""The paper's tables beside ours: what was evaluated and trained here, in Markdown and in JSON.

Every figure comes from a record.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.documents.markdown import Makers, aligned_table
from experiments.errors import DataError
from experiments.provenance import Record, Records
from experiments.study.records import StudyRecord, study_records
from experiments.study.statistics import Summary, summarise
from experiments.zoo.manifest import Manifest, Row

STUDY = "reproduce"
"""Name of the study that `--train` is; its variants are named after the rows' configs."""

TOLERANCE = 0.1
"""Points of top-1 within which a row counts as reproduced."""
EXPLANATION = (
    f"Reproduced: within {TOLERANCE} points of the published figure, on all images of the "
    "validation split."
)

REPRODUCED, DIFFERS, SKIPPED = "reproduced", "differs", "skipped"
EVALUATED = "evaluated"  # there is no published figure
PARTIAL = "part of the images"
NOT_YET = "not evaluated"

HEAD = ("data set", "method", "published", "ours", "difference", "images", "status")
RIGHT = (2, 3, 4, 5)
TRAINING_HEAD = ("data set", "method", "published", "trained here", "seeds", "epochs")
TRAINING_RIGHT = (2, 3)


class RowRecord(Record):
    """The evaluation of one row's checkpoint, or the reason why it was skipped."""

    row: str
    reason: str = ""
    """Why the row was skipped."""
    ours: float | None = None
    """Top-1, per cent; None if skipped."""
    top5: float | None = None
    loss: float | None = None
    images: int | None = None
    checkpoint_sha256: str | None = None
    device: str | None = None
    precision: str | None = None
    seconds: float | None = None
    identity: str | None = None
    """Hash of all that the figure depends on: the record is kept while it is the same."""


def row_records(results: Path) -> Records[RowRecord]:
    """The evaluations of all tables' rows."""
    return Records(results / "evaluations.jsonl", RowRecord, lambda record: record.row)


@dataclass(frozen=True)
class Line:
    """One row of the zoo with its evaluation, if any, and its trainings by seed."""

    row: Row
    record: RowRecord | None
    seeds: tuple[StudyRecord, ...]

    @property
    def name(self) -> str:
        """Data set and method."""
        return f"{self.row.dataset.name}, {self.row.method}"

    @property
    def ours(self) -> float | None:
        """Top-1, per cent."""
        return self.record.ours if self.record else None

    @property
    def difference(self) -> float | None:
        """Ours minus published, points."""
        if self.ours is None or self.row.published_top1 is None:
            return None
        return round(self.ours - self.row.published_top1, 4)  # both are known to 0.01 at best

    @property
    def status(self) -> str:
        """How the row compares with the published figure."""
        if self.record is None:
            return NOT_YET
        if self.ours is None:
            return SKIPPED
        if self.row.dataset.images not in (None, self.record.images):
            return PARTIAL
        if self.difference is None:
            return EVALUATED
        return REPRODUCED if abs(self.difference) <= TOLERANCE + 1e-9 else DIFFERS

    @property
    def trained(self) -> Summary | None:
        """Top-1 over the trainings, per cent."""
        return summarise({seed.seed: seed.top1 for seed in self.seeds})

    def cells(self) -> list[str]:
        """In the order of HEAD."""
        images = self.record.images if self.record else None
        difference = self.difference
        return [
            self.row.dataset.name,
            self.row.method,
            _percent(self.row.published_top1),
            _percent(self.ours),
            "–" if difference is None else f"{difference:+.2f}".replace("-", "−"),
            "–" if images is None else f"{images:,}",
            self.status,
        ]

    def training_cells(self) -> list[str]:
        """In the order of TRAINING_HEAD."""
        return [
            self.row.dataset.name,
            self.row.method,
            _percent(self.row.published_top1),
            self.trained.text(2) if self.trained else "–",
            ", ".join(str(seed.seed) for seed in self.seeds),
            ", ".join(map(str, sorted({seed.epochs for seed in self.seeds}))),
        ]


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, in the order of the zoo."""

    name: str
    title: str
    lines: list[Line]

    @property
    def trained(self) -> list[Line]:
        """The lines with trainings."""
        return [line for line in self.lines if line.seeds]


def read_table(results: Path, manifest: Manifest, name: str) -> PaperTable:
    """A table with all results that there are.

    Raises:
        DataError: the records are damaged.
    """
    evaluated = {record.row: record for record in row_records(results).read()}
    trained: dict[str, list[StudyRecord]] = {}
    for record in study_records(results, STUDY).read():
        trained.setdefault(record.variant, []).append(record)
    lines = []
    for row in manifest.rows(name):
        # rows may share a config: the first one, a baseline, shows its trainings
        seeds = sorted(trained.pop(row.config, []), key=lambda record: record.seed)
        lines.append(Line(row, evaluated.get(row.name), tuple(seeds)))
    return PaperTable(name, manifest.tables[name].title, lines)


def json_text(table: PaperTable) -> str:
    """A table as JSON."""
    rows, training = [], []
    nothing: dict[str, Any] = dict.fromkeys(RowRecord.model_fields) | {"reason": ""}
    for line in table.lines:
        row = line.row
        head = {
            "name": row.name,
            "dataset": row.dataset.name,
            "method": row.method,
            "config": row.config,
            "published": row.published_top1,
        }
        more = {
            "status": line.status,
            "difference": line.difference,
            "expected_images": row.dataset.images,
            "checkpoint": row.checkpoint.file if row.checkpoint else None,
            "note": row.note,
        }
        facts = line.record.model_dump() if line.record else nothing
        rows.append({**head, **more, **{k: v for k, v in facts.items() if k != "row"}})
        if line.trained:
            seeds = [
                {**seed.model_dump(), "best_top1": max(seed.top1_by_epoch.values())}
                for seed in line.seeds
            ]
            training.append(
                {**head, "mean": line.trained.mean, "std": line.trained.std, "seeds": seeds}
            )
    content = {
        "table": table.name,
        "title": table.title,
        "tolerance": TOLERANCE,
        "rows": rows,
        "training": training,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def markdown(table: PaperTable) -> str:
    """A whole page in Markdown: table, remarks, and where the figures come from."""
    parts = [f"# {table.title}\n\nTop-1 in per cent. {EXPLANATION}\n", markdown_table(table)]
    remarks = [f"- {text}\n" for text in remarks_of(table)]
    parts += ["".join(remarks)] if remarks else []
    if table.trained:
        parts.append(
            "## Trained here\n\nTop-1 after the last epoch: mean ± standard deviation over the "
            "seeds.\n"
        )
        parts.append(markdown_training(table))
    sources = [f"- {text}\n" for text in sources_of(table)]
    parts += ["## Where the figures come from\n", "".join(sources)] if sources else []
    return "\n".join(parts)


def markdown_table(table: PaperTable) -> str:
    """The rows."""
    return aligned_table(HEAD, [line.cells() for line in table.lines], RIGHT)


def markdown_training(table: PaperTable) -> str:
    """The rows that were trained."""
    rows = [line.training_cells() for line in table.trained]
    return aligned_table(TRAINING_HEAD, rows, TRAINING_RIGHT)


def remarks_of(table: PaperTable) -> list[str]:
    """Notes on single rows: why one was skipped, whose figure it is."""
    remarks = []
    for line in table.lines:
        reason = line.record.reason if line.record else ""
        said = "; ".join(filter(None, (line.row.note, reason)))
        if said:
            remarks.append(f"{line.name}: {said}")
    return remarks


def sources_of(table: PaperTable) -> list[str]:
    """Day, hardware, precision, versions, commit, command of the figures; equal ones once."""
    entries: list[tuple[str, Record, str]] = [
        (line.name, line.record, f"evaluated in {line.record.precision}, ")
        for line in table.lines
        if line.record and line.ours is not None
    ]
    entries += [
        (f"{line.name}, seed {s.seed}", s, "") for line in table.trained for s in line.seeds
    ]
    found: dict[str, list[str]] = {}
    for name, record, precision in entries:
        versions = ", ".join(f"{key} {value}" for key, value in record.versions.items())
        source = (
            f"{record.time.partition('T')[0]}, {record.hardware}, {precision}{versions}, "
            f"commit {record.commit or 'unknown'}, `{record.command}`"
        )
        found.setdefault(source, []).append(name)
    return [f"{'; '.join(names)}: {source}" for source, names in found.items()]


def zoo_table(manifest: Manifest) -> str:
    """The zoo's checkpoints in Markdown."""
    rows = [
        [
            f"`{entry.name}`",
            f"`{entry.file}`",
            entry.dataset,
            entry.method,
            _percent(entry.published_top1),
            f"[{'Google Drive' if entry.drive else 'link'}]({entry.link})",
        ]
        for entry in manifest.checkpoints.values()
    ]
    return aligned_table(
        ("name", "file", "data set", "method", "published top-1", "from"), rows, (4,)
    )


def makers(manifest: Manifest, results: Path) -> Makers:
    """What makes the blocks `table NAME`, `training NAME` and `zoo all` of the documents.

    Raises (when called):
        DataError: there is no such table.
    """

    def of_table(make: Callable[[PaperTable], str], kind: str, name: str) -> str:
        if name not in manifest.tables:
            raise DataError(
                f"generated: got {kind} {name}; allowed: {kind} of {', '.join(manifest.tables)}"
            )
        table = read_table(results, manifest, name)
        # a row that some machine could not evaluate counts as not evaluated
        lines = [replace(line, record=None) if line.ours is None else line for line in table.lines]
        return make(replace(table, lines=lines))

    return {
        "zoo": lambda _: zoo_table(manifest),
        "table": lambda name: of_table(markdown_table, "table", name),
        "training": lambda name: of_table(markdown_training, "training", name),
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
