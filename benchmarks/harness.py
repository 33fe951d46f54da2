"""What every row of the benchmarks shares: its command line, its record, how targets are told."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import records
from experiments import cli
from experiments.provenance import ROOT


@dataclass(frozen=True)
class Settings:
    """How a row is measured."""

    quick: bool = False
    """A smoke run: tiny sizes, few repetitions, figures without meaning."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    given_rounds: int | None = None
    """Repetitions of everything, in the place of each row's own number."""
    keep: Callable[[dict[str, Any]], object] = lambda values: None
    """Takes what was measured so far: a row that is cut off leaves as much."""

    def rounds(self, full: int) -> int:
        """Repetitions of what is compared, which are `full` in a full run."""
        return self.given_rounds or (2 if self.quick else full)


@dataclass(frozen=True)
class Target:
    """A figure that a row is to reach, beside what it came to."""

    row: str
    """Number and subject, as `docs/performance.md` lists them."""
    target: str
    measured: str
    reached: bool


@dataclass(frozen=True)
class Row:
    """A row of the benchmarks.

    Attributes:
        name: of its module.
        measure: measures it; what it gives can be written as JSON.
        tables: what was measured, in Markdown.
        targets: what it is to reach.
    """

    name: str
    measure: Callable[[Settings], dict[str, Any]]
    tables: Callable[[dict[str, Any]], str]
    targets: Callable[[dict[str, Any]], list[Target]]


def main(row: Row) -> int:
    """The command line of a row's own module."""

    def measure_and_show(argv: Sequence[str]) -> None:
        options = parser(f"python -m benchmarks.{row.name}", row.measure.__doc__).parse_args(argv)
        run(row, options)

    return cli.run(measure_and_show)


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options that rows have in common."""
    found = argparse.ArgumentParser(prog=program, description=description)
    found.add_argument(
        "--quick",
        action="store_true",
        help="smoke run: tiny sizes, few repetitions; writes nothing unless --results is given",
    )
    found.add_argument("--threads", type=_positive, help="threads of torch; by default its own")
    found.add_argument("--rounds", type=_positive, help="repetitions, instead of each row's own")
    found.add_argument(
        "--results",
        type=Path,
        help="folder of the JSON files; by default results/benchmarks",
    )
    return found


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a whole number from 1")
    return int(text)


def words_of(options: argparse.Namespace) -> list[str]:
    """The options that change what is measured, as they were given."""
    words = ["--quick"] if options.quick else []
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value is not None else []
    if getattr(options, "device", "cuda") != "cuda":  # rows of the CPU alone have no such option
        words += ["--device", options.device]
    return words


def run(row: Row, options: argparse.Namespace, device: torch.device | None = None) -> None:
    """Measure a row, print its tables and targets, and keep the record."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = " ".join([f"python -m benchmarks.{row.name}", *words_of(options)])
    folder = options.results
    if folder is None and not options.quick:
        folder = records.RESULTS
    device = device or torch.device("cpu")
    origin = records.origin(device, command)

    def keep(values: dict[str, Any]) -> Path | None:
        load = round(os.getloadavg()[0], 2)
        entry = {**origin, "load_after": load, "quick": options.quick, "values": values}
        return None if folder is None else records.write(row.name, entry, folder)

    values = row.measure(Settings(options.quick, device, options.rounds, keep))
    path = keep(values)
    print(row.tables(values))
    for target in row.targets(values):
        state = "reached" if target.reached else "NOT REACHED"
        print(f"{target.row}: target {target.target}; measured {target.measured}: {state}")
    if path is not None:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"written to {shown}", file=sys.stderr)


def milliseconds(timing: dict[str, Any]) -> str:
    """A timing's median for a table."""
    value = 1e3 * timing["seconds"]
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times(found: dict[str, float], digits: int = 2) -> str:
    """A ratio with its interval for a table."""
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("ratio", "low", "high"))
    return f"{middle} ({low}–{high})"


def at_most(row: str, over: dict[str, float], limit: float, of: str) -> Target:
    """That a ratio is no larger than its limit, in multiples of what `of` names."""
    return Target(row, f"≤ {limit} × {of}", times(over, 3), over["ratio"] <= limit)


def mebibytes(number: int | None) -> str:
    """Bytes for a table."""
    return "–" if number is None else f"{number / 2**20:,.1f}"
