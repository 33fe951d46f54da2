"""Evaluates the rows of the paper's tables whose checkpoints are there."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from experiments import provenance
from experiments.config import COMMAND_LINE, RunConfig, as_plain, load_config
from experiments.errors import ConfigError, UserError
from experiments.provenance import Records
from experiments.reproduce.table import Line, RowRecord
from experiments.training.distributed import choose_device, one_process
from experiments.training.evaluation import Assessment
from experiments.zoo.download import MissingFileError, Zoo
from experiments.zoo.manifest import Manifest, Row


@dataclass(frozen=True)
class Evaluator:
    """Evaluates rows and keeps their records.

    Attributes:
        manifest: the zoo.
        zoo: its files.
        records: of the rows.
        overrides: keys of every row's config -> text, as on a command line.
        download: fetch missing weights and data sets.
        fresh: evaluate again what was evaluated before.
        command: the command line, for the records.
        finished: called with each row.
    """

    manifest: Manifest
    zoo: Zoo
    records: Records[RowRecord]
    overrides: Mapping[str, str]
    download: bool
    fresh: bool
    command: str
    finished: Callable[[Row], object]

    def evaluate(self, rows: list[Row]) -> None:
        """Evaluate each row that can be evaluated, and keep its result at once; skip the others.

        Raises:
            ConfigError: an override that no row could take.
        """
        code = provenance.code_hash()
        for number, row in enumerate(rows, start=1):
            where = f"[{number}/{len(rows)}] {row.dataset.name}, {row.method}"
            earlier = next((r for r in self.records.read() if r.row == row.name), None)
            try:
                record = self._evaluate(row, earlier, code, where)
            except UserError as error:
                if isinstance(error, ConfigError) and str(error).startswith(COMMAND_LINE):
                    raise
                reason = " ".join(str(error).split())
                if isinstance(error, MissingFileError) and error.checkpoint is row.checkpoint:
                    reason = "; ".join([reason, *(" ".join(a.split()) for a in error.advice[:3])])
                print(f"{where}: skipped: {reason}", flush=True)
                if earlier is not None and earlier.ours is not None:
                    print(f"{where}: the result of {earlier.time} is kept", flush=True)
                    continue
                origin = provenance.provenance(torch.device("cpu"))
                record = RowRecord(row=row.name, reason=reason, command=self.command, **origin)
            self.records.keep(record)
            self.finished(row)

    def _evaluate(self, row: Row, earlier: RowRecord | None, code: str, where: str) -> RowRecord:
        if row.checkpoint is None:
            raise UserError(
                f"no checkpoint was released; train it: python -m experiments.reproduce --train "
                f"{row.name}"
            )
        path = self.manifest.config_path(row.config)
        overrides = {"data.download": str(self.download).lower(), **self.overrides}
        config = load_config(path, overrides)
        weights = self.zoo.path(row.checkpoint)
        if self.download:
            self.zoo.obtain(row.checkpoint)
        elif not weights.exists():
            raise UserError(
                f"{weights} is not there; fetch it: "
                f"{self.zoo.command('download', row.checkpoint)} (or --download), or by hand from "
                f"{row.checkpoint.link}"
            )
        sha256 = self.zoo.verify(row.checkpoint)
        identity = _identity(config, sha256, code)
        if earlier is not None and earlier.identity == identity and not self.fresh:
            print(f"{where}: {earlier.ours:.2f}%, evaluated {earlier.time} (--fresh: again)")
            return earlier
        print(f"{where}: {row.checkpoint.file}", flush=True)
        assessment = Assessment(config, str(weights), one_process(config.device))
        start = time.perf_counter()
        batches = track(
            assessment.batches,
            row.name,
            total=len(assessment.batches),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        evaluation = assessment.evaluate(batches)
        record = RowRecord(
            row=row.name,
            ours=round(evaluation.top1, 4),
            top5=round(evaluation.top5, 4),
            loss=round(evaluation.loss, 6),
            images=evaluation.images,
            checkpoint_sha256=sha256,
            device=assessment.world.device.type,
            precision=config.eval_precision,
            seconds=round(time.perf_counter() - start, 2),
            identity=identity,
            command=self.command,
            **provenance.provenance(assessment.world.device),
        )
        status = Line(row, record, ()).status
        print(f"{where}: {record.ours:.2f}% of {record.images:,} images: {status}", flush=True)
        return record


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
