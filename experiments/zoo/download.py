"""One file over HTTP into a partial file, which is resumed where the server allows it.

What is in the partial file is always the beginning of the file at the address: what cannot be
continued is thrown away.
"""

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

import tokenmixup
from experiments.zoo.transfer import (
    Again,
    DiskError,
    Patience,
    Progress,
    TransferError,
    disk_errors,
    network_errors,
    refuse_answer,
    retried,
)
from experiments.zoo.web_pages import describe_page, looks_like_page

USER_AGENT = f"tokenmixup/{tokenmixup.__version__}"
_PAGE = 64 * 1024  # as much of an answer as is looked at to see whether it is a page
_CHUNK = 256 * 1024


@dataclass(frozen=True)
class Origin:
    """Where the bytes of a partial file came from, and what tells whether the source changed."""

    url: str
    validator: str | None
    """A strong ETag, or else Last-Modified."""
    total: int | None
    """Bytes of the whole file."""


def fetch(
    url: str,
    partial: Path,
    progress: Progress,
    patience: Patience,
    expected_size: int | None = None,
) -> None:
    """Bring the file at an address into `partial`, going on with what is there of the same file.

    It returns when the server has given all of it. Where it raises, `partial` holds what can be
    continued, or does not exist.

    Raises:
        UnreachableError: there is no way to the server.
        DiskError: the file cannot be written.
        TransferError: anything else that another attempt would not change.
    """
    with requests.Session() as session:
        session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        attempt = _Attempt(session, url, partial, progress, patience, expected_size)
        retried(attempt, lambda: size_of(partial), progress, patience)


def discard(partial: Path) -> None:
    """Forget a partial file and where it came from."""
    partial.unlink(missing_ok=True)
    _origin_file(partial).unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


@dataclass(frozen=True)
class _Attempt:
    """One request, for the whole file or for the rest of it."""

    session: requests.Session
    url: str
    partial: Path
    progress: Progress
    patience: Patience
    expected_size: int | None

    def __call__(self) -> None:
        origin = _read_origin(self.partial, self.url)
        start = size_of(self.partial) if origin else 0
        headers = {}
        if start and origin:
            headers["Range"] = f"bytes={start}-"
            if origin.validator:
                # a file that has changed since must not be joined to the old one's beginning
                headers["If-Range"] = origin.validator
        timeout = (self.patience.connect_seconds, self.patience.stall_seconds)
        with (
            network_errors(self.url, self.patience),
            self.session.get(self.url, headers=headers, stream=True, timeout=timeout) as response,
        ):
            self._take(response, start, origin)

    def _take(self, response: requests.Response, start: int, origin: Origin | None) -> None:
        host = urlsplit(response.url).hostname or ""
        status = response.status_code
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            if response.headers.get("Content-Range") == f"bytes */{start}":
                return  # all of it was there already
            discard(self.partial)
            raise Again(f"{host} has no such part of the file, it starts anew", wait=0)
        if status != HTTPStatus.OK and status != HTTPStatus.PARTIAL_CONTENT:
            refuse_answer(status, response.headers, _beginning(response), host)
            raise TransferError(f"{host} answers {status}, which is not a file")
        if status == HTTPStatus.PARTIAL_CONTENT:
            found = re.fullmatch(
                r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "")
            )
            total = int(found[2]) if found else None
            known = origin.total if origin else None
            if not found or int(found[1]) != start or (known is not None and total != known):
                discard(self.partial)
                raise Again(f"{host} sent another part of the file, it starts anew", wait=0)
        else:
            start, total = 0, _length(response)
        first = _chunk(response)
        if start == 0:
            discard(self.partial)
            if looks_like_page(first, response.headers.get("Content-Type", "")):
                page = describe_page(first + _beginning(response))
                raise TransferError(f"{host} sent {page} in place of the file; it is not kept")
            self._check_room(host, total)
            _write_origin(self.partial, Origin(self.url, _validator(response), total))
        self._write(response, host, first, start, total)

    def _check_room(self, host: str, total: int | None) -> None:
        if total is not None and self.expected_size not in (None, total):
            raise TransferError(
                f"{host} has a file of {total:,} bytes, and the zoo knows {self.expected_size:,}"
            )
        free = shutil.disk_usage(self.partial.parent).free
        if total is not None and free < total:
            raise DiskError(
                f"{self.partial.parent}: {total:,} bytes are needed, {free:,} are free there"
            )

    def _write(
        self, response: requests.Response, host: str, chunk: bytes, start: int, total: int | None
    ) -> None:
        done = start
        window_start, window_bytes = time.monotonic(), 0
        with (
            disk_errors(self.partial, lambda: size_of(self.partial)),
            self.partial.open("ab" if start else "wb", buffering=0) as file,
        ):
            while chunk:
                written = file.write(chunk)
                while written < len(chunk):  # unbuffered, a write may be a short one
                    written += file.write(chunk[written:])
                done += len(chunk)
                window_bytes += len(chunk)
                self.progress.at(done, total)
                now = time.monotonic()
                if now - window_start > self.patience.stall_seconds:
                    if window_bytes < self.patience.slowest:
                        raise Again(
                            f"the connection to {host} stalled: {window_bytes} bytes in "
                            f"{now - window_start:.0f} seconds"
                        )
                    window_start, window_bytes = now, 0
                chunk = _chunk(response)
        if total is not None and done != total:
            raise Again(f"the connection to {host} ended after {done:,} of {total:,} bytes")


def _chunk(response: requests.Response) -> bytes:
    """What has arrived, without waiting for more; b"" at the end."""
    # unlike iter_content, which waits until a chunk is full, however slowly it comes
    return response.raw.read1(_CHUNK, decode_content=True) or b""


def _beginning(response: requests.Response) -> bytes:
    parts: list[bytes] = []
    while sum(map(len, parts)) < _PAGE:
        part = _chunk(response)
        if not part:
            break
        parts.append(part)
    return b"".join(parts)[:_PAGE]


def _is_packed(response: requests.Response) -> bool:
    """Whether what travels is not the file itself, so that its bytes are counted otherwise."""
    return bool(response.headers.get("Content-Encoding", "identity") != "identity")


def _length(response: requests.Response) -> int | None:
    """Bytes that will arrive, where the answer says so."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() and not _is_packed(response) else None


def _validator(response: requests.Response) -> str | None:
    if _is_packed(response):
        return None
    tag = response.headers.get("ETag")
    if tag and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified")


def _origin_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.origin")


def _write_origin(partial: Path, origin: Origin) -> None:
    with disk_errors(partial, lambda: 0):
        _origin_file(partial).write_text(json.dumps(asdict(origin)), encoding="utf-8")


def _read_origin(partial: Path, url: str) -> Origin | None:
    """Where a partial file came from, or None where it cannot be continued from this address."""
    if not partial.exists():
        return None
    try:
        content: Any = json.loads(_origin_file(partial).read_text(encoding="utf-8"))
        origin = Origin(**content)
    except (OSError, ValueError, TypeError):
        return None
    same = origin.url == url and (origin.validator is not None or origin.total is not None)
    return origin if same else None
