"""Transforms, Mixup and CutMix, label smoothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing

from experiments.config.reading import load_config
from experiments.config.schema import DataConfig, MixupConfig
from experiments.data import augment
from experiments.data.augment import (
    BatchMixer,
    eval_transform,
    least_difficulty,
    mean_and_std,
    normalise,
    refuse_unreachable_tau,
    train_transform,
)
from experiments.data.images import DigitImages
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.seeding import derive_seed, seeded
from tests.helpers.others_warnings import uses_inductor
from tests.helpers.runs_helper import HTM, small_config
from tokenmixup.functional import sample_difficulty


def test_images_are_normalised():
    config = DataConfig(mean=(0.5, 0.4, 0.5), std=(0.25, 0.25, 0.2))
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    expected = np.asarray(image) / 255 - (0.5, 0.4, 0.5)
    expected = (expected / (0.25, 0.25, 0.2)).transpose(2, 0, 1)
    pixels = eval_transform(config, 32)(image)
    actual = normalise(pixels, *mean_and_std(config)).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_augmented_images_are_timms_own_to_the_bit():
    facts = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.21)}
    shared = {"auto_augment": "rand-m9-mstd0.5-inc1"}
    config = DataConfig(**shared, **facts, re_prob=0.25)
    ranges = {"scale": config.scale, "ratio": config.ratio, "interpolation": "random"}
    own = create_transform(24, is_training=True, **shared, **facts, **ranges)
    ours = train_transform(config, 24)
    images, found, expected = DigitImages("validation"), [], []
    for seed in range(20):
        for transform, kept in ((ours, found), (own, expected)):
            with seeded(seed):
                kept.append(transform(images[seed][0]))
    batch = torch.stack(found)
    assert batch.dtype == torch.uint8
    assert torch.equal(normalise(batch, *mean_and_std(config)), torch.stack(expected))


def test_every_setting_reaches_its_transform():
    crop = {"scale": (0.3, 0.6), "ratio": (0.8, 1.2), "train_interpolation": "bicubic"}
    flips = {"hflip": 0.3, "vflip": 0.2}
    transform = train_transform(DataConfig(**crop, **flips, color_jitter=0.25), 24)
    by_name = {type(step).__name__: step for step in transform.transforms}
    cropping = by_name["RandomResizedCropAndInterpolation"]
    assert (cropping.size, cropping.scale, cropping.ratio) == ((24, 24), (0.3, 0.6), (0.8, 1.2))
    assert str(cropping.interpolation).lower().endswith("bicubic")
    assert by_name["RandomHorizontalFlip"].p == 0.3 and by_name["RandomVerticalFlip"].p == 0.2
    assert by_name["ColorJitter"].brightness == (0.75, 1.25)
    policy = train_transform(DataConfig(auto_augment="rand-m5-n3", color_jitter=0.0), 24)
    names = {type(step).__name__ for step in policy.transforms}
    assert "RandAugment" in names and "ColorJitter" not in names
    evaluation = eval_transform(DataConfig(crop_pct=0.5, interpolation="bilinear"), 24)
    resize = evaluation.transforms[0]
    assert resize.size == 48 and resize.interpolation.value == "bilinear"


def erased(erase, size):
    """Which pixels (B, H, W) of images of nines are replaced, and by what (N,)."""
    images = torch.full((size, 3, 16, 24), 9.0)
    found = erase(images.clone())
    replaced = found != 9
    assert torch.equal(replaced[:, 0], replaced.all(1))
    return replaced[:, 0], found[replaced]


def is_like_timms(places, reference):
    """The shares of images and pixels, of places by row and column, and the extents."""
    for statistic in (
        lambda p: p.any((1, 2)).float().mean(),
        lambda p: p.float().mean((0, 2)),
        lambda p: p.float().mean((0, 1)),
        lambda p: torch.bincount(p.any(2).sum(1), minlength=17) / len(p),
        lambda p: torch.bincount(p.any(1).sum(1), minlength=25) / len(p),
    ):
        torch.testing.assert_close(statistic(places), statistic(reference), atol=0.02, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_places_are_erased_as_timm_does(mode, count):
    settings = {"re_prob": 0.4, "re_mode": mode, "re_count": count}
    reference = RandomErasing(0.4, mode=mode, max_count=count, device="cpu")
    with seeded(3):
        places, noise = erased(augment.RandomErasing(DataConfig(**settings)), 8000)
        wanted, wanted_noise = erased(reference, 8000)
    is_like_timms(places, wanted)
    assert noise.std().item() == pytest.approx(wanted_noise.std().item(), abs=0.05)
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    colours = noise.unique().numel()
    assert colours == 1 if mode == "const" else colours > 8000
    assert (colours > 4e5) == (mode == "pixel")  # a colour for each rectangle, or for each pixel


def test_one_rectangle_of_each_image_is_erased():
    with seeded(3):
        places, _ = erased(augment.RandomErasing(DataConfig(re_prob=1.0)), 2000)
    rectangles = places.any(2, keepdim=True) & places.any(1, keepdim=True)
    assert torch.equal(places, rectangles)
    area = places.sum((1, 2)) / (16 * 24)
    assert area.min() > 0.01 and area.max() < 0.37  # 2% to a third, before whole pixels


def test_nothing_is_erased_unless_asked():
    images = torch.full((4, 3, 16, 24), 9.0)
    assert augment.RandomErasing(DataConfig())(images) is images


@pytest.mark.parametrize("count", [1, 3])
def test_compiled_erasing_is_one_graph_with_the_same_draws(count):
    erase = augment.RandomErasing(DataConfig(re_prob=0.9, re_count=count))
    compiled = torch.compile(erase.__call__, fullgraph=True, backend="aot_eager")
    for size in (8, 4):
        images, found = torch.randn(size, 3, 16, 24), []
        for how in (erase, compiled):
            with seeded(3):
                found.append(how(images))
        assert torch.equal(*found) and not torch.equal(found[0], images)


@pytest.mark.slow
@uses_inductor
def test_erasing_compiled_by_inductor_is_like_timms():
    erase = augment.RandomErasing(DataConfig(re_prob=0.4))
    with seeded(3):
        places, _ = erased(torch.compile(erase.__call__, fullgraph=True), 8000)
        wanted, _ = erased(RandomErasing(0.4, mode="pixel", device="cpu"), 8000)
    is_like_timms(places, wanted)


def test_every_setting_reaches_mixup():
    settings = {"mixup_alpha": 0.3, "cutmix_alpha": 0.7, "prob": 0.6, "switch_prob": 0.3}
    settings |= {"mode": "elem", "label_smoothing": 0.2}
    ours, reference = BatchMixer(MixupConfig(**settings), 6, 7), Mixup(num_classes=6, **settings)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 6
    for epoch, step in ((0, 0), (0, 1), (1, 0), (5, 9)):
        found = ours(images.clone(), labels, epoch, step, 2)
        with seeded(derive_seed(7, "mixup", epoch, step, 2)):
            wanted = reference(images.clone(), labels)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_is_off_from_its_epoch_on(mode):
    """As where timm's train.py sets `mixup_enabled`: labels are smoothed, and nothing else."""
    settings = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": mode, "label_smoothing": 0.1}
    ending = BatchMixer(MixupConfig(**settings, off_epoch=2), 6, 7)
    endless, reference = BatchMixer(MixupConfig(**settings), 6, 7), Mixup(num_classes=6, **settings)
    reference.mixup_enabled = False
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 6
    for epoch in range(4):
        found = ending(images.clone(), labels, epoch, epoch, 0)
        if epoch < 2:
            wanted = endless(images.clone(), labels, epoch, epoch, 0)
        else:
            wanted = reference(images.clone(), labels)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert torch.equal(found[0], images) == (epoch >= 2)


def test_mixup_is_a_function_of_the_step():
    mixer = BatchMixer(MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1), 10, 7)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    runs = [mixer(images.clone(), labels, 0, step, 0) for step in (0, 0, 1, 2, 3)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not any(torch.equal(runs[0][0], run[0]) for run in runs[2:])
    for mixed, targets in runs:
        assert mixed.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_label_smoothing_without_mixup():
    images, targets = BatchMixer(MixupConfig(label_smoothing=0.2), 4, 0)(
        torch.zeros(2, 3, 4, 4), torch.tensor([1, 3]), 0, 0, 0
    )
    assert torch.equal(images, torch.zeros(2, 3, 4, 4))
    expected = torch.full((2, 4), 0.05)
    expected[0, 1] = expected[1, 3] = 0.85
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.8])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_no_logits_are_easier_than_the_least_difficulty(classes, mixup_alpha):
    """The best logits are the target's logarithm; any others are more difficult."""
    config = MixupConfig(label_smoothing=0.1, mixup_alpha=mixup_alpha)
    least = least_difficulty(config, classes)
    labels = torch.arange(64) % classes
    _, targets = BatchMixer(config, classes, 0)(torch.zeros(64, 3, 4, 4), labels, 0, 0, 0)
    best = sample_difficulty(targets.log(), targets)
    if mixup_alpha:
        assert (best >= least - 1e-6).all() and best.max() > least
    else:
        torch.testing.assert_close(best, torch.full((64,), least), rtol=1e-5, atol=0)
        one_hot = F.one_hot(labels, classes)
        sharpness = torch.linspace(1, 20, 64)  # of confident logits: none gets below
        assert (sample_difficulty(one_hot * sharpness.unsqueeze(1), targets) > least - 1e-6).all()
    assert least_difficulty(MixupConfig(mixup_alpha=mixup_alpha), classes) == 0


def test_a_tau_below_the_least_difficulty_is_refused(tmp_path):
    def check(tau, classes=10, **horizontal):
        config = small_config(
            tmp_path, horizontal={**HTM, "tau": tau, **horizontal}, mixup={"label_smoothing": 0.1}
        )
        refuse_unreachable_tau(config, classes)

    check(0.0501)
    check(0.078, classes=100)
    check(0.0, scorenet=None)  # every sample is mixed
    for tau, classes, least in ((0.05, 10, "0.0500"), (0.07, 100, "0.0778")):
        with pytest.raises(ConfigError, match=rf"horizontal\.tau: got {tau}; .*above {least}, "):
            check(tau, classes)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_tau_of_each_shipped_config_can_be_reached(path):
    config = load_config(path)
    if "imagenet" in path.stem:
        classes = 1000
    else:
        classes = 100 if config.data.dataset == "torch/cifar100" else 10
    refuse_unreachable_tau(config, classes)
