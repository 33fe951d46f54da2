"""Trains what a study lacks: a process for each training, some of them at once.

What is finished is in the study's records; what was begun goes on from its run folder.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.errors import ConfigError, SavedAndStopped, TrainingFailed
from experiments.study.plan import Study
from experiments.study.records import (
    find_record,
    keep_record,
    read_records,
    records_path,
    same_training,
)
from experiments.study.training import Training
from experiments.training.stopping import StopRequests

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass
class Queue:
    """The trainings of a study, and where everything goes.

    Attributes:
        study: what is trained.
        overrides: keys of every config -> text, as on a command line.
        output: folder of the run folders.
        results: folder of the records.
        threads: of each training.
        say: told how it gets on.
    """

    study: Study
    overrides: Mapping[str, str]
    output: Path
    results: Path
    threads: int
    say: Callable[[str], object]

    @property
    def path(self) -> Path:
        """The file of the records."""
        return records_path(self.results, self.study.name)

    def trainings(self) -> list[Training]:
        """All of the study, seed by seed."""
        return [
            Training(self.study, variant, seed, self.overrides, self.output, self.threads)
            for variant, seed in self.study.runs()
        ]

    def missing(self) -> list[Training]:
        """What has no record yet. What another study has done already is taken from there.

        Raises:
            ConfigError: there is a record of a training with other settings.
        """
        missing = []
        records = read_records(self.path)
        for training in self.trainings():
            record = find_record(records, training.variant.name, training.seed)
            if record is None:
                if not self._take(training):
                    missing.append(training)
            elif record.identity != training.identity:
                raise ConfigError(
                    f"{self.path}: holds {training.name} with other settings than "
                    f"{self.study.file} and the command line say now; remove its line to train it "
                    "anew, or give another --results"
                )
        return missing

    def _take(self, training: Training) -> bool:
        found = same_training(self.results, self.study.name, training.identity)
        if found is None:
            return False
        taken = replace(
            found,
            study=self.study.name,
            variant=training.variant.name,
            differences=self.study.differences(training.variant),
            taken_from=found.study,
        )
        keep_record(self.path, self.study, taken)
        self.say(f"{training.name}: {found.top1:.2f}%, the same training as in {found.study}")
        return True

    def train(self, jobs: int, requests: StopRequests) -> None:
        """Train all that is missing, `jobs` at a time; each keeps its own record at its end.

        Raises:
            ConfigError: as `missing`.
            TrainingFailed: a training failed; those that run are brought to their end, no other is
                begun.
            SavedAndStopped: asked to stop; what ran has saved itself.
        """
        waiting = self.missing()
        total, failed = len(self.trainings()), None
        done = total - len(waiting)
        running: dict[subprocess.Popen[bytes], Training] = {}
        self.say(f"{self.study.name}: {done} of {total} trainings are done")
        while running or (waiting and failed is None):
            if requests.reason is not None:
                self._stop(running, requests.reason)
            while waiting and failed is None and len(running) < jobs:
                training = waiting.pop(0)
                self.say(f"{training.name}: begins")
                running[self._start(training)] = training
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            for process in [p for p in running if p.poll() is not None]:
                training = running.pop(process)
                record = find_record(read_records(self.path), training.variant.name, training.seed)
                if process.returncode == 0 and record is not None:
                    done += 1
                    self.say(
                        f"{training.name}: {record.top1:.2f}% in {record.seconds:.0f} s "
                        f"({done} of {total})"
                    )
                else:
                    failed = failed or TrainingFailed(
                        f"{training.name} ended with status {process.returncode}, see "
                        f"{self._log(training)}; the same command goes on from its last checkpoint",
                        process.returncode or 1,
                    )
        if failed is not None:
            raise failed

    def _start(self, training: Training) -> "subprocess.Popen[bytes]":
        words = training.words()
        words += ["--output", str(self.output), "--results", str(self.results)]
        training.folder.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        with self._log(training).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **threads},
            )

    def _log(self, training: Training) -> Path:
        return training.folder / "log.txt"

    def _stop(self, running: Mapping["subprocess.Popen[bytes]", Training], reason: str) -> None:
        """Have what runs save itself, wait for it, and stop."""
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        names = ", ".join(training.name for training in running.values()) or "nothing"
        raise SavedAndStopped(
            f"{reason}: {names} was running and saved itself; the same command goes on"
        )
