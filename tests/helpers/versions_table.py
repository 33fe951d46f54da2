"""Records which versions the tests passed with, for the table of docs/hosts.md.

`run/versions.sh` calls it with the name of an environment, pytest's report and its arguments.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from experiments import provenance
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT

RECORDS = ROOT / "results" / "versions" / "records.jsonl"
SHOWN = ("python", "torch", "torchvision", "timm", "transformers", "numpy")


class Outcome(provenance.Record):
    """What the tests said in one environment."""

    name: str
    tests: str  # pytest's arguments
    passed: int
    skipped: int
    failed: list[str]


def records(path: Path) -> provenance.Records[Outcome]:
    """The store: the last outcome of each environment."""
    return provenance.Records(path, Outcome, key=lambda outcome: outcome.name)


def outcome(name: str, report: Path, tests: Sequence[str]) -> Outcome:
    """From pytest's report in JUnit's format, and the packages of this environment."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    origin = provenance.provenance(torch.device("cpu"))
    more = provenance.versions_of(("transformers", "lapx"))
    return Outcome(
        name=name,
        tests=shlex.join(tests),
        passed=len(cases) - len(failed) - skipped,
        skipped=skipped,
        failed=[f"{c.get('classname')}::{c.get('name')}" for c in failed],
        command=f"bash run/versions.sh {name}",
        **{**origin, "versions": {**origin["versions"], **more}},
    )


def table(name: str) -> str:
    """One row per environment."""
    assert name == "tests"
    lines = [
        [
            found.name,
            *(found.versions[package] for package in SHOWN),
            f"`{found.tests}`",
            f"{found.passed:,}",
            f"{len(found.failed):,}",
            found.time[:10],
        ]
        for found in records(RECORDS).read()
    ]
    return aligned_table(("", *SHOWN, "tests", "passed", "failed", "date"), lines, (8, 9))


if __name__ == "__main__":
    name, report, *tests = sys.argv[1:]
    records(RECORDS).keep(outcome(name, Path(report), tests))
