"""One process at a time at a file."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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
