"""`reproduce --train`: a study of rows and seeds, whose trainings are kept and resumed."""

import contextlib
import json
import os
import shlex
import signal
import statistics
from pathlib import Path

import pytest

from experiments import cli
from experiments.reproduce import __main__ as reproduce
from experiments.study.run import Runner
from experiments.training.metrics import read_metrics
from tests.helpers.commands import ended, fails, finished, outcome, started, wait_until
from tests.helpers.runs_helper import HTM, write_config
from tests.helpers.standins import write_yaml

FEW = {"train_split": "tune_validation", "val_split": "tune_train[:285]", "batch_size": 64}


@pytest.fixture
def manifest(tmp_path):
    """Two rows of digits, trained for two epochs."""
    write_config(tmp_path, "plain", data=FEW)
    write_config(tmp_path, "mixed", data=FEW, horizontal=HTM)
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
    """The commands of the trainings, which run inside this process.

    `codes` maps a training's name to the exit code with which it ends instead.
    """
    seen, codes = [], {}

    class Ended:
        def __init__(self, code):
            self.returncode = code

        def poll(self):
            return self.returncode

    def start(runner, training):
        seen.append(training.name)
        command = [*runner._words(training), *runner.places]
        assert command[:3] == ["-m", "experiments.reproduce", "--train"]
        if training.name in codes:
            return Ended(codes[training.name])
        return Ended(cli.run(reproduce.main, command[2:]))

    monkeypatch.setattr(Runner, "_start", start)
    monkeypatch.setattr("experiments.study.run._SECONDS_BETWEEN_LOOKS", 0)
    return seen, codes


def training_of(tmp_path, name="plain"):
    content = json.loads((tmp_path / "r" / "digits.json").read_text())
    return next(entry for entry in content["training"] if entry["name"] == name)


def test_seeds_are_trained_and_averaged(tmp_path, words, calls, capsys):
    seen, _ = calls
    given = words("plain", "mixed", "--seeds", "1,2", "--schedule.lr", "0.002")
    assert cli.run(reproduce.main, given) == 0
    out = capsys.readouterr().out
    assert seen == ["plain/1", "mixed/1", "plain/2", "mixed/2"]
    plain = training_of(tmp_path)
    figures = []
    for seed, entry in zip((1, 2), plain["seeds"], strict=True):
        folder = tmp_path / "runs" / "plain" / f"seed{seed}"
        rows = [row for row in read_metrics(folder) if row["split"] == "validation"]
        assert entry["seed"] == seed
        assert entry["top1"] == round(rows[-1]["top1"], 4)
        assert entry["best_top1"] == round(max(row["top1"] for row in rows), 4)
        assert (entry["epochs"], entry["steps"]) == (2, rows[-1]["step"])
        assert entry["hardware"] and entry["versions"] and entry["time"]
        figures.append(entry["top1"])
        # the recorded command is one that a person would give
        assert shlex.split(entry["command"]) == [
            *("python", "-m", "experiments.reproduce", "--train", "--run", f"plain/{seed}"),
            *("--schedule.lr", "0.002"),
        ]
    assert plain["mean"] == pytest.approx(statistics.fmean(figures))
    assert plain["std"] == pytest.approx(statistics.stdev(figures))
    text = f"{plain['mean']:.2f} ± {plain['std']:.2f}"
    assert text in out
    assert text in (tmp_path / "r" / "digits.md").read_text()
    assert text in (tmp_path / "r" / "digits.html").read_text()


def test_finished_trainings_are_kept_and_not_mixed_with_other_settings(
    tmp_path, words, calls, capsys
):
    seen, _ = calls
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 0
    first = training_of(tmp_path)
    assert cli.run(reproduce.main, words("plain", "--seeds", "1,2")) == 0
    both = training_of(tmp_path)
    assert both["seeds"][0] == first["seeds"][0] and first["std"] is None
    # the same wherever the data lie and however they are read
    assert cli.run(reproduce.main, words("plain", "--seeds", "1", "--data.root", "elsewhere")) == 0
    assert seen == ["plain/1", "plain/2"]
    for seeds in ("1", "3", "1,2,3"):
        more = ("--seeds", seeds, "--schedule.lr", "0.001")
        error = fails(capsys, reproduce, *words("mixed", "plain", *more))
        assert "records.jsonl: holds plain/1 with other settings" in error
    assert training_of(tmp_path) == both
    assert seen == ["plain/1", "plain/2"], "refused before anything is trained"


def test_a_finished_run_folder_is_taken(tmp_path, words, calls, capsys):
    """As for trainings on several machines, which `run/train.sh` has started."""
    from experiments import train

    folder = tmp_path / "runs" / "plain" / "seed1"
    config = ["--config", str(tmp_path / "plain.yaml"), "--seed", "1", "--output", str(folder)]
    assert cli.run(train.main, config) == 0
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 0
    assert "all 2 epochs are done already" in capsys.readouterr().out
    assert len(training_of(tmp_path)["seeds"]) == 1


def test_a_run_without_its_last_row_is_not_recorded(tmp_path, words, capsys):
    one = words("--run", "plain/1")
    assert cli.run(reproduce.main, one) == 0
    folder = tmp_path / "runs" / "plain" / "seed1"
    (tmp_path / "r" / "studies" / "reproduce" / "records.jsonl").unlink()
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    code, _, err = outcome(capsys, reproduce, *one)
    assert code == 2 and "metrics.jsonl lacks rows of the training" in err
    assert not (tmp_path / "r" / "studies" / "reproduce" / "records.jsonl").exists()


@pytest.mark.parametrize("code", [0, 75])
def test_a_training_that_was_stopped_is_told_as_one(words, calls, capsys, code):
    """torchrun ends with 0 after its processes have saved and stopped."""
    _, codes = calls
    codes["plain/1"] = code
    assert cli.run(reproduce.main, words("plain", "--seeds", "1")) == 75
    assert "plain/1 was asked to stop and saved itself" in capsys.readouterr().err


def test_a_failed_training_ends_the_study_and_is_taken_up_again(tmp_path, words, calls, capsys):
    seen, codes = calls
    codes["plain/2"] = 3
    given = words("plain", "--seeds", "1,2,3")
    assert cli.run(reproduce.main, given) == 3
    told = capsys.readouterr().err
    assert "plain/2 ended with status 3, see" in told and "log.txt" in told
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1]
    codes.clear()
    assert cli.run(reproduce.main, given) == 0
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1, 2, 3]
    assert seen == ["plain/1", "plain/2", "plain/2", "plain/3"]


def test_a_config_that_cannot_be_used_is_told_before_anything_is_trained(
    tmp_path, words, calls, capsys
):
    seen, _ = calls
    (tmp_path / "mixed.yaml").write_text("sched: {}")
    error = fails(capsys, reproduce, *words("plain", "mixed", "--seeds", "1"))
    assert "mixed.yaml: 'sched': unknown key" in error
    error = fails(capsys, reproduce, *words("plain", "--device", "tpu"))
    assert "command line: device: got 'tpu'" in error
    assert seen == []


def test_pretrained_weights_come_from_their_folder(tmp_path, words, monkeypatch, capsys):
    write_config(tmp_path, "plain", data=FEW, model={"weights": "weights/ViT.npz"})
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "elsewhere"))
    error = fails(capsys, reproduce, *words("--run", "plain/1"))
    assert str(tmp_path / "elsewhere" / "ViT.npz") in error
    assert cli.run(reproduce.main, words("--run", "mixed/1")) == 0


def test_a_wrong_number_of_processes_is_refused(words, calls, capsys, monkeypatch):
    for text in ("0", "many", "-1"):
        monkeypatch.setenv("NPROC", text)
        error = fails(capsys, reproduce, *words("plain", "--seeds", "1"))
        assert f"NPROC: got {text!r}" in error
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in fails(capsys, reproduce, *words("plain"))


def living_processes(word):
    """Ids of the processes whose command line holds a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word in path.read_bytes().decode(errors="replace"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGUSR1, 2)],
)
def test_a_signal_reaches_all_processes_and_all_resumes(
    tmp_path, words, monkeypatch, number, processes
):
    """Real processes, of torchrun as well: the second training is stopped in its middle."""
    given = words("plain", "--seeds", "1,2", "--schedule.epochs", "40", "--data.batch_size", "32")
    given = ("-m", "experiments.reproduce", *given)
    monkeypatch.setenv("NPROC", str(processes))
    process = started(*given)
    folder = tmp_path / "runs" / "plain" / "seed2"
    wait_until((folder / "checkpoints" / "step-00000008.pt").exists, process)
    process.send_signal(number)
    if number == signal.SIGINT:  # as a terminal does, which tells the whole group
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), number)
    code, out, err = ended(process, timeout=120)
    assert code == 75, out + err
    assert "plain/2 was running and saved itself" in err
    assert living_processes(str(tmp_path / "runs")) == []
    assert [entry["seed"] for entry in training_of(tmp_path)["seeds"]] == [1]
    code, out, err = finished(*given, timeout=300)
    assert code == 0, out + err
    assert "resuming after step" in (folder / "log.txt").read_text()
    seeds = training_of(tmp_path)["seeds"]
    assert [(entry["seed"], entry["epochs"]) for entry in seeds] == [(1, 40), (2, 40)]
    assert seeds[1]["command"].startswith("NPROC=2 python" if processes == 2 else "python")
