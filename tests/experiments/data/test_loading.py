"""Batches depend on (seed, epoch, index) alone; bad images are named."""

import random

import numpy as np
import pytest
import torch

from experiments.config import DataConfig
from experiments.data.datasets import DigitImages, open_images
from experiments.data.loading import (
    EpochBatches,
    EvalBatches,
    SeededImages,
    TrainBatches,
    divide_batch,
)
from experiments.errors import DataError
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


def test_evaluation_sees_each_image_once_in_order(tmp_path):
    config = small_config(tmp_path, data={"eval_batch_size": 100})
    images = DigitImages("validation")
    found = [label for _, labels in EvalBatches(config, images, 10) for label in labels.tolist()]
    assert found == [images[index][1] for index in range(len(images))]


def test_a_class_beyond_the_models_is_named(folder_of_images):
    images = open_images(DataConfig(dataset="", root=str(folder_of_images)), "train")
    dataset = SeededImages(images, lambda image: image, seed=0, num_classes=1)
    with pytest.raises(DataError, match=r"dog/0\.png has class 1; allowed with 1 classes: 0 to 0"):
        dataset[(0, 3)]
