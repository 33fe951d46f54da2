"""Data sets: their splits, images and classes; what is missing is named."""

import shutil
import struct
import tarfile
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import evaluate, train
from experiments.checkpoint import save_final_weights
from experiments.config.schema import DataConfig, RunConfig
from experiments.data.augment import normalisation
from experiments.data.datasets import open_images, refuse_other_classes, refuse_shared_images
from experiments.data.facts import known_num_classes, stated_num_classes
from experiments.data.images import DigitImages, digits_split, draw_per_class
from experiments.errors import ConfigError, DataError
from experiments.models.build import build_model
from tests.helpers.commands import fails
from tests.helpers.runs_helper import small_config, write_config


def write_idx(path, values):
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_fashion_mnist(root):
    """Four images to train on and two to test with; gives the pixels of the four."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28))
    for part, count in (("train", 4), ("t10k", 2)):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count))
    return pixels


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


def test_a_folder_of_images(tmp_path, folder_of_images):
    config = RunConfig(data=DataConfig(dataset="", root=str(folder_of_images)))
    images = open_images(config.data, "train")
    assert len(images) == 6
    image, label = images[5]
    assert (image.mode, label) == ("RGB", 1)
    assert images.describe(5).endswith("train/dog/2.png")
    assert stated_num_classes(config, images) == 2
    assert stated_num_classes(config, open_images(config.data, "train[:2]")) == 2, "of the whole"
    data = {"dataset": "", "root": str(folder_of_images)}
    wrong = small_config(tmp_path, model={"num_classes": 7}, data=data)
    with pytest.raises(ConfigError, match=r"model\.num_classes: got 7; allowed: 2"):
        stated_num_classes(wrong, images)


def test_a_split_is_never_taken_from_another(tmp_path, folder_of_images):
    config = DataConfig(dataset="", root=str(folder_of_images))
    shutil.rmtree(folder_of_images / "validation")
    with pytest.raises(DataError, match=r"split validation: .* there is train, but not this"):
        open_images(config, "validation")
    # a folder without splits is itself the place of each
    inner = DataConfig(dataset="", root=str(folder_of_images / "train"))
    assert len(open_images(inner, "validation")) == 6
    (folder_of_images / "train" / "dog").rename(folder_of_images / "train" / "train")
    images = open_images(config, "train")
    assert len(images) == 6 and images.class_names == ("cat", "train")


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("between", ["ILSVRC2012", "Data/CLS-LOC"])
def test_a_root_above_the_splits_is_refused(tmp_path, folder_of_images, dataset, between):
    """Each split would be all images of both."""
    place = tmp_path / "root" / between
    place.parent.mkdir(parents=True)
    folder_of_images.rename(place)
    config = DataConfig(dataset=dataset, root=str(tmp_path / "root"))
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=rf"data\.root: got .*/root, .*; allowed: {place},"):
            open_images(config, split)
    (place / "train").rename(place / "Train")
    (place / "validation").rename(place / "VAL")
    with pytest.raises(DataError, match=r"there is Train, VAL, but not this split"):
        open_images(DataConfig(dataset=dataset, root=str(place)), "train")


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_a_local_hugging_face_data_set(tmp_path, folder_of_images, form):
    """Images in files, and images inside the table, which have no file's name."""
    import datasets
    from pyarrow import Table, parquet

    place = folder_of_images
    if form == "parquet":
        place = tmp_path / "tables"
        place.mkdir()
        classes = datasets.ClassLabel(names=["cat", "dog"])
        schema = datasets.Features(image=datasets.Image(), label=classes).arrow_schema
        for split in ("train", "validation"):
            files = sorted((folder_of_images / split).rglob("*.png"))
            images = [{"bytes": file.read_bytes(), "path": None} for file in files]
            labels = [classes.str2int(file.parent.name) for file in files]
            table = Table.from_pydict({"image": images, "label": labels}, schema=schema)
            parquet.write_table(table, place / f"{split}.parquet")
    config = DataConfig(dataset=f"hfds/{place}", root=str(tmp_path / "cache"))
    images = open_images(config, "train")
    reference = open_images(DataConfig(dataset="", root=str(folder_of_images)), "train")
    assert len(images) == len(reference) == 6 and images.class_names == ("cat", "dog")
    for index in range(6):
        (image, label), (same, its_label) = images[index], reference[index]
        assert image.tobytes() == same.tobytes() and label == its_label
    named = {"folder": reference.describe(5), "parquet": "image 5"}
    assert images.describe(5) == named[form]
    part = open_images(config, "validation[1:3]")
    assert [part[index][1] for index in range(len(part))] == [0, 1]
    with pytest.raises(DataError, match=r'Unknown split "test".*; name a data set of the Hugging'):
        open_images(config, "test")


def test_fashion_mnist_through_timm_is_rgb(tmp_path):
    pixels = write_fashion_mnist(tmp_path)
    config = DataConfig(dataset="torch/fashion_mnist", root=str(tmp_path), download=False)
    images = open_images(config, "validation")
    assert len(images) == 2
    assert len(open_images(config, "train")) == 4
    image, label = images[1]
    assert label == 1
    assert np.array_equal(np.asarray(image), np.repeat(pixels[1][..., None], 3, axis=2))


@pytest.mark.parametrize("dataset", ["torch/fashion_mnist", "Torch/a/Fashion_MNIST"])
def test_test_images_come_under_their_names_alone(tmp_path, dataset):
    """timm takes any split that is not called train or training for the test images."""
    write_fashion_mnist(tmp_path)
    config = DataConfig(dataset=dataset, root=str(tmp_path), download=False)
    for split, count in (("training", 4), ("test", 2), ("val", 2), ("training[1:]", 3)):
        assert len(open_images(config, split)) == count
    for split in ("Train", "trian", "train ", "unlabeled", "trian[:1]"):
        with pytest.raises(DataError, match=r"' is unknown; allowed: train, training, val, .*test"):
            open_images(config, split)


@pytest.mark.parametrize("dataset", ["digits", "", "torch/cifar10", "torch/qmnist", "hfds/a"])
def test_a_part_that_is_not_understood(tmp_path, dataset):
    config = DataConfig(dataset=dataset, root=str(tmp_path), download=False)
    for part in (
        "[:90%]",
        "[:-1]",
        "[0:4:2]",
        "[ :2]",
        "[:1_0]",
        "[1]",
        "[:5][1:2]",
        "[:2",
        "[:2] ",
    ):
        with pytest.raises(DataError, match=r"not understood; allowed: parts .* train\[500:600\]"):
            open_images(config, f"train{part}")


def test_a_data_set_is_known_by_its_name_in_any_case():
    """timm opens them all."""
    for name in ("digits", "torch/fashion_mnist", "torch/cifar100"):
        known = DataConfig(dataset=name)
        for other in (name.upper(), name.title(), name.replace("torch/", "torch/a/")):
            config = DataConfig(dataset=other)
            assert normalisation(config) == normalisation(known) != normalisation(DataConfig(""))
            classes = 100 if name == "torch/cifar100" else 10
            assert known_num_classes(RunConfig(data=config)) == classes
    assert len(open_images(DataConfig(dataset="Digits"), "train")) == 1442


def test_a_part_of_a_split_is_those_images_in_their_order(tmp_path):
    data = small_config(tmp_path).data
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
        open_images(small_config(tmp_path).data, split)


def images_named(*names):
    return SimpleNamespace(class_names=names or None)


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("abc", "ac", "'val' lacks 'b'"),
        ("ac", "abc", "'train' lacks 'b'"),
        ("abc", "abd", "'val' lacks 'c'; 'train' lacks 'd'"),
        ("abc", "acb", "class 1 is 'b' in 'train' and 'c' in 'val'"),
        ("abcdefgh", "h", "'val' lacks 'a', 'b', 'c', 'd', 'e' and 2 more"),
        ("abc", "abc", ""),
        ("abc", "", ""),  # not named, as in WebDataset shards
        ("", "abc", ""),
    ],
)
def test_splits_must_have_the_same_classes_in_the_same_order(first, second, told):
    opened = [images_named(*first), images_named(*second)]
    if not told:
        refuse_other_classes(DataConfig(), ("train", "val"), opened)
        return
    with pytest.raises(DataError, match=f"differ: {told}; allowed: the same classes"):
        refuse_other_classes(DataConfig(), ("train", "val"), opened)


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("train", "train", 1442),
        ("train", "train[1000:]", 442),
        ("train[:1001]", "train[1000:]", 1),
        ("train[:1000]", "train[1000:]", 0),
        ("train", "tune_validation", 285),
        ("tune_validation[:9]", "train", 9),
        ("tune_train", "tune_validation", 0),
        ("train", "validation", 0),
    ],
)
def test_splits_that_share_images_are_refused(first, second, shared):
    expect_shared(DataConfig(dataset="digits"), first, second, shared)


def expect_shared(config, first, second, shared):
    opened = [open_images(config, split) for split in (first, second)]
    words = f"the splits '.*' and '.*' share {shared} images; allowed"
    with pytest.raises(DataError, match=words) if shared else nullcontext():
        refuse_shared_images(config, (first, second), opened)


def test_images_are_shared_under_other_names_too(tmp_path, folder_of_images):
    write_fashion_mnist(tmp_path)
    fashion = DataConfig(dataset="torch/fashion_mnist", root=str(tmp_path), download=False)
    table = DataConfig(dataset=f"hfds/{folder_of_images}", root=str(tmp_path / "cache"))
    inner = DataConfig(dataset="", root=str(folder_of_images / "train"))
    for config, first, second, shared in (
        (fashion, "train", "training[3:]", 1),
        (fashion, "test", "validation", 2),
        (fashion, "train", "test", 0),
        (table, "train[:4]", "train[2:]", 2),
        (table, "train", "validation", 0),
        (inner, "train", "validation", 6),  # a folder without splits is the place of each
        (inner, "train[:4]", "validation[4:]", 0),
    ):
        expect_shared(config, first, second, shared)


@pytest.mark.parametrize("check", [[], ["--check"]])
def test_no_training_validates_on_its_own_images(check, tmp_path, capsys):
    words = ("--config", write_config(tmp_path), "--output", tmp_path / "run", *check)
    error = fails(capsys, train, *words, "--data.val_split", "train[1400:]")
    assert "'train' and 'train[1400:]' share 42 images" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["folders", "tar per split", "torch/image_folder"])
def test_a_class_that_validation_lacks_stops_the_training(kind, tmp_path, folder_of_images, capsys):
    """timm numbers the folders of each split: a third class would become the second."""
    shutil.rmtree(folder_of_images / "validation" / "cat")
    if kind == "tar per split":
        for split in ("train", "validation"):
            with tarfile.open(folder_of_images / f"{split}.tar", "w") as archive:
                archive.add(folder_of_images / split, ".")
            shutil.rmtree(folder_of_images / split)
    dataset = kind if kind.startswith("torch") else ""
    data = {"dataset": dataset, "root": str(folder_of_images), "batch_size": 2}
    words = ("--config", write_config(tmp_path, data=data), "--output", tmp_path / "run")
    assert "'validation' lacks 'cat'" in fails(capsys, train, *words)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_number_of_classes_are_refused(tmp_path, folder_of_images, capsys):
    """Evaluation sees one split alone, and the weights know how many classes they tell apart."""
    path, weights = write_config(tmp_path), tmp_path / "weights.safetensors"
    save_final_weights(weights, build_model(small_config(tmp_path), 3))
    words = ("--config", path, "--checkpoint", weights, "--data.dataset", "")
    error = fails(capsys, evaluate, *words, "--data.root", folder_of_images)
    assert str(weights) in error and "(3, 32) in the file and (2, 32) in the model" in error


def test_images_of_each_class_are_drawn_by_the_seed(tmp_path):
    data = small_config(tmp_path).data
    whole = open_images(data, "train[100:900]")
    drawn = draw_per_class(whole, 20, 10, seed=3)
    assert Counter(drawn[index][1] for index in range(200)) == dict.fromkeys(range(10), 20)
    assert sorted(set(drawn.indices)) == list(drawn.indices)
    assert drawn.describe(0) == whole.describe(drawn.indices[0])
    assert draw_per_class(whole, 20, 10, seed=3).indices == drawn.indices
    # fewer images are among the more, and each image is as likely: 20 of about 80 in 40 draws
    assert set(draw_per_class(whole, 5, 10, seed=3).indices) < set(drawn.indices)
    times = Counter(i for seed in range(40) for i in draw_per_class(whole, 20, 10, seed).indices)
    assert len(times) > 790 and max(times.values()) < 25
    with pytest.raises(DataError, match=r"data.per_class: got 100; allowed: up to \d\d, as many"):
        draw_per_class(whole, 100, 10, seed=3)
