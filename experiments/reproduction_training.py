"""Trains rows of the paper's tables with several seeds, one after the other, resumably.

Each training is a process of its own, by the same command that a person would give. What is
finished is in the table's record; what was begun goes on from its run folder.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from experiments import provenance, records
from experiments.config_file import load_config
from experiments.distributed import choose_device
from experiments.errors import ConfigError, UserError
from experiments.metrics import read_metrics
from experiments.records import SeedResult, TableRecord
from experiments.zoo_manifest import Manifest, Row


class TrainingFailed(UserError):
    """A training ended before its last epoch. Exit code: that of the training."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code


@dataclass
class Trainings:
    """What is trained, and where it goes.

    Attributes:
        manifest: the zoo.
        results: folder of the records.
        output: folder of the run folders.
        overrides: keys of every row's config -> text, as on a command line.
        weights: folder of pretrained weights, or None for the one that a config names.
        say: told how it gets on.
        finished: called with the record after each training.
    """

    manifest: Manifest
    results: Path
    output: Path
    overrides: Mapping[str, str]
    weights: Path | None
    say: Callable[[str], object]
    finished: Callable[[TableRecord], object]

    def train(self, rows: list[Row], seeds: list[int]) -> None:
        """Train each row with each seed, and keep each result at once.

        Raises:
            UserError: a config that cannot be used; found before anything is trained.
            TrainingFailed: a training did not come to its end; the others are not begun.
        """
        work = [(row, seed, self._identity(row, seed)) for seed in seeds for row in rows]
        for number, (row, seed, identity) in enumerate(work, start=1):
            where = f"[{number}/{len(work)}] {row.config}, seed {seed}"
            record = records.read_record(self.results, self.manifest, row.table)
            known = record.training.get(row.name)
            done = next((s for s in known.seeds if s.seed == seed), None) if known else None
            if done is not None and done.identity == identity:
                self.say(f"{where}: {done.top1:.2f}%, trained {done.time}")
                continue
            result = self._train(row, seed, identity, where)
            self.say(f"{where}: {result.top1:.2f}% after {result.epochs} epochs")
            self._keep(row, result)

    def _keep(self, row: Row, result: SeedResult) -> None:
        record = records.update_record(
            self.results, self.manifest, row.table, lambda record: record.with_seed(row, result)
        )
        self.finished(record)

    def folder(self, row: Row, seed: int) -> Path:
        """The run folder of a training."""
        return self.output / row.config / f"seed{seed}"

    def _train(self, row: Row, seed: int, identity: str, where: str) -> SeedResult:
        path, folder = self.manifest.config_path(row.config), self.folder(row, seed)
        settings = {**self._settings(row), "seed": str(seed), "output": str(folder)}
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        module = [*launcher(), "-m", "experiments.train", "--config", str(path), *words]
        command = shlex.join(["python", *module])
        self.say(f"{where}: {command}")
        start = time.perf_counter()
        code = _run([sys.executable, *module])
        if code != 0:
            raise TrainingFailed(
                f"{row.config}, seed {seed}: the training ended with status {code}; the same "
                "command goes on from its last checkpoint",
                code,
            )
        rows = [entry for entry in read_metrics(folder) if entry["split"] == "validation"]
        last = rows[-1]
        device = choose_device(load_config(path, settings).device)
        return SeedResult(
            seed=seed,
            top1=round(last["top1"], 4),
            best_top1=round(max(entry["top1"] for entry in rows), 4),
            epochs=last["epoch"],
            steps=last["step"],
            folder=str(folder),
            command=command,
            seconds=round(time.perf_counter() - start, 2),
            identity=identity,
            **provenance.provenance(device),
        )

    def _settings(self, row: Row) -> dict[str, str]:
        """The overrides, and pretrained weights from their folder where the config wants some."""
        config = load_config(self.manifest.config_path(row.config), self.overrides)
        if self.weights is None or config.model.weights is None:
            return dict(self.overrides)
        path = self.weights / Path(config.model.weights).name
        return {"model.weights": str(path), **self.overrides}

    def _identity(self, row: Row, seed: int) -> str:
        config = load_config(self.manifest.config_path(row.config), self._settings(row))
        return provenance.training_identity(config, seed=seed)


def launcher() -> list[str]:
    """What stands before `-m experiments.train`: torchrun where NPROC asks for several processes.

    Raises:
        ConfigError: NPROC is no number.
    """
    text = os.environ.get("NPROC") or "1"
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"environment: NPROC: got {text!r}; allowed: a whole number from 1")
    if text == "1":
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", text]


def _run(command: list[str]) -> int:
    """Run a command to its end; what ends this process asks the command to end first."""
    process = subprocess.Popen(command, cwd=Path.cwd())
    with _handing_on(process):
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # the terminal has told it, too: it saves what it has
            raise


@contextmanager
def _handing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Hand SIGTERM and SIGUSR1 on, as a scheduler sends them to the first process alone."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
