"""What all rows share: settings, targets, the command line and the record.

A row is a module with three functions (measure, tables, targets) and its `ROW`; `report.ROWS` lists
all rows.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.timing import times
from experiments import cli, provenance
from experiments.provenance import ROOT, Record, Records

RESULTS = ROOT / "results" / "benchmarks"
_CPU = torch.device("cpu")
_ALSO = ("scipy", "lapx", "scikit-learn")

Values = dict[str, Any]
"""The figures of a row, as plain types."""


@dataclass(frozen=True)
class Settings:
    """How to measure a row."""

    quick: bool = False
    """A smoke run: tiny sizes, few repetitions, meaningless figures."""
    device: torch.device = _CPU
    given_rounds: int | None = None
    """Repetitions that replace each row's own number."""
    keep: Callable[[Values], object] = lambda values: None
    """Records the figures so far: a row that is interrupted afterwards keeps them."""

    def rounds(self, full: int) -> int:
        """The number of repetitions, `full` in a full run."""
        return self.given_rounds or (2 if self.quick else full)


class Target(NamedTuple):
    """A target, and what was measured; None where nothing was."""

    name: str
    """The number of the row in `docs/performance.md`, and the subject."""
    target: str
    measured: str | None
    reached: bool


class Row(NamedTuple):
    """A row of the benchmarks."""

    name: str
    measure: Callable[[Settings], Values]
    tables: Callable[[Values], str]  # in Markdown
    targets: Callable[[Values], list[Target]]
    module: str = ""
    """With the part of it that the row is; by default of the row's name."""
    threads: int | None = None
    """Of torch, unless `--threads` says otherwise; None leaves torch's own."""

    @property
    def command(self) -> str:
        """Measures the row."""
        return f"python -m benchmarks.{self.module or self.name}"


class Measurement(Record):
    """The record of a row, from one machine on one day."""

    row: str
    quick: bool
    cores: int | None
    threads: int
    load_before: float
    load_after: float
    values: Values


def records(folder: Path) -> Records[Measurement]:
    """The store in a folder: one record per row, machine and day."""
    return Records(
        folder / "records.jsonl",
        Measurement,
        key=lambda record: (record.row, record.hardware, record.time[:10], record.quick),
    )


def latest(folder: Path) -> dict[str, Measurement]:
    """The newest record per row, from whichever machine; quick runs do not count."""
    found = sorted(records(folder).read(), key=lambda record: record.time)
    return {record.row: record for record in found if not record.quick}


def at_most(name: str, over: Mapping[str, float], limit: float, of: str) -> Target:
    """The target that a ratio to `of` does not exceed its limit."""
    return Target(name, f"≤ {limit} × {of}", times(over, 3), over["ratio"] <= limit)


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every row."""
    found = argparse.ArgumentParser(prog=program, description=description)
    found.add_argument(
        "--quick",
        action="store_true",
        help="smoke run: tiny sizes, few repetitions; records nothing unless --results is given",
    )
    found.add_argument("--threads", type=_positive, help="threads of torch; default: the row's")
    found.add_argument("--rounds", type=_positive, help="repetitions; default: each row's own")
    found.add_argument(
        "--results", type=Path, help="folder of records.jsonl; default: that of this repository"
    )
    return found


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number from 1")
    return int(text)


def main(row: Row) -> int:
    """The command line of a row's module."""

    def measure_and_show(argv: Sequence[str]) -> None:
        program = f"python -m benchmarks.{row.name}"
        run(row, parser(program, row.measure.__doc__).parse_args(argv), [program, *argv])

    return cli.run(measure_and_show)


def run(
    row: Row,
    options: argparse.Namespace,
    command: Sequence[str],
    results: Path = RESULTS,
    device: torch.device = _CPU,
) -> list[Target]:
    """Measure a row, print its tables and targets, and keep the record.

    `options` are those of `parser`; `command`, the program and its words, is for the record.
    """
    threads = options.threads or row.threads
    if threads is not None:
        torch.set_num_threads(threads)
    folder = options.results or (None if options.quick else results)
    origin = {
        **provenance.provenance(device),
        "command": " ".join([command[0], *map(shlex.quote, command[1:])]),
        "versions": {**provenance.versions(), **provenance.versions_of(_ALSO)},
        "commit": provenance.commit("benchmarks"),
        "quick": options.quick,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }

    def keep(values: Values) -> None:
        if folder is not None and values:
            load = round(os.getloadavg()[0], 2)
            record = Measurement(row=row.name, values=values, load_after=load, **origin)
            records(folder).keep(record)

    values = row.measure(Settings(options.quick, device, options.rounds, keep))
    keep(values)
    print(row.tables(values))
    targets = row.targets(values)
    for target in targets:
        state = "reached" if target.reached else "NOT REACHED"
        told = "not measured" if target.measured is None else f"measured {target.measured}: {state}"
        print(f"{target.name}: target {target.target}; {told}")
    if folder is not None and values:
        print(f"recorded in {records(folder).path}", file=sys.stderr)
    return targets
