"""The kills of `python -m benchmarks.faults`, in short, and the table of `docs/reliability.md`."""

import json

import pytest

from benchmarks import faults
from benchmarks.faults import CHECKPOINT, EVALUATION, TRAINING, place
from benchmarks.row import latest
from experiments import cli

KILLS = {"processes": 1, "survived": 20, "total": 20}
PHASES = {"training": 19, "evaluation": 1}


def test_the_phase_of_a_training_is_read_from_its_files(tmp_path):
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


@pytest.mark.parametrize(
    "change, reached",
    [({}, True), ({"survived": 19}, False), ({"phases": {"training": 20, "evaluation": 0}}, False)],
)
def test_every_kill_must_survive_and_every_phase_be_hit(change, reached):
    values = {**KILLS, "phases": PHASES, **change}
    assert faults.targets(values)[0].reached == reached
    record = latest(faults.RESULTS)["kills-1"].model_copy(update={"values": values})
    assert ("**(not met)**" in faults.page({"kills-1": record})) != reached


@pytest.mark.slow
def test_a_quick_run_survives_its_kills_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "ROWS", faults.ROWS[:1])
    assert cli.run(faults.main, ["--quick", "--results", str(tmp_path)]) == 0
    (record,) = faults.row.records(tmp_path).read()
    assert record.values["survived"] == record.values["total"] == 3 and record.quick
