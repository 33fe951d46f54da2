"""Trains rows of the paper's tables with several seeds, one after the other, resumably.

Each training is a process of its own, by the same command that a person would give. What is
finished is in the table's record; what was begun goes on from its run folder.
"""

import json
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

from experiments import provenance
from experiments.config import as_plain, load_config
from experiments.errors import ConfigError, SavedAndStopped, TrainingFailed
from experiments.reproduce import records
from experiments.reproduce.records import SeedResult, TableRecord
from experiments.training.distributed import choose_device
from experiments.training.folder import FINAL_WEIGHTS, HEARTBEAT_FILE
from experiments.training.metrics import read_metrics
from experiments.zoo.manifest import Manifest, Row

_LAUNCHER = ("sh", str(provenance.ROOT / "run" / "launch.sh"))
_CLOCKS_DIFFER = 2.0
"""Seconds by which a file server's clock may be behind this machine's."""


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
            UserError: a config that cannot be used, or a record of other settings; found before
                anything is trained.
            TrainingFailed: a training did not come to its end; the others are not begun.
            SavedAndStopped: a training was asked to stop; the others are not begun.
        """
        identities = {row.name: self._identity(row) for row in rows}
        for row in rows:
            self._refuse_other_settings(row, identities[row.name])
        work = [(row, seed, identities[row.name]) for seed in seeds for row in rows]
        for number, (row, seed, identity) in enumerate(work, start=1):
            where = f"[{number}/{len(work)}] {row.config}, seed {seed}"
            record = records.read_record(self.results, self.manifest, row.table)
            known = record.training.get(row.name)
            done = next((s for s in known.seeds if s.seed == seed), None) if known else None
            if done is not None:
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

    def _refuse_other_settings(self, row: Row, identity: str) -> None:
        """One mean and one deviation speak of one training, so all its seeds share settings."""
        record = records.read_record(self.results, self.manifest, row.table)
        known = record.training.get(row.name)
        others = [s.seed for s in known.seeds if s.identity != identity] if known else []
        if others:
            path = records.record_path(self.results, row.table)
            raise ConfigError(
                f"{path}: holds {row.name} with seed {', '.join(map(str, others))}, trained with "
                "other settings than the config and the command line say now; one mean needs one "
                f'setting: give the settings of then, remove {row.name} under "training" there, '
                "or give another --results and --runs"
            )

    def folder(self, row: Row, seed: int) -> Path:
        """The run folder of a training."""
        return self.output / row.config / f"seed{seed}"

    def _train(self, row: Row, seed: int, identity: str, where: str) -> SeedResult:
        path, folder = self.manifest.config_path(row.config), self.folder(row, seed)
        settings = {**self._settings(row), "seed": str(seed), "output": str(folder)}
        words = [word for key, value in settings.items() for word in (f"--{key}", value)]
        module = ["experiments.train", "--config", str(path), *words]
        processes = number_of_processes()
        command = shlex.join(["python", "-m", *module])
        if processes > 1:
            command = f"NPROC={processes} {shlex.join(['sh', 'run/launch.sh', *module])}"
        self.say(f"{where}: {command}")
        start, begun = time.perf_counter(), time.time()
        code = _run([sys.executable, "-m", *module] if processes == 1 else [*_LAUNCHER, *module])
        config = load_config(path, settings)
        rows = [entry for entry in read_metrics(folder) if entry["split"] == "validation"]
        finished = (folder / FINAL_WEIGHTS).exists() and bool(rows)
        # torchrun's own exit code may be 0 where the run was asked to stop and has saved
        if code != 0 or not finished or rows[-1]["epoch"] != config.schedule.total_epochs:
            raise _unfinished(f"{row.config}, seed {seed}", folder, code, begun)
        last = rows[-1]
        device = choose_device(config.device)
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

    def _identity(self, row: Row) -> str:
        """A hash of what the trainings of a row have in common, wherever their data lie."""
        config = load_config(self.manifest.config_path(row.config), self._settings(row))
        data = {**as_plain(config.data), "root": None, "download": None, "workers": None}
        return provenance.training_identity(config, data=data, seed=None)


def number_of_processes() -> int:
    """Of each training: NPROC in the environment, as for `run/launch.sh`.

    Raises:
        ConfigError: NPROC is no number.
    """
    text = os.environ.get("NPROC") or "1"
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"environment: NPROC: got {text!r}; allowed: a whole number from 1")
    return int(text)


def _unfinished(
    training: str, folder: Path, code: int, begun: float
) -> SavedAndStopped | TrainingFailed:
    """What to tell of a training that did not come to its last epoch."""
    heartbeat = folder / HEARTBEAT_FILE
    try:
        stopped = json.loads(heartbeat.read_text())["state"] == "stopped"
        stopped = stopped and heartbeat.stat().st_mtime >= begun - _CLOCKS_DIFFER
    except (OSError, ValueError, KeyError, TypeError):
        stopped = False
    if stopped:
        return SavedAndStopped(
            f"{training}: the training was asked to stop and has saved; the same command goes on"
        )
    missing = "" if code else f", but {folder} lacks the weights or the row of its last epoch"
    return TrainingFailed(
        f"{training}: the training ended with status {code}{missing}; the same command goes on "
        "from its last checkpoint",
        code or 3,
    )


def _run(command: list[str]) -> int:
    """Run a command to its end; what ends this process asks the command to end first."""
    launcher = {"TOKENMIXUP_PYTHON": sys.executable, "NNODES": "1", "RDZV_ENDPOINT": ""}
    process = subprocess.Popen(command, cwd=Path.cwd(), env={**os.environ, **launcher})
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
