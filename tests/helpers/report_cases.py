"""Results of the paper's tables to make pages from, without evaluating anything."""

from experiments.reproduce.table import RowRecord, read_table, row_records
from experiments.study.records import study_records
from experiments.zoo.manifest import read_manifest
from tests.helpers.study_helper import study_record

MANIFEST = read_manifest()
SOURCE = {
    "hardware": "NVIDIA H200",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": "0123456789ab",
    "command": "python -m experiments.reproduce --table cifar",
    "time": "2026-11-22T14:00:00+00:00",
}
OURS = {
    "cct_cifar10_htm": 97.57,
    "cct_cifar10_vtm": 97.68,
    "cct_cifar10_hvtm": 97.64,
    "cct_cifar100_htm": 83.58,
    "VIT_HTM": 82.35,
    "ViT-B_16-224": 81.11,
}
TRAINED = {
    "cct_cifar10_htm": {44: 97.61, 42: 97.3, 43: 97.52},
    "cct_7-3x1_cifar10_baseline": {42: 97.4},
}
REASON = 'x<y> is not there; fetch it: python -m experiments.zoo download "x" & more'


def evaluated(name: str, ours: float, images: int | None = None) -> RowRecord:
    """The record of an evaluated row, by default on all images."""
    everything = MANIFEST.row(name).dataset.images
    return RowRecord(
        row=name,
        ours=ours,
        images=everything if images is None else images,
        precision="tf32",
        **SOURCE,
    )


def trained(name: str, seed: int, top1: float):
    """The record of a trained row."""
    return study_record(
        study="reproduce",
        variant=MANIFEST.row(name).config,
        seed=seed,
        top1=top1,
        top1_by_epoch={"1509": top1 + 0.1, "1510": top1},
        epochs=1510,
        **SOURCE,
    )


def keep_example(results):
    """Records with rows of every status, and of two rows that were trained; gives the tables."""
    rows, trainings = row_records(results), study_records(results, "reproduce")
    for row in MANIFEST.rows():
        if row.name in OURS:
            rows.keep(evaluated(row.name, OURS[row.name], 500 if row.name == "VIT_HTM" else None))
        elif row.checkpoint and row.name != "VIT_VTM":
            rows.keep(RowRecord(row=row.name, reason=REASON, **SOURCE))
    for name, figures in TRAINED.items():
        for seed, top1 in figures.items():
            trainings.keep(trained(name, seed, top1))
    return [read_table(results, MANIFEST, name) for name in MANIFEST.tables]
