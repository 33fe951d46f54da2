"""The paper's tables beside ours: `python -m experiments.reproduce [--table cifar|imagenet]`."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.config import known_keys
from experiments.errors import ConfigError, DataError
from experiments.reproduce.terminal import Terminal
from experiments.zoo.manifest import MANIFEST, Manifest, Row, read_manifest

if TYPE_CHECKING:
    from experiments.reproduce.records import TableRecord

USAGE = """usage: python -m experiments.reproduce [ROW...] [OPTION ...] [--SECTION.KEY VALUE ...]

Evaluate the released checkpoints that are there, and put the results beside the paper's figures:
RESULTS/TABLE.json, .md and .html. What is interrupted goes on where it stopped, with the same
command. With --train, train the rows with several seeds instead.

ROW is a row's name, the file of its checkpoint or its config; without one, all rows of the table.

options:
  --table NAME       cifar, imagenet or all (default: all)
  --download         fetch missing checkpoints, and missing data sets as far as torchvision can
  --fresh            evaluate also what was evaluated before with the same files and settings
  --train            train the rows (name them, or give --table) and report mean and deviation;
                     NPROC=N in the environment starts each training with N processes
  --seeds LIST       of the trainings (default: 42,43,44)
  --runs DIR         folder of the trainings' run folders (default: output/reproduce)
  --render           only make the pages, and the tables in README and docs, from the records
  --results DIR      folder of what is written (default: results)
  --weights DIR      folder of the weights (default: $WEIGHTS, else weights)
  --manifest FILE    what is in the zoo (default: weights/zoo.yaml of this project)
  --SECTION.KEY VALUE   overrides a key of every row's config, such as --data.root, --device and
                        --data.eval_batch_size ($DATA is taken for --data.root)
"""
_OPTIONS = {
    "table": cli.Option("table"),
    "download": cli.Option("fetch what is missing", takes_value=False),
    "fresh": cli.Option("evaluate everything", takes_value=False),
    "train": cli.Option("train instead", takes_value=False),
    "seeds": cli.Option("seeds of the trainings"),
    "runs": cli.Option("folder of run folders"),
    "render": cli.Option("only make the pages", takes_value=False),
    "results": cli.Option("folder of what is written"),
    "weights": cli.Option("folder of the weights"),
    "manifest": cli.Option("what is in the zoo"),
}
_ALL = "all"


def main(argv: Sequence[str]) -> None:
    """Read the command line and do what it says."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return
    keys = {name: cli.Option("") for name in known_keys() if name not in ("output", "seed")}
    found, words = cli.split_options(argv, {**keys, **_OPTIONS})
    options = {name: value for name, value in found.items() if name in _OPTIONS}
    overrides = {name: value for name, value in found.items() if name not in _OPTIONS}
    if os.environ.get("DATA"):
        overrides.setdefault("data.root", os.environ["DATA"])
    _check(options)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "environment: WORLD_SIZE: reproduce runs in one process; start it without torchrun "
            "(with --train, NPROC=N starts each training with N processes)"
        )
    manifest = read_manifest(Path(options.get("manifest", MANIFEST)))
    results = Path(options.get("results", "results"))
    table = options.get("table", _ALL)
    if table not in (_ALL, *manifest.tables):
        names = ", ".join((*manifest.tables, _ALL))
        raise ConfigError(f"command line: --table: got {table!r}; allowed: {names}")
    rows = _rows(manifest, table, words)
    if "render" in options:
        render(manifest, results)
        return
    if "train" in options:
        if not words and "table" not in options:
            raise ConfigError("command line: --train: name the rows, or give --table")
        train(manifest, results, rows, options, overrides)
    else:
        command = shlex.join(["python", "-m", "experiments.reproduce", *argv])
        evaluate(manifest, results, rows, options, overrides, command)
    _finish(manifest, results, sorted({row.table for row in rows}), table == _ALL and not words)


def evaluate(
    manifest: Manifest,
    results: Path,
    rows: list[Row],
    options: dict[str, str],
    overrides: dict[str, str],
    command: str,
) -> None:
    """Evaluate rows, and keep records and pages up to date after each."""
    from experiments.reproduce.evaluation import Reproduction
    from experiments.zoo.download import Zoo

    terminal = Terminal(sys.stdout)
    folder = Path(options.get("weights") or os.environ.get("WEIGHTS") or "weights")
    Reproduction(
        manifest=manifest,
        zoo=Zoo(folder, say=terminal.line),
        results=results,
        overrides=overrides,
        download="download" in options,
        fresh="fresh" in options,
        command=command,
        say=terminal.line,
        finished=lambda record: _write([record], results, record.table),
    ).evaluate(rows)


def train(
    manifest: Manifest,
    results: Path,
    rows: list[Row],
    options: dict[str, str],
    overrides: dict[str, str],
) -> None:
    """Train rows, and keep records and pages up to date after each."""
    from experiments.reproduce.training import Trainings

    Trainings(
        manifest=manifest,
        results=results,
        output=Path(options.get("runs", "output/reproduce")),
        overrides=overrides,
        weights=Path(os.environ["WEIGHTS"]) if os.environ.get("WEIGHTS") else None,
        say=Terminal(sys.stdout).line,
        finished=lambda record: _write([record], results, record.table),
    ).train(rows, _seeds(options.get("seeds", "42,43,44")))


def render(manifest: Manifest, results: Path) -> None:
    """Make all pages and all generated blocks of the documents from the records."""
    from experiments.reproduce.records import read_record
    from experiments.reproduce.table import update_documents

    records = [read_record(results, manifest, name) for name in manifest.tables]
    for record in records:
        _write([record], results, record.table)
    _write(records, results, _ALL)
    for path in update_documents(MANIFEST.parent.parent, manifest, results):
        print(f"changed: {path}")


def _finish(manifest: Manifest, results: Path, tables: list[str], everything: bool) -> None:
    """Print the tables and say where they are."""
    from experiments.reproduce.records import read_record, record_path
    from experiments.reproduce.table import print_record

    terminal = Terminal(sys.stdout)
    records = [read_record(results, manifest, name) for name in manifest.tables if name in tables]
    names = list(tables)
    for record in records:
        print_record(record, terminal)
    if everything:
        _write(records, results, _ALL)
        names.append(_ALL)
    terminal.line()
    for name in names:
        _write([r for r in records if name in (r.table, _ALL)], results, name)
        path = record_path(results, name)
        terminal.line(f"{path}, {path.stem}.md, {path.stem}.html")


def _write(records: "list[TableRecord]", results: Path, name: str) -> None:
    """The pages of one or all tables, and for all of them the joint JSON."""
    from experiments.files import write_atomically
    from experiments.reproduce.page import page
    from experiments.reproduce.records import as_json
    from experiments.reproduce.table import markdown

    contents = {"md": markdown(records), "html": page(records)}
    if name == _ALL:
        joined = ",\n".join(as_json(record).rstrip() for record in records)
        contents["json"] = f'{{"tables": [\n{joined}\n]}}\n'
    try:
        results.mkdir(parents=True, exist_ok=True)
        for ending, text in contents.items():
            write_atomically(results / f"{name}.{ending}", text.encode())
    except OSError as error:
        raise DataError(f"{results}: cannot write the pages: {error.strerror}") from None


def _rows(manifest: Manifest, table: str, words: list[str]) -> list[Row]:
    if not words:
        return manifest.rows(None if table == _ALL else table)
    rows = [manifest.row(word) for word in words]
    for word, row in zip(words, rows, strict=True):
        if table not in (_ALL, row.table):
            raise ConfigError(f"command line: {word!r}: is a row of {row.table}, not of {table}")
    return list(dict.fromkeys(rows))


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words) or len(set(words)) < len(words):
        raise ConfigError(
            f"command line: --seeds: got {text!r}; allowed: whole numbers with commas between, "
            "each once"
        )
    return [int(word) for word in words]


def _check(options: dict[str, str]) -> None:
    """Refuse options that have no meaning together."""
    for mode, others in {
        "train": ("download", "fresh", "render", "weights"),
        "render": ("download", "fresh", "table", "seeds", "runs", "weights"),
    }.items():
        for other in others:
            if mode in options and other in options:
                raise ConfigError(f"command line: --{other}: has no meaning with --{mode}")
    for option in ("seeds", "runs"):
        if option in options and "train" not in options:
            raise ConfigError(f"command line: --{option}: has a meaning only with --train")


if __name__ == "__main__":
    sys.exit(cli.run(main))
