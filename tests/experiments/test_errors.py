"""A person's mistake gives exit code 2 and one line that says what is wrong and where."""

import pytest
import torch

from experiments import cli, evaluate, train
from experiments.provenance import ROOT
from tests.helpers.commands import fails
from tests.helpers.runs_helper import HTM, write_config

# what is written in the file: what the line must say beside the file's name
IN_THE_FILE = {
    "modell: {name: a}": "'modell': unknown key; the nearest is model",
    "schedule: {epoch: 3}": "'schedule.epoch': unknown key; the nearest is schedule.epochs",
    "data: {epochs: 3}": "'data.epochs': unknown key; the nearest is schedule.epochs",
    "seed: 1\nseed: 2": "line 2: the key 'seed' is given twice",
    "data: &a {workers: 0}\nmodel: *a": "line 2: aliases are not allowed",
    "data: {workers: 0": "line 1",
    "[1, 2]": "got [1, 2]; allowed: keys with values",
    "schedule: 3": "schedule: got 3; allowed: a section with the keys name",
    "seed: !!python/object:os.system {}": (
        "the tag 'tag:yaml.org,2002:python/object:os.system' is not allowed"
    ),
    "data: " + "[" * 3000: "nested too deeply",
    "schedule: {epochs: many}": "schedule.epochs: got 'many'; allowed: a whole number",
    "seed: 010": "seed: got '010'; allowed: a whole number from 0",
    "schedule: {epochs: 1:30}": "schedule.epochs: got '1:30'; allowed: a whole number from 1",
    "schedule: {lr: 1:30.5}": "schedule.lr: got '1:30.5'; allowed: a finite number above 0",
    "compile: yes": "compile: got 'yes'; allowed: one of off, on, graphs, auto",
    "data: {root: }": "data.root: got None; allowed: text of 1 to",
    "precision: fp8": "precision: got 'fp8'; allowed: one of fp32, bf16, fp16",
    "schedule: {lr: -1}": "schedule.lr: got -1; allowed: a finite number above 0",
    "data: {scale: [1, 0.5]}": (
        "data.scale: got [1, 0.5]; allowed: a list of 2 numbers above 0 up to 1, the smaller first"
    ),
    "data: {mean: [1, 2]}": (
        "data.mean: got [1, 2]; allowed: null or a list of 3, each item a finite number"
    ),
    "mixup: {mixup_alpha: 1}\ndata: {batch_size: 3}": (
        "data.batch_size: got 3; allowed: for Mixup and CutMix, an even number"
    ),
    "data: {batch_size: 128, micro_batch: 3}": (
        "data.micro_batch: got 3; allowed: a divisor of data.batch_size"
    ),
    "mixup: {off_epoch: 3}": "mixup.off_epoch: got 3; allowed: null where Mixup and CutMix are off",
    "mixup: {mixup_alpha: 1, off_epoch: 7}\nschedule: {epochs: 5, cooldown_epochs: 2}": (
        "mixup.off_epoch: got 7; allowed: null, or less than the training's 7 epochs"
    ),
    "tokenmixup_off_epoch: 0": "_off_epoch: got 0; allowed: null or a whole number from 1 up to",
    "tokenmixup_off_epoch: 3": (
        "tokenmixup_off_epoch: got 3; allowed: null without horizontal or vertical"
    ),
    "tokenmixup_off_epoch: 300\nvertical: {layers: [1], kappa: 3}": (
        "tokenmixup_off_epoch: got 300; allowed: null, or less than the training's 300 epochs"
    ),
    "schedule: {name: constant, min_lr: 1.0}": "schedule.min_lr: got 1.0",
    "model: {kwargs: {img_size: 3}}": "model.kwargs: got 'img_size'",
    "horizontal: {layers: [1], tau: -1, rho: 0}": "horizontal.tau",
    "horizontal: {layers: [1], rho: 0}": "horizontal.tau is needed",
    "horizontal: {tau: 0.1, rho: 0}": "horizontal.layers: missing",
    "horizontal: {layers: [1], tau: 0.1, rho: 0, scorenet: max}": (
        "horizontal.scorenet: got 'max'; allowed: null or one of attention, cls, average"
    ),
    "vertical: {layers: [0], kappa: 1}": "vertical.layers",
    "horizontal: {layers: [2], tau: 0.1, rho: 0}\nmodel: {name: cct_2_3x2_32}": (
        "horizontal.layers names layer 2, but the model has 2 layers"
    ),
    "vertical: {layers: [1], kappa: 65}\nmodel: {name: cct_2_3x2_32}": (
        "vertical.kappa is 65, but a layer has only 64 patch tokens"
    ),
    "horizontal: {layers: [1], tau: 0.1, rho: 0, scorenet: cls}\nmodel: {name: cct_2_3x2_32}": (
        "horizontal.scorenet: ScoreNet's pooling 'cls' reads the class token"
    ),
    "model: {name: cct_2_3x2_33}": (
        "model.name: got 'cct_2_3x2_33', which timm does not know; the nearest is cct_2_3x2_32"
    ),
    "model: {name: resnet18}": "model.name resnet18: timm.models.resnet.ResNet is no supported",
    "model: {name: cct_2_3x2_32, kwargs: {colour: 3}}": (
        "model: 'cct_2_3x2_32' cannot be built with image_size 32, kwargs.colour 3: TypeError: "
    ),
    **{
        f"model: {{name: vit_tiny_patch16_224, kwargs: {{depth: 1, {key}: {value}}}}}": (
            "model: 'vit_tiny_patch16_224' cannot be built with image_size 32, kwargs.depth 1, "
            f"kwargs.{key} {value}: {reason}"
        )
        for key, value, reason in (
            ("patch_size", 0, "ZeroDivisionError: "),
            ("num_heads", 0, "ZeroDivisionError: "),
            ("embed_dim", 0, ""),  # torch warns first, which is an error in tests,
            ("norm_layer", "'evil'", "KeyError: 'evil'"),
            ("patch_size", 64, "RuntimeError: Calculated padded input size"),
            ("global_pool", "''", "for one image it gives (1, 5, 10), not logits of 10 classes"),
        )
    },
    **{
        f"model: {{name: vit_tiny_patch16_224, kwargs: {{{key}: {value}}}}}": (
            f"model.kwargs: got '{key}'; allowed: arguments of the model's constructor"
        )
        for key, value in (
            ("checkpoint_path", "/nonexistent"),
            ("pretrained", "true"),
            ("pretrained_cfg", "{file: a}"),
            ("pretrained_cfg_overlay", "{file: a}"),
            ("cache_dir", "a"),
            ("scriptable", "true"),
            ("features_only", "true"),
            ("in_chans", 1),
        )
    },
    "model: {name: cct_2_3x2_32, kwargs: {mlp_ratio: '4'}}": (
        "model.kwargs.mlp_ratio: got the text '4'; allowed: numbers without quotes"
    ),
    "model: {name: vit_tny}": "which timm does not know; the nearest is mvitv2_tiny",
    "horizontal: {layers: [1], tau: 0.05, rho: 0}\nmixup: {label_smoothing: 0.1}": (
        "horizontal.tau: got 0.05; allowed: above 0.0500, the least difficulty"
    ),
    "model: {num_classes: 7}": "model.num_classes: got 7; allowed: 10",
    "optimizer: {name: adamx}": "optimizer.name: got 'adamx', which timm does not know",
    "optimizer: {momentum: 0.9}": "optimizer.momentum: got 0.9; allowed: null",
    "optimizer: {name: sgd, betas: [0.9, 0.9]}": "optimizer.betas: got (0.9, 0.9); allowed: null",
    "optimizer: {name: sgd, eps: 0.001}": "optimizer.eps: got 0.001; allowed: null",
    "data: {train_split: tran}\nmodel: {name: cct_2_3x2_32}": (
        "split 'tran' is unknown; allowed: train"
    ),
    "data: {auto_augment: nonsense}\nmodel: {name: cct_2_3x2_32}": (
        "data.auto_augment: got 'nonsense'"
    ),
    "data: {batch_size: 2000}\nmodel: {name: cct_2_3x2_32}": (
        "data.batch_size: got 2000; allowed: up to the 1442 images"
    ),
    "data: {dataset: torch/nonsense}\nmodel: {num_classes: 3}": "torch/nonsense",
    "data: {dataset: hfids/a}\nmodel: {num_classes: 3}": "'hfids/a', which is read as a stream",
    "data: {dataset: torch/cifar100, download: false, root: nowhere}": (
        "data set torch/cifar100, split train: expected in"
    ),
    "data: {dataset: '', root: nowhere}\nmodel: {num_classes: 3}": (
        "set data.root to the folder that holds it"
    ),
}


@pytest.mark.parametrize(("content", "message"), IN_THE_FILE.items())
def test_mistakes_in_the_file(content, message, tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_text(content)
    words = ("--config", path, "--output", tmp_path / "run")
    error = fails(capsys, train, *words)
    assert str(path) in error
    assert message in error
    assert fails(capsys, train, *words, "--check") == error
    assert not (tmp_path / "run").exists()


ON_THE_COMMAND_LINE = {
    "": "--config: missing",
    "--config nothing.yaml": "nothing.yaml: cannot read the config: No such file",
    "--config .": "Is a directory",
    "--config FILE --data.scale [1": (
        "command line: data.scale: got '[1'; allowed: a list of 2 numbers"
    ),
    "--config FILE -- 3": "command line: '--': expected",
    "--config FILE more": "'more': expected --config FILE",
    "--config FILE --epochs 3": "--epochs: unknown option; the nearest is schedule.epochs",
    "--config FILE --schedule.epoch 3": "the nearest is schedule.epochs",
    "--config FILE --seed": "--seed: a value must follow",
    "--config FILE --seed --device cpu": "--seed: a value must follow",
    "--config FILE --seed 1 --seed=2": "--seed: given twice",
    "--config FILE --seed 010": "command line: seed: got '010'; allowed: a whole number",
    "--config FILE --schedule.epochs 1:30": "command line: schedule.epochs: got '1:30'; allowed:",
    "--config FILE --schedule.lr 1:30.5": "command line: schedule.lr: got '1:30.5'; allowed:",
    "--config FILE --seed x": "command line: seed: got 'x'; allowed: a whole number",
    "--config FILE --schedule.epochs -3": "command line: schedule.epochs: got -3",
    "--config FILE --schedule 3": "--schedule: unknown option",
    "--config FILE --vertical.kappa 3": "vertical.layers: missing",
    "--config FILE --checkpoint a": "--checkpoint: unknown option",
}


@pytest.mark.parametrize(("words", "message"), ON_THE_COMMAND_LINE.items())
def test_mistakes_on_the_command_line(words, message, tmp_path, capsys):
    path = write_config(tmp_path)
    given = [path if word == "FILE" else word for word in words.split()]
    assert message in fails(capsys, train, *given, quiet=bool(given))  # without, configs are listed


def test_a_config_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00seed")
    assert "is not text" in fails(capsys, train, "--config", path)


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = write_config(tmp_path)
    for more in ((), ("--check",)):
        error = fails(capsys, train, "--config", path, "--output", tmp_path / "file" / "run", *more)
        assert "output: cannot write the run folder" in error and "Not a directory" in error


def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_config(tmp_path)
    for more in ((), ("--check",)):
        error = fails(capsys, train, "--config", path, "--device", "cuda", *more)
        assert "torch finds no CUDA device" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--checkpoint: missing"),
        (["--checkpoint", "nothing.pt"], "nothing.pt: cannot read the checkpoint: No such file"),
        (["--checkpoint", "FILE"], "is no checkpoint"),
        (["--checkpoint", "FILE", "--json=yes"], "--json: takes no value"),
    ],
)
def test_mistakes_in_evaluation(words, message, tmp_path, capsys):
    path = write_config(tmp_path, horizontal=HTM)
    words = [path if word == "FILE" else word for word in words]
    error = fails(capsys, evaluate, "--config", path, *words)
    assert message in error
    assert message in fails(capsys, evaluate, "--config", path, *words, "--check")


def test_without_arguments_the_configs_are_listed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.run(train.main, []) == 2
    out, err = capsys.readouterr()
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert listed.keys() == {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert all(about.endswith(".") and about[:8] != "configs/" for about in listed.values())
    assert "--config: missing" in err
