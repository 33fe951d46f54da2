"""What reproducing the paper's tables has come to: results/TABLE.json, kept row by row."""

import json
import math
import statistics
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from experiments.errors import DataError
from experiments.files import exclusive, write_atomically
from experiments.zoo.manifest import Manifest, Row

TOLERANCE = 0.1
"""Points of top-1 within which a row counts as reproduced."""

REPRODUCED, DIFFERS, SKIPPED = "reproduced", "differs", "skipped"
EVALUATED = "evaluated"  # there is no published figure
PARTIAL = "part of the images"
NOT_YET = "not evaluated"

R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """One row of a table: what was published and what came out here."""

    name: str
    dataset: str
    method: str
    config: str
    published: float | None
    """Top-1, per cent."""
    status: str = NOT_YET
    reason: str = ""
    """Why the row was skipped."""
    ours: float | None = None
    """Top-1, per cent."""
    difference: float | None = None
    """Ours minus published, points."""
    top5: float | None = None
    loss: float | None = None
    images: int | None = None
    expected_images: int | None = None
    """Images of the whole validation split, where known."""
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    device: str | None = None
    precision: str | None = None
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str | None = None
    time: str | None = None
    seconds: float | None = None
    identity: str | None = None
    """Hash of all that the figure depends on: while it is the same, the row is kept."""
    note: str = ""


@dataclass(frozen=True)
class SeedResult:
    """One training."""

    seed: int
    top1: float
    """After the last epoch, per cent."""
    best_top1: float
    """After the best epoch, which was chosen on the same images."""
    epochs: int
    steps: int
    folder: str
    hardware: str
    versions: dict[str, str]
    commit: str | None
    command: str
    time: str
    seconds: float
    """Of this call's training; a resumed run took longer in all."""
    identity: str
    """Hash of all that the training depends on but its seed: the seeds of a row share it."""


@dataclass(frozen=True)
class Training:
    """One row of a table, trained here with several seeds."""

    name: str
    dataset: str
    method: str
    config: str
    published: float | None
    seeds: tuple[SeedResult, ...] = ()

    @property
    def mean(self) -> float | None:
        """Mean top-1 over the seeds."""
        return statistics.fmean(s.top1 for s in self.seeds) if self.seeds else None

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds (n - 1 in the denominator), from two seeds on."""
        return statistics.stdev(s.top1 for s in self.seeds) if len(self.seeds) > 1 else None


@dataclass(frozen=True)
class TableRecord:
    """A table: its rows by name, and its trainings by name."""

    table: str
    title: str
    rows: dict[str, Result]
    training: dict[str, Training] = field(default_factory=dict)

    def with_row(self, result: Result) -> "TableRecord":
        """The same with one row replaced."""
        return replace(self, rows={**self.rows, result.name: result})

    def with_seed(self, row: Row, result: SeedResult) -> "TableRecord":
        """The same with the training of one seed added or replaced."""
        before = self.training.get(row.name)
        seeds = {s.seed: s for s in before.seeds} if before else {}
        assert all(s.identity == result.identity for s in seeds.values()), "seeds of two settings"
        seeds[result.seed] = result
        training = Training(
            name=row.name,
            dataset=row.dataset.name,
            method=row.method,
            config=row.config,
            published=row.published_top1,
            seeds=tuple(seeds[seed] for seed in sorted(seeds)),
        )
        return replace(self, training={**self.training, row.name: training})


def blank(row: Row) -> Result:
    """A row of which nothing is known yet but what was published."""
    return Result(
        name=row.name,
        dataset=row.dataset.name,
        method=row.method,
        config=row.config,
        published=row.published_top1,
        expected_images=row.dataset.images,
        checkpoint=row.checkpoint.file if row.checkpoint else None,
        note=row.note,
    )


def judged(result: Result) -> Result:
    """The same with its difference and its status, from `ours`, `published` and the images."""
    assert result.ours is not None, "only an evaluated row can be judged"
    whole = result.expected_images in (None, result.images)
    if result.published is None:
        return replace(result, status=EVALUATED if whole else PARTIAL)
    difference = round(result.ours - result.published, 4)  # both are known to 0.01 at best
    close = REPRODUCED if abs(difference) <= TOLERANCE + 1e-9 else DIFFERS
    return replace(result, difference=difference, status=close if whole else PARTIAL)


def record_path(folder: Path, table: str) -> Path:
    """Where a table's record is."""
    return folder / f"{table}.json"


def read_record(folder: Path, manifest: Manifest, table: str) -> TableRecord:
    """A table's record in the order of the zoo; rows that were never evaluated are blank.

    Raises:
        DataError: the file is damaged.
    """
    path = record_path(folder, table)
    rows = {row.name: blank(row) for row in manifest.rows(table)}
    record = TableRecord(table, manifest.tables[table].title, rows)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return record
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the results: {error}") from None
    try:
        found = {entry["name"]: read_section(Result, entry) for entry in content["rows"]}
        training = {}
        for entry in content["training"]:
            seeds = tuple(read_section(SeedResult, seed) for seed in entry["seeds"])
            plain = {key: entry[key] for key in entry if key not in ("seeds", "mean", "std")}
            training[entry["name"]] = read_section(Training, {**plain, "seeds": seeds})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is damaged, or of another version of this program: {error}; "
            "move it away to begin a new one"
        ) from None
    known = {name: found.get(name, row) for name, row in rows.items()}
    return replace(record, rows=known, training={n: training[n] for n in rows if n in training})


def update_record(
    folder: Path, manifest: Manifest, table: str, change: Callable[[TableRecord], TableRecord]
) -> TableRecord:
    """Change a table's record on disk; several processes may do it at once."""
    path = record_path(folder, table)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            record = change(read_record(folder, manifest, table))
            write_atomically(path, as_json(record).encode())
    except OSError as error:
        raise DataError(f"{path}: cannot write the results: {error.strerror}") from None
    return record


def as_json(record: TableRecord) -> str:
    """A record as JSON text."""
    training = [
        {**asdict(entry), "mean": entry.mean, "std": entry.std}
        for entry in record.training.values()
    ]
    content = {
        "table": record.table,
        "title": record.title,
        "tolerance": TOLERANCE,
        "rows": [asdict(row) for row in record.rows.values()],
        "training": training,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_section(section: type[R], values: dict[str, Any]) -> R:
    """A dataclass from plain values; a TypeError where a value is of another type."""
    hints = typing.get_type_hints(section)
    for key, value in values.items():
        if key not in hints:
            raise TypeError(f"{key!r} is unknown")
        if not _fits(value, hints[key]):
            raise TypeError(f"{key} is {value!r}")
    return section(**values)


def _fits(value: Any, hint: Any) -> bool:
    union = typing.get_origin(hint) is types.UnionType
    for option in typing.get_args(hint) if union else (hint,):
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return math.isfinite(value)
        if type(value) is (typing.get_origin(option) or option):
            return True
    return False
