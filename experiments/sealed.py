"""Files of torch.save that carry their own checksum, so that any damage to them is noticed.

The SHA-256 of the file stands in the comment at its end, which the zip format provides: such a file
stays one that torch.load reads, under any name and wherever it is copied.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from experiments.errors import CheckpointError
from experiments.files import atomic_file

_LABEL = b"sha256:"
_COMMENT_LENGTH = len(_LABEL) + 2 * hashlib.sha256().digest_size


def save_sealed(path: Path, content: Any) -> None:
    """Write `content` with its checksum, atomically."""
    with atomic_file(path) as file:
        _save(content, file)
        # a zip file without a comment ends in the length of it, two bytes
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_LENGTH.to_bytes(2, "little"))
        digest = _digest(file, file.tell())
        file.write(_LABEL + digest)


def refuse_damaged(path: Path) -> None:
    """Raise a CheckpointError unless the file is what `save_sealed` wrote, to the last bit."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END) - _COMMENT_LENGTH
            file.seek(max(length, 0))
            comment = file.read()
            whole = comment.startswith(_LABEL) and length > 0
            if whole and comment == _LABEL + _digest(file, length):
                return
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror}") from None
    reason = "its content does not match its checksum" if whole else "its end is missing"
    raise CheckpointError(f"{path}: is damaged or cut off: {reason}")


def _save(content: Any, file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # where the file cannot be written, torch's closing of its archive hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _digest(file: BinaryIO, length: int) -> bytes:
    """SHA-256 of the first bytes of a file, in hexadecimal; the file stands after them then."""
    digest = hashlib.sha256()
    file.seek(0)
    while length:
        block = file.read(min(length, 1 << 20))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()
