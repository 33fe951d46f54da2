"""Where a figure comes from, and the file that keeps it."""

import json
import platform
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from experiments import provenance
from experiments.errors import DataError
from experiments.provenance import Record, Records

ORIGIN = {
    "command": "python -m x",
    "hardware": "a processor",
    "versions": {"torch": "2"},
    "commit": None,
    "time": "2026-11-25T00:00:00+00:00",
}


class Speed(Record):
    row: str
    seconds: float
    note: str | None = None


def speed(row="a", seconds=1.5, **more):
    return Speed(row=row, seconds=seconds, **{**ORIGIN, **more})


@pytest.fixture
def store(tmp_path):
    return Records(tmp_path / "results" / "speeds.jsonl", Speed, lambda record: record.row)


def test_a_record_of_the_same_key_is_replaced(store):
    assert store.read() == []
    for record in (speed("a"), speed("b"), speed("a", 2.5, note="−")):
        store.keep(record)
    assert store.read() == [speed("a", 2.5, note="−"), speed("b")]
    first = json.loads(store.path.read_text().splitlines()[0])
    assert list(first) == ["row", "seconds", "note", *ORIGIN]
    assert {p.name for p in store.path.parent.iterdir()} == {"speeds.jsonl", ".speeds.jsonl.lock"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seconds": "1.5"}, "seconds: Input should be a valid number"),
        ({"seconds": float("nan")}, "seconds: Input should be a finite number"),
        ({"seconds": True}, "seconds: Input"),
        ({"secs": 1.0}, "secs: Extra inputs are not permitted"),
        ({"hardware": None}, "hardware: Input should be a valid string"),
        (None, "Invalid JSON"),
    ],
)
def test_a_damaged_line_is_named_and_left(store, change, message):
    store.keep(speed())
    good = store.path.read_text()
    bad = "{" if change is None else json.dumps({**json.loads(good), **change})
    store.path.write_text(good + bad + "\n")
    before = store.path.read_bytes()
    for action in (store.read, lambda: store.keep(speed("b"))):
        with pytest.raises(DataError, match=f"speeds.jsonl, line 2: is damaged.*{message}"):
            action()
    assert store.path.read_bytes() == before
    if change is not None:
        with pytest.raises(ValidationError):
            Speed(**{**json.loads(good), **change})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    store = Records(tmp_path / "file" / "x.jsonl", Speed, lambda record: record.row)
    with pytest.raises(DataError, match=r"x.jsonl: cannot write the records: "):
        store.keep(speed())


def test_processes_that_write_at_once_lose_no_record(store, tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, "")
from tests.experiments.test_provenance import *
store = Records(Path({str(store.path)!r}), Speed, lambda record: record.row)
for number in range(20):
    store.keep(speed(f"{{sys.argv[1]}}/{{number}}"))
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert {r.row for r in store.read()} == {f"{name}/{n}" for name in "abc" for n in range(20)}


def test_processors_of_the_same_name_are_told_apart(tmp_path):
    path = tmp_path / "cpuinfo"
    assert provenance._processor(path) == (platform.processor() or platform.machine())
    path.write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t: 99\n")
    assert provenance._processor(path) == "AMD EPYC (family 25, model 17)"


def test_provenance(monkeypatch, tmp_path):
    told = provenance.provenance(torch.device("cpu"))
    assert told.keys() == Record.model_fields.keys() - {"command"}
    assert told["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert "threads" in told["hardware"]
    assert provenance.code_hash() == provenance.code_hash()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    source = tmp_path / "tokenmixup" / "solver.c"
    source.parent.mkdir()
    before = provenance.code_hash()
    source.write_text("int x;")
    assert provenance.code_hash() != before
    assert provenance.commit() is None  # no checkout
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None  # no git
