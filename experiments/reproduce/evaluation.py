"""Evaluates the rows of the paper's tables whose checkpoints are there, one after the other."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from experiments import provenance
from experiments.config import COMMAND_LINE, RunConfig, as_plain, load_config
from experiments.errors import ConfigError, UserError
from experiments.reproduce import records
from experiments.reproduce.records import Result, TableRecord
from experiments.training.distributed import choose_device, one_process
from experiments.training.evaluation import Assessment
from experiments.zoo.download import MissingFileError, Zoo
from experiments.zoo.manifest import Checkpoint, Manifest, Row


@dataclass
class Reproduction:
    """What is evaluated, with what, and where the results go.

    Attributes:
        manifest: the zoo.
        zoo: its files.
        results: folder of the records.
        overrides: keys of every row's config -> text, as on a command line.
        download: fetch what is missing, weights as well as data sets.
        fresh: evaluate also what was evaluated before.
        command: the command line, for the records.
        say: told how it gets on.
        finished: called with the record after each row.
    """

    manifest: Manifest
    zoo: Zoo
    results: Path
    overrides: Mapping[str, str]
    download: bool
    fresh: bool
    command: str
    say: Callable[[str], object]
    finished: Callable[[TableRecord], object]

    def evaluate(self, rows: list[Row]) -> None:
        """Evaluate each row that can be, and keep its result at once; say why of the others.

        Raises:
            ConfigError: an override that no row could take.
        """
        code = provenance.code_hash()
        for number, row in enumerate(rows, start=1):
            where = f"[{number}/{len(rows)}] {row.dataset.name}, {row.method}"
            earlier = self._earlier(row)
            try:
                result = self._evaluate(row, earlier, code, where)
            except UserError as error:
                if isinstance(error, ConfigError) and str(error).startswith(COMMAND_LINE):
                    raise
                reason = " ".join(str(error).split())
                if isinstance(error, MissingFileError) and error.checkpoint is row.checkpoint:
                    reason = "; ".join([reason, *(" ".join(a.split()) for a in error.advice[:3])])
                self.say(f"{where}: skipped: {reason}")
                result = replace(records.blank(row), status=records.SKIPPED, reason=reason)
                if earlier.ours is not None:  # a result is not lost by a file that is gone
                    self.say(f"{where}: the result of {earlier.time} is kept")
                    continue
            self.keep(row, result)

    def keep(self, row: Row, result: Result) -> None:
        """Put a result into its table's record."""
        record = records.update_record(
            self.results, self.manifest, row.table, lambda record: record.with_row(result)
        )
        self.finished(record)

    def _earlier(self, row: Row) -> Result:
        return records.read_record(self.results, self.manifest, row.table).rows[row.name]

    def _evaluate(self, row: Row, earlier: Result, code: str, where: str) -> Result:
        checkpoint = row.checkpoint
        if checkpoint is None:
            raise UserError(
                f"no checkpoint was released; train it: python -m experiments.reproduce --train "
                f"{row.name}"
            )
        path = self.manifest.config_path(row.config)
        overrides = {"data.download": str(self.download).lower(), **self.overrides}
        config = load_config(path, overrides)
        sha256 = self._have(checkpoint)
        identity = _identity(config, sha256, code)
        if earlier.identity == identity and not self.fresh:
            self.say(f"{where}: {earlier.ours:.2f}%, evaluated {earlier.time} (--fresh: again)")
            return earlier
        self.say(f"{where}: {checkpoint.file}")
        weights = self.zoo.path(checkpoint)
        assessment = Assessment(config, str(weights), one_process(config.device))
        start, shown = time.perf_counter(), sys.stderr.isatty()
        with tqdm(assessment.batches, desc=row.name, leave=False, disable=not shown) as bar:
            evaluation = assessment.evaluate(bar)
        result = records.judged(
            replace(
                records.blank(row),
                ours=round(evaluation.top1, 4),
                top5=round(evaluation.top5, 4),
                loss=round(evaluation.loss, 6),
                images=evaluation.images,
                checkpoint_sha256=sha256,
                device=assessment.world.device.type,
                precision=config.eval_precision,
                command=self.command,
                seconds=round(time.perf_counter() - start, 2),
                identity=identity,
                **provenance.provenance(assessment.world.device),
            )
        )
        self.say(f"{where}: {result.ours:.2f}% of {result.images:,} images: {result.status}")
        return result

    def _have(self, checkpoint: Checkpoint) -> str:
        """Have a checkpoint's file, checked; gives its hash."""
        path = self.zoo.path(checkpoint)
        if self.download:
            self.zoo.obtain(checkpoint)
        elif not path.exists():
            raise UserError(
                f"{path} is not there; fetch it: {self.zoo.command('download', checkpoint)} "
                f"(or --download), or by hand from {checkpoint.link}"
            )
        return self.zoo.verify(checkpoint)


def _identity(config: RunConfig, checkpoint_sha256: str, code: str) -> str:
    """A hash of all that a figure depends on, the place of the data included."""
    told = dataclasses.replace(config, output=None)
    facts = {
        "config": as_plain(told),
        "root": str(Path(config.data.root).resolve()),
        "checkpoint": checkpoint_sha256,
        "code": code,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(choose_device(config.device)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
