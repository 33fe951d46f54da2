"""Files that are whole or not there at all, and locks that end with their process."""

import errno
import fcntl
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

_TEMPORARY = ".tmp"


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it, and nothing that has no end or that waits for a writer.

    Raises:
        OSError: it cannot be opened, or is a pipe, a socket or a device.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # a pipe would be waited for
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return file


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    The content goes to a temporary file of the same folder, and to the disk, before it gets its
    name.
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
    _flush_folder(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """`atomic_file` for content that is in memory already."""
    with atomic_file(path) as file:
        file.write(content)


def remove_half_written(folder: Path) -> None:
    """Remove the temporary files that crashes left in a folder, in which nobody writes now."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Only one process at a time works on a path; the others wait, and a crash sets it free.

    Args:
        path: a file, which need not exist; its folder must.
        on_wait: called once where another process works on it.
    """
    guard = path.with_name(f".{path.name}.lock")
    descriptor = _open_locked(guard, on_wait)
    try:
        yield
    finally:
        guard.unlink(missing_ok=True)  # first, so that nobody finds it and waits for nothing
        os.close(descriptor)


def _open_locked(guard: Path, on_wait: Callable[[], object]) -> int:
    told = False
    while True:
        descriptor = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    on_wait()
                told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # who was first has taken the guard away: then another one may already be in its place
            if _is_named(descriptor, guard):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _leave_to_the_parent() -> None:
    """Close what a forked process, such as a data loader's, has of the locks.

    It may outlive the process that holds them by seconds, and would keep others out as long.
    """
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


class Occupied(Exception):
    """Another process holds a lock file; says which."""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file for as long as the block lasts; the kernel sets it free after a crash.

    Raises:
        Occupied: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            raise Occupied(holder or "another process") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        if descriptor in _held:  # not in a forked process, which has closed it
            _held.remove(descriptor)
            os.close(descriptor)
