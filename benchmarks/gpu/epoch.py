"""Epochs of a study for a GPU, by a whole training."""

import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.row import Settings, Values
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT
from experiments.study.plan import read_study
from experiments.training.distributed import World
from experiments.training.metrics import read_metrics
from experiments.training.run import Run

STUDY = ROOT / "configs" / "studies" / "fashion_mnist_cct7.yaml"
EPOCHS = 4


def measure(files: Path, settings: Settings, found: Values) -> None:
    """Epochs of the study for a GPU, by a whole training: its steps, evaluation and saving."""
    study = read_study(STUDY)
    changes = {"device": settings.device.type, "checkpoint.every": "1"}
    changes |= {"logging.evaluate_every": "1", "schedule.epochs": str(EPOCHS)}
    changes |= {"schedule.warmup_epochs": "1"}
    if settings.quick:
        changes |= {"model.name": "cct_2_3x2_32", "horizontal.layers": "[1]"}
        changes |= {"vertical.layers": "[1]", "data.dataset": "digits", "data.workers": "0"}
        changes |= {"data.train_split": "train[:16]", "data.val_split": "validation[:8]"}
        changes |= {"data.batch_size": "8", "schedule.epochs": "2"}
    files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files) as folder:
        config = study.config(study.variants["HTM + VTM"], 1, changes, Path(folder) / "run")
        run = Run(config, World(0, 1, settings.device))
        run.fit()
        rows = read_metrics(run.folder.path)
    training = [one for one in rows if one["split"] == "train"]
    ends = [one["time"] for one in rows if one["split"] == "validation"]
    found |= {
        "images": run.batches.num_images,
        "evaluated": run.val_batches.num_images,
        "epochs": [],
    }
    # the first epoch compiles, and starts the loader's processes
    for number, (before, end) in enumerate(pairwise(ends), start=2):
        steps = [one for one in training if one["epoch"] == number]
        seconds = sum(
            one["steps"] * config.data.batch_size / one["images_per_second"] for one in steps
        )
        waited = sum(one["steps"] * one["data_seconds"] for one in steps)
        epoch = {"seconds": end - before, "training_seconds": seconds, "waited_seconds": waited}
        found["epochs"].append(epoch)
    settings.keep(found)


def tables(values: Values) -> str:
    """One line per epoch."""
    rows = []
    for number, epoch in enumerate(values["epochs"], start=2):
        rest = epoch["seconds"] - epoch["training_seconds"]
        seconds = (epoch["seconds"], epoch["training_seconds"], epoch["waited_seconds"], rest)
        speed = values["images"] / epoch["training_seconds"]
        rows.append([str(number), *(f"{value:.2f}" for value in seconds), f"{speed:,.0f}"])
    head = (
        *("epoch", "whole (s)", "training (s)", "of it waiting for data"),
        *("evaluation and saving (s)", "images/s"),
    )
    table = aligned_table(head, rows, range(6))
    return f"{table}\n{values['images']:,} images, {values['evaluated']:,} to evaluate.\n"
