"""Trains what a study lacks: one process per training, several at a time.

Finished trainings are in the study's records; interrupted ones resume from their run folders.
"""

import json
import os
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments.config.schema import RunConfig
from experiments.data.datasets import open_images
from experiments.errors import CheckpointError, ConfigError, SavedAndStopped, TrainingFailed
from experiments.files import write_atomically
from experiments.provenance import Records, provenance
from experiments.study.measures import measure
from experiments.study.plan import Study, Variant
from experiments.study.records import StudyRecord, same_training, study_records
from experiments.study.variants import rules_of
from experiments.training.distributed import joined_world
from experiments.training.evaluation import Evaluation
from experiments.training.metrics import CLOCK_VALUES, mean_of_rows, read_metrics
from experiments.training.run import Run
from experiments.training.stopping import StopRequests

if TYPE_CHECKING:
    from rich.progress import TaskID

_CLOCK_FILE = "study_clock.json"
_NOT_STATISTICS = {"split", "epoch", "step", "steps", "lr", *CLOCK_VALUES}
_SECONDS_BETWEEN_LOOKS = 0.5
# torchrun ends its processes by these, so that they save; Slurm's SIGUSR1 is not among its own
_STOP_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True)
class Training:
    """One variant with one seed."""

    variant: Variant
    seed: int
    config: RunConfig
    folder: Path
    """The run folder."""
    identity: str
    """A hash of what the result depends on."""

    @property
    def name(self) -> str:
        """As the command line names it."""
        return f"{self.variant.name}/{self.seed}"

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.folder / "log.txt"


@dataclass(frozen=True)
class Runner:
    """Trains a study and keeps its records.

    Attributes:
        study: what is trained.
        command: words behind `python` to which `--run NAME/SEED` is added to train one alone.
        places: options of the command that say where files go; records leave them out.
        overrides: keys of every config -> text, as on a command line.
        runs: folder of the run folders.
        results: folder of the records.
        threads: of each training, or None to leave them to torch.
        processes: of each training, started by torchrun if more than one.
        finished: called after each training.
    """

    study: Study
    command: Sequence[str]
    places: Sequence[str]
    overrides: Mapping[str, str]
    runs: Path
    results: Path
    threads: int | None = 1
    processes: int = 1
    finished: Callable[[], object] = lambda: None

    @property
    def records(self) -> Records[StudyRecord]:
        """The records of the study."""
        return study_records(self.results, self.study.name)

    def trainings(self) -> list[Training]:
        """All of the study, seed by seed."""
        return [self._training(variant, seed) for variant, seed in self.study.runs()]

    def missing(self) -> list[Training]:
        """The trainings without a record, after taking over those that another study has done.

        Raises:
            ConfigError: there is a record of one of the variants with other settings.
        """
        records = self.records.read()
        for record in records:
            variant = self.study.variants.get(record.variant)
            if variant and record.identity != self._training(variant, record.seed).identity:
                raise ConfigError(
                    f"{self.records.path}: holds {record.variant}/{record.seed} with other "
                    f"settings than {variant.file} and the command line say now; remove its line "
                    "to train it anew, or give another --results"
                )
        done = {f"{record.variant}/{record.seed}" for record in records}
        return [t for t in self.trainings() if t.name not in done and not self._take(t)]

    def train(self, jobs: int, requests: StopRequests) -> None:
        """Train all that is missing, `jobs` at a time; each keeps its own record at its end.

        Raises:
            ConfigError: as `missing`, before anything is trained.
            TrainingFailed: a training failed; those that run beside it are finished, no other is
                started.
            SavedAndStopped: asked to stop; the trainings that ran have saved themselves.
        """
        waiting = self.missing()
        total, failed = len(self.trainings()), None
        done = total - len(waiting)
        running: dict[subprocess.Popen[bytes], Training] = {}
        logs = f"; each keeps a log, {self.runs}/NAME/seedN/log.txt" if waiting else ""
        print(f"{self.study.name}: {done} of {total} trainings are done{logs}", flush=True)
        with _bars() as show:
            while running or (waiting and failed is None):
                if requests.reason is not None:
                    self._stop(running, requests.reason)
                while waiting and failed is None and len(running) < jobs:
                    training = waiting.pop(0)
                    running[self._start(training)] = training
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                for process in [p for p in running if p.poll() is not None]:
                    training = running.pop(process)
                    key = (training.variant.name, training.seed)
                    found = [r for r in self.records.read() if (r.variant, r.seed) == key]
                    if process.returncode == 0 and found:
                        done += 1
                        measured = f"{found[0].top1:.2f}% in {found[0].seconds:.0f} s"
                        print(f"{training.name}: {measured} ({done} of {total})", flush=True)
                        self.finished()
                    else:
                        failed = failed or _failure(training, process.returncode)
                show(running.values())
        if failed is not None:
            raise failed

    def train_one(self, name: str, requests: StopRequests) -> None:
        """Train one variant with one seed in this process, and keep its record.

        Raises:
            ConfigError: there is no such training.
            UserError, TrainingStopped, SavedAndStopped: as `Run.fit`.
        """
        trainings = {training.name: training for training in self.trainings()}
        if name not in trainings:
            allowed = f"NAME/SEED with a name of {', '.join(self.study.variants)}"
            if name.rpartition("/")[0] in self.study.variants:
                allowed = f"a seed of {', '.join(map(str, self.study.seeds))}"
            raise ConfigError(f"command line: --run: got {name!r}; allowed: {allowed}")
        training = trainings[name]
        config, rules = training.config, rules_of(training.variant.substitutions)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with joined_world(config.device, config.timeout_minutes) as world:
            with _clock(training.folder) if world.is_main else nullcontext():
                run = Run(config, world, rules, self._command(training, self.places))
                run.fit(requests)
                result = self._test(run) if world.is_main else None
            if world.is_main:
                record = self._recorded(training, run, result)
                self.records.keep(record)
                print(f"{name}: {record.top1:.2f}%, kept in {self.records.path}", flush=True)

    def _training(self, variant: Variant, seed: int) -> Training:
        folder = self.runs / variant.folder / f"seed{seed}"
        config = self.study.config(variant, seed, self.overrides, folder)
        identity = self.study.identity(variant, seed, self.overrides)
        return Training(variant, seed, config, folder, identity)

    def _take(self, training: Training) -> bool:
        found = same_training(self.results, self.study.name, training.identity)
        if found is None:
            return False
        changed = {
            "study": self.study.name,
            "variant": training.variant.name,
            "differences": self.study.differences(training.variant),
            "taken_from": found.study,
        }
        self.records.keep(found.model_copy(update=changed))
        print(f"{training.name}: {found.top1:.2f}%, the same training as in {found.study}")
        return True

    def _words(self, training: Training) -> list[str]:
        """The command of one training alone, behind `python`."""
        words = [*self.command, "--run", training.name]
        if self.threads not in (None, 1):
            words += ["--threads", str(self.threads)]
        for key, value in self.overrides.items():
            words += [f"--{key}", value]
        return words

    def _command(self, training: Training, places: Sequence[str] = ()) -> str:
        return shlex.join(["python", *self._words(training), *places])

    def _start(self, training: Training) -> "subprocess.Popen[bytes]":
        words, environment = [*self._words(training), *self.places], dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        if self.processes > 1:
            environment.setdefault("PET_SIGNALS_TO_HANDLE", _STOP_SIGNALS)
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            torchrun += ["--nproc-per-node", str(self.processes)]
            torchrun += ["--max-restarts", environment.get("MAX_RESTARTS", "3")]
            assert words[0] == "-m"
            # after "--" torchrun does not take the training's --run for one of its own options
            words = [*torchrun, "-m", "--", *words[1:]]
        training.folder.mkdir(parents=True, exist_ok=True)
        with training.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def _stop(self, running: Mapping["subprocess.Popen[bytes]", Training], reason: str) -> None:
        """Have the running trainings save themselves, wait for them, and stop."""
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        names = ", ".join(training.name for training in running.values()) or "nothing"
        raise SavedAndStopped(
            f"{reason}: {names} was running and saved itself; the same command resumes"
        )

    def _test(self, run: Run) -> tuple[Evaluation, dict[str, float]] | None:
        """Measure the final weights on the test split, if the study has one."""
        if self.study.test_split is None:
            return None
        images = open_images(run.config.data, self.study.test_split)
        return measure(
            run.learner.model, images, run.batches.images, run.num_classes, run.world, run.config
        )

    def _recorded(
        self, training: Training, run: Run, tested: tuple[Evaluation, dict[str, float]] | None
    ) -> StudyRecord:
        """The record of a training that `Run.fit` has finished."""
        config, rows = training.config, read_metrics(training.folder)
        validation = [row for row in rows if row["split"] == "validation"]
        train = [row for row in rows if row["split"] == "train"]
        if not train or not validation or validation[-1]["epoch"] != config.schedule.total_epochs:
            raise CheckpointError(
                f"{training.folder}: metrics.jsonl lacks rows of the training, the last one's or "
                "all; remove the folder to train anew"
            )
        last, clock = validation[-1], _read_clock(training.folder)
        result, measures = tested or (
            Evaluation(last["top1"], last["top5"], last["loss"], run.val_batches.num_images),
            {},
        )
        by_epoch = {
            str(n): _statistics([row for row in train if row["epoch"] == n])
            for n in (row["epoch"] for row in validation)
        }
        command = self._command(training)
        return StudyRecord(
            study=self.study.name,
            variant=training.variant.name,
            seed=training.seed,
            differences=self.study.differences(training.variant),
            substitutions=list(training.variant.substitutions),
            top1=round(result.top1, 4),
            top5=round(result.top5, 4),
            loss=round(result.loss, 6),
            epochs=last["epoch"],
            steps=last["step"],
            train_images=run.batches.num_images,
            val_images=result.images,
            top1_by_epoch={str(row["epoch"]): round(row["top1"], 4) for row in validation},
            statistics=by_epoch[str(last["epoch"])],
            statistics_by_epoch={**by_epoch, "all": _statistics(train)},
            measures={name: round(value, 6) for name, value in measures.items()},
            seconds=round(clock["seconds"], 1),
            cpu_seconds=round(clock["cpu_seconds"], 1),
            parts=clock["parts"],
            images_per_second=round(
                config.data.batch_size / statistics.median(row["step_seconds"] for row in train), 1
            ),
            identity=training.identity,
            overrides=dict(self.overrides),
            command=command if self.processes == 1 else f"NPROC={self.processes} {command}",
            **provenance(run.world.device),
        )


def _statistics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means of what was measured in training steps."""
    means = mean_of_rows(rows)
    return {n: round(means[n], 6) for n in sorted(means) if n not in _NOT_STATISTICS}


def _failure(training: Training, code: int) -> SavedAndStopped | TrainingFailed:
    """What to tell of a process that has ended without a record."""
    if code in (0, SavedAndStopped.exit_code):  # 0 is torchrun's if its processes have saved
        return SavedAndStopped(
            f"{training.name} was asked to stop and saved itself; the same command resumes"
        )
    return TrainingFailed(
        f"{training.name} ended with status {code}, see {training.log}; the same command resumes "
        "from its last checkpoint",
        code,
    )


@contextmanager
def _bars() -> Iterator[Callable[[Iterable[Training]], None]]:
    """A bar with the time left for each running training, on a terminal alone."""
    if not sys.stdout.isatty():
        yield lambda running: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as progress:  # prints appear above the bars
        tasks: dict[str, TaskID] = {}

        def show(running: Iterable[Training]) -> None:
            trainings = {training.name: training for training in running}
            for name in tasks.keys() - trainings.keys():
                progress.remove_task(tasks.pop(name))
            for name, training in trainings.items():
                if name not in tasks:
                    epochs = training.config.schedule.total_epochs
                    tasks[name] = progress.add_task(name, total=epochs)
                rows = read_metrics(training.folder)
                progress.update(tasks[name], completed=rows[-1]["epoch"] if rows else 0)

        yield show


@contextmanager
def _clock(folder: Path) -> Iterator[None]:
    """Add the time of the block to the time of earlier parts of the same training."""
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
    """Of this process and of its children that have ended, such as loader processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _read_clock(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / _CLOCK_FILE).read_text())
    except (OSError, ValueError):
        content = {}
    return {"seconds": 0.0, "cpu_seconds": 0.0, "parts": 0, **content}
