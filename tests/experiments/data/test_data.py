"""Data: what a batch is depends on (seed, epoch, index) alone, and what is wrong is named."""

import random
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.config import DataConfig, MixupConfig, RunConfig
from experiments.data.datasets import DigitImages, digits_split, open_images, stated_num_classes
from experiments.data.loading import (
    BatchMixer,
    EpochBatches,
    EvalBatches,
    SeededImages,
    TrainBatches,
    divide_batch,
    eval_transform,
    normalisation,
)
from experiments.errors import ConfigError, DataError
from experiments.seeding import derive_seed, seeded
from tests.helpers.others_warnings import forks
from tests.helpers.runs_helper import small_config

AUGMENTED = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "train_interpolation": "random",
    "hflip": 0.5,
}


def batches(tmp_path, workers=0, seed=1, **data):
    config = small_config(tmp_path, seed=seed, data={**AUGMENTED, "workers": workers, **data})
    return TrainBatches(config, DigitImages("tune_validation"), 10)


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


def test_digits_splits_are_stratified_and_disjoint():
    labels = np.random.default_rng(0).integers(0, 10, size=500)
    train, held_out = digits_split(labels, "train"), digits_split(labels, "validation")
    assert sorted([*train, *held_out]) == list(range(500))
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        assert set(members[4::5]) == set(held_out) & set(members)
    inner = digits_split(labels, "tune_train"), digits_split(labels, "tune_validation")
    assert sorted([*inner[0], *inner[1]]) == sorted(train)


def test_digits_are_scaled_to_rgb():
    train, validation = DigitImages("train"), DigitImages("validation")
    assert (len(train), len(validation)) == (1442, 355)
    image, label = train[0]
    assert (image.size, image.mode, label) == ((32, 32), "RGB", 0)
    counts = Counter(validation[index][1] for index in range(len(validation)))
    assert min(counts.values()) >= 34
    assert max(counts.values()) <= 36
    mean, std = normalisation(DataConfig(dataset="digits"))
    pixels = np.stack([np.asarray(train[i][0]) for i in range(len(train))]) / 255
    assert pixels.mean() == pytest.approx(mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(std[0], abs=1e-4)


@forks
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path):
    alone, two = batches(tmp_path), batches(tmp_path, workers=2)
    for epoch in (0, 1):
        assert same(list(alone.epoch(epoch)), list(two.epoch(epoch)))


def test_batches_do_not_depend_on_where_an_epoch_is_begun(tmp_path):
    whole = list(batches(tmp_path).epoch(3))
    rest = list(batches(tmp_path).epoch(3, first_step=1))
    assert len(whole) == 2
    assert same(whole[1:], rest)


def test_epochs_and_seeds_differ_and_repeat(tmp_path):
    first = list(batches(tmp_path).epoch(0))
    assert same(first, list(batches(tmp_path).epoch(0)))
    assert not same(first, list(batches(tmp_path).epoch(1)))
    assert not same(first, list(batches(tmp_path, seed=2).epoch(0)))


def test_an_epoch_takes_each_image_once_and_leaves_the_rest_out():
    sampler = EpochBatches(23, 4, 5, divide_batch(DataConfig(batch_size=4), 0, 1))
    keys = [key for batch in sampler for key in batch]
    assert len(keys) == len(set(keys)) == 20
    assert {epoch for epoch, _ in keys} == {0}
    assert len(list(sampler)) == len(sampler) == 5
    sampler.epoch = 1
    assert [i for batch in sampler for _, i in batch] != [i for _, i in keys]


def test_augmentation_leaves_the_global_generators_alone():
    dataset = SeededImages(
        DigitImages("tune_validation"),
        lambda image: torch.rand(3) + random.random() + np.random.rand(),
        seed=3,
        num_classes=10,
    )
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first, *_ = dataset[(0, 5)]
    assert torch.equal(first, dataset[(0, 5)][0])
    assert not torch.equal(first, dataset[(1, 5)][0])
    assert not torch.equal(first, dataset[(0, 6)][0])
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_seeds_of_different_places_differ():
    seeds = {
        derive_seed(s, name, e, i) for s in (0, 1) for name in "ab" for e in (0, 1) for i in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "sample", 2, 3) == derive_seed(1, "sample", 2, 3)
    with seeded(1 << 62):
        assert torch.initial_seed() == 1 << 62


def test_evaluation_sees_each_image_once_in_order(tmp_path):
    config = small_config(tmp_path, data={"eval_batch_size": 100})
    images = DigitImages("validation")
    found = [label for _, labels in EvalBatches(config, images, 10) for label in labels.tolist()]
    assert found == [images[index][1] for index in range(len(images))]


def test_evaluation_transform_normalises_the_image():
    config = DataConfig(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    expected = (np.asarray(image).transpose(2, 0, 1) / 255 - 0.5) / 0.25
    actual = eval_transform(config, 32)(image).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_mixup_is_a_function_of_the_step():
    mixer = BatchMixer(MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1), 10, 7)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    before = np.random.get_state()[1].copy()
    runs = [mixer(images.clone(), labels, 0, step, 0) for step in (0, 0, 1, 2, 3)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not any(torch.equal(runs[0][0], run[0]) for run in runs[2:])
    assert np.array_equal(np.random.get_state()[1], before)
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


def folder_of_images(root):
    for split, count in (("train", 3), ("validation", 2)):
        for name, shade in (("cat", 50), ("dog", 200)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (20, 24), shade + number).save(folder / f"{number}.png")


def test_a_folder_of_images(tmp_path):
    folder_of_images(tmp_path)
    config = RunConfig(data=DataConfig(dataset="", root=str(tmp_path)))
    images = open_images(config.data, "train")
    assert len(images) == 6
    assert stated_num_classes(config, images) == 2
    image, label = images[5]
    assert (image.mode, label) == ("RGB", 1)
    assert images.describe(5).endswith("train/dog/2.png")


def test_a_damaged_image_is_named(tmp_path):
    folder_of_images(tmp_path)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no image at all")
    images = open_images(DataConfig(dataset="", root=str(tmp_path)), "train")
    dataset = SeededImages(images, lambda image: image, seed=0, num_classes=2)
    dataset[(0, 3)]
    with pytest.raises(DataError, match=r"cannot read .*train/dog/1\.png: UnidentifiedImageError"):
        dataset[(0, 4)]


@forks
def test_a_damaged_image_in_a_worker_gives_one_line(tmp_path):
    folder_of_images(tmp_path / "data")
    (tmp_path / "data" / "train" / "dog" / "1.png").write_bytes(b"no image at all")
    data = {"dataset": "", "root": str(tmp_path / "data"), "batch_size": 6, "workers": 1}
    config = small_config(tmp_path, data=data)
    with pytest.raises(DataError) as caught:
        list(TrainBatches(config, open_images(config.data, "train"), 2).epoch(0))
    assert str(caught.value).startswith("cannot read ")
    assert "\n" not in str(caught.value)


def test_a_class_beyond_the_models_is_named(tmp_path):
    folder_of_images(tmp_path)
    images = open_images(DataConfig(dataset="", root=str(tmp_path)), "train")
    dataset = SeededImages(images, lambda image: image, seed=0, num_classes=1)
    with pytest.raises(DataError, match=r"dog/0\.png has class 1; allowed with 1 classes: 0 to 0"):
        dataset[(0, 3)]


def test_number_of_classes_must_be_the_data_sets(tmp_path):
    folder_of_images(tmp_path)
    path = str(tmp_path)
    config = RunConfig(data=DataConfig(dataset="", root=path))
    images = open_images(config.data, "train")
    wrong = small_config(tmp_path, model={"num_classes": 7}, data={"dataset": "", "root": path})
    with pytest.raises(ConfigError, match=r"model\.num_classes: got 7; allowed: 2"):
        stated_num_classes(wrong, images)


def write_idx(path, values):
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def test_fashion_mnist_through_timm_is_rgb(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28))
    for part, count in (("train", 4), ("t10k", 2)):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count))
    config = DataConfig(dataset="torch/fashion_mnist", root=str(tmp_path), download=False)
    images = open_images(config, "validation")
    assert len(images) == 2
    assert len(open_images(config, "train")) == 4
    image, label = images[1]
    assert label == 1
    assert np.array_equal(np.asarray(image), np.repeat(pixels[1][..., None], 3, axis=2))


def test_a_part_of_a_split_is_those_images_in_their_order(tmp_path):
    data = small_data_config(tmp_path)
    whole, part = open_images(data, "train"), open_images(data, "train[100:130]")
    assert len(part) == 30
    for index in (0, 7, 29):
        (image, label), (same, its_label) = part[index], whole[100 + index]
        assert label == its_label and image.tobytes() == same.tobytes()
        assert part.describe(index) == whole.describe(100 + index)
    with pytest.raises(IndexError):
        part[30]
    assert len(open_images(data, "train[:50]")) == 50
    assert len(open_images(data, "train[1400:]")) == len(whole) - 1400


@pytest.mark.parametrize("split", ["train[5:5]", "train[9:3]", "train[:5000]", "train[1442:]"])
def test_a_part_that_is_not_there(tmp_path, split):
    with pytest.raises(DataError, match="of the 1442 of 'train'"):
        open_images(small_data_config(tmp_path), split)


def test_the_number_of_classes_of_a_part_is_that_of_the_whole(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "one.png")
    config = small_config(tmp_path, data={"dataset": "", "root": str(tmp_path)})
    part = open_images(config.data, "train[:2]")
    assert stated_num_classes(config, part) == 3


def small_data_config(folder):
    return small_config(folder).data
