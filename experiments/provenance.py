"""Where a figure comes from (hardware, versions, commit, command, time), and its file."""

import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

import tokenmixup
from experiments.errors import DataError
from experiments.files import write_atomically

ROOT = Path(__file__).parent.parent
_CODE = ("tokenmixup", "experiments")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


class Record(BaseModel):
    """A figure and where it comes from; a subclass adds what was measured.

    Raises:
        pydantic.ValidationError: a field is unknown, missing, of another type or not finite.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    command: str
    hardware: str
    versions: dict[str, str]
    commit: str | None
    time: str


R = TypeVar("R", bound=Record)


class Records(Generic[R]):
    """A file of records, one JSON object per line, which several processes may write to.

    Args:
        path: the file; it need not exist.
        kind: the class of the records.
        key: what tells two records apart, for example their row.
    """

    def __init__(self, path: Path, kind: type[R], key: Callable[[R], object]) -> None:
        self.path = path
        self._kind = kind
        self._key = key

    def read(self) -> list[R]:
        """All records; none where there is no file.

        Raises:
            DataError: the file cannot be read, or a line is damaged; the message names the line.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: cannot read the records: {error}") from None
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1)]

    def keep(self, record: R) -> None:
        """Replace the record of the same key, or add it at the end.

        The file is whole at any moment, whatever is killed.

        Raises:
            DataError: the file is damaged or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                found = {self._key(other): other for other in self.read()}
                found[self._key(record)] = record
                write_atomically(self.path, "".join(map(_line, found.values())).encode())
        except OSError as error:
            raise DataError(f"{self.path}: cannot write the records: {error.strerror}") from None

    def _parsed(self, line: str, number: int) -> R:
        try:
            return self._kind.model_validate_json(line)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")
                for fault in error.errors()
            ]
            raise DataError(
                f"{self.path}, line {number}: is damaged, or of another version of this program: "
                f"{'; '.join(faults)}; remove the line to have it made again"
            ) from None


def _line(record: Record) -> str:
    """A record as a line of JSON, what was measured first, where it comes from last."""
    plain = sorted(record.model_dump().items(), key=lambda item: item[0] in Record.model_fields)
    return json.dumps(dict(plain), ensure_ascii=False, allow_nan=False) + "\n"


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hardware(device: torch.device) -> str:
    """The name of the device."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_processor()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of the packages that a figure depends on."""
    found = {"python": platform.python_version(), "tokenmixup": tokenmixup.__version__}
    found |= versions_of(_PACKAGES)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(*also: str) -> str | None:
    """The checked-out commit, with "+changes" if its code has changed since; None without git.

    Args:
        also: further folders whose changes count.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git("status", "--porcelain", "--", *_CODE, "configs", *also)
    return f"{head}+changes" if changed else head


def code_hash() -> str:
    """A hash of this project's source files: figures of the same hash come from the same code."""
    digest = hashlib.sha256()
    for folder in _CODE:
        files = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c"))
        for path in sorted(files):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def provenance(device: torch.device) -> dict[str, Any]:
    """The fields of a `Record` except its command."""
    return {"hardware": hardware(device), "versions": versions(), "commit": commit(), "time": now()}


def _processor(facts: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, family and model: on rented machines many share one name."""
    try:
        first = facts.read_text().partition("\n\n")[0]
    except OSError:  # not Linux
        first = ""
    found = dict(re.findall(r"^(.+?)[ \t]*: (.+)$", first, re.MULTILINE))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    numbers = [f"{key.split()[-1]} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{found['model name']} ({', '.join(numbers)})" if numbers else found["model name"]


def _git(*words: str) -> str | None:
    """The output of git, or None outside a checkout or without git."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
