"""What a study measures of final weights, beside slow references and known answers."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from experiments.data.augment import normalisation
from experiments.data.datasets import open_images
from experiments.data.loading import EvalBatches
from experiments.models.build import build_model
from experiments.study import __main__ as study
from experiments.study import measures
from experiments.study.measures import (
    CORRUPTIONS,
    GREY,
    NOISE,
    PATCH,
    blurred,
    calibration_error,
    measure,
    noisy,
    occluded,
)
from experiments.study.records import study_records
from experiments.study.sinks import layer_saliencies, sink_statistics
from experiments.training.distributed import ONE_PROCESS
from tests.helpers.runs_helper import small_config
from tests.helpers.study_helper import TINY, write_config, write_study


def seeded():
    return torch.Generator().manual_seed(5)


def logits_of(confidence):
    """Two classes, of which the first has this probability."""
    values = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack((values.log(), (1 - values).log()), 1)


def test_calibration_error_by_hand():
    # bins of a tenth: (0.9, 1] with 0.95 and 1 of 2 right; (0.6, 0.7] with 0.7 and all 2 right
    logits, labels = logits_of([0.95, 0.95, 0.7, 0.7]), torch.tensor([0, 1, 0, 0])
    expected = 0.5 * abs(0.5 - 0.95) + 0.5 * abs(1 - 0.7)
    assert calibration_error(logits, labels, bins=10) == pytest.approx(expected)
    assert calibration_error(logits_of([0.75] * 4), torch.tensor([0, 0, 0, 1])) == pytest.approx(0)


def test_calibration_error_as_a_loop():
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(300, 7), torch.randint(7, (300,))
    probabilities = torch.softmax(logits, 1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    expected = 0.0
    for k in range(15):
        members = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if members.any():
            gap = abs(right[members].mean() - confidence[members].mean())
            expected += members.mean() * gap
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_the_corruptions():
    torch.manual_seed(1)
    pixels = torch.rand(40, 3, 28, 28)
    difference = noisy(torch.full_like(pixels, 0.5), seeded()) - 0.5
    assert difference.std().item() == pytest.approx(NOISE, rel=0.02)
    assert torch.equal(difference[:, 0], difference[:, 2])
    assert noisy(pixels, seeded()).min() >= 0
    slow = gaussian_filter(pixels.numpy(), (0, 0, 1, 1), mode="mirror", radius=(0, 0, 3, 3))
    assert np.allclose(blurred(pixels, seeded()), slow, atol=1e-6)
    hidden = (occluded(pixels, seeded()) != pixels).any(1)
    patches = hidden.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3)
    assert torch.equal(patches.all(3), patches.any(3)), "whole patches"
    assert (patches.all(3).sum((1, 2)) == 49 // 4).all()
    assert not torch.equal(hidden[0], hidden[1])
    assert (occluded(pixels, seeded())[hidden.unsqueeze(1).expand_as(pixels)] == GREY).all()


def test_each_measure_is_of_its_own_images(tmp_path, monkeypatch):
    config = small_config(tmp_path)
    images, own = (open_images(config.data, f"train[{part}]") for part in (":200", "200:260"))
    monkeypatch.setitem(CORRUPTIONS, "noise", lambda pixels, generator: torch.zeros_like(pixels))
    monkeypatch.setattr(measures, "SALIENCY_IMAGES", 150)
    torch.manual_seed(0)
    model = build_model(config, 10)
    arguments = (10, ONE_PROCESS, config)
    result, found = measure(model, images, own, *arguments)
    assert result.images == 200
    # black images are all of one class for the model
    black = torch.zeros(1, 3, 16, 16) - torch.tensor(normalisation(config.data)[0][0])
    guess = int(model.eval()(black / normalisation(config.data)[1][0]).argmax())
    right = sum(images[i][1] == guess for i in range(200))
    assert found["top1_noise"] == pytest.approx(100 * right / 200)
    alone, _ = measure(model, own, images, *arguments)
    assert (found["train_top1"], found["train_loss"]) == (alone.top1, alone.loss)
    pixels = torch.cat([b for b, _ in EvalBatches(config, images, 10)])[:150]
    for layer, saliency in enumerate(layer_saliencies(model, pixels)):
        for name, value in sink_statistics(saliency).items():
            assert found[f"layer{layer}/{name}"] == pytest.approx(value, abs=1e-6)
    assert len(found) == 1 + 3 + 2 + 2 * 3
    assert measure(model, images, own, *arguments) == (result, found)


def test_a_study_measures_its_test_split_once(tmp_path):
    base = {"data": {**TINY["data"], "train_split": "tune_train", "per_class": 13}, **TINY}
    base["data"] = {"train_split": "tune_train", "per_class": 13, "val_split": "tune_validation"}
    config = str(write_config(tmp_path, "base", **base))
    path = write_study(tmp_path, config=config, test_split="validation")
    places = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path)]
    study.main(["--study", str(path), *places, "--run", "HTM/2"])
    (record,) = study_records(tmp_path, "tiny").read()
    assert (record.train_images, record.val_images) == (130, 355)
    assert record.top1 * 355 / 100 == pytest.approx(round(record.top1 * 355 / 100), abs=1e-3)
    assert record.measures["train_top1"] * 1.3 == pytest.approx(
        round(record.measures["train_top1"] * 1.3), abs=1e-3
    )
    shares = record.statistics_by_epoch
    assert shares.keys() == {"1", "2", "all"} and shares["2"] == record.statistics
    name = "htm/layer1/mixed_share"
    assert shares["all"][name] == pytest.approx((shares["1"][name] + shares["2"][name]) / 2)
