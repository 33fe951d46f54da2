"""WebDataset shards and tar files: every image has its own number."""

import io
import json
import os
import tarfile

import pytest
import torch
from PIL import Image

from experiments import evaluate, train
from experiments.config.schema import DataConfig, RunConfig
from experiments.data.datasets import open_images
from experiments.data.facts import stated_num_classes
from experiments.data.loading import TrainBatches
from experiments.errors import DataError
from tests.helpers.others_warnings import forks
from tests.helpers.runs_helper import small_config

SHADES = (10, 60, 110, 160, 210)


def png(shade):
    content = io.BytesIO()
    Image.new("L", (20, 24), shade).save(content, "png")
    return content.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_shards(root, shards=2):
    """Five images per shard; the class follows from the shade."""
    names = [f"set-train-{number:04}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        files = {}
        for order, shade in enumerate(SHADES):
            files[f"a/{number}-{order}.png"] = png(shade + number)
            files[f"a/{number}-{order}.cls"] = str(order % 2).encode()
            files[f"a/{number}-{order}.json"] = b"{}"
        write_tar(root / name, files)
    info = {"splits": {"train": {"filenames": names}, "validation": {"filenames": names[:1]}}}
    (root / "_info.json").write_text(json.dumps(info))


def wds(root):
    return DataConfig(dataset="wds/set", root=str(root), batch_size=2, workers=0)


@pytest.mark.parametrize("split", ["train", "set-train-{0000..0001}.tar"])
def test_every_image_of_the_shards_has_a_number(tmp_path, split):
    write_shards(tmp_path)
    images = open_images(wds(tmp_path), split)
    assert len(images) == 10
    for index in (9, 0, 7, 3):
        image, label = images[index]
        shard, order = divmod(index, 5)
        assert image.mode == "RGB" and image.size == (20, 24)
        assert image.getpixel((0, 0)) == (SHADES[order] + shard,) * 3
        assert label == order % 2
    assert "set-train-0001.tar (the image at byte" in images.describe(7)


@forks
def test_batches_of_shards_do_not_depend_on_the_loader_processes(tmp_path):
    write_shards(tmp_path / "data")
    found = []
    for workers in (0, 2):
        data = {"dataset": "wds/set", "root": str(tmp_path / "data"), "batch_size": 5}
        config = small_config(tmp_path, data={**data, "workers": workers})
        images = open_images(config.data, "train")
        found.append(list(TrainBatches(config, images, 2).epoch(0)))
    for before, after in zip(*found, strict=True):
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_shards_are_trained_on_and_evaluated_by_the_entry_points(tmp_path, capsys):
    write_shards(tmp_path / "data")
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {name: cct_2_3x2_32, num_classes: 2, image_size: 32}\n"
        f"data: {{dataset: wds/set, root: {tmp_path / 'data'}, batch_size: 5, workers: 0}}\n"
        "schedule: {epochs: 1}\nlogging: {tensorboard: false}\n"
        f"output: {tmp_path / 'run'}\ndevice: cpu\n"
    )
    with pytest.raises(DataError, match="'train' and 'validation' share 5 images"):
        train.main(["--config", str(config)])
    train.main(["--config", str(config), "--data.train_split", "train[5:]"])
    weights = str(tmp_path / "run" / "final.safetensors")
    capsys.readouterr()
    evaluate.main(["--config", str(config), "--checkpoint", weights, "--json"])
    assert json.loads(capsys.readouterr().out)["images"] == 5


FIRST, SECOND, INFO = "set-train-0000.tar", "set-train-0001.tar", "_info.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: os.truncate(root / FIRST, 1100), r"set-train-0000\.tar: "),
        (
            lambda root: (root / SECOND).unlink(),
            r"set-train-0001\.tar: cannot read the shard: No such file",
        ),
        (
            lambda root: (root / FIRST).write_bytes(b"\x1f\x8b" + b"\0" * 600),
            r"set-train-0000\.tar: cannot read the shard",
        ),
        (
            lambda root: write_tar(root / FIRST, {"1.png": png(1)}),
            r"1\.png has no class: no \.cls beside it",
        ),
        (
            lambda root: write_tar(root / FIRST, {"a/1.cls": b"1"}),
            r"a/1\.cls has no image beside it",
        ),
        (
            lambda root: write_tar(root / FIRST, {"1.png": png(1), "1.cls": b"dog"}),
            r"1\.cls: got b'dog'; allowed: a class number",
        ),
        (
            lambda root: (root / INFO).write_text("{"),
            "_info.json: does not list shards",
        ),
        (lambda root: (root / INFO).unlink(), "split 'train' needs a file _info.json there"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, message):
    write_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_images(wds(tmp_path), "train")


def test_an_unknown_split_lists_the_known_ones(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(DataError, match="'test' is unknown; allowed: train, validation"):
        open_images(wds(tmp_path), "test")


# timm's reader keeps the archive open for the life of the process
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("root, split", [("", "train"), ("train.tar", "train"), ("", "training")])
def test_a_tar_file_of_one_folder_per_class(tmp_path, root, split):
    files = {f"{name}/{k}.png": png(s + k) for name, s in (("a", 10), ("b", 99)) for k in range(2)}
    write_tar(tmp_path / "train.tar", files)
    config = RunConfig(data=DataConfig(dataset="", root=str(tmp_path / root)))
    images = open_images(config.data, split)
    assert len(images) == 4 and stated_num_classes(config, images) == 2
    found = [(images[index][0].getpixel((0, 0)), images[index][1]) for index in range(4)]
    assert list(tmp_path.iterdir()) == [tmp_path / "train.tar"], "no pickled index beside it"
    assert found == [((10,) * 3, 0), ((11,) * 3, 0), ((99,) * 3, 1), ((100,) * 3, 1)]


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval", "evaluation"])
def test_a_tar_file_is_found_under_the_names_of_a_folder(tmp_path, name):
    config = DataConfig(dataset="", root=str(tmp_path))
    write_tar(tmp_path / f"{name}.tar", {"a/1.png": png(1), "b/1.png": png(2)})
    assert len(open_images(config, "validation")) == 2
    if name == "validation":
        return
    # the split's own name comes first, be it a folder or a tar file
    (tmp_path / "validation" / "a").mkdir(parents=True)
    (tmp_path / "validation" / "a" / "1.png").write_bytes(png(3))
    images = open_images(config, "validation")
    assert len(images) == 1 and images[0][0].getpixel((0, 0)) == (3, 3, 3)


def test_a_tar_file_that_is_none_is_named(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"train\.tar: cannot read the tar file of images"):
        open_images(DataConfig(dataset="", root=str(tmp_path)), "train")
