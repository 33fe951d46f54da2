"""Evaluation of files by the entry point: the figures of the run, from every kind of file."""

import json

import pytest
import torch
from safetensors.torch import load_file

from experiments import cli, evaluate
from experiments.checkpoint import load_checkpoint
from experiments.training import run as runs
from experiments.training.distributed import ONE_PROCESS
from experiments.training.metrics import read_metrics
from tests.helpers.runs_helper import HTM, VTM, small_config, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    sections = {"horizontal": HTM, "vertical": VTM, "schedule": {"epochs": 2}}
    config = small_config(folder, "run", **sections)
    runs.Run(config, ONE_PROCESS).fit()
    return folder / "run.yaml", folder / "output" / "run"


def run_json(capsys, *words):
    assert cli.run(evaluate.main, [*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_json_gives_the_runs_own_figures(trained, capsys):
    config, folder = trained
    last = [row for row in read_metrics(folder) if row["split"] == "validation"][-1]
    weights = str(folder / "final.safetensors")
    result = run_json(capsys, "--config", str(config), "--checkpoint", weights)
    assert result["top1"] == last["top1"]
    assert result["top5"] == last["top5"]
    assert result["loss"] == pytest.approx(last["loss"])
    assert result["images"] == 355
    assert result["checkpoint"] == weights


def test_best_and_last_checkpoints_evaluate(trained, capsys):
    config, folder = trained
    best = folder / "checkpoints" / "best.pt"
    result = run_json(capsys, "--config", str(config), "--checkpoint", str(best))
    assert result["kind"] == "checkpoint of a run"
    assert result["top1"] == load_checkpoint(best)["progress"]["best_top1"]


def test_the_run_folders_own_config_will_do(trained, capsys):
    _, folder = trained
    words = ["--config", str(folder / "config.yaml"), "--checkpoint"]
    first = run_json(capsys, *words, str(folder / "final.safetensors"))
    second = run_json(capsys, *words, str(folder / "final.safetensors"), "--data.batch_size", "50")
    assert second["top1"] == first["top1"]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_person_gets_a_line(trained, capsys):
    config, folder = trained
    words = ["--config", str(config), "--checkpoint", str(folder / "final.safetensors")]
    assert cli.run(evaluate.main, words) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "355 images" in out


def test_a_plain_hosts_file_says_what_it_left_out(trained, capsys, tmp_path):
    config, folder = trained
    state = load_file(folder / "final.safetensors")
    host = {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.")
    }
    torch.save(host, tmp_path / "host.bin")
    words = ["--config", str(config), "--checkpoint", str(tmp_path / "host.bin")]
    assert cli.run(evaluate.main, words) == 0
    assert "left as initialised: scorenets.1.pool.weight" in capsys.readouterr().out


def test_weights_without_a_place_are_an_error(trained, capsys, tmp_path):
    _, folder = trained
    baseline = write_config(tmp_path)
    words = ["--config", str(baseline), "--checkpoint", str(folder / "final.safetensors")]
    assert cli.run(evaluate.main, words) == 2
    error = capsys.readouterr().err
    assert "without a place in the model: scorenets.1.head.bias" in error
    assert error.count("\n") == 1
