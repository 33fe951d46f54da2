"""Evaluation of files by the entry point: the figures of the run, from every kind of file."""

import json

import pytest
import torch
from safetensors.torch import load_file

from experiments import evaluate
from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.training.metrics import read_metrics
from tests.helpers.commands import fails, outcome
from tests.helpers.runs_helper import HTM, VTM, fit, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    run = fit(folder, "run", horizontal=HTM, vertical=VTM, schedule={"epochs": 2})
    return folder / "run.yaml", run


def evaluated(capsys, config, checkpoint, *words):
    """What the entry point prints."""
    words = ("--config", config, "--checkpoint", checkpoint, *words)
    code, out, err = outcome(capsys, evaluate, *words)
    assert code == 0, err
    return out


def test_json_gives_the_runs_own_figures(trained, capsys):
    config, folder = trained
    last = [row for row in read_metrics(folder) if row["split"] == "validation"][-1]
    weights = folder / "final.safetensors"
    result = json.loads(evaluated(capsys, config, weights, "--json"))
    assert (result["top1"], result["top5"]) == (last["top1"], last["top5"])
    assert result["loss"] == pytest.approx(last["loss"])
    assert (result["images"], result["checkpoint"]) == (355, str(weights))
    # by the run folder's own config, in other batches
    words = ("--json", "--data.batch_size", "50")
    again = json.loads(evaluated(capsys, folder / "config.yaml", weights, *words))
    assert again["top1"] == result["top1"]
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)
    best = folder / "checkpoints" / "best.pt"
    result = json.loads(evaluated(capsys, config, best, "--json"))
    assert result["kind"] == "checkpoint of a run"
    assert result["top1"] == load_checkpoint(best)["progress"]["best_top1"]


def test_weights_whose_logits_are_not_finite_have_no_accuracy(trained, capsys, tmp_path):
    config, folder = trained
    state = load_file(folder / "final.safetensors")
    state["backbone.head.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    for words in ((), ("--json",)):
        words = ("--config", config, "--checkpoint", tmp_path / "nan.pt", *words)
        error = fails(capsys, evaluate, *words)
        assert f"{tmp_path / 'nan.pt'}: its loss on the 355 images of 'validation' is nan" in error


def test_images_prepared_otherwise_than_for_the_run_are_told(trained, capsys, tmp_path):
    config, folder = trained
    best = folder / "checkpoints" / "best.pt"
    assert "prepares images" not in evaluated(capsys, config, best)
    words = ("--data.std", "[0.1, 0.1, 0.1]", "--data.crop_pct", "0.5")
    note = (
        "the config in the file prepares images otherwise: data.std: (0.3237, 0.3237, 0.3237) "
        "there, (0.1, 0.1, 0.1) here; data.crop_pct: 1.0 there, 0.5 here"
    )
    assert f"\n{note}\n" in evaluated(capsys, config, best, *words)
    assert json.loads(evaluated(capsys, config, best, *words, "--json"))["notes"] == [note]
    old = load_checkpoint(best)
    old["config"]["no longer"] = 1  # its weights are used all the same
    save_checkpoint(tmp_path / "old.pt", old)
    assert "prepares images" not in evaluated(capsys, config, tmp_path / "old.pt", *words)


def test_a_plain_hosts_file_says_what_it_left_out(trained, capsys, tmp_path):
    config, folder = trained
    state = load_file(folder / "final.safetensors")
    start = "backbone."
    host = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    torch.save(host, tmp_path / "host.bin")
    out = evaluated(capsys, config, tmp_path / "host.bin")
    assert "left as initialised: scorenets.1.pool.weight" in out
    assert "top-1" in out and "355 images" in out and " s, in fp32 on cpu\n" in out
    low = evaluated(capsys, config, tmp_path / "host.bin", "--eval-precision", "bf16")
    assert " s, in bf16 on cpu\n" in low


def test_a_plain_model_takes_the_host_and_says_so(trained, capsys, tmp_path):
    config, folder = trained
    baseline, weights = write_config(tmp_path), folder / "final.safetensors"
    out = evaluated(capsys, baseline, weights)
    note = "in the file, not used by the model: scorenets.1.head.bias, scorenets.1.head.weight, "
    assert note in out
    plain, own = (json.loads(evaluated(capsys, c, weights, "--json")) for c in (baseline, config))
    assert plain["notes"][0].startswith(note) and own["notes"] == []
    assert (plain["top1"], plain["loss"]) == (own["top1"], own["loss"])


def test_weights_without_a_place_are_an_error(trained, capsys, tmp_path):
    _, folder = trained
    other = write_config(tmp_path, horizontal={**HTM, "layers": [0]})
    words = ("--config", other, "--checkpoint", folder / "final.safetensors")
    error = fails(capsys, evaluate, *words)
    assert "without a place in the model: scorenets.1.head.bias" in error
