"""The folder of a run: its lock, its checkpoints and how a run resumes from them, its heartbeat."""

import errno
import json
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import torch

from experiments import provenance
from experiments.checkpoint import (
    copied,
    load_checkpoint,
    refuse_changed_config,
    save_checkpoint,
)
from experiments.config.reading import build_config, settings_of
from experiments.config.schema import RunConfig, as_plain
from experiments.data.loading import TrainBatches
from experiments.errors import CheckpointError, ConfigError, UserError
from experiments.files import remove_half_written, write_atomically
from experiments.strict_yaml import yaml_text
from experiments.training.distributed import World
from experiments.training.metrics import METRICS_FILE, Progress, RunningStatistics, read_metrics
from experiments.training.step import Learner

CHECKPOINT_FOLDER = "checkpoints"
CONFIG_FILE = "config.yaml"
FINAL_WEIGHTS = "final.safetensors"
HEARTBEAT_FILE = "heartbeat.json"
README_FILE = "README.md"
_BEST = "best.pt"
_LOCK = ".lock"
_ABOUT = (
    "A training of {} on {}, {}, {} epochs, begun or resumed {}.\n\n`{}`, called in {}, goes on "
    f"from the newest checkpoint; `{FINAL_WEIGHTS}` is there when all is done.\n"
)
_OURS = re.compile(re.escape(_ABOUT).replace(r"\{\}", ".+"))
_NUMBERED = re.compile(r"step-(\d{8,})\.pt")
_SECONDS_BETWEEN_HEARTBEATS = 10.0


class RunFolder:
    """One run's files. The main process alone writes them.

    A checkpoint is copied at once and written by a thread, one at a time, while the run goes on.
    What goes wrong there is raised in the main thread by the next `beat`, `settle` or save.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINT_FOLDER
        self.final_weights = path / FINAL_WEIGHTS
        self._next_beat = 0.0
        self._thread: ThreadPoolExecutor
        self._underway: Future[None] | None = None
        self._copy: dict[str, Any] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep other writers out of it; a crash releases the lock.

        At the end the thread finishes what it writes.

        Raises:
            ConfigError: another process writes there, or it cannot be written.
        """
        path = self.path / _LOCK
        # the kernel's lock or none: a soft one would outlive a crash
        lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
        with self.refuse_unwritable():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                holder = path.read_text().strip() or "another process"
                raise ConfigError(
                    f"output: the run folder {self.path} is in use by {holder}; wait for it, stop "
                    "it, or choose another --output"
                ) from None
        try:
            with self.refuse_unwritable():
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
                for folder in (self.path, self.checkpoints):
                    remove_half_written(folder)
            with ThreadPoolExecutor(1, "checkpoints") as self._thread:
                yield
        finally:
            lock.release()

    @contextmanager
    def refuse_unwritable(self) -> Iterator[None]:
        """Turn what the file system refuses at the start of a run into a ConfigError."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"output: cannot write the run folder {self.path}: {error.strerror}"
            ) from None

    def refuse_unwritable_place(self) -> None:
        """Refuse a folder that could not be made or written, without making it.

        Raises:
            ConfigError: a file is in its way, or the rights do not suffice.
        """
        folders = (self.checkpoints, self.path, *self.path.absolute().parents)
        nearest = next(folder for folder in folders if os.path.lexists(folder))
        with self.refuse_unwritable():
            if not nearest.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(nearest, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def begin(self, config: RunConfig, command: str | None = None) -> None:
        """Write the config, and remove the final weights of fewer epochs: they say "done".

        The README is written too, unless a person has written another.

        Args:
            config: of the run.
            command: what resumes the run; by default `experiments.train` with its config.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self.refuse_unwritable():
            self.final_weights.unlink(missing_ok=True)
            text = yaml_text(as_plain(config))
            write_atomically(self.path / CONFIG_FILE, text.encode())
            readme = self.path / README_FILE
            if not readme.exists() or _OURS.fullmatch(readme.read_text(errors="replace")):
                write_atomically(readme, self._about(config, command).encode())

    def refuse_lost_checkpoints(self, every: int) -> None:
        """Refuse to begin where a run has been whose checkpoints are gone.

        A run that was killed before its first checkpoint may begin again. The second one is written
        only when the first is on the disk, so rows of a later epoch tell that there was one.

        Args:
            every: epochs from one checkpoint to the next.

        Raises:
            ConfigError: there are final weights, or metrics of more than two such times.
        """
        rows = read_metrics(self.path)
        epoch = rows[-1]["epoch"] if rows else 0
        if self.final_weights.exists():
            there = FINAL_WEIGHTS
        elif epoch > 2 * every:
            there = f"{METRICS_FILE} up to epoch {epoch}"
        else:
            return
        raise ConfigError(
            f"output: the run folder {self.path} holds {there}, but no checkpoint to resume from "
            f"in {self.checkpoints}: put one back or, to begin anew, remove the run folder or "
            "choose another --output"
        )

    def _about(self, config: RunConfig, command: str | None) -> str:
        """Two lines for those who find the folder: what it is, and which command goes on."""
        with_what = [name for name in ("horizontal", "vertical") if getattr(config, name)]
        train = ["python", "-m", "experiments.train", "--config", str(self.path / CONFIG_FILE)]
        return _ABOUT.format(
            config.model.name,
            config.data.dataset,
            f"{' and '.join(with_what)} TokenMixup" if with_what else "plain",
            config.schedule.total_epochs,
            provenance.now(),
            command or shlex.join(train),
            Path.cwd(),
        )

    def saved(self) -> list[Path]:
        """The checkpoints to resume from, the newest first."""
        found = [
            path for path in self.checkpoints.glob("step-*.pt") if _NUMBERED.fullmatch(path.name)
        ]
        return sorted(found, key=_step_of, reverse=True)

    def last_good(self) -> str:
        """Name the newest checkpoint in a message, that being written included if it succeeds."""
        if self._underway is not None:
            wait([self._underway])
        saved = self.saved()
        return f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"

    def newest(
        self, world: World, warn: Callable[[str], object], set_aside: bool
    ) -> tuple[Path, dict[str, Any]] | None:
        """Read the newest undamaged checkpoint, the same in all processes; None without any.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        found = self.newest_valid(warn, set_aside) if world.is_main else None
        step = world.from_main(-1 if found is None else _step_of(found[0]))
        if found is not None or step < 0:
            return found
        path = self._numbered(step)
        return path, load_checkpoint(path)

    def newest_valid(
        self, warn: Callable[[str], object], set_aside: bool
    ) -> tuple[Path, dict[str, Any]] | None:
        """Read the newest undamaged checkpoint; None without any.

        Damaged ones are named in warnings and set aside under another name, unless `set_aside` is
        False; nothing is deleted.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for path in self.saved():
            try:
                content = load_checkpoint(path)
            except CheckpointError as error:
                damaged.append((path, str(error)))
                continue
            for newer, reason in damaged:
                if not set_aside:
                    warn(reason)
                    continue
                warn(f"{reason}; it is set aside as *.damaged")
                newer.rename(newer.with_name(newer.name + ".damaged"))
            if damaged:
                warn(f"resuming from the one before: {path}")
            return path, content
        if damaged:
            raise CheckpointError(
                f"{damaged[0][1]}; all checkpoints of {self.checkpoints} are damaged: to begin "
                "anew, remove the run folder or choose another --output"
            )
        return None

    def save(self, step: int, content: dict[str, Any], keep: int) -> None:
        """Begin to write a checkpoint; of those up to it, the newest `keep` stay."""

        def remove_older() -> None:
            older = [path for path in self.saved() if _step_of(path) <= step]
            for path in older[keep:]:
                path.unlink(missing_ok=True)

        self._begin_to_write(self._numbered(step), content, remove_older)

    def save_best(self, content: dict[str, Any]) -> None:
        """Begin to write the checkpoint of the best validation."""
        self._begin_to_write(self.checkpoints / _BEST, content, lambda: None)

    def settle(self) -> None:
        """Wait until what is being written is on the disk, and raise what went wrong there."""
        underway, self._underway = self._underway, None
        if underway is not None:
            underway.result()

    def _begin_to_write(
        self, path: Path, content: dict[str, Any], finish: Callable[[], object]
    ) -> None:
        self.settle()  # and the memory of the last copy is free
        copy = copied(content, self._copy)
        self._copy |= copy

        def write() -> None:
            save_checkpoint(path, copy)
            finish()

        self._underway = self._thread.submit(write)

    def beat(self, state: str, progress: Progress, at_once: bool = False) -> None:
        """Write the heartbeat, at most every ten seconds unless `at_once`."""
        if self._underway is not None and self._underway.done():
            self.settle()
        now = time.monotonic()
        if now < self._next_beat and not at_once:
            return
        self._next_beat = now + _SECONDS_BETWEEN_HEARTBEATS
        content = {
            "time": provenance.now(),
            "state": state,
            "epochs_done": progress.epochs_done,
            "step": progress.step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        write_atomically(self.path / HEARTBEAT_FILE, (json.dumps(content) + "\n").encode())

    def _numbered(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"


def _step_of(path: Path) -> int:
    name = _NUMBERED.fullmatch(path.name)
    assert name is not None, path
    return int(name[1])


def captured(
    learner: Learner, batches: TrainBatches, progress: Progress, statistics: RunningStatistics
) -> dict[str, Any] | None:
    """The state of all processes for a checkpoint, in the main one; every process calls it."""
    # no state of random generators: each step and each sample seeds its own
    own = {"statistics": statistics.state_dict(), "bad_images": list(batches.bad_images)}
    processes = learner.world.gather(own)
    if not learner.world.is_main:
        return None
    return {
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "progress": asdict(progress),
        "data": _data_facts(batches),
        "processes": processes,
        "config": as_plain(learner.config),
        "versions": _versions(),
    }


def restore(
    saved: tuple[Path, dict[str, Any]],
    learner: Learner,
    batches: TrainBatches,
    statistics: RunningStatistics,
    allow_changed: Collection[str],
    warn: Callable[[str], object],
) -> Progress:
    """Put the state of a checkpoint into the parts of a run; gives how far it had come.

    Keys of the config in `allow_changed` may differ; `warn` is told what does, and which versions.

    Raises:
        ConfigError: it is of another experiment.
        CheckpointError: it does not fit the model or the optimiser.
    """
    path, content = saved
    try:
        # read as a file is, so that one of an earlier version means what it meant
        before = as_plain(build_config(settings_of(content["config"], str(path)), str(path)))
        now = as_plain(learner.config)
        for text in refuse_changed_config(path, before, now, allow_changed):
            warn(f"resuming with another config: {text}")
        if text := _changed_versions(content["versions"]):
            warn(f"resuming with other versions: {text}; results may differ from here on")
        if content["data"] != _data_facts(batches):
            before, after = (_listed(facts) for facts in (content["data"], _data_facts(batches)))
            raise ConfigError(
                f"{path}: that run had {before}, and now there are {after}: the order of the "
                "images would be another, so it cannot be resumed"
            )
        learner.model.load_state_dict(content["model"])
        _restore_optimizer(learner.optimizer, content["optimizer"], allow_changed)
        if content["scaler"]:  # empty without fp16: a run that changes to it begins a new scale
            learner.scaler.load_state_dict(content["scaler"])
        _restore_process(content["processes"], learner, batches, statistics, warn)
        return Progress(**content["progress"])
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as err:
        # whatever is wrong in a checkpoint that another program or model wrote
        reason = " ".join(f"{type(err).__name__} {err}".split())
        raise CheckpointError(
            f"{path}: does not hold the state of this run's model and optimiser: {reason[:300]}"
        ) from None


def _versions() -> dict[str, str]:
    # torch's own version names its build, as cpu or cu128, which the package's may lack
    return {**provenance.versions(), "torch": str(torch.__version__)}


def _changed_versions(saved: dict[str, str]) -> str:
    """The packages whose versions differ; older checkpoints list fewer, and tell of those alone."""
    now = _versions()
    texts = {name: (before, now.get(name, "not installed")) for name, before in saved.items()}
    return ", ".join(f"{name} {b} there, {n} now" for name, (b, n) in texts.items() if b != n)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], allow_changed: Collection[str]
) -> None:
    """Load the state; this device's implementation and settings that may change stay."""
    groups = [dict(group) for group in optimizer.param_groups]
    for saved, here in zip(state["param_groups"], groups, strict=False):
        # before it is loaded, since fused decides where torch puts the state
        saved.update({name: here[name] for name in ("fused", "foreach") if name in here})
    optimizer.load_state_dict(state)
    for key in allow_changed:
        section, _, name = key.partition(".")
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            if section == "optimizer" and name in wanted:
                group[name] = wanted[name]


def _restore_process(
    processes: list[dict[str, Any]],
    learner: Learner,
    batches: TrainBatches,
    statistics: RunningStatistics,
    warn: Callable[[str], object],
) -> None:
    """Take on what the checkpoint holds of each single process."""
    world = learner.world
    if len(processes) == world.size:
        own = processes[world.rank]
        statistics.load_state_dicts([own["statistics"]])
        batches.bad_images = dict.fromkeys(own["bad_images"])
        return
    if learner.config.data.micro_batch is None:
        kept = (
            "each computes its share of the batch at once (data.micro_batch: null), so Mixup, "
            "dropout and HTM partners differ from here on; the order of the images and their "
            "augmentation stay the same"
        )
    else:
        kept = (
            "order, augmentation, Mixup, dropout and HTM partners stay the same; sums over the "
            "batch are taken in another order, so weights agree up to rounding"
        )
    warn(f"the run so far had {len(processes)} processes, now {world.size}: {kept}")
    statistics.load_state_dicts([each["statistics"] for each in processes], world.size)
    batches.bad_images = dict.fromkeys(
        problem for each in processes for problem in each["bad_images"]
    )


def _data_facts(batches: TrainBatches) -> dict[str, int]:
    """What the order of the images depends on, besides the seed."""
    return {"images": batches.num_images, "steps per epoch": batches.steps_per_epoch}


def _listed(facts: dict[str, int]) -> str:
    return " and ".join(f"{number} {name}" for name, number in facts.items())
