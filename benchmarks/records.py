"""What benchmarks measured, as JSON: one file for each machine and day, one entry for each row."""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from experiments import provenance
from experiments.errors import DataError
from experiments.files import write_atomically

RESULTS = provenance.ROOT / "results" / "benchmarks"
_ALSO = ("scipy", "lapx", "scikit-learn")


def origin(device: torch.device, command: str) -> dict[str, Any]:
    """What every figure carries: command, hardware, versions, commit, time, and what else ran."""
    return {
        "command": command,
        **provenance.provenance(device),
        "versions": {**provenance.versions(), **provenance.versions_of(_ALSO)},
        "commit": provenance.commit("benchmarks"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def file_name(entry: dict[str, Any]) -> str:
    """`<hardware>-<date>.json` for an entry."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(entry["hardware"]).lower()).strip("-")
    return f"{slug}-{entry['time'][:10]}.json"


def write(row: str, entry: dict[str, Any], folder: Path) -> Path:
    """Put a row's entry into the file of its machine and day, in the place of an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(entry)
    rows = _read(path) if path.exists() else {}
    rows[row] = entry
    content = json.dumps(dict(sorted(rows.items())), indent=1, allow_nan=False) + "\n"
    write_atomically(path, content.encode())
    return path


def latest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest full entry of each row, whatever machine it is of; "file" says where it stands."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        for row, entry in _read(path).items():
            if entry["quick"]:
                continue
            if row not in found or entry["time"] > found[row]["time"]:
                found[row] = {**entry, "file": path.name}
    return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the results of benchmarks: {error}") from None
    complete = isinstance(rows, dict) and all(
        isinstance(entry, dict) and {"time", "hardware", "quick", "values"} <= entry.keys()
        for entry in rows.values()
    )
    if not complete:
        raise DataError(
            f"{path}: expected rows of benchmarks, each with time, hardware, quick and values"
        )
    return rows
