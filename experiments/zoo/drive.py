"""One file from Google Drive into a partial file, by gdown, which knows Drive's detours."""

from dataclasses import dataclass
from pathlib import Path

from experiments.zoo.transfer import (
    Again,
    Patience,
    Progress,
    TransferError,
    disk_errors,
    network_errors,
    refuse_answer,
    retried,
)

_ENDING = ".part"
_RANDOM = 8  # characters that gdown puts between the name and the ending of what it writes


def fetch_from_drive(
    file_id: str,
    target: Path,
    progress: Progress,
    patience: Patience,
    cookies: Path | None = None,
) -> None:
    """Bring a file of Google Drive to `target`, going on with what an earlier call has left.

    Until it is whole it lies beside `target`, under a name that gdown makes from it.

    Args:
        file_id: Drive's id of the file.
        target: written whole or not at all.
        progress: told how it gets on.
        patience: how long to wait and how often to try.
        cookies: a file of cookies in Netscape's format, for files that need somebody signed in.

    Raises:
        UnreachableError: there is no way to Drive.
        DiskError: the file cannot be written.
        TransferError: Drive does not give the file (quota, permission, no such file).
    """
    attempt = _Attempt(file_id, target, progress, patience, cookies)
    retried(attempt, lambda: arrived(target), progress, patience)


def discard_drive(target: Path) -> None:
    """Forget what an interrupted download has left."""
    for path in (target, *_partials(target)):
        path.unlink(missing_ok=True)


def arrived(target: Path) -> int:
    """Bytes that an interrupted download has left."""
    return sum(path.stat().st_size for path in _partials(target))


def _partials(target: Path) -> list[Path]:
    length = len(target.name) + _RANDOM + len(_ENDING)
    found = target.parent.glob(f"{target.name}*{_ENDING}") if target.parent.exists() else ()
    return sorted((p for p in found if len(p.name) == length), key=lambda p: p.stat().st_size)


@dataclass(frozen=True)
class _Attempt:
    file_id: str
    target: Path
    progress: Progress
    patience: Patience
    cookies: Path | None

    def __call__(self) -> None:
        self.target.unlink(missing_ok=True)  # gdown takes one that is there for the file
        for stray in _partials(self.target)[:-1]:  # of several, gdown takes none
            stray.unlink()
        url = f"https://drive.google.com/uc?id={self.file_id}"
        with network_errors(url, self.patience), disk_errors(self.target, self._arrived):
            self._download()

    def _arrived(self) -> int:
        return arrived(self.target)

    def _download(self) -> None:
        import gdown
        import requests
        from gdown.exceptions import DownloadError, FileURLRetrievalError

        before = self._arrived()
        try:
            gdown.download(
                id=self.file_id,
                output=str(self.target),
                quiet=True,
                resume=True,
                use_cookies=self.cookies is not None,
                cookies_file=None if self.cookies is None else str(self.cookies),
                progress=self.progress.at,
                timeout=(self.patience.connect_seconds, self.patience.stall_seconds),
            )
        except requests.HTTPError as error:
            answer = error.response
            refuse_answer(answer.status_code, answer.headers, answer.content, "Google Drive")
            raise
        except FileURLRetrievalError as error:
            said = str(error).partition("You may still be able")[0]
            said = " ".join(said.removeprefix("Failed to retrieve file url:").split())
            raise TransferError(f"Google Drive does not give the file: {said}") from None
        except DownloadError as error:
            if before and self._arrived() <= before:  # it does not go on from what is there
                discard_drive(self.target)
                raise Again("Google Drive did not go on from the part; it starts anew", 0) from None
            said = " ".join(str(error).partition(".\n")[0].split())
            raise Again(f"Google Drive: {said}") from None
        except (KeyError, AssertionError) as error:
            raise TransferError(
                f"Google Drive: an answer that gdown cannot read: {error!r}"
            ) from None
