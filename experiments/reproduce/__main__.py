"""The paper's tables beside ours: `python -m experiments.reproduce [--table cifar|imagenet]`."""

import io
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.config.keys import known_keys
from experiments.errors import ConfigError, DataError
from experiments.zoo.manifest import MANIFEST, Manifest, Row, read_manifest

if TYPE_CHECKING:
    from experiments.reproduce.table import PaperTable
    from experiments.study.plan import Study

USAGE = """usage: python -m experiments.reproduce [ROW...] [OPTION ...] [--SECTION.KEY VALUE ...]

Evaluate the released checkpoints that are there, and compare the results with the paper's figures:
RESULTS/TABLE.json, .md and .html per table. The same command resumes what was interrupted. With
--train, train the rows with several seeds instead.

ROW is a row's name, the file of its checkpoint or its config; without one, all rows of the table.

options:
  --table NAME       cifar, imagenet or all (default: all)
  --download         fetch missing checkpoints, and missing data sets as far as torchvision can
  --fresh            evaluate also what was evaluated before with the same files and settings
  --train            train the rows (name them, or give --table) and report mean and deviation;
                     NPROC=N in the environment starts each training with N processes
  --seeds LIST       of the trainings (default: 42,43,44)
  --jobs N           trainings at a time (default: 1)
  --run CONFIG/SEED  with --train: one training alone, in this process
  --runs DIR         folder of the trainings' run folders (default: output/reproduce)
  --render           only rewrite the pages, and the tables in README and docs, from the records
  --results DIR      folder of what is written (default: results)
  --weights DIR      folder of the weights (default: $WEIGHTS, else weights)
  --manifest FILE    what is in the zoo (default: weights/zoo.yaml of this project)
  --SECTION.KEY VALUE   overrides a key of every row's config, such as --data.root, --device and
                        --data.eval_batch_size ($DATA is taken for --data.root)
"""
_VALUES = ("table", "seeds", "jobs", "run", "runs", "results", "weights", "manifest")
_FLAGS = ("download", "fresh", "train", "render")
_OPTIONS = {name: cli.Option("", takes_value=name in _VALUES) for name in (*_VALUES, *_FLAGS)}
_COLOURS = {"reproduced": "green", "differs": "red", "part of the images": "yellow"}


def main(argv: Sequence[str]) -> None:
    """Read the command line, then evaluate, train or render."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return
    keys = {name: cli.Option("") for name in known_keys() if name not in ("output", "seed")}
    found, words = cli.split_options(argv, {**keys, **_OPTIONS})
    options = {name: value for name, value in found.items() if name in _OPTIONS}
    overrides = {name: value for name, value in found.items() if name not in _OPTIONS}
    if os.environ.get("DATA"):
        overrides.setdefault("data.root", os.environ["DATA"])
    _check(options, words)
    manifest = read_manifest(Path(options.get("manifest", MANIFEST)))
    results = Path(options.get("results", "results"))
    rows = _rows(manifest, options.get("table", "all"), words)
    if "render" in options:
        render(manifest, results)
        return
    if "train" in options:
        train(manifest, results, rows, options, overrides)
    else:
        command = shlex.join(["python", "-m", "experiments.reproduce", *argv])
        evaluate(manifest, results, rows, options, overrides, command)
    if "run" not in options:
        names = [name for name in manifest.tables if name in {row.table for row in rows}]
        for name in names:
            _print(_write(manifest, results, name))
        print()
        for name in names:
            print(f"{results / name}.json, {name}.md, {name}.html")
    if "train" not in options:
        _refuse_nothing(results, rows)


def _refuse_nothing(results: Path, rows: list[Row]) -> None:
    from experiments.reproduce.table import row_records

    ours = {record.row: record.ours for record in row_records(results).read()}
    if all(ours.get(row.name) is None for row in rows):
        raise DataError(
            "nothing could be evaluated: the lines above say why of each row; --download fetches "
            "released checkpoints"
        )


def evaluate(
    manifest: Manifest,
    results: Path,
    rows: list[Row],
    options: dict[str, str],
    overrides: dict[str, str],
    command: str,
) -> None:
    """Evaluate rows, and keep records and pages up to date after each."""
    from experiments.reproduce.evaluate import evaluate_rows
    from experiments.reproduce.table import row_records
    from experiments.zoo.download import Zoo

    for row in evaluate_rows(
        manifest,
        Zoo(Path(options.get("weights") or os.environ.get("WEIGHTS") or "weights")),
        row_records(results),
        rows,
        overrides,
        download="download" in options,
        fresh="fresh" in options,
        command=command,
    ):
        _write(manifest, results, row.table)


def train(
    manifest: Manifest,
    results: Path,
    rows: list[Row],
    options: dict[str, str],
    overrides: dict[str, str],
) -> None:
    """Train rows as a study without a plain variant, and keep pages up to date after each."""
    from experiments.study.run import Runner
    from experiments.training.stopping import StopRequests

    seeds = _seeds(options.get("seeds", "42,43,44"))
    jobs = cli.whole_number("command line: --jobs", options.get("jobs", "1"))
    if "run" in options:
        name, _, seed = options["run"].rpartition("/")
        rows, seeds = [manifest.row(name)], _seeds(seed)
    runs = Path(options.get("runs", "output/reproduce"))
    places = {"--runs": runs, "--results": results, "--manifest": manifest.path}
    names = {row.table for row in rows}
    runner = Runner(
        _study(manifest, rows, seeds),
        command=["-m", "experiments.reproduce", "--train"],
        places=[str(word) for pair in places.items() for word in pair],
        overrides=overrides,
        runs=runs,
        results=results,
        threads=None,
        processes=cli.whole_number("environment: NPROC", os.environ.get("NPROC") or "1"),
        finished=lambda: [_write(manifest, results, name) for name in names],
    )
    with StopRequests() as requests:
        if "run" in options:
            runner.train_one(options["run"], requests)
        else:
            runner.train(jobs, requests)


def _study(manifest: Manifest, rows: list[Row], seeds: tuple[int, ...]) -> "Study":
    """The rows with the seeds; pretrained weights come from $WEIGHTS where a config wants some."""
    from experiments.config.reading import Setting, read_settings
    from experiments.reproduce.table import STUDY
    from experiments.study.plan import Study, Variant

    variants, key, folder = {}, "model.weights", os.environ.get("WEIGHTS")
    for row in rows:
        path = manifest.config_path(row.config)
        settings = read_settings(path)
        if folder and key in settings and settings[key].value is not None:
            path_there = Path(folder) / Path(str(settings[key].value)).name
            settings[key] = Setting(str(path_there), "environment: WEIGHTS")
        variants[row.config] = Variant(row.config, row.config, str(path), settings)
    title = "The paper's tables, trained here"
    return Study(STUDY, "the configs", title, title, plain="", seeds=seeds, variants=variants)


def render(manifest: Manifest, results: Path) -> None:
    """Make all pages and all generated blocks of the documents from the records."""
    from experiments.documents.markdown import update_documents
    from experiments.reproduce.table import makers
    from experiments.study import page as study_page

    for name in manifest.tables:
        _write(manifest, results, name)
    every = {**makers(manifest, results), **study_page.makers(results)}
    for path in update_documents(MANIFEST.parent.parent, every):
        print(f"changed: {path}")


def _write(manifest: Manifest, results: Path, name: str) -> "PaperTable":
    """Write the pages of a table."""
    from experiments.files import write_atomically
    from experiments.reproduce.page import page
    from experiments.reproduce.table import json_text, markdown, read_table

    table = read_table(results, manifest, name)
    contents = {"md": markdown(table), "html": page(table), "json": json_text(table)}
    try:
        results.mkdir(parents=True, exist_ok=True)
        for ending, text in contents.items():
            write_atomically(results / f"{name}.{ending}", text.encode())
    except OSError as error:
        raise DataError(f"{results}: cannot write the pages: {error.strerror}") from None
    return table


def _print(table: "PaperTable") -> None:
    """Print a table: coloured on a terminal that shows colours, plain text in a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from experiments.reproduce.table import HEAD, RIGHT, TRAINING_HEAD, TRAINING_RIGHT

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter
    # a pipe has no width that lines could be broken at
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200)
    for title, head, right, rows in (
        (table.title, HEAD, RIGHT, [line.cells() for line in table.lines]),
        (
            "Trained here",
            TRAINING_HEAD,
            TRAINING_RIGHT,
            [x.training_cells() for x in table.trained],
        ),
    ):
        grid = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(head):
            grid.add_column(name, justify="right" if number in right else "left")
        for cells in rows:
            grid.add_row(*cells[:-1], Text(cells[-1], _COLOURS.get(cells[-1], "")))
        if rows:
            console.print(grid)


def _rows(manifest: Manifest, table: str, words: list[str]) -> list[Row]:
    if table not in (*manifest.tables, "all"):
        names = ", ".join((*manifest.tables, "all"))
        raise ConfigError(f"command line: --table: got {table!r}; allowed: {names}")
    if not words:
        return manifest.rows(None if table == "all" else table)
    rows = [manifest.row(word) for word in words]
    for word, row in zip(words, rows, strict=True):
        if table not in ("all", row.table):
            raise ConfigError(f"command line: {word!r}: is a row of {row.table}, not of {table}")
    return list(dict.fromkeys(rows))


def _seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() for word in words) or len(set(words)) < len(words):
        raise ConfigError(
            f"command line: --seeds: got {text!r}; allowed: whole numbers with commas between, "
            "each once"
        )
    return tuple(int(word) for word in words)


def _check(options: dict[str, str], words: list[str]) -> None:
    """Refuse options that have no meaning together."""
    for mode, others in {
        "train": ("download", "fresh", "render", "weights"),
        "render": ("download", "fresh", "table", "weights"),
        "run": ("seeds", "jobs", "table"),
    }.items():
        for other in others:
            if mode in options and other in options:
                raise ConfigError(f"command line: --{other}: has no meaning with --{mode}")
    for option in ("seeds", "jobs", "run", "runs"):
        if option in options and "train" not in options:
            raise ConfigError(f"command line: --{option}: has a meaning only with --train")
    if "train" in options and not words and not {"table", "run"} & options.keys():
        raise ConfigError("command line: --train: name the rows, or give --table")
    if "run" in options and words:
        raise ConfigError(f"command line: {words[0]!r}: has no meaning with --run")
    if "run" not in options and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "environment: WORLD_SIZE: reproduce runs in one process; start it without torchrun "
            "(with --train, NPROC=N starts each training with N processes)"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
