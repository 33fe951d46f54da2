"""One training of a study, in this process: by the trainer's own run, then its record."""

import json
import resource
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments import provenance
from experiments.data.datasets import open_images
from experiments.errors import CheckpointError
from experiments.files import write_atomically
from experiments.study.plan import Study, Variant
from experiments.study.records import StudyRecord
from experiments.study.substitutions import substituted
from experiments.training.distributed import joined_world
from experiments.training.metrics import CLOCK_VALUES, mean_of_rows, read_metrics
from experiments.training.run import Run
from experiments.training.stopping import StopRequests

_CLOCK_FILE = "study_clock.json"
_NOT_STATISTICS = {"split", "epoch", "step", "steps", "lr", *CLOCK_VALUES}


@dataclass(frozen=True)
class Training:
    """One variant with one seed, and where it goes.

    Attributes:
        study: whose training it is.
        variant: of the study.
        seed: of the study.
        overrides: keys of the config -> text, as on a command line.
        output: folder of the study's run folders.
        threads: of torch's operations.
    """

    study: Study
    variant: Variant
    seed: int
    overrides: Mapping[str, str]
    output: Path
    threads: int = 1

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output / self.study.name / self.variant.folder / f"seed{self.seed}"

    @property
    def name(self) -> str:
        """As the command line names it."""
        return f"{self.variant.name}/{self.seed}"

    @property
    def identity(self) -> str:
        """A hash of what the result depends on."""
        return self.study.identity(self.variant, self.seed, self.overrides)

    def words(self) -> list[str]:
        """The command of this training alone, behind `python`."""
        words = ["-m", "experiments.study", "--study", self.study.file, "--run", self.name]
        if self.threads != 1:
            words += ["--threads", str(self.threads)]
        for key, value in self.overrides.items():
            words += [f"--{key}", value]
        return words

    def train(self, requests: StopRequests) -> StudyRecord:
        """Train to the end, from where an earlier call of this folder stopped.

        Raises:
            UserError, TrainingStopped, SavedAndStopped: as `Run.fit`.
        """
        torch.set_num_threads(self.threads)
        config = self.study.config(self.variant, self.seed, self.overrides, self.folder)
        with (
            joined_world(config.device, config.timeout_minutes) as world,
            substituted(self.variant.substitutions),
            _clock(self.folder),
        ):
            Run(config, world).fit(requests)
        return self._record()

    def _record(self) -> StudyRecord:
        config = self.study.config(self.variant, self.seed, self.overrides, self.folder)
        rows = read_metrics(self.folder)
        validation = [row for row in rows if row["split"] == "validation"]
        train = [row for row in rows if row["split"] == "train"]
        if not validation or not train:
            raise CheckpointError(f"{self.folder}: metrics.jsonl lacks the rows of the training")
        last = validation[-1]
        means = mean_of_rows([row for row in train if row["epoch"] == last["epoch"]])
        clock = _read_clock(self.folder)
        with joined_world(config.device, config.timeout_minutes) as world:
            facts = provenance.provenance(world.device)
        return StudyRecord(
            study=self.study.name,
            variant=self.variant.name,
            seed=self.seed,
            differences=self.study.differences(self.variant),
            substitutions=list(self.variant.substitutions),
            top1=round(last["top1"], 4),
            top5=round(last["top5"], 4),
            loss=round(last["loss"], 6),
            epochs=last["epoch"],
            steps=last["step"],
            train_images=len(open_images(config.data, config.data.train_split)),
            val_images=len(open_images(config.data, config.data.val_split)),
            top1_by_epoch={str(row["epoch"]): round(row["top1"], 4) for row in validation},
            statistics={
                name: round(value, 6)
                for name, value in sorted(means.items())
                if name not in _NOT_STATISTICS
            },
            seconds=round(clock["seconds"], 1),
            cpu_seconds=round(clock["cpu_seconds"], 1),
            parts=clock["parts"],
            images_per_second=round(
                config.data.batch_size / statistics.median(row["step_seconds"] for row in train), 1
            ),
            identity=self.identity,
            command=shlex.join(["python", *self.words()]),
            overrides=dict(self.overrides),
            **facts,
        )


@contextmanager
def _clock(folder: Path) -> Iterator[None]:
    """Add the time of the block to what earlier parts of the same training took."""
    wall, cpu = time.perf_counter(), _processor_seconds()
    try:
        yield
    finally:
        if folder.is_dir():
            before = _read_clock(folder)
            content = {
                "seconds": before["seconds"] + time.perf_counter() - wall,
                "cpu_seconds": before["cpu_seconds"] + _processor_seconds() - cpu,
                "parts": before["parts"] + 1,
            }
            write_atomically(folder / _CLOCK_FILE, (json.dumps(content) + "\n").encode())


def _processor_seconds() -> float:
    """Of this process and of those that it has started and seen end, such as loader processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _read_clock(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _CLOCK_FILE).read_text())
    except (OSError, ValueError):
        content = {}
    return {"seconds": 0.0, "cpu_seconds": 0.0, "parts": 0, **content}
