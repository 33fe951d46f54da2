"""Run a study: `python -m experiments.study --study configs/studies/NAME.yaml`."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments import cli
from experiments.config.keys import known_keys, optional_sections
from experiments.errors import ConfigError, SavedAndStopped, TrainingFailed

if TYPE_CHECKING:
    from experiments.study.plan import Study

USAGE = """usage: python -m experiments.study --study FILE [--jobs N] [--SECTION.KEY VALUE ...]

Train every variant of a study with every seed, keep a record of each training, and write the
page and the picture that compare them. Finished trainings are kept; interrupted ones resume.

options:
  --study FILE     the study, a YAML file of configs/studies
  --jobs N         trainings at a time, each in its own process (default: 1)
  --threads N      threads per training (default: 1)
  --only NAMES     only these variants, separated by commas; page and picture are left alone
  --seed SEED      only this seed of the study; page and picture are left alone
  --run NAME/SEED  one training alone, in this process
  --report         only rewrite page and picture from the records, and the documents' tables
  --judge DIR      mix test images by the saliency of the finished trainings at layer 0, and record
                   how well the labels agree with what the model of this run folder sees
  --output DIR     folder of the run folders (default: output/studies)
  --results DIR    folder of the records and pages (default: results)

--SECTION.KEY VALUE sets a key of the config in every training; python -m experiments.train --help
lists the keys.
"""
_VALUES = ("study", "jobs", "threads", "only", "seed", "run", "judge", "output", "results")
_OPTIONS = {name: cli.Option("") for name in _VALUES} | {"report": cli.Option("", False)}


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
    mode = next((name for name in ("report", "judge", "run") if name in options), None)
    for other in ("judge", "run", "jobs", "only", "seed"):
        if mode not in (None, other) and other in options:
            raise ConfigError(f"command line: --{other}: has no meaning with --{mode}")
    output = Path(options.get("output", "output/studies"))
    results = Path(options.get("results", "results"))

    from experiments.study.plan import read_study

    study = read_study(options["study"])
    if "report" in options:
        from experiments.documents.markdown import update_documents
        from experiments.provenance import ROOT
        from experiments.study.page import makers

        _show(study, results)
        if results.resolve() == ROOT / "results":  # the documents show this checkout's results
            for path in update_documents(ROOT, makers(results)):
                print(f"changed: {path}")
        return

    if "judge" in options:
        from experiments.study.labels import judge_labels

        judge, command = options["judge"], shlex.join(["python", "-m", "experiments.study", *argv])
        count = judge_labels(study, output / study.name, results, Path(judge), command)
        print(f"labels of {count} trainings judged, kept in {results}")
        return

    from experiments.study.run import Runner
    from experiments.training.stopping import StopRequests

    part = _part(study, options)
    runner = Runner(
        part,
        command=["-m", "experiments.study", "--study", study.file],
        places=["--output", str(output), "--results", str(results)],
        overrides=overrides,
        runs=output / study.name,
        results=results,
        threads=cli.whole_number("command line: --threads", options.get("threads", "1")),
    )
    jobs = cli.whole_number("command line: --jobs", options.get("jobs", "1"))
    with StopRequests() as requests:
        if "run" in options:
            runner.train_one(options["run"], requests)
            return
        try:
            runner.train(jobs, requests)
        except (SavedAndStopped, TrainingFailed):
            if part == study and runner.records.path.exists():
                _show(study, results)  # the trainings that are done so far
            raise
    if part == study:
        _show(study, results)


def _part(study: "Study", options: Mapping[str, str]) -> "Study":
    """The variants and the seed that `--only` and `--seed` name."""
    variants, seeds = study.variants, study.seeds
    if "only" in options:
        names = [name.strip() for name in options["only"].split(",")]
        for name in names:
            if name not in variants:
                raise ConfigError(
                    f"command line: --only: got {name!r}; allowed: {', '.join(variants)}"
                )
        variants = {name: variants[name] for name in variants if name in names}
    if "seed" in options:
        seeds = tuple(seed for seed in seeds if str(seed) == options["seed"])
        if not seeds:
            allowed = ", ".join(map(str, study.seeds))
            raise ConfigError(f"command line: --seed: got {options['seed']!r}; allowed: {allowed}")
    return replace(study, variants=variants, seeds=seeds)


def _show(study: "Study", results: Path) -> None:
    """Write page and picture, and print where they are."""
    from experiments.study.page import write_report

    for path in write_report(study, results):
        print(path)


if __name__ == "__main__":
    sys.exit(cli.run(main))
