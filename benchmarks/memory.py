"""Memory that an action needs beyond what is there before it, as the operating system counts it.

A process of its own takes the action twice to warm up, has the kernel forget the high-water mark of
its resident memory, takes the action once more and reads the mark. That counts everything: tensors,
NumPy's arrays and what a solver allocates for itself, and the result. Large blocks of the C
library's allocator go straight back to the kernel there (otherwise a warmed-up process would find
its temporaries ready and seem to need none). What is counted are pages: about 0.2 MiB is noise.
"""

import gc
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ALLOCATOR = {
    # blocks from 64 KiB on are mapped one by one, and unmapped when they are freed
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
_REPETITIONS = 3


def peak_extra_bytes(make_action: Callable[..., Callable[[], object]], *args: Any) -> int | None:
    """The high-water mark of an action, in bytes, the median of three; None where it is not told.

    Args:
        make_action: makes the action in the other process, from `args`; a module's function.
        args: for it; what can be pickled.
    """
    if not _CLEAR.exists():
        return None  # not Linux
    context = multiprocessing.get_context("spawn")
    with _environment(_ALLOCATOR):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_measure, args=(sender, make_action, args))
        process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that measures memory ended with code {process.exitcode}"
        ) from None
    process.join()
    return int(found)


def _measure(sender: Any, make_action: Callable[..., Callable[[], object]], args: Any) -> None:
    action = make_action(*args)
    action()
    action()
    sender.send(int(statistics.median(_one(action) for _ in range(_REPETITIONS))))


def _one(action: Callable[[], object]) -> int:
    gc.collect()
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    result = action()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
