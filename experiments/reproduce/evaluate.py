"""Evaluates the rows of the paper's tables whose checkpoints are there."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from experiments import provenance
from experiments.config.reading import COMMAND_LINE, load_config
from experiments.config.schema import RunConfig, as_plain
from experiments.errors import ConfigError, UserError
from experiments.provenance import Records
from experiments.reproduce.table import Line, RowRecord
from experiments.training.distributed import World, choose_device
from experiments.training.evaluation import Assessment
from experiments.zoo.download import MissingFileError, Zoo
from experiments.zoo.manifest import Checkpoint, Manifest, Row


def evaluate_rows(
    manifest: Manifest,
    zoo: Zoo,
    records: Records[RowRecord],
    rows: list[Row],
    overrides: Mapping[str, str],
    *,
    download: bool,
    fresh: bool,
    command: str,
) -> Iterator[Row]:
    """Evaluate each row that can be evaluated, and yield it once its record is kept.

    Args:
        manifest: the zoo.
        zoo: its files.
        records: of the rows.
        rows: what to evaluate.
        overrides: keys of every row's config -> text, as on a command line.
        download: fetch missing weights and data sets.
        fresh: evaluate again what was evaluated before.
        command: the command line, for the records.

    Raises:
        ConfigError: an override that no row could take.
    """
    code = provenance.code_hash()
    overrides = {"data.download": str(download).lower(), **overrides}
    for number, row in enumerate(rows, start=1):
        where = f"[{number}/{len(rows)}] {row.dataset.name}, {row.method}"
        earlier = next((r for r in records.read() if r.row == row.name), None)
        try:
            checkpoint = _checkpoint_of(row)
            config = load_config(manifest.config_path(row.config), overrides)
            sha256 = _verified(checkpoint, zoo, download)
            identity = _identity(config, sha256, code)
            if earlier is not None and earlier.identity == identity and not fresh:
                print(f"{where}: {earlier.ours:.2f}%, evaluated {earlier.time} (--fresh: again)")
                record = earlier
            else:
                print(f"{where}: {checkpoint.file}", flush=True)
                record = RowRecord(
                    row=row.name,
                    checkpoint_sha256=sha256,
                    identity=identity,
                    command=command,
                    **_evaluate(config, zoo.path(checkpoint), row.name),
                )
                status = Line(row, record, ()).status
                print(f"{where}: {record.ours:.2f}% of {record.images:,} images: {status}")
        except UserError as error:
            if isinstance(error, ConfigError) and str(error).startswith(COMMAND_LINE):
                raise
            advice = error.advice[:3] if isinstance(error, MissingFileError) else []
            reason = "; ".join(" ".join(text.split()) for text in (str(error), *advice))
            print(f"{where}: skipped: {reason}", flush=True)
            if earlier is not None and earlier.ours is not None:
                print(f"{where}: the result of {earlier.time} is kept", flush=True)
                continue
            origin = provenance.provenance(torch.device("cpu"))
            record = RowRecord(row=row.name, reason=reason, command=command, **origin)
        records.keep(record)
        yield row


def _checkpoint_of(row: Row) -> Checkpoint:
    if row.checkpoint is None:
        raise UserError(
            f"no checkpoint was released; train it: python -m experiments.reproduce --train "
            f"{row.name}"
        )
    return row.checkpoint


def _verified(checkpoint: Checkpoint, zoo: Zoo, download: bool) -> str:
    """The hash of a file that is on disk, or is fetched if it may be."""
    if download:
        zoo.obtain(checkpoint)
    elif not zoo.path(checkpoint).exists():
        raise UserError(
            f"{zoo.path(checkpoint)} is not there; fetch it: {zoo.command('download', checkpoint)} "
            f"(or --download), or by hand from {checkpoint.link}"
        )
    return zoo.verify(checkpoint)


def _evaluate(config: RunConfig, weights: Path, name: str) -> dict[str, Any]:
    """What was measured, with where and when, as fields of a record."""
    assessment = Assessment(config, str(weights), World(0, 1, choose_device(config.device)))
    for note in assessment.loaded.notes:
        print(f"{weights}: {note}", flush=True)
    start = time.perf_counter()
    batches = track(
        assessment.batches,
        name,
        total=len(assessment.batches),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    evaluation = assessment.evaluate(batches)
    return {
        "ours": round(evaluation.top1, 4),
        "top5": round(evaluation.top5, 4),
        "loss": round(evaluation.loss, 6),
        "images": evaluation.images,
        "device": assessment.world.device.type,
        "precision": config.eval_precision,
        "seconds": round(time.perf_counter() - start, 2),
        **provenance.provenance(assessment.world.device),
    }


def _identity(config: RunConfig, checkpoint_sha256: str, code: str) -> str:
    """A hash of all that a figure depends on, the place of the data included."""
    facts = {
        "config": as_plain(dataclasses.replace(config, output=None)),
        "root": str(Path(config.data.root).resolve()),
        "checkpoint": checkpoint_sha256,
        "code": code,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(choose_device(config.device)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
