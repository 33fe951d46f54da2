"""The measured part of `docs/reliability.md`, from the figures alone."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import DataError
from experiments.provenance import ROOT

RESULTS = ROOT / "results" / "reliability"
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"


def newest_result(results: Path) -> dict[str, Any]:
    """Each part's newest figures.

    Raises:
        DataError: nothing was measured.
    """
    files = sorted(results.glob("*.json"))
    if not files:
        raise DataError(f"{results}: no figures; run python -m benchmarks.faults")
    found: dict[str, Any] = {}
    for path in files:
        found.update(json.loads(path.read_text()))
    return found


def shown(document: str, result: Mapping[str, Any]) -> str:
    """A document with the figures between its two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(result) + END + after


def table(result: Mapping[str, Any]) -> str:
    """The figures as a table, and where they come from."""
    lines = ["", "| what | measured | promised |", "| --- | --- | --- |"]
    for part, entry in result.items():
        what, measured, promised = _row(part, entry)
        lines.append(
            f"| {what} | {measured}{'' if entry['good'] else ' **(not met)**'} | {promised} |"
        )
    sources: dict[str, list[str]] = {}
    for part, entry in result.items():
        versions = ", ".join(f"{name} {value}" for name, value in entry["versions"].items())
        day = entry["time"].partition("T")[0]
        source = f"{day}, {entry['hardware']}, {versions}, commit {entry['commit']}"
        sources.setdefault(source, []).append(
            f"{part} (`{entry['command']}`, load {entry['load'][0]} to {entry['load'][1]})"
        )
    lines.append("")
    lines += [f"- {source}: {', '.join(parts)}." for source, parts in sources.items()]
    return "\n".join(lines) + "\n\n"


def _row(part: str, entry: Mapping[str, Any]) -> tuple[str, str, str]:
    if part.startswith("kills"):
        count = entry["processes"]
        who = "one process" if count == 1 else f"{count} processes (gloo)"
        phases = ", ".join(f"{number} in {phase}" for phase, number in entry["phases"].items())
        return (
            f"kill -9 of all processes at once, {who}",
            f"{entry['survived']} of {entry['total']} survived ({phases})",
            "all, final weights and metrics the same to the byte",
        )
    if part == "damages":
        return (
            "the newest checkpoint cut off or changed by a byte",
            f"{entry['detected']} detected and {entry['recovered']} recovered of {entry['total']} "
            f"({entry['truncated']} cut off, {entry['flipped']} changed)",
            "all, from the checkpoint before",
        )
    if part == "stops":
        saved, ended = entry["to_saved"], entry["to_exit"]
        if not saved or not ended:
            return "SIGTERM", "none of the runs was stopped", "saved within 2 s of the step's end"
        return (
            f"SIGTERM, {len(saved)} times: until saved; until the exit",
            f"median {statistics.median(saved):.2f} s, longest {max(saved):.2f} s; "
            f"{statistics.median(ended):.2f} s, {max(ended):.2f} s",
            "saved within 2 s of the step's end",
        )
    if part == "cost":
        each = 1000 * entry["checkpoint_seconds"] / entry["checkpoints"]
        return (
            f"a checkpoint each epoch, and the best, over {entry['epochs']} epochs",
            f"{entry['percent']:.2f}% of training time ({each:.0f} ms each)",
            "under 2%",
        )
    first, last = entry["resident_mib"]
    return (
        f"{entry['cycles']} times resumed and stopped, in one process, {entry['minutes']:.1f} min",
        f"resident memory {first:.0f} to {last:.0f} MiB "
        f"({entry['kib_a_cycle']:+.2f} KiB a cycle over the second half), "
        f"open files {entry['files'][0]} to {entry['files'][1]}, "
        f"threads {entry['threads'][0]} to {entry['threads'][1]}",
        "no growth",
    )
