"""Files that are whole or not there at all."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
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
