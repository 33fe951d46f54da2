"""`docs/performance.md` and `docs/scaling.md` from the records: `python -m benchmarks.report`.

A generated block stands between `<!-- benchmark: NAME -->` and `<!-- end of benchmark -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import cost_model, figures, records
from benchmarks.gpu_report import (
    COPIES,
    IMAGES_PER_SECOND,
    MEMORY_RATIO,
    OVER_PLAIN,
    SAME_WITH_LESS,
    WAITED_SHARE,
)
from benchmarks.harness import Row, Target
from benchmarks.rows import CPU_ROWS, GPU_ROW
from experiments import cli
from experiments.documents.markdown import aligned_table
from experiments.errors import DataError
from experiments.files import write_atomically
from experiments.provenance import ROOT

DOCUMENTS = ("performance.md", "scaling.md")
_BLOCK = re.compile(r"(<!-- benchmark: (\S+) -->\n).*?(<!-- end of benchmark -->)", re.S)
FIGURES: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any]]] = {
    "pairing": (
        "performance_pairing.svg",
        "Time of pairing over the batch",
        figures.pairing_curve,
    ),
    "gpu": (
        "performance_gpu_steps.png",
        "What the device does in one step",
        figures.step_timelines,
    ),
}
_NOT_MEASURED = "not measured"
_ROWS = (*CPU_ROWS, GPU_ROW)
_HEAD = ("row", "target", "measured", "reached", "command", "date")

Entries = dict[str, dict[str, Any]]


def summary(entries: Entries) -> str:
    """Every target beside what was measured, in the order of the rows."""
    lines = []
    for row in _ROWS:
        if row.name in entries:
            entry = entries[row.name]
            for target in row.targets(entry["values"]):
                reached = "yes" if target.reached else "**no**"
                lines.append(_line(target, reached, row, entry["time"][:10]))
        elif row is GPU_ROW:
            lines += [_line(target, "–", row, "–") for target in _open_targets()]
        else:
            missing = Target(row.name, "–", _NOT_MEASURED, False)
            lines.append(_line(missing, "–", row, "–"))
    lines.sort(key=lambda line: int(line[0].partition(".")[0]) if line[0][0].isdigit() else 99)
    return aligned_table(_HEAD, lines, ())


def _line(target: Target, reached: str, row: Row, date: str) -> list[str]:
    command = f"`python -m benchmarks.{row.name}`"
    return [target.row, target.target, target.measured, reached, command, date]


def _open_targets() -> list[Target]:
    """Rows 7 to 10 where no GPU has measured them."""
    found = []
    for model, speed in IMAGES_PER_SECOND.items():
        for row, target in (
            (f"7. {model}, bf16, compiled", f"≥ {speed:,} images/s"),
            (f"7. {model}, HTM + VTM", f"≤ {OVER_PLAIN[model]} × plain"),
            (f"8. {model}, HTM + VTM", f"≤ {COPIES['HVTM']} copies to the host a step"),
            (f"8. {model}, VTM", f"≤ {COPIES['VTM']} copies to the host a step"),
            (f"10. peak memory, {model}, HTM + VTM", f"≤ {MEMORY_RATIO} × plain"),
            (f"10. activation checkpointing, {model}", SAME_WITH_LESS),
        ):
            found.append(Target(row, target, _NOT_MEASURED, False))
    share = f"data waited for in ≤ {WAITED_SHARE:.0%} of the steps"
    return [*found, Target("9. CCT-7/3×1, from the loader", share, _NOT_MEASURED, False)]


def provenance(entries: Entries) -> str:
    """Where each row's figures come from."""
    lines = []
    for row in _ROWS:
        if row.name not in entries:
            continue
        entry = entries[row.name]
        load = f"{entry['load_before']:.1f}–{entry['load_after']:.1f}"
        lines.append(
            [
                f"`{entry['command']}`",
                entry["time"].replace("T", " ").replace("+00:00", " UTC"),
                entry["commit"] or "–",
                f"{entry['hardware']}, {entry['cores']} cores",
                load,
                f"`{entry['file']}`",
            ]
        )
    if not lines:
        return "Nothing has been measured yet.\n"
    head = ("command", "time", "commit", "hardware", "load", "record in `results/benchmarks`")
    found: dict[str, str] = {}
    for row in _ROWS:
        found |= entries.get(row.name, {}).get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    return f"{aligned_table(head, lines, ())}\nVersions: {versions}.\n"


def _details(row: Row) -> Callable[[Entries], str]:
    def block(entries: Entries) -> str:
        if row.name not in entries:
            return f"Not measured; `python -m benchmarks.{row.name}` does it.\n"
        text = row.tables(entries[row.name]["values"])
        if row.name in FIGURES:
            name, title, _ = FIGURES[row.name]
            text += f"\n![{title}](figures/{name})\n"
        return text

    return block


def _from_curve(
    table: Callable[..., str], *, of_trainings: bool = True
) -> Callable[[Entries], str]:
    def block(entries: Entries) -> str:
        if "pairing" not in entries:
            return "Not measured; `python -m benchmarks.pairing` does it.\n"
        model = cost_model.fit(entries["pairing"]["values"])
        return table(model, _trainings(entries)) if of_trainings else table(model)

    return block


def _trainings(entries: Entries) -> tuple[cost_model.Training, ...]:
    """The trainings of the cost model, at the speed that a GPU has reached where one has."""
    speeds = {
        model["model"]: model["variants"]["plain"]["images_per_second"]
        for model in entries.get(GPU_ROW.name, {"values": {"models": []}})["values"]["models"]
        if "plain" in model["variants"]
    }
    return tuple(
        replace(training, images_per_second=speeds.get(training.model, training.images_per_second))
        for training in cost_model.TRAININGS
    )


BLOCKS: dict[str, Callable[[Entries], str]] = {
    "summary": summary,
    "provenance": provenance,
    **{row.name: _details(row) for row in _ROWS},
    "cost-constants": _from_curve(cost_model.constants, of_trainings=False),
    "cost-by-batch": _from_curve(cost_model.by_batch),
    "cost-by-gpus": _from_curve(cost_model.by_gpus),
    "cost-shows": _from_curve(cost_model.where_it_shows),
}


def regenerated(text: str, entries: Entries, name: str) -> str:
    """A document with its blocks made anew.

    Raises:
        DataError: a block asks for what there is not.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise DataError(
                f"{name}: benchmark: got {match[2]}; allowed: {', '.join(sorted(BLOCKS))}"
            )
        return f"{match[1]}\n{BLOCKS[match[2]](entries)}\n{match[3]}"

    return _BLOCK.sub(block, text)


def update(docs: Path, results: Path) -> list[Path]:
    """Make blocks and figures anew from the newest full records; gives the files that changed."""
    entries = records.latest(results)
    changed = []
    for name in DOCUMENTS:
        path = docs / name
        before = path.read_text(encoding="utf-8")
        after = regenerated(before, entries, name)
        if after != before:
            write_atomically(path, after.encode())
            changed.append(path)
    for row, (file, _, draw) in FIGURES.items():
        path = docs / "figures" / file
        if row in entries and figures.save(draw(entries[row]["values"]), path):
            changed.append(path)
    return changed


def main(argv: Sequence[str]) -> None:
    """Update the documents and say which files changed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(argv)
    for path in update(options.docs, options.results):
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
