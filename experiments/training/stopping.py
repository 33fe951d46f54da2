"""What ends a training early: a request to save and stop, or a fault from outside."""

import errno
import os
import signal
import time
from types import FrameType

import torch

from experiments.config.schema import RunConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAME_REQUEST_SECONDS = 1.0
"""A scheduler and torchrun may both send a signal: so close together, they count as one request."""
_COMPILER = ("torch._dynamo.", "torch._inductor.")
"""Modules of torch.compile's own errors; others it hands on as they are."""
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


def explain_fault(error: BaseException, config: RunConfig, images_per_pass: int) -> str | None:
    """Say what happened and one way out, or None where the error is the program's own."""
    data = config.data
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
    if type(error).__module__.startswith(_COMPILER):
        return (
            f"torch.compile failed ({said}); --compile off (now {config.compile}) trains the same "
            "model without it"
        )
    if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    return None
