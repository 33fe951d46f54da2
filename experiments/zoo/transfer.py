"""What goes wrong while a file comes over a network, and which of it another attempt may change."""

import email.utils
import errno
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from requests import exceptions
from urllib3.exceptions import HTTPError, NewConnectionError

from experiments.errors import UserError
from experiments.zoo.web_pages import describe_page, is_page

_WORTH_ANOTHER_TRY = (408, 425, 429, 500, 502, 503, 504)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TransferError(UserError):
    """A source did not give the file; the message says why."""


class UnreachableError(TransferError):
    """There was no way to the server: no network, no such host, nobody listening."""


class DiskError(TransferError):
    """The file cannot be written here, whatever its source."""


class Again(Exception):
    """An attempt failed that may go better next time.

    Attributes:
        reason: what happened.
        wait: seconds that the server asks to wait, or None.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How long to wait, and how often to try again."""

    connect_seconds: float = 10
    stall_seconds: float = 30
    """Without `slowest` bytes within this time, a connection counts as stalled."""
    slowest: int = 4096
    attempts: int = 6
    """Attempts in a row that bring nothing further."""
    first_wait: float = 1
    """Seconds before the second attempt; twice as long before each further one, at random up to
    half of it more or less, so that many clients do not come back at once."""
    longest_wait: float = 120
    sleep: Callable[[float], object] = field(default=time.sleep, repr=False)


class Progress(Protocol):
    """Whoever is told how a transfer gets on."""

    def at(self, done: int, total: int | None) -> None:
        """So many bytes are there, of so many."""

    def note(self, text: str) -> None:
        """Tell something that a person may want to know."""


def retried(
    attempt: Callable[[], None], arrived: Callable[[], int], progress: Progress, patience: Patience
) -> None:
    """Call `attempt` until it succeeds; after one that brought bytes the count starts anew.

    Args:
        attempt: goes on from what is there.
        arrived: bytes that are there.
        progress: is told why there is another attempt.
        patience: how many attempts.

    Raises:
        TransferError: no further attempt makes sense.
    """
    failures, most = 0, arrived()
    gained = False
    while True:
        try:
            return attempt()
        except Again as error:
            reason, asked = error.reason, error.wait
        except UnreachableError as error:
            if not gained and arrived() <= most:
                raise  # no network at all: waiting would only hide it
            reason, asked = str(error), None
        if arrived() > most:
            failures, most, gained = 0, arrived(), True
        failures += 1
        if failures >= patience.attempts:
            raise TransferError(f"{reason} ({failures} times in a row)")
        if asked is not None and asked > patience.longest_wait:
            raise TransferError(f"{reason}, and wants to be asked again in {asked:.0f} s")
        wait = patience.first_wait * 2 ** (failures - 1) * random.uniform(0.5, 1.5)
        wait = min(wait, patience.longest_wait) if asked is None else asked
        progress.note(
            f"{reason}; attempt {failures + 1} of {patience.attempts} in {wait:.1f} seconds"
        )
        patience.sleep(wait)


@contextmanager
def network_errors(url: str, patience: Patience) -> Iterator[None]:
    """Sort what requests and urllib3 raise into `Again` and `TransferError`."""
    host = urlsplit(url).hostname
    try:
        yield
    except exceptions.SSLError as error:
        raise TransferError(f"no safe connection to {host}: {_cause(error)}") from None
    except exceptions.ProxyError as error:
        raise UnreachableError(f"no way to {host}: the proxy failed: {_cause(error)}") from None
    except exceptions.ConnectTimeout:
        limit = f"no answer within {patience.connect_seconds:g} seconds"
        raise UnreachableError(f"no way to {host}: {limit}") from None
    except (
        exceptions.ConnectionError,
        exceptions.Timeout,
        exceptions.ChunkedEncodingError,
        HTTPError,
    ) as error:
        if isinstance(_bottom(error), NewConnectionError):  # a name that does not resolve is one
            raise UnreachableError(f"no way to {host}: {_cause(error)}") from None
        if "timed out" in str(error).lower():
            limit = f"nothing came for {patience.stall_seconds:g} seconds"
            raise Again(f"the connection to {host} stalled: {limit}") from None
        raise Again(f"the connection to {host} was cut: {_cause(error)}") from None
    except exceptions.RequestException as error:
        raise TransferError(f"{url}: {_cause(error)}") from None


@contextmanager
def disk_errors(path: Path, arrived: Callable[[], int]) -> Iterator[None]:
    """Tell in a person's words why a file cannot be written.

    Args:
        path: what is written.
        arrived: bytes that are there.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, exceptions.RequestException):
            raise  # requests' errors are OSErrors, too
        if error.errno not in _NO_SPACE:
            raise DiskError(f"{path}: cannot write: {error.strerror or error}") from None
        free = shutil.disk_usage(path.parent).free
        raise DiskError(
            f"{path}: the disk is full, or a limit on the size of files is reached, after "
            f"{arrived():,} bytes ({free:,} bytes are free there); they are kept, and the same "
            "command goes on from them when there is room"
        ) from None


def refuse_answer(status: int, headers: Mapping[str, str], body: bytes, host: str) -> None:
    """Raise for an answer whose status says that it is not the file.

    Args:
        status: HTTP's.
        headers: of the answer.
        body: the beginning of the answer.
        host: who answered.

    Raises:
        Again: the server is busy; with the seconds that it asks to wait.
        TransferError: it will not give the file.
    """
    if status < HTTPStatus.BAD_REQUEST:
        return
    said = f"{host} answers {status} {responses.get(status, '')}".rstrip()
    if is_page(body):
        said += f", with {describe_page(body)}"
    if status in _WORTH_ANOTHER_TRY:
        raise Again(said, _seconds(headers.get("Retry-After")))
    raise TransferError(said)


def _seconds(retry_after: str | None) -> float | None:
    """The header Retry-After, a number of seconds or a date, in seconds from now."""
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _bottom(error: BaseException) -> BaseException:
    """The error inside all that requests and urllib3 wrap around it."""
    while True:
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((a for a in reversed(error.args) if isinstance(a, BaseException)), None)
        if inner is None:
            return error
        error = inner


def _cause(error: BaseException) -> str:
    """The same in words."""
    bottom = _bottom(error)
    for source in (bottom, bottom.__cause__, bottom.__context__):
        if isinstance(source, OSError) and source.strerror:
            return source.strerror
    return " ".join(str(bottom).split()) or type(bottom).__name__
