"""The zoo's files on disk: fetched, recognised by their content, and checked by their hash."""

import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments import checkpoint as zoo_lock
from experiments.checkpoint import read_weights, recognise
from experiments.errors import CheckpointError, UserError
from experiments.files import exclusive
from experiments.zoo.download import discard, fetch, size_of
from experiments.zoo.drive import arrived, discard_drive, fetch_from_drive
from experiments.zoo.manifest import Checkpoint
from experiments.zoo.transfer import DiskError, Patience, TransferError, UnreachableError


class MissingFileError(UserError):
    """A checkpoint could not be fetched.

    Attributes:
        checkpoint: which one.
        reasons: what each source said.
        advice: lines for a person who wants to fetch it by hand.
    """

    def __init__(self, checkpoint: Checkpoint, reasons: list[str], advice: list[str]) -> None:
        super().__init__(f"{checkpoint.name}: {'; '.join(reasons)}")
        self.checkpoint = checkpoint
        self.reasons = reasons
        self.advice = advice


@dataclass(frozen=True)
class State:
    """What is known of a checkpoint's file.

    Attributes:
        present: whether the file is there.
        verified: whether its hash is known and right.
        words: the same for a person.
        size: bytes of the file, or of the part that has come.
    """

    present: bool
    verified: bool
    words: str
    size: int


@dataclass
class Zoo:
    """A folder of weights, and how it is filled."""

    folder: Path
    patience: Patience = field(default_factory=Patience)
    cookies: Path | None = None
    say: Callable[[str], object] = print
    _unreachable: dict[str, str] = field(default_factory=dict)

    UNKNOWN = "no hash known yet"

    def path(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint's file belongs."""
        return self.folder / checkpoint.file

    def state(self, checkpoint: Checkpoint) -> State:
        """Look at a checkpoint's file without changing or recording anything."""
        path = self.path(checkpoint)
        if not path.exists():
            part = max(size_of(self._partial(checkpoint)), arrived(self._from_drive(checkpoint)))
            return State(False, False, "a part" if part else "-", part)
        size = path.stat().st_size
        try:
            recognise_as(path, checkpoint.kind)
            known = self._check_hash(path, checkpoint)
        except CheckpointError as error:
            return State(True, False, str(error).removeprefix(f"{path}: "), size)
        return State(True, known, "verified" if known else self.UNKNOWN, size)

    def verify(self, checkpoint: Checkpoint) -> str:
        """Check a file that is there, and record its hash where none is known; gives the hash.

        Raises:
            CheckpointError: it is missing, not a checkpoint, damaged, or not the one it should be.
        """
        path = self.path(checkpoint)
        if not path.exists():
            raise CheckpointError(f"{path}: is missing; {self.command('download', checkpoint)}")
        return self._admit(path, path, checkpoint, "put there by hand")

    def obtain(self, checkpoint: Checkpoint) -> Path:
        """Have a checkpoint's file, by fetching it where it is missing; gives its path.

        Raises:
            MissingFileError: no source gave it; with what a person can do.
            CheckpointError: a file is there that is not it.
        """
        path = self.path(checkpoint)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(
                path, lambda: self.say(f"{checkpoint.name}: another process is at it, waiting")
            ):
                if path.exists():
                    self._admit(path, path, checkpoint, "put there by hand")
                    self.say(f"{checkpoint.name}: {path} is there")
                else:
                    self._fetch(path, checkpoint)
        except OSError as error:
            raise MissingFileError(
                checkpoint, [f"{self.folder}: cannot write: {error.strerror}"], []
            ) from None
        return path

    def command(self, verb: str, checkpoint: Checkpoint) -> str:
        """The command line that does something with a checkpoint of this folder."""
        folder = "" if self.folder == Path("weights") else f" --weights {self.folder}"
        return f"python -m experiments.zoo {verb} {checkpoint.name}{folder}"

    def _fetch(self, path: Path, checkpoint: Checkpoint) -> None:
        reasons = []
        for source, bring in self._sources(checkpoint):
            self.say(f"{checkpoint.name}: from {source}")
            try:
                arrived_file = bring()
                self._admit(arrived_file, path, checkpoint, source)
            except DiskError as error:
                reasons.append(str(error))
                break  # another source would not find more room
            except TransferError as error:
                reasons.append(str(error))
            except CheckpointError as error:
                discard(self._partial(checkpoint))
                discard_drive(self._from_drive(checkpoint))
                said = str(error).partition(": ")[2]
                reasons.append(f"what {source} gave is not kept: it {said}")
            else:
                discard(self._partial(checkpoint))
                discard_drive(self._from_drive(checkpoint))
                self.say(f"{checkpoint.name}: {path}")
                return
        raise MissingFileError(checkpoint, reasons, self._advice(checkpoint))

    def _sources(self, checkpoint: Checkpoint) -> list[tuple[str, Callable[[], Path]]]:
        """Each source with what brings the file from it, in the order in which they are asked."""
        found: list[tuple[str, Callable[[], Path]]] = []
        if checkpoint.drive is not None:
            found.append((checkpoint.link, partial(self._bring_from_drive, checkpoint)))
        for url in (*([checkpoint.url] if checkpoint.url else []), *checkpoint.mirrors):
            found.append((url, partial(self._bring, checkpoint, url)))
        return found

    def _bring(self, checkpoint: Checkpoint, url: str) -> Path:
        part = self._partial(checkpoint)
        self._once_per_host(
            url, checkpoint, lambda bar: fetch(url, part, bar, self.patience, checkpoint.size)
        )
        return part

    def _bring_from_drive(self, checkpoint: Checkpoint) -> Path:
        assert checkpoint.drive is not None
        file_id, target = checkpoint.drive, self._from_drive(checkpoint)
        self._once_per_host(
            checkpoint.link,
            checkpoint,
            lambda bar: fetch_from_drive(file_id, target, bar, self.patience, self.cookies),
        )
        return target

    def _once_per_host(
        self, url: str, checkpoint: Checkpoint, work: Callable[["Bar"], None]
    ) -> None:
        """A host to which there was no way is not looked for again: the next file fails at once."""
        host = url.split("/")[2]
        if host in self._unreachable:
            raise UnreachableError(self._unreachable[host])
        bar = Bar(checkpoint.name, self.say)
        try:
            work(bar)
        except UnreachableError as error:
            self._unreachable[host] = str(error)
            raise
        finally:
            bar.close()

    def _admit(self, found: Path, path: Path, checkpoint: Checkpoint, source: str) -> str:
        """Let a file in under its name, once it is seen to be what it should be; gives its hash.

        Raises:
            CheckpointError: it is not.
        """
        recognise_as(found, checkpoint.kind)
        if checkpoint.size is not None and found.stat().st_size != checkpoint.size:
            raise CheckpointError(
                f"{found}: has {found.stat().st_size:,} bytes, and the zoo knows "
                f"{checkpoint.size:,}"
            )
        known = self._check_hash(found, checkpoint)
        if not known:
            read_whole(found)
        if found != path:
            with found.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(found, path)
        if known:
            return checkpoint.sha256 or zoo_lock.read_lock(self.folder)[path.name].sha256
        lock = self.folder / zoo_lock.LOCK_FILE
        try:
            digest = zoo_lock.record_hash(path, source).sha256
        except OSError as error:  # a folder that is shared, read-only
            self.say(f"{checkpoint.name}: {lock}: cannot record its hash: {error.strerror}")
            return zoo_lock.file_hash(path)
        self.say(
            f"{checkpoint.name}: its hash was not known; recorded in {lock}, and checked from now "
            f"on: {digest}"
        )
        return digest

    def _check_hash(self, found: Path, checkpoint: Checkpoint) -> bool:
        """Whether a hash is known; a CheckpointError where it is another one."""
        recorded = zoo_lock.read_lock(self.folder).get(checkpoint.file)
        if checkpoint.sha256 is not None:
            zoo_lock.refuse_wrong_hash(found, checkpoint.sha256, "in the zoo's manifest")
        elif recorded is not None:
            where = f"recorded in {self.folder / zoo_lock.LOCK_FILE}"
            zoo_lock.refuse_wrong_hash(found, recorded.sha256, where)
        return checkpoint.sha256 is not None or recorded is not None

    def _partial(self, checkpoint: Checkpoint) -> Path:
        return self.folder / f"{checkpoint.file}.part"

    def _from_drive(self, checkpoint: Checkpoint) -> Path:
        return self.folder / f"{checkpoint.file}.drive"

    def _advice(self, checkpoint: Checkpoint) -> list[str]:
        lines = [
            f"fetch it by hand from  {checkpoint.link}",
            f"put it at              {self.path(checkpoint).resolve()}",
            f"and go on with         {self.command('verify', checkpoint)}",
        ]
        if checkpoint.drive is not None and self.cookies is None:
            lines.append(
                "or, signed in:         the same command with --cookies FILE, cookies of your "
                "browser for google.com in Netscape's format"
            )
        return lines


class Bar:
    """Progress as a bar on a terminal, and as a line where something happens."""

    def __init__(self, name: str, say: Callable[[str], object]) -> None:
        self._name = name
        self._say = say
        self._bar: Any = None

    def at(self, done: int, total: int | None) -> None:
        """So many bytes are there, of so many."""
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                initial=done,
                unit="B",
                unit_scale=True,
                desc=self._name,
                disable=not sys.stderr.isatty(),
                leave=False,
            )
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def note(self, text: str) -> None:
        """Tell something that a person may want to know."""
        self._say(f"{self._name}: {text}")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def recognise_as(path: Path, kind: str) -> None:
    """Raise a CheckpointError where a file's content is not of a kind."""
    found = recognise(path)
    if found != kind:
        raise CheckpointError(f"{path}: is of the kind {found}, expected {kind}")


def read_whole(path: Path) -> None:
    """Read a file of weights to its end, so that one that was cut or damaged is found out.

    Raises:
        CheckpointError: what is wrong with it.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # every member has a checksum of its own
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
            raise CheckpointError(f"{path}: is damaged or cut off: {error}") from None
        if broken is not None:
            raise CheckpointError(f"{path}: is damaged: the checksum of {broken} is wrong")
    read_weights(path)
