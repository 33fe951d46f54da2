"""`reproduce --train`: rows over seeds, kept one by one, and taken up again."""

import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import cli, train
from experiments.reproduce import __main__ as reproduce
from experiments.training.metrics import read_metrics
from tests.helpers.runs_helper import HTM, write_config
from tests.helpers.standins import write_yaml

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture
def manifest(tmp_path):
    """Two rows of digits, trained for two epochs."""
    few = {"train_split": "tune_validation", "val_split": "tune_validation", "batch_size": 64}
    write_config(tmp_path, "plain", data=few)
    write_config(tmp_path, "mixed", data=few, horizontal=HTM)
    rows = {
        "plain": {"dataset": "digits", "method": "baseline", "published_top1": 97.0},
        "mixed": {"dataset": "digits", "method": "HTM"},
    }
    content = {
        "configs": ".",
        "tables": {"digits": {"title": "Digits"}},
        "datasets": {"digits": {"table": "digits", "images": 284}},
        "baselines": rows,
        "checkpoints": {},
    }
    return write_yaml(tmp_path / "zoo.yaml", content)


@pytest.fixture
def words(tmp_path, manifest):
    def make(*more):
        places = {"--manifest": manifest, "--results": tmp_path / "r", "--runs": tmp_path / "runs"}
        named = [str(word) for pair in places.items() for word in pair]
        return ["--train", *map(str, more), *named]

    return make


@pytest.fixture
def calls(monkeypatch):
    """Trainings run inside this process; `fail` lists the seeds that end badly."""
    seen: list[list[str]] = []
    fail: dict[str, int] = {}

    def run(command):
        assert command[:3] == [sys.executable, "-m", "experiments.train"]
        seed = command[command.index("--seed") + 1]
        seen.append(command[3:])
        return fail.get(seed) or cli.run(train.main, command[3:])

    monkeypatch.setattr("experiments.reproduce.training._run", run)
    return seen, fail


def training_of(tmp_path, name="plain"):
    content = json.loads((tmp_path / "r" / "digits.json").read_text())
    return next(entry for entry in content["training"] if entry["name"] == name)


def test_seeds_are_trained_and_summed_up(tmp_path, words, calls, capsys):
    seen, _ = calls
    assert cli.run(reproduce.main, words("plain", "mixed", "--seeds", "1,2")) == 0
    out = capsys.readouterr().out
    seeds = [(call[call.index("--seed") + 1], Path(call[1]).stem) for call in seen]
    assert seeds == [("1", "plain"), ("1", "mixed"), ("2", "plain"), ("2", "mixed")]
    plain = training_of(tmp_path)
    figures = []
    for seed, entry in zip((1, 2), plain["seeds"], strict=True):
        folder = tmp_path / "runs" / "plain" / f"seed{seed}"
        rows = [row for row in read_metrics(folder) if row["split"] == "validation"]
        assert entry["seed"] == seed and entry["folder"] == str(folder)
        assert entry["top1"] == round(rows[-1]["top1"], 4)
        assert entry["best_top1"] == round(max(row["top1"] for row in rows), 4)
        assert (entry["epochs"], entry["steps"]) == (2, rows[-1]["step"])
        assert entry["hardware"] and entry["versions"] and entry["time"]
        figures.append(entry["top1"])
        # the recorded command is the one that a person would give
        said = shlex.split(entry["command"])
        assert said[:3] == ["python", "-m", "experiments.train"] and said[3:] in seen
    assert plain["mean"] == pytest.approx(statistics.fmean(figures))
    assert plain["std"] == pytest.approx(statistics.stdev(figures))
    text = f"{plain['mean']:.2f} ± {plain['std']:.2f}"
    assert text in out
    assert text in (tmp_path / "r" / "digits.md").read_text()
    assert text in (tmp_path / "r" / "digits.html").read_text()


def test_what_is_finished_is_not_trained_again(tmp_path, words, calls, capsys):
    seen, _ = calls
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 0
    first = training_of(tmp_path)
    assert cli.run(reproduce.main, words("plain", "--seeds", "1,2")) == 0
    assert [call[call.index("--seed") + 1] for call in seen] == ["1", "2"]
    both = training_of(tmp_path)
    assert both["seeds"][0] == first["seeds"][0] and first["std"] is None
    assert ", trained 20" in capsys.readouterr().out
    # the same wherever the data lie and however they are read
    assert cli.run(reproduce.main, words("plain", "--seeds", "1", "--data.root", "elsewhere")) == 0
    assert len(seen) == 2


@pytest.mark.parametrize("seeds", ["1", "3", "1,2,3"])
def test_seeds_of_other_settings_are_not_averaged(tmp_path, words, calls, capsys, seeds):
    seen, _ = calls
    assert cli.run(reproduce.main, words("plain", "--seeds", "1,2")) == 0
    before = training_of(tmp_path)
    more = ("--seeds", seeds, "--schedule.lr", "0.001")
    assert cli.run(reproduce.main, words("mixed", "plain", *more)) == 2
    told = capsys.readouterr().err
    assert "digits.json: holds plain with seed 1, 2, trained with other settings" in told
    assert training_of(tmp_path) == before
    assert len(seen) == 2, "refused before anything is trained"


def forgets_its_weights(folder):
    (folder / "final.safetensors").unlink()


def lacks_its_last_row(folder):
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def lacks_all_rows(folder):
    (folder / "metrics.jsonl").unlink()


@pytest.mark.parametrize("damage", [forgets_its_weights, lacks_its_last_row, lacks_all_rows])
def test_what_is_not_finished_is_not_recorded(tmp_path, words, monkeypatch, capsys, damage):
    def run(command):
        code = cli.run(train.main, command[3:])
        damage(tmp_path / "runs" / "plain" / "seed1")
        return code

    monkeypatch.setattr("experiments.reproduce.training._run", run)
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 3
    told = capsys.readouterr().err
    assert "ended with status 0, but" in told and "lacks the weights or the row of its" in told
    assert not (tmp_path / "r" / "digits.json").exists()


def test_a_stop_under_torchrun_is_told_as_one(tmp_path, words, monkeypatch, capsys):
    """A run that was asked to stop leaves torchrun with 0."""
    stop = ["--max-minutes", "0.0001"]

    def run(command):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        code = cli.run(train.main, [*command[3:], *stop])
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        assert stop == [] or code == 0
        return code

    monkeypatch.setattr("experiments.reproduce.training._run", run)
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 75
    assert "plain, seed 1: the training was asked to stop and has saved" in capsys.readouterr().err
    assert not (tmp_path / "r" / "digits.json").exists()
    # that it has stopped once says nothing of the next start, which fails
    os.utime(tmp_path / "runs" / "plain" / "seed1" / "heartbeat.json", (0, 0))
    monkeypatch.setattr("experiments.reproduce.training._run", lambda command: 2)
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 2
    monkeypatch.setattr("experiments.reproduce.training._run", run)
    stop.clear()
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 0
    assert [entry["epochs"] for entry in training_of(tmp_path)["seeds"]] == [2]


def test_a_training_that_fails_stops_and_is_taken_up_again(tmp_path, words, calls, capsys):
    seen, fail = calls
    fail["2"] = 3
    assert cli.run(reproduce.main, words("plain", "--seeds", "1,2,3")) == 3
    assert "plain, seed 2: the training ended with status 3" in capsys.readouterr().err
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1]
    fail.clear()
    assert cli.run(reproduce.main, words("plain", "--seeds", "1,2,3")) == 0
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1, 2, 3]
    assert [call[call.index("--seed") + 1] for call in seen] == ["1", "2", "2", "3"]


def test_a_config_that_cannot_be_used_is_told_before_anything_is_trained(
    tmp_path, words, calls, capsys
):
    seen, _ = calls
    (tmp_path / "mixed.yaml").write_text("sched: {}")
    assert cli.run(reproduce.main, words("plain", "mixed", "--seeds", "1")) == 2
    assert "mixed.yaml: 'sched': unknown key" in capsys.readouterr().err
    assert seen == []


def test_pretrained_weights_come_from_their_folder(tmp_path, words, calls, monkeypatch):
    seen, fail = calls
    fail["1"] = 2
    write_config(tmp_path, "plain", model={"weights": "weights/ViT.npz"})
    monkeypatch.setenv("WEIGHTS", "/elsewhere")
    assert cli.run(reproduce.main, words("plain", "mixed", "--seeds", "1")) == 2
    fail["1"] = 2
    assert cli.run(reproduce.main, words("mixed", "--seeds", "1")) == 2
    assert seen[0][seen[0].index("--model.weights") + 1] == "/elsewhere/ViT.npz"
    assert "--model.weights" not in seen[1]


def test_a_wrong_number_of_processes_is_refused(words, calls, capsys, monkeypatch):
    for text in ("0", "many", "-1"):
        monkeypatch.setenv("NPROC", text)
        assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 2
        assert f"NPROC: got {text!r}" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(reproduce.main, words("plain")) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def started(words, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.reproduce", *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for(path, process, seconds=120):
    for _ in range(seconds * 20):
        if path.exists():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"{path} did not come: {process.communicate()}")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_training_and_all_goes_on(tmp_path, words, number, capsys):
    """Real processes: the second training is stopped in its middle."""
    given = words("plain", "--seeds", "1,2", "--schedule.epochs", "40")  # of 4 steps each
    process = started(given)
    wait_for(tmp_path / "runs" / "plain" / "seed2" / "checkpoints" / "step-00000004.pt", process)
    process.send_signal(number)
    if number == signal.SIGINT:  # as a terminal does, which tells the whole group
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), number)
    out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None), out + err
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1]
    again = started(given)
    out, err = again.communicate(timeout=180)
    assert again.returncode == 0, out + err
    assert "going on after step" in out
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1, 2]
    assert [entry["epochs"] for entry in training_of(tmp_path)["seeds"]] == [40, 40]


def living_processes(word):
    """Ids of the processes whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_all_processes_of_a_training(tmp_path, words, number):
    """Real processes under torchrun, which by itself would leave them behind at SIGUSR1."""
    given = words("plain", "--seeds", "1", "--schedule.epochs", "60", "--data.batch_size", "32")
    process = started(given, NPROC="2")
    folder = tmp_path / "runs" / "plain" / "seed1"
    wait_for(folder / "checkpoints" / "step-00000008.pt", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, out + err
    assert "NPROC=2 sh run/launch.sh experiments.train" in out
    assert "plain, seed 1: the training was asked to stop and has saved" in err
    assert living_processes(str(folder)) == []
    assert not (tmp_path / "r" / "digits.json").exists()
    again = started(given, NPROC="2")
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, out + err
    assert "going on after step" in out
    assert [entry["epochs"] for entry in training_of(tmp_path)["seeds"]] == [60]
