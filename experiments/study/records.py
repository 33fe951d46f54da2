"""The records of a study's trainings: results/studies/STUDY/records.jsonl."""

from pathlib import Path
from typing import Any

from pydantic import Field

from experiments.provenance import Record, Records

RECORDS_FILE, LABELS_FILE = "records.jsonl", "labels.jsonl"


class StudyRecord(Record):
    """One training, after its last epoch."""

    study: str
    variant: str
    seed: int
    differences: dict[str, Any]
    """Settings that differ from the plain variant's: `section.key` -> value."""
    substitutions: list[str]
    """Names of the rules (`experiments/study/variants.py`) that replaced the library's."""
    top1: float
    """After the last epoch, per cent of the evaluated images: those of the study's test split, or
    of the config's validation split if the study has none."""
    top5: float
    """Likewise."""
    loss: float
    """Cross-entropy, likewise."""
    epochs: int
    steps: int
    train_images: int
    val_images: int
    """The evaluated images."""
    top1_by_epoch: dict[str, float]
    """Of each evaluated epoch, on the validation split; for curves only, nothing is chosen by it.
    """
    statistics: dict[str, float]
    """Of the training steps, as `metrics.jsonl` names them: means over the last epoch."""
    statistics_by_epoch: dict[str, dict[str, float]] = Field(default={})
    """Likewise for each evaluated epoch, and under `all` over the whole training."""
    measures: dict[str, float] = Field(default={})
    """Of the final weights, with a test split: see `experiments/study/measures.py`."""
    seconds: float
    """Wall time of all parts of the training, with evaluation and saving. It includes the time for
    which a process was halted from outside."""
    cpu_seconds: float
    """Processor time of all parts, data-loader processes included."""
    parts: int
    """1, plus 1 for each time that the training was stopped and resumed."""
    images_per_second: float
    """Of training: batch size by the median time per step over the logged intervals."""
    identity: str
    """Hash of the config, seed and device included, and of the substitutions: the record is kept
    while it is the same. Not counted: where the data lie, how they are read, logging and saving;
    nor hardware, versions and commit, which stand beside it."""
    taken_from: str | None = None
    """The study whose record of the same training this is, or None."""
    overrides: dict[str, str] = Field(default={})
    """Keys that the command line set."""


class LabelRecord(Record):
    """What a judge sees of one model's labels, at one rho."""

    study: str
    variant: str
    seed: int
    rho: float
    agreement: dict[str, float | None]
    """The fields of `experiments.study.labels.Agreement`."""


def study_records(results: Path, study: str) -> Records[StudyRecord]:
    """The records of a study: one per variant and seed."""
    path = results / "studies" / study / RECORDS_FILE
    return Records(path, StudyRecord, lambda record: (record.variant, record.seed))


def label_records(results: Path, study: str) -> Records[LabelRecord]:
    """What a judge saw of a study's labels: one record per training and rho."""
    path = results / "studies" / study / LABELS_FILE
    return Records(path, LabelRecord, lambda record: (record.variant, record.seed, record.rho))


def same_training(results: Path, study: str, identity: str) -> StudyRecord | None:
    """The record of the same training in another study, or None.

    Raises:
        DataError: a study's records are damaged.
    """
    for path in sorted((results / "studies").glob(f"*/{RECORDS_FILE}")):
        if path.parent.name == study:
            continue
        for record in study_records(results, path.parent.name).read():
            if record.identity == identity and record.taken_from is None:
                return record
    return None
