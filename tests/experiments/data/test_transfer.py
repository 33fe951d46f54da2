"""Batches on their way to the device: one ahead or not, they are the same, in order, and let go."""

import functools
import weakref

import pytest
import torch

from experiments.checkpoint import load_checkpoint
from experiments.data import loading
from experiments.data.images import DigitImages
from experiments.data.loading import EvalBatches, TrainBatches
from experiments.data.transfer import Transfer, one_early
from experiments.errors import DataError, SavedAndStopped
from experiments.training.folder import RunFolder
from tests.helpers.batches import AUGMENTED, Damaged, same
from tests.helpers.others_warnings import forks
from tests.helpers.runs_helper import AtLook, final_bytes, fit, small_config

CPU = torch.device("cpu")


@pytest.fixture
def ahead(monkeypatch):
    """Batches are begun one ahead on a CPU as well."""
    monkeypatch.setattr(loading, "Transfer", functools.partial(Transfer, ahead=True))


def in_order(count, log, fail_at=None):
    for number in range(count):
        log.append(f"ask {number}")
        if number == fail_at:
            raise DataError(f"no batch {number}")
        yield number


def test_an_item_is_asked_for_before_the_one_before_it_is_handed_on():
    log = []
    for number in one_early(in_order(3, log)):
        log.append(f"take {number}")
    assert log == ["ask 0", "ask 1", "take 0", "ask 2", "take 1", "take 2"]
    assert list(one_early(iter(()))) == []


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_an_error_comes_in_its_place(fail_at):
    taken = []
    with pytest.raises(DataError, match=f"^no batch {fail_at}$"):
        taken.extend(one_early(in_order(3, [], fail_at)))
    assert taken == list(range(fail_at))


def batches(tmp_path, workers=0, **sections):
    data = {**AUGMENTED, "workers": workers, **sections.pop("data", {})}
    return TrainBatches(
        small_config(tmp_path, data=data, **sections), DigitImages("tune_validation"), 10
    )


@forks
def test_batches_begun_ahead_are_the_same(tmp_path, monkeypatch):
    """With and without processes of the loader, from its beginning and from within an epoch."""
    sections = {"data": {"batch_size": 50}, "channels_last": True}
    plain = batches(tmp_path, **sections)
    expected = [list(plain.epoch(0)), list(plain.epoch(1, first_step=2))]
    assert expected[0][0][0].is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(loading, "Transfer", functools.partial(Transfer, ahead=True))
    for workers in (0, 2):
        early = batches(tmp_path, workers, **sections)
        assert same(expected[0], list(early.epoch(0)))
        assert same(expected[1], list(early.epoch(1, first_step=2)))
        early.close()


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_told_after_the_batches_before_it(tmp_path, ahead, workers):
    config = small_config(tmp_path, data={"batch_size": 2, "workers": workers})
    sent = loading.EpochBatches(10, 2, config.seed, loading.divide_batch(config.data, 0, 1))
    bad = list(sent)[3][0][1]  # the first image of the fourth batch
    found, images = [], Unseen(bad)
    with pytest.raises(DataError, match=f"^cannot read image {bad}: OSError: broken$"):
        found.extend(TrainBatches(config, images, 1).epoch(0))
    assert len(found) == 3


class Unseen(Damaged):
    """The same as pictures, which a transform takes."""

    class_names = None

    def __getitem__(self, index):
        number, label = super().__getitem__(index)
        return DigitImages("tune_validation")[int(number)][0], label


def test_no_batch_is_kept(ahead, tmp_path):
    """One is with who takes them, one is begun; after an epoch, or a part of one, none."""
    config = small_config(tmp_path, data={"batch_size": 20, "eval_batch_size": 20})
    train = TrainBatches(config, DigitImages("tune_validation"), 10)
    for source in (train.epoch(0), iter(EvalBatches(config, DigitImages("validation"), 10))):
        seen = []
        for number, (images, labels) in enumerate(source):
            seen += [weakref.ref(images), weakref.ref(labels)]
            del images, labels
            assert not any(each() is not None for each in seen[:-2])
            if number == 10:
                break
        source.close()
        assert not any(each() is not None for each in seen)


def test_a_checkpoint_knows_the_batches_that_were_trained_and_no_others(
    tmp_path, monkeypatch, capsys
):
    """Stopped and resumed; the unreadable images are those of the steps so far."""
    sections = {
        "data": {"train_split": "tune_validation", "batch_size": 25, "max_bad_images": 20},
        "schedule": {"epochs": 1},
    }
    read = loading.read_image

    def reading(images, index, classes):
        if index % 20 == 0 and len(images) == 285:
            raise loading.UnreadableImage(f"cannot read {index}")
        return read(images, index, classes)

    monkeypatch.setattr(loading, "read_image", reading)
    ends = []
    for name in ("plain", "early"):
        if name == "early":
            monkeypatch.setattr(loading, "Transfer", functools.partial(Transfer, ahead=True))
        known = []
        for step in (3, 6, 9):
            with pytest.raises(SavedAndStopped, match=f"saved after step {step} "):
                fit(tmp_path, name, AtLook(3), **sections)
            newest = RunFolder(tmp_path / "output" / name).saved()[0]
            known.append(load_checkpoint(newest)["processes"][0]["bad_images"])
        ends.append((final_bytes(fit(tmp_path, name, **sections)), known, capsys.readouterr().err))
    assert ends[0] == ends[1]
    counts = [len(images) for images in ends[0][1]]
    assert 0 < counts[0] < counts[2] < ends[0][2].count("warning: cannot read")


@pytest.mark.gpu
def test_a_stream_of_its_own_brings_the_batches_while_the_gpu_computes(tmp_path):
    """The values arrive whole though steps are slow and memory is used again; nothing waits."""
    config = small_config(tmp_path, data={"batch_size": 64})
    transfer, device = Transfer(config, torch.device("cuda")), torch.device("cuda")
    shape = (64, 3, 128, 128)
    loaded = [
        (
            torch.full(shape, n, dtype=torch.uint8).pin_memory(),
            torch.full((64,), n).pin_memory(),
            [],
        )
        for n in range(1, 30)
    ]
    wanted = [next(Transfer(config, CPU)([batch]))[0][0, :, 0, 0] for batch in loaded]
    square = torch.randn(4096, 4096, device=device)
    square = torch.tanh(square @ square)  # libraries load
    least, most, labels = [], [], []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, own, _ in transfer(loaded):
            for _ in range(4):  # the step: long enough that copies overtake it
                square = torch.tanh(square @ square)
            least.append(images.amin((0, 2, 3)))
            most.append(images.amax((0, 2, 3)))
            labels.append(own.sum())
            images.zero_()  # as a step may write into its images
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found in (least, most):
        torch.testing.assert_close(
            torch.stack(found).cpu(), torch.stack(wanted), rtol=1e-5, atol=1e-5
        )
    assert [total.item() for total in labels] == [64 * n for n in range(1, 30)]
