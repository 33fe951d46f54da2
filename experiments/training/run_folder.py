"""The folder of a run: whose it is, its checkpoints, its heartbeat, where everything lies in it."""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.errors import CheckpointError, ConfigError
from experiments.files import Occupied, held, remove_half_written, write_atomically

CHECKPOINT_FOLDER = "checkpoints"
CONFIG_FILE = "config.yaml"
FINAL_WEIGHTS = "final.safetensors"
HEARTBEAT_FILE = "heartbeat.json"
_BEST = "best.pt"
_LOCK = ".lock"
_NUMBERED = re.compile(r"step-(\d{8,})\.pt")
_SECONDS_BETWEEN_HEARTBEATS = 10.0


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint that was read."""

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps before it."""
        return _step_of(self.path)


class RunFolder:
    """One run's files. The main process alone writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINT_FOLDER
        self.final_weights = path / FINAL_WEIGHTS
        self._next_beat = 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other processes out of it; a crash sets it free.

        Raises:
            ConfigError: another process works in it, or it cannot be written.
        """
        with ExitStack() as stack:
            try:
                with self.refuse_unwritable():
                    self.checkpoints.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(held(self.path / _LOCK))
                    for folder in (self.path, self.checkpoints):
                        remove_half_written(folder)
            except Occupied as error:
                raise ConfigError(
                    f"output: the run folder {self.path} is in use by {error}; wait for it, stop "
                    "it, or choose another --output"
                ) from None
            yield

    @contextmanager
    def refuse_unwritable(self) -> Iterator[None]:
        """Make a ConfigError of what the file system refuses at the start of a run."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"output: cannot write the run folder {self.path}: {error.strerror}"
            ) from None

    def saved(self) -> list[Path]:
        """The checkpoints to go on from, the newest first."""
        found = [
            path for path in self.checkpoints.glob("step-*.pt") if _NUMBERED.fullmatch(path.name)
        ]
        return sorted(found, key=_step_of, reverse=True)

    def newest_valid(self, tell: Callable[[str], object]) -> SavedRun | None:
        """Read the newest checkpoint that is not damaged.

        Damaged ones are told, and set aside under another name; nothing is deleted.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        for path in self.saved():
            try:
                content = load_checkpoint(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            for reason in damaged:
                tell(f"warning: {reason}; it is set aside as *.damaged")
            for newer in self.saved()[: len(damaged)]:
                newer.rename(newer.with_name(newer.name + ".damaged"))
            if damaged:
                tell(f"warning: going on from the one before: {path}")
            return SavedRun(path, content)
        if damaged:
            raise CheckpointError(
                f"{damaged[0]}; no checkpoint of {self.checkpoints} is whole: to begin anew, "
                "remove the run folder or choose another --output"
            )
        return None

    def load(self, step: int) -> SavedRun:
        """Read the checkpoint after a given step.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        path = self._numbered(step)
        return SavedRun(path, load_checkpoint(path))

    def save(self, step: int, content: dict[str, Any], keep: int) -> None:
        """Write a checkpoint; of those up to it, the newest `keep` stay."""
        save_checkpoint(self._numbered(step), content)
        older = [path for path in self.saved() if _step_of(path) <= step]
        for path in older[keep:]:
            path.unlink(missing_ok=True)

    def _numbered(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}.pt"

    def save_best(self, content: dict[str, Any]) -> None:
        """Write the checkpoint of the best validation."""
        save_checkpoint(self.checkpoints / _BEST, content)

    def save_config(self, text: str) -> None:
        """Write the config of the run.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self.refuse_unwritable():
            write_atomically(self.path / CONFIG_FILE, text.encode())

    def forget_final_weights(self) -> None:
        """Remove those of fewer epochs, since they tell that a run is done.

        Raises:
            ConfigError: the folder cannot be written.
        """
        with self.refuse_unwritable():
            self.final_weights.unlink(missing_ok=True)

    def beat(self, state: str, at_once: bool = False, **facts: int) -> None:
        """Write the heartbeat, at most every ten seconds unless it must be now."""
        now = time.monotonic()
        if now < self._next_beat and not at_once:
            return
        self._next_beat = now + _SECONDS_BETWEEN_HEARTBEATS
        content = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "state": state,
            **facts,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        write_atomically(self.path / HEARTBEAT_FILE, (json.dumps(content) + "\n").encode())


def _step_of(path: Path) -> int:
    name = _NUMBERED.fullmatch(path.name)
    assert name is not None, path
    return int(name[1])
