"""Where a figure comes from: hardware, versions, commit, time."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tokenmixup
from experiments.config import RunConfig, as_plain

ROOT = Path(__file__).parent.parent
_CODE = ("tokenmixup", "experiments")
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def hardware(device: torch.device) -> str:
    """The device that computes, in words."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{_processor()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
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
    """The commit of this checkout, with "+changes" where its code was changed since, or None.

    Args:
        also: further folders whose changes count.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git("status", "--porcelain", "--", *_CODE, "configs", *also)
    return f"{head}+changes" if changed else head


def code_hash() -> str:
    """A hash of this project's source files: another one, and a figure may be another one."""
    digest = hashlib.sha256()
    for folder in _CODE:
        files = (path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c"))
        for path in sorted(files):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def training_identity(config: RunConfig, **more: Any) -> str:
    """A hash of what a training depends on: two with the same one are the same training.

    Args:
        config: of the run; where it goes, what it logs and when it is saved do not count.
        more: further facts, as plain types.
    """
    plain = as_plain(config) | {"output": None, "logging": None, "checkpoint": None}
    return hashlib.sha256(json.dumps(plain | more, sort_keys=True).encode()).hexdigest()


def provenance(device: torch.device) -> dict[str, Any]:
    """What every figure carries beside its command."""
    return {"hardware": hardware(device), "versions": versions(), "commit": commit(), "time": now()}


def _processor(facts: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, with family and model: on rented machines many go by the same name."""
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
    """What git says, or None where this is no checkout or there is no git."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
