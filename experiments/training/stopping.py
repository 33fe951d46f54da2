"""What ends a training early: a request to save and stop, or a fault from outside."""

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from experiments.config import DataConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_SECONDS = 1.0
"""A scheduler and torchrun may both send a signal: so close together, they count as one request."""
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class StopRequests:
    """Notes signals while its block lasts: the first asks to stop, a later one ends the process.

    Args:
        max_minutes: how long the run may take, counted from here; None is without limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._minutes = max_minutes
        self._start = time.monotonic()
        self._signal: signal.Signals | None = None
        self._signal_time = 0.0

    @property
    def reason(self) -> str | None:
        """What asked the run to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._minutes is not None and time.monotonic() >= self._start + 60 * self._minutes:
            return f"--max-minutes {self._minutes:g}"
        return None

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signal_time = signal.Signals(number), now
        elif now - self._signal_time > _SAME_REQUEST_SECONDS:
            os._exit(128 + number)


def explain_fault(error: BaseException, data: DataConfig, images_per_pass: int) -> str | None:
    """Say what happened and one way out, or None where the error is the program's own.

    Args:
        error: what ended the training.
        data: of the run's config.
        images_per_pass: images of one forward pass in training.
    """
    said = str(error).strip().partition("\n")[0][:200].rstrip(" .")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory ({said}); a smaller data.micro_batch (now {images_per_pass}) trains "
            "the same batch in more parts, a smaller data.eval_batch_size (now "
            f"{data.eval_batch_size or data.batch_size}) evaluates in more"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in said:
        return (
            f"a data-loader process was killed ({said}), most often by the kernel for want of "
            f"memory; fewer of them need less (data.workers, now {data.workers})"
        )
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    return None


@contextmanager
def loader_deaths_ignored() -> Iterator[None]:
    """Ignore the death of further loader processes: torch's handler raises in any statement."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handle_child_end(signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # None: not Python's handler, so it raises nothing
            signal.signal(signal.SIGCHLD, before)


def _handle_child_end(handler: signal.Handlers) -> Any:
    """Set the handler of SIGCHLD, again where the news of another death interrupts that."""
    while True:
        try:
            return signal.signal(signal.SIGCHLD, handler)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
