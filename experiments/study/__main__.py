"""Run a study: `python -m experiments.study --study configs/studies/NAME.yaml`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.config import known_keys, optional_sections
from experiments.errors import ConfigError, SavedAndStopped, TrainingFailed

if TYPE_CHECKING:
    from experiments.study.plan import Study
    from experiments.study.queue import Queue

USAGE = """usage: python -m experiments.study --study FILE [--jobs N] [--SECTION.KEY VALUE ...]

Train every variant of a study with every seed, keep a record of each training, and write the
page and the picture that compare them. What is done is kept, what was cut off goes on.

options:
  --study FILE     the study, a YAML file of configs/studies
  --jobs N         trainings at a time, each a process of its own (default: 1)
  --threads N      threads of each training (default: 1)
  --run NAME/SEED  one training alone, in this process
  --report         only write page and picture anew from the records, and the documents' tables
  --output DIR     folder of the run folders (default: output/studies)
  --results DIR    folder of the records and pages (default: results)

--SECTION.KEY VALUE sets a key of the config in every training; python -m experiments.train --help
lists the keys.
"""
_OPTIONS = {
    "study": cli.Option("the study"),
    "jobs": cli.Option("trainings at a time"),
    "threads": cli.Option("threads of each training"),
    "run": cli.Option("one training alone"),
    "report": cli.Option("only write the page", takes_value=False),
    "output": cli.Option("folder of the run folders"),
    "results": cli.Option("folder of the records"),
}


def main(argv: Sequence[str]) -> None:
    """Read the command line, then train and report."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return
    keys = (*known_keys(), *optional_sections())
    known = {name: cli.Option("") for name in keys if name not in ("seed", "output")}
    found, words = cli.split_options(argv, {**known, **_OPTIONS})
    if words:
        raise ConfigError(f"command line: {words[0]!r}: expected --study FILE or --KEY VALUE")
    options = {name: value for name, value in found.items() if name in _OPTIONS}
    overrides = {name: value for name, value in found.items() if name not in _OPTIONS}
    if "study" not in options:
        raise ConfigError("command line: --study: missing; it is a file of configs/studies")
    for other in ("run", "jobs"):
        if "report" in options and other in options:
            raise ConfigError(f"command line: --{other}: has no meaning with --report")
    if "run" in options and "jobs" in options:
        raise ConfigError("command line: --jobs: has no meaning with --run")
    jobs, threads = _count(options, "jobs"), _count(options, "threads")

    from experiments.study.plan import read_study
    from experiments.study.queue import Queue

    study = read_study(options["study"])
    output = Path(options.get("output", "output/studies"))
    results = Path(options.get("results", "results"))
    queue = Queue(study, overrides, output, results, threads, say)
    if "run" in options:
        run_one(queue, options["run"])
        return
    if "report" in options:
        show(study, results)
        update_documents(results)
        return
    from experiments.training.stopping import StopRequests

    try:
        with StopRequests() as requests:
            queue.train(jobs, requests)
    except (SavedAndStopped, TrainingFailed):
        if queue.path.exists():
            show(study, results)  # what is done so far
        raise
    show(study, results)


def show(study: "Study", results: Path) -> None:
    """Write page and picture, and say where they are."""
    from experiments.study.page import write_report

    for path in write_report(study, results):
        print(path)


def update_documents(results: Path) -> None:
    """Make the blocks of this checkout's documents anew, where these are its results."""
    from experiments.provenance import ROOT
    from experiments.reproduce import table as report
    from experiments.zoo.manifest import MANIFEST, read_manifest

    if results.resolve() != ROOT / "results":
        return
    for path in report.update_documents(ROOT, read_manifest(MANIFEST), results):
        print(f"changed: {path}")


def run_one(queue: "Queue", name: str) -> None:
    """Train one variant with one seed here, and keep its record."""
    from experiments.study.records import keep_record
    from experiments.training.stopping import StopRequests

    trainings = {training.name: training for training in queue.trainings()}
    if name not in trainings:
        variant = name.rpartition("/")[0]
        known = queue.study.variants
        allowed = (
            f"a seed of {', '.join(map(str, queue.study.seeds))}"
            if variant in known
            else f"NAME/SEED with a name of {', '.join(known)}"
        )
        raise ConfigError(f"command line: --run: got {name!r}; allowed: {allowed}")
    training = trainings[name]
    with StopRequests() as requests:
        record = training.train(requests)
    keep_record(queue.path, queue.study, record)
    print(f"{name}: {record.top1:.2f}%, kept in {queue.path}")


def say(text: str) -> None:
    """Tell how it gets on."""
    print(text, flush=True)


def _count(options: dict[str, str], name: str) -> int:
    text = options.get(name, "1")
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise ConfigError(
            f"command line: --{name}: got {text!r}; allowed: a whole number from 1 to 1024"
        )
    return int(text)


if __name__ == "__main__":
    sys.exit(cli.run(main))
