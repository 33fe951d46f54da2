"""Hashes of weights, recorded in a lock file beside them and checked at every later use."""

import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from experiments.errors import CheckpointError
from experiments.exclusive import exclusive
from experiments.files import write_atomically

LOCK_FILE = "zoo.lock.yaml"
_HEAD = """\
# Hashes of the weights in this folder, each recorded when the file first came, because the zoo's
# manifest does not know it. Every later use checks them. To accept another file in place of one
# named here, delete its entry.
"""


@dataclass(frozen=True)
class Recorded:
    """What is known of a file since it first came."""

    sha256: str
    size: int
    source: str
    recorded: str
    """UTC, ISO 8601."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror}") from None


def read_lock(folder: Path) -> dict[str, Recorded]:
    """The recorded hashes of a folder of weights: file name -> what is known of it.

    Raises:
        CheckpointError: the lock file is damaged. It is never repaired: it is what tells a
            replaced file from the right one.
    """
    path = folder / LOCK_FILE
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot read the recorded hashes: {error}") from None
    try:
        return {str(name): Recorded(**entry) for name, entry in (content or {}).items()}
    except (AttributeError, TypeError):
        raise CheckpointError(
            f"{path}: is damaged; allowed: file names with sha256, size, source and recorded"
        ) from None


def record_hash(path: Path, source: str) -> Recorded:
    """Hash a file and note it in the lock file beside it."""
    entry = Recorded(
        sha256=file_hash(path),
        size=path.stat().st_size,
        source=source,
        recorded=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    folder = path.parent
    with exclusive(folder / LOCK_FILE):
        entries = {**read_lock(folder), path.name: entry}
        plain = {name: asdict(entries[name]) for name in sorted(entries)}
        text = _HEAD + yaml.safe_dump(plain, sort_keys=False)
        write_atomically(folder / LOCK_FILE, text.encode())
    return entry


def refuse_changed(path: Path) -> None:
    """Raise a CheckpointError where a file is not the one whose hash was recorded."""
    entry = read_lock(path.parent).get(path.name)
    if entry is not None:
        refuse_wrong_hash(path, entry.sha256, f"recorded in {path.parent / LOCK_FILE}")


def refuse_wrong_hash(path: Path, expected: str, where: str) -> None:
    """Raise a CheckpointError where a file's hash is another one than `where` says."""
    found = file_hash(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: is not the file that it should be: its SHA-256 is {found}, expected "
            f"{expected} ({where})"
        )
