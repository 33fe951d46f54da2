"""The proof of reliability, in short, and the figures that the document shows."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import faults, faults_page
from benchmarks.faults_processes import CHECKPOINT, EVALUATION, TRAINING, place
from experiments import cli
from experiments.provenance import ROOT


def test_the_document_shows_the_newest_figures():
    text = faults_page.DOCUMENT.read_text(encoding="utf-8")
    result = faults_page.newest_result(faults_page.RESULTS)
    assert set(result) == set(faults.PARTS)
    assert text == faults_page.shown(text, result), "run python -m benchmarks.faults --render"
    for part, entry in result.items():
        assert entry["good"] == faults.good(part, entry), part
        assert not entry["quick"], part


def test_what_a_run_does_is_told_from_its_files(tmp_path):
    def rows(*steps):
        lines = [json.dumps({"split": split, "step": step}) for split, step in steps]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    assert place(tmp_path) == (TRAINING, 0)
    (tmp_path / "checkpoints").mkdir()
    rows(("train", 20), ("train", 22))
    assert place(tmp_path) == (TRAINING, 22), "not saved yet"
    (tmp_path / "checkpoints" / "step-00000022.pt").touch()
    assert place(tmp_path) == (EVALUATION, 22)
    rows(("train", 22), ("validation", 22))
    assert place(tmp_path) == (TRAINING, 22)
    (tmp_path / "checkpoints" / ".best.pt.abc.tmp").touch()
    assert place(tmp_path) == (CHECKPOINT, 22)


def test_what_is_not_as_promised_is_not_good():
    kills = {"survived": 20, "total": 20, "phases": {"training": 19, "evaluation": 1}}
    assert faults.good("kills-1", kills)
    assert not faults.good("kills-1", {**kills, "survived": 19})
    assert not faults.good("kills-2", {**kills, "phases": {"training": 20, "evaluation": 0}})
    soak = {"resident_mib": [500, 505], "files": [7, 7], "threads": [4, 4]}
    assert faults.good("soak", soak)
    assert not faults.good("soak", {**soak, "files": [7, 8]})
    assert not faults.good("soak", {**soak, "resident_mib": [500, 600]})


def test_a_part_that_stopped_nothing_is_told_and_not_good():
    stops = {"same": True, "to_saved": [], "to_exit": []}
    assert not faults.good("stops", stops)
    assert faults.good("stops", {**stops, "to_saved": [0.1], "to_exit": [0.2]})
    result = faults_page.newest_result(faults_page.RESULTS)
    entry = {**result["stops"], **stops, "good": False}
    assert "| SIGTERM | none of the runs was stopped **(not met)** |" in faults_page.table(
        {"stops": entry}
    )


def test_a_run_that_goes_on_again_and_again_leaves_no_file_and_no_thread_open(tmp_path):
    """In a process of its own: what other tests left would come and go in between."""
    code = (
        "import pathlib, sys, torch; torch.set_num_threads(1)\n"
        "from benchmarks.faults_within import measure_soak\n"
        "measure_soak(pathlib.Path(sys.argv[1]), cycles=4, minutes=2)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    found = re.search(r"cycles=4, .*files=\((\d+), (\d+)\), threads=\((\d+), (\d+)\)", done.stdout)
    assert found is not None, done.stdout
    files_before, files_after, threads_before, threads_after = map(int, found.groups())
    assert files_before == files_after and threads_before == threads_after


def test_unknown_parts_are_refused(tmp_path, capsys):
    assert cli.run(faults.main, ["--parts", "kills-3", "--results", str(tmp_path)]) == 2
    assert "kills-3" in capsys.readouterr().err


@pytest.mark.slow
def test_the_short_version_measures_what_is_promised(tmp_path):
    words = ["--quick", "--results", str(tmp_path), "--parts", "kills-1,damages,stops"]
    assert cli.run(faults.main, words) == 0
    (path,) = tmp_path.glob("*.json")
    assert all(entry["good"] for entry in json.loads(path.read_text()).values())
