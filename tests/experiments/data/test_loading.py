"""Batches depend on (seed, epoch, index) alone; bad images are named."""

import itertools
import random

import numpy as np
import pytest
import torch

from experiments.config.schema import DataConfig
from experiments.data.datasets import open_images
from experiments.data.images import DigitImages
from experiments.data.loading import (
    EpochBatches,
    EvalBatches,
    SeededImages,
    TrainBatches,
    divide_batch,
)
from experiments.errors import DataError
from tests.helpers.batches import AUGMENTED, Damaged, same
from tests.helpers.others_warnings import forks
from tests.helpers.runs_helper import small_config

CPU = torch.device("cpu")


def batches(tmp_path, workers=0, seed=1, **data):
    config = small_config(tmp_path, seed=seed, data={**AUGMENTED, "workers": workers, **data})
    return TrainBatches(config, DigitImages("tune_validation"), 10)


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


@pytest.mark.parametrize("size, length", [(1, 7), (2, 100), (3, 50), (4, None)])
def test_processes_share_the_evaluation(tmp_path, size, length):
    config = small_config(tmp_path, data={"eval_batch_size": length, "batch_size": 64})
    images = DigitImages("tune_validation")
    shares = [EvalBatches(config, images, 10, CPU, rank, size) for rank in range(size)]
    labels = [[labels.tolist() for _, labels in share] for share in shares]
    assert [len(share) for share in shares] == [len(share) for share in labels]
    assert shares[0].common_batches == min(map(len, labels))
    assert max(len(part) for share in labels for part in share) == (length or 64)
    every = [list(itertools.chain(*share)) for share in labels]
    in_order = [label for group in itertools.zip_longest(*every) for label in group]
    wanted = [images[index][1] for index in range(len(images))]
    assert in_order[: len(images)] == wanted and set(in_order[len(images) :]) <= {None}


def test_another_image_stands_in_for_one_that_cannot_be_read():
    def sample(epoch, index, seed=1, bad=(0, 1, 2, 3), allowed=True):
        return SeededImages(Damaged(*bad), lambda image: image, seed, 1, allowed)[(epoch, index)]

    assert sample(0, 4) == (4, 0, "")
    found = {(e, i, s): sample(e, i, s) for e in range(9) for i in (0, 1) for s in (1, 2)}
    for (epoch, index, seed), (image, _, problem) in found.items():
        assert image >= 4 and problem == f"cannot read image {index}: OSError: broken"
        assert sample(epoch, index, seed)[0] == image
    of_0, of_1 = ([im for (_, i, _), (im, *_) in found.items() if i == index] for index in (0, 1))
    assert of_0 != of_1 and {*map(int, of_0 + of_1)} == {*range(4, 10)}
    for settings in ({"allowed": False}, {"bad": range(10)}):
        with pytest.raises(DataError, match=r"^cannot read image 2: OSError: broken$"):
            sample(0, 2, **settings)


def test_a_class_beyond_the_models_is_named(folder_of_images):
    images = open_images(DataConfig(dataset="", root=str(folder_of_images)), "train")
    dataset = SeededImages(images, lambda image: image, seed=0, num_classes=1)
    with pytest.raises(DataError, match=r"dog/0\.png has class 1; allowed with 1 classes: 0 to 0"):
        dataset[(0, 3)]
