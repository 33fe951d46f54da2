"""Atomic writes, and locks that a crash releases."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from filelock import FileLock, Timeout

_TEMPORARY = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    The content goes to a temporary file in the same folder and is flushed to disk before the file
    gets its name.
    """
    descriptor, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY
    )
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it unreadable for others
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, must survive a power failure
    finally:
        os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """`atomic_file` for content that is already in memory."""
    with atomic_file(path) as file:
        file.write(content)


def remove_half_written(folder: Path) -> None:
    """Remove the temporary files that crashes left in a folder that has no writer now."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let one process at a time work on a path; the others wait.

    Args:
        path: a file, which need not exist; its folder must.
        on_wait: called once if another process holds the lock.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        # while the lock is held: a process that waits for this file notices that it is gone
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
