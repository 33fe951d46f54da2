"""Training end to end on digits: repeatable, resumable, recorded, and it learns."""

import json
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from experiments import cli, train
from experiments.checkpoint import load_checkpoint
from experiments.config.reading import load_config
from experiments.models.build import build_model
from experiments.training.distributed import ONE_PROCESS
from experiments.training.metrics import read_metrics
from experiments.training.run import Run
from tests.helpers.others_warnings import uses_inductor
from tests.helpers.runs_helper import (
    BOTH,
    HTM,
    VTM,
    final_bytes,
    fit,
    rows_without_clock,
    small_config,
    write_config,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed"), "run", **BOTH, schedule={"epochs": 3})


def test_the_run_folder_holds_what_is_promised(undisturbed):
    names = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert names == ["best.pt", "step-00000011.pt", "step-00000022.pt", "step-00000033.pt"]
    heartbeat = json.loads((undisturbed / "heartbeat.json").read_text())
    assert (heartbeat["state"], heartbeat["epochs_done"], heartbeat["step"]) == ("finished", 3, 33)
    config = load_config(undisturbed / "config.yaml")
    assert config.output == str(undisturbed)
    assert config.schedule.epochs == 3
    names = load_file(undisturbed / "final.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"backbone", "scorenets"}


def test_the_run_folder_says_which_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, "run", output="output/a run", schedule={"epochs": 1})
    assert cli.run(train.main, ["--config", str(config)]) == 0
    about, _, command = (tmp_path / "output" / "a run" / "README.md").read_text().splitlines()
    assert about.startswith("A training of ") and "plain, 1 epochs, begun or resumed 20" in about
    words = shlex.split(command.split("`")[1])
    assert words[:3] == ["python", "-m", "experiments.train"] and str(tmp_path) in command
    capsys.readouterr()
    assert cli.run(train.main, words[3:]) == 0
    assert "all 1 epochs are done already" in capsys.readouterr().out


def test_a_readme_that_a_person_wrote_stays(tmp_path):
    readme = tmp_path / "output" / "run" / "README.md"
    fit(tmp_path, "run", schedule={"epochs": 1})
    ours, more = readme.read_text(), {"schedule": {"epochs": 2}}
    fit(tmp_path, "run", allow_changed=["schedule.epochs"], **more)
    assert ", 1 epochs," in ours and ", 2 epochs," in readme.read_text(), "ours is renewed"
    for notes in (ours + "\nThe learning rate was too high.\n", "My notes: caf\u00e9\n"):
        readme.write_text(notes, encoding="latin-1")
        written = readme.read_bytes()
        (readme.parent / "final.safetensors").unlink()
        fit(tmp_path, "run", **more)
        assert readme.read_bytes() == written


def test_what_became_of_the_weights_that_a_training_starts_from_is_told(tmp_path, capsys):
    states = {
        key: build_model(small_config(tmp_path, horizontal=horizontal), 10).state_dict()
        for key, horizontal in (("model", HTM), ("model_ema", None))
    }
    torch.save(states, tmp_path / "deit.pth")
    model = {"weights": str(tmp_path / "deit.pth")}
    folder = fit(tmp_path, "short", model=model, schedule={"epochs": 1})
    scorenets = ", ".join(name for name in states["model"] if name.startswith("scorenets."))
    assert (
        f"{folder}: starts from {model['weights']} (checkpoint in DeiT's layout); in the file, not "
        f"used by the model: {scorenets}; the averaged weights in the file (model_ema) are not used"
    ) in capsys.readouterr().out


def test_a_warm_up_that_the_run_does_not_outlast_is_told(tmp_path, capsys):
    schedule = {"epochs": 1, "warmup_epochs": 2, "lr": 0.5}
    fit(tmp_path, "short", schedule=schedule)
    assert (
        "warning: schedule.warmup_epochs is 2 and schedule.epochs 1: the learning rate never "
        "reaches schedule.lr (0.5)"
    ) in capsys.readouterr().err
    fit(tmp_path, "longer", schedule={**schedule, "epochs": 3})
    assert "warmup_epochs" not in capsys.readouterr().err


def test_metrics_are_complete_and_in_order(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    train_rows = [row for row in rows if row["split"] == "train"]
    # 1442 images in batches of 128: 11 steps an epoch, reported every 4 and at the end
    expected = [epoch * 11 + step for epoch in range(3) for step in (4, 8, 11)]
    assert [row["step"] for row in train_rows] == expected
    assert sum(row["steps"] for row in train_rows) == 33
    assert [row["epoch"] for row in train_rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    validation = [row for row in rows if row["split"] == "validation"]
    assert [(row["epoch"], row["step"]) for row in validation] == [(1, 11), (2, 22), (3, 33)]
    for row in train_rows:
        assert row["htm/layer1/easy_share"] == 1.0  # tau is that high here
        assert row["htm/layer1/tokens_mixed"] > 0
        assert row["vtm/layer1/remembered_tokens"] == 3
        assert row["scorenet_loss"] > 0
        assert row["lr"] > 0
        assert 0 <= row["data_seconds"] <= row["step_seconds"]


def test_the_same_run_gives_the_same_bytes(tmp_path, undisturbed):
    again = fit(tmp_path, "again", **BOTH, schedule={"epochs": 3})
    assert final_bytes(again) == final_bytes(undisturbed)
    other = fit(tmp_path, "other", **BOTH, schedule={"epochs": 3}, seed=1)
    assert final_bytes(other) != final_bytes(undisturbed)


def test_a_finished_run_is_left_alone_but_for_final_weights_that_are_missing(
    tmp_path, undisturbed, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(undisturbed, copy)
    final = copy / "final.safetensors"
    before, written = final.read_bytes(), final.stat().st_mtime_ns
    sections = {**BOTH, "schedule": {"epochs": 3}}
    config = load_config(write_config(tmp_path, output=str(copy), **sections))
    Run(config, ONE_PROCESS).fit()
    assert "all 3 epochs are done already" in capsys.readouterr().out
    assert final.stat().st_mtime_ns == written
    final.unlink()  # as after a crash right before it was written
    Run(config, ONE_PROCESS).fit()
    assert final.read_bytes() == before
    assert rows_without_clock(copy) == rows_without_clock(undisturbed)


def test_training_learns(tmp_path):
    folder = fit(tmp_path, "learns", schedule={"epochs": 5, "lr": 4e-3}, data={"batch_size": 32})
    rows = read_metrics(folder)
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    top1 = [row["top1"] for row in rows if row["split"] == "validation"]
    assert losses[-1] < 0.6 * losses[0]
    assert top1[-1] > 60
    best = load_checkpoint(folder / "checkpoints" / "best.pt")
    assert best["progress"]["best_top1"] == max(top1)


def test_evaluation_and_checkpoints_at_their_intervals(tmp_path):
    sections = {"logging": {"evaluate_every": 2}, "checkpoint": {"every": 2}}
    folder = fit(tmp_path, "rare", schedule={"epochs": 3}, **sections)
    rows = [row for row in read_metrics(folder) if row["split"] == "validation"]
    assert [row["epoch"] for row in rows] == [2, 3]


@pytest.mark.slow
@uses_inductor
def test_compiled_training_learns_the_same(tmp_path):
    sections = {"horizontal": HTM, "vertical": VTM, "schedule": {"epochs": 2}}
    sections["tokenmixup_off_epoch"] = 1
    plain = read_metrics(fit(tmp_path, "plain", **sections))
    compiled = read_metrics(fit(tmp_path, "compiled", compile="on", **sections))
    for row, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-2)
