"""The zoo's files on disk: fetched by gdown, recognised by content and checked by hash."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gdown
from gdown.exceptions import DownloadError

from experiments import checkpoint as weights
from experiments.checkpoint import LOCK_FILE, read_weights, recognise
from experiments.errors import CheckpointError, UserError
from experiments.files import exclusive
from experiments.zoo.manifest import Checkpoint

# requests' errors are OSErrors; gdown raises the last two on an answer that it cannot read
_FAILURES = (OSError, DownloadError, KeyError, AssertionError)

# what gdown and requests put around a reason
_WRAPPING = (
    r"Failed to retrieve file url:| (Client|Server) Error:| for url: .*|You may still be able.*"
    r"|\.\nThe received bytes.*"
)


class MissingFileError(UserError):
    """A checkpoint could not be fetched.

    Attributes:
        checkpoint: which one.
        advice: lines for a person who wants to fetch it by hand.
    """

    def __init__(self, checkpoint: Checkpoint, reason: str, advice: list[str]) -> None:
        super().__init__(f"{checkpoint.name}: {reason}")
        self.checkpoint = checkpoint
        self.advice = advice


@dataclass
class Zoo:
    """A folder of weights, and how it is filled.

    Attributes:
        folder: of the weights.
        cookies: in Netscape's format, for files of Google Drive that need somebody signed in.
        say: told about progress.
        timeout: seconds to wait for a connection, and for the next bytes.
    """

    folder: Path
    cookies: Path | None = None
    say: Callable[[str], object] = print
    timeout: tuple[float, float] = (10, 30)

    def path(self, checkpoint: Checkpoint) -> Path:
        """Where a checkpoint's file belongs."""
        return self.folder / checkpoint.file

    def state(self, checkpoint: Checkpoint) -> tuple[str, int]:
        """What a file is, in words, and how many bytes have arrived; changes nothing."""
        path = self.path(checkpoint)
        if not path.exists():
            part = _arrived(self._incoming(checkpoint))
            return "a part" if part else "-", part
        try:
            recognise(path)
            known = weights.check_hash(path, listed=checkpoint.sha256)
            words = "verified" if known else "no hash known yet"
        except CheckpointError as error:
            words = str(error).removeprefix(f"{path}: ")
        return words, path.stat().st_size

    def verify(self, checkpoint: Checkpoint) -> str:
        """Check a file on disk, record its hash if none is known, and return the hash.

        Raises:
            CheckpointError: it is missing, not a checkpoint, damaged, or not the one it should be.
        """
        path = self.path(checkpoint)
        if not path.exists():
            raise CheckpointError(f"{path}: is missing; {self.command('download', checkpoint)}")
        return self._admit(path, checkpoint, "put there by hand")

    def obtain(self, checkpoint: Checkpoint) -> Path:
        """Fetch a checkpoint's file unless it is on disk, and return its path.

        Raises:
            MissingFileError: it cannot be fetched; with advice for a person.
            CheckpointError: the file on disk is another one.
        """
        path = self.path(checkpoint)
        waiting = f"{checkpoint.name}: another process is fetching it, waiting"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with exclusive(path, lambda: self.say(waiting)):
                if path.exists():
                    self._admit(path, checkpoint, "put there by hand")
                    self.say(f"{checkpoint.name}: {path} is there")
                else:
                    self._fetch(checkpoint)
        except OSError as error:
            raise MissingFileError(
                checkpoint, f"{self.folder}: cannot write: {error.strerror}", []
            ) from None
        return path

    def command(self, verb: str, checkpoint: Checkpoint) -> str:
        """The command line that does something with a checkpoint of this folder."""
        return weights.zoo_command(verb, checkpoint.name, self.folder)

    def _fetch(self, checkpoint: Checkpoint) -> None:
        incoming, source = self._incoming(checkpoint), checkpoint.link
        self.say(f"{checkpoint.name}: from {source}")
        try:
            self._download(checkpoint)
            self._admit(incoming, checkpoint, source)
        except CheckpointError as error:
            _discard(incoming)
            said = str(error).partition(": ")[2]
            reason = f"what {source} gave is not kept: it {said}"
        except _FAILURES as error:
            reason = f"{source}: {_cause(error)}"
        else:
            self.say(f"{checkpoint.name}: {self.path(checkpoint)}")
            return
        raise MissingFileError(checkpoint, reason, self._advice(checkpoint))

    def _download(self, checkpoint: Checkpoint) -> None:
        """Download to a temporary name; bytes that arrive before a failure are kept and continued.

        gdown continues a part by a range request, and checks that all announced bytes arrived. As
        long as an attempt brings bytes, another one follows.
        """
        incoming, restarted = self._incoming(checkpoint), False
        while True:
            before = _arrived(incoming)
            try:
                gdown.download(
                    url=checkpoint.link,
                    output=str(incoming),
                    quiet=not sys.stderr.isatty(),
                    resume=True,
                    use_cookies=self.cookies is not None,
                    cookies_file=str(self.cookies) if self.cookies else None,
                    timeout=self.timeout,
                )
                return
            except _FAILURES as error:
                if _arrived(incoming) > before:
                    self.say(f"{checkpoint.name}: {_cause(error)}; continuing")
                elif before and type(error) is DownloadError and not restarted:
                    self.say(f"{checkpoint.name}: {_cause(error)}; starting again")
                    _discard(incoming)
                    restarted = True
                else:
                    raise

    def _admit(self, found: Path, checkpoint: Checkpoint, source: str) -> str:
        """Check a file, give it its final name, record its hash if none is known; returns the hash.

        Raises:
            CheckpointError: it is not the checkpoint.
        """
        path = self.path(checkpoint)
        recognise(found)
        known = weights.check_hash(found, checkpoint.file, checkpoint.sha256)
        if known is None:
            read_weights(found)  # completely, so that truncation and damage are found
        if found != path:
            with found.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(found, path)
        if known is not None:
            return known
        lock = self.folder / LOCK_FILE
        try:
            digest = weights.record_hash(path, source)
        except OSError as error:  # a shared folder that is read-only
            self.say(f"{checkpoint.name}: {lock}: cannot record its hash: {error.strerror}")
            return weights.file_hash(path)
        self.say(
            f"{checkpoint.name}: its hash was not known; recorded in {lock}, and checked from now "
            f"on: {digest}"
        )
        return digest

    def _incoming(self, checkpoint: Checkpoint) -> Path:
        return self.folder / f"{checkpoint.file}.new"

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


def _parts(incoming: Path) -> list[Path]:
    """gdown's partial files: it adds eight characters and an ending to the name."""
    return list(incoming.parent.glob(f"{incoming.name}{'?' * 8}.part"))


def _arrived(incoming: Path) -> int:
    """Bytes in the partial files."""
    return sum(part.stat().st_size for part in _parts(incoming))


def _discard(incoming: Path) -> None:
    for path in (incoming, *_parts(incoming)):
        path.unlink(missing_ok=True)


def _cause(error: BaseException) -> str:
    """The reason of a failure, without what libraries wrap around it."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    for link in reversed(chain):
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    said = " ".join(re.sub(_WRAPPING, "", str(error), flags=re.DOTALL).split())
    if isinstance(error, KeyError | AssertionError):
        return f"an answer that gdown cannot read ({type(error).__name__}: {said})"
    return said[:300] or type(error).__name__
