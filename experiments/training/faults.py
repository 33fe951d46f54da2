"""What ends a training from outside, told so that a person knows what to do."""

import errno
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from experiments.config import RunConfig
from experiments.data.loading import Division
from experiments.errors import LoaderProcessLost

_KILLED_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)")
_T = TypeVar("_T")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def further_deaths_unheard() -> Iterator[None]:
    """Keep the death of another loader process out of what is said about the first.

    torch's handler raises in whatever the main thread does when a loader process ends.
    """
    before = _despite_deaths(lambda: signal.getsignal(signal.SIGCHLD))
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or before is None:  # None: not Python's, so it raises nothing
        yield
        return
    _despite_deaths(lambda: signal.signal(signal.SIGCHLD, signal.SIG_DFL))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _despite_deaths(call: Callable[[], _T]) -> _T:
    """Make a call once more wherever the news of a loader process's death came in between."""
    while True:
        try:
            return call()
        except RuntimeError as error:
            if not _KILLED_WORKER.search(str(error)):
                raise


def explain(
    error: BaseException,
    config: RunConfig,
    division: Division,
    evaluating: bool,
    saved: bool = False,
) -> str | None:
    """Say what happened and what to do, or None where it is no fault from outside.

    Args:
        error: what ended the training.
        config: of the run.
        division: of its batches.
        evaluating: whether it happened in the evaluation.
        saved: whether there is a checkpoint that another command would go on from.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return _out_of_memory(text, config, division, evaluating, saved)
    if isinstance(error, LoaderProcessLost):
        return _loader_process_ended("a data-loader process", text, config)
    if isinstance(error, RuntimeError) and (killed := _KILLED_WORKER.search(text)):
        return _loader_process_ended(f"data-loader process {killed[1]}", killed[2], config)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}"
    return None


def _loader_process_ended(which: str, said: str, config: RunConfig) -> str:
    return (
        f"{which} was ended from outside ({said.strip(' .')}), most often by the kernel for want "
        f"of memory: fewer of them need less (data.workers, now {config.data.workers})"
    )


def _out_of_memory(
    text: str, config: RunConfig, division: Division, evaluating: bool, saved: bool
) -> str:
    said = text.strip().splitlines()[0][:200]
    if evaluating:
        size = config.data.eval_batch_size or config.data.batch_size
        return (
            f"out of memory in evaluation, at {size} images a batch in {config.eval_precision} "
            f"({said}); try --data.eval_batch_size {max(1, size // 2)}"
        )
    size = division.micro_batch
    line = (
        f"out of memory, at {size} images a forward pass (data.batch_size "
        f"{config.data.batch_size}) in {config.precision} ({said})"
    )
    smaller = _next_smaller(config, division)
    if smaller is None:
        return f"{line}; a smaller model, smaller images or a lower precision need less"
    goes_on = " --allow-changed data.micro_batch" if saved else ""
    line += (
        f"; try --data.micro_batch {smaller}{goes_on}, which computes the same batch in "
        f"{config.data.batch_size // smaller} parts one after another"
    )
    if config.horizontal is not None:
        line += " (HTM finds partners within a part)"
    return line


def _next_smaller(config: RunConfig, division: Division) -> int | None:
    """The largest forward pass of at most half the images that the batch can be divided into."""
    processes = config.data.batch_size // (division.micro_batch * division.count)
    even = 2 if config.mixup.active else 1
    for size in range(division.micro_batch // 2, 0, -1):
        if config.data.batch_size % (size * processes) == 0 and size % even == 0:
            return size
    return None
