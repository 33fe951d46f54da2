"""What the trainings of a study came to: results/studies/STUDY/records.jsonl, one line each."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import DataError
from experiments.files import exclusive, write_atomically
from experiments.reproduce.records import read_section
from experiments.study.plan import Study

RECORDS_FILE = "records.jsonl"


@dataclass(frozen=True)
class StudyRecord:
    """One training, after its last epoch."""

    study: str
    variant: str
    seed: int
    differences: dict[str, Any]
    """What is set otherwise than in the plain variant: `section.key` -> value."""
    substitutions: list[str]
    """What took the place of the library's decisions."""
    top1: float
    """After the last epoch, per cent of the evaluated images."""
    top5: float
    """Likewise."""
    loss: float
    """Cross-entropy, likewise."""
    epochs: int
    steps: int
    train_images: int
    val_images: int
    top1_by_epoch: dict[str, float]
    """Of each evaluated epoch; for curves, nothing is chosen by it."""
    statistics: dict[str, float]
    """Of the training's steps, as `metrics.jsonl` names them: means over the last epoch."""
    seconds: float
    """Wall time of all parts of the training, with evaluation and saving. A process that is halted
    from outside goes on counting."""
    cpu_seconds: float
    """Processor time of all parts, data-loader processes included."""
    parts: int
    """1, and one more for each time that the training was stopped and resumed."""
    images_per_second: float
    """Of training, from the median over the steps of an interval, the median of the intervals."""
    identity: str
    """Hash of the config, seed and device included, and of the substitutions: while it is the same,
    the record is kept. Where the data lie, how they are read, what is logged and when the run is
    saved do not count, nor do hardware, versions and commit, which stand beside it."""
    command: str
    hardware: str
    versions: dict[str, str]
    commit: str | None
    time: str
    taken_from: str | None = None
    """The study whose record of the same training this is, or None."""
    overrides: dict[str, str] = field(default_factory=dict)
    """Keys that the command line set."""


def records_path(results: Path, study: str) -> Path:
    """Where a study's records are."""
    return results / "studies" / study / RECORDS_FILE


def read_records(path: Path) -> list[StudyRecord]:
    """All records of a file; none where there is no file.

    Raises:
        DataError: a line is damaged; the message says which.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the records: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(read_section(StudyRecord, json.loads(line)))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: is damaged, or of another version of this program: "
                f"{error}; remove the line to have its training done again"
            ) from None
    return records


def find_record(records: list[StudyRecord], variant: str, seed: int) -> StudyRecord | None:
    """The record of one training."""
    return next((r for r in records if (r.variant, r.seed) == (variant, seed)), None)


def keep_record(path: Path, study: Study, record: StudyRecord) -> None:
    """Add a record, or put it in the place of that of the same training.

    Several processes may do it at once; the file is whole at any time, in the order of the study.
    """
    order = {(variant.name, seed): n for n, (variant, seed) in enumerate(study.runs())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path):
            others = [
                r
                for r in read_records(path)
                if (r.variant, r.seed) != (record.variant, record.seed)
            ]
            records = sorted(
                [*others, record], key=lambda r: order.get((r.variant, r.seed), len(order))
            )
            text = "".join(_line(entry) for entry in records)
            write_atomically(path, text.encode())
    except OSError as error:
        raise DataError(f"{path}: cannot write the records: {error.strerror}") from None


def same_training(results: Path, study: str, identity: str) -> StudyRecord | None:
    """The record of the same training in another study, if one has done it."""
    for path in _all_files(results):
        if path.parent.name == study:
            continue
        for record in read_records(path):
            if record.identity == identity and record.taken_from is None:
                return record
    return None


def _all_files(results: Path) -> Iterator[Path]:
    yield from sorted((results / "studies").glob(f"*/{RECORDS_FILE}"))


def _line(record: StudyRecord) -> str:
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"
