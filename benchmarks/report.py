"""The documents of the benchmarks, from their records: `python -m benchmarks.report`.

It fills the generated blocks of the kind `benchmark` and draws the figures.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import (
    faults,
    host,
    launches,
    pairing,
    pipeline,
    saliency,
    scaling,
    solver,
    startup,
    steps,
)
from benchmarks.gpu import parts as gpu
from benchmarks.row import RESULTS, Measurement, Row, Target, latest
from benchmarks.timing import times
from experiments import cli
from experiments.documents import figures
from experiments.documents.markdown import aligned_table, update_documents
from experiments.errors import DataError
from experiments.provenance import ROOT

ROWS = (
    *(pairing.ROW, solver.ROW, steps.ROW, saliency.ROW, startup.ROW, pipeline.ROW),
    *(*gpu.ROWS, scaling.ROW, launches.ROW, host.ROW),
)
"""All rows, in the order of `docs/performance.md`."""

Latest = Mapping[str, Measurement]


def summary(found: Latest) -> str:
    """Every target with what was measured, in the order of the rows."""
    lines = []
    for row in ROWS:
        record = found.get(row.name)
        if record is not None:
            targets = row.targets(record.values)
        elif row in gpu.ROWS:
            targets = row.targets({})
        else:
            targets = [Target(row.name, "–", None, False)]
        command = f"`{row.command}`"
        for name, target, measured, reached in targets:
            if record is None or measured is None:
                lines.append([name, target, "not measured", "–", command, "–"])
            else:
                yes = "yes" if reached else "**no**"
                lines.append([name, target, measured, yes, command, record.time[:10]])
    head = ("row", "target", "measured", "reached", "command", "date")
    return aligned_table(head, lines, ())


def sources(records: Iterable[Measurement]) -> str:
    """Command, time, commit, hardware and load of each record, and the versions of all."""
    versions: dict[str, str] = {}
    lines, busy = [], []
    for record in records:
        cores = "" if record.cores is None else f", {record.cores} cores"
        lines.append(
            [
                record.row,
                f"`{record.command}`",
                record.time.replace("T", " ").replace("+00:00", " UTC"),
                record.commit or "–",
                record.hardware + cores,
                f"{record.load_before:.1f}–{record.load_after:.1f}",
            ]
        )
        versions |= record.versions
        if record.load_before > 1.5 * record.threads:
            busy.append(record.row)
    head = ("row", "command", "time", "commit", "hardware", "load")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    beside = f"Measured while other programs ran: {', '.join(busy)}.\n" * bool(busy)
    return f"{aligned_table(head, lines, ())}\nVersions: {shown}.\n{beside}"


def in_short(found: Latest, reliability: Latest) -> str:
    """What README says of cost and reliability: a table of steps, and a line per other figure."""
    table, lines = "", []
    if "steps" in found:
        names = {"HTM": "HTM", "VTM": "VTM", "HVTM": "both"}
        rows = [
            [
                f"{model['model']}, batch {model['batch']}",
                *(times(over[name], 3) if name in over else "–" for name in names),
            ]
            for model in found["steps"].values["models"]
            for over in [model["over_plain"]]
        ]
        where = f"on {found['steps'].cores} CPU cores"
        head = (f"training step over plain, {where} (95% interval)", *names.values())
        table = f"{aligned_table(head, rows, (1, 2, 3))}\n"
    if "solver" in found:
        ratios = [case["speed_up"]["ratio"] for case in found["solver"].values["cases"]]
        lines.append(
            f"The exact solver finds partners {min(ratios):.1f} to {max(ratios):.1f} times as fast "
            "as lapx, depending on the gains."
        )
    if "saliency" in found:
        for model in found["saliency"].values["models"]:
            alone, whole = (model[name]["ratio"] for name in ("speed_up", "step_ratio"))
            lines.append(
                f"Saliency from attention is {alone:.0f} times as fast as from gradients, and the "
                f"whole HTM step {whole:.2f} times ({model['model']}, batch {model['batch']})."
            )
    kills = [one.values for name, one in reliability.items() if name.startswith("kills-")]
    if kills:
        survived, total = (sum(one[name] for one in kills) for name in ("survived", "total"))
        lines.append(
            "Runs killed by `kill -9` in training, evaluation or saving resumed and ended with the "
            f"same bytes: {survived} of {total}."
        )
    return table + "".join(f"- {line}\n" for line in lines)


def block(name: str, found: Latest, reliability: Latest) -> str:
    """The text of a generated block.

    Raises:
        DataError: no block has this name.
    """
    makers: dict[str, Callable[[], str]] = {
        "summary": lambda: summary(found),
        "sources": lambda: sources(found[row.name] for row in ROWS if row.name in found),
        "in-short": lambda: in_short(found, reliability),
        "reliability": lambda: faults.page(reliability),
        "reliability-sources": lambda: sources(reliability.values()),
        "gpu": lambda: gpu.page(found),
        **{
            one.name: functools.partial(_details, one, found)
            for one in ROWS
            if one not in gpu.ROWS  # on one page
        },
    }
    if name not in makers:
        raise DataError(f"generated: benchmark: got {name}; allowed: {', '.join(sorted(makers))}")
    return makers[name]()


def _details(row: Row, found: Latest) -> str:
    if row.name not in found:
        return f"Not measured; `{row.command}` does it.\n"
    return row.tables(found[row.name].values)


def pairing_figure(values: dict[str, Any]) -> Figure:
    """Time of pairing over the batch, in the library's form and the direct one."""
    figure = figures.make_figure(4.6)
    axes = figure.subplots()
    share = f"{100 * values['filtered_share']:.0f}% easy"
    for name, label, colour, dash, marker in (
        ("direct", "direct, all easy", figures.ORANGE, "-", "s"),
        ("direct_filtered", f"direct, {share}", figures.ORANGE, "--", "s"),
        ("ours", "ours, all easy", figures.BLUE, "-", "o"),
        ("ours_filtered", f"ours, {share}", figures.BLUE, "--", "o"),
        ("gain", "ours: gains alone", figures.GREEN, ":", "^"),
        ("assignment", "ours: assignment alone", figures.REST, ":", "v"),
    ):
        points = [point for point in values["curve"] if name in point["timings"]]
        axes.plot(
            [point["batch"] for point in points],
            [1e3 * point["timings"][name]["seconds"] for point in points],
            label=label,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=4,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = [point["batch"] for point in values["curve"]]
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel(f"batch B (T = {values['curve'][0]['patches']} patch tokens)")
    axes.set_ylabel("milliseconds (median)")
    axes.grid(color=figures.GRID, linewidth=0.6)
    axes.legend(handlelength=4)
    return figure


def update(root: Path, found: Latest, reliability: Latest) -> list[Path]:
    """Regenerate blocks and figures of a checkout; returns the documents that changed."""
    changed = update_documents(root, {"benchmark": lambda name: block(name, found, reliability)})
    if "pairing" in found:
        with figures.house_style():
            figure = pairing_figure(found["pairing"].values)
            stem = root / "docs" / "figures" / "performance_pairing"
            figures.write(figure, stem, "Time of pairing over the batch")
    return changed


def main(argv: Sequence[str]) -> None:
    """Update the documents and figures, and print the documents that changed."""
    argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__).parse_args(
        argv
    )
    for path in update(ROOT, latest(RESULTS), latest(faults.RESULTS)):
        print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
