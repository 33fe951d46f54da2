"""Data sets as maps from an index to (PIL image, class), without any transform."""

import dataclasses
import itertools
import os
import re
import socket
import tarfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from experiments.config.schema import DataConfig, RunConfig
from experiments.errors import ConfigError, DataError, MissingData
from experiments.seeding import derive_seed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_PART = re.compile(r"(?P<split>[^\[\]]+)\[(?P<start>\d*):(?P<stop>\d*)\]")
_DOWNLOAD_TIMEOUT_SECONDS = 30
_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # timm's
_NAMES = [name for group in _SYNONYMS for name in group]
_FOLDERS = ("torch/image_folder", "torch/folder")  # read by torchvision as by timm
_BY_HAND = ("torch/imagenet", *_FOLDERS)  # never fetched
# timm takes every split of these that is not called train or training for the test images
_TRAIN_AND_TEST = tuple(
    f"torch/{name}"
    for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
)
STREAMED = ("tfds", "hfids")  # read from front to back: their images have no index


@dataclass(frozen=True)
class Facts:
    """What is known about a data set before it is read."""

    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


FACTS = {
    # of the training split, grey as three equal channels
    "digits": Facts(10, (0.3054,) * 3, (0.3237,) * 3),
    "torch/cifar10": Facts(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "torch/cifar100": Facts(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "torch/mnist": Facts(10, (0.1307,) * 3, (0.3081,) * 3),
    "torch/fashion_mnist": Facts(10, (0.2860,) * 3, (0.3530,) * 3),
}


def known_facts(config: DataConfig) -> Facts | None:
    """What is known about the configured data set, whose name may be in any case."""
    return FACTS.get(_name(config))


def _name(config: DataConfig) -> str:
    """The data set's name, as timm reads those of torchvision."""
    return re.sub("^torch/[^/]*/", "torch/", config.dataset.lower())


class Images(Protocol):
    """A data set of this project: an image and its class under each index."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in order, where the data set states them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    def describe(self, index: int) -> str:
        """Name one image in a message: its file where it has one."""


class SplitImages(Images, Protocol):
    """The same of a split, or of a part of one."""

    def key(self, index: int) -> Hashable:
        """What an image is among those of all splits: the same image has the same key."""


class DigitImages:
    """scikit-learn's 1,797 handwritten digits (8×8, grey) as 32×32 RGB images.

    The splits are fixed: within each class, in the data set's own order, every fifth image
    belongs to `validation` and the others to `train`. `tune_train` and `tune_validation` divide
    `train` in the same way, so that settings can be chosen without a look at `validation`.
    """

    splits = ("train", "validation", "tune_train", "tune_validation")
    class_names = None

    def __init__(self, split: str) -> None:
        if split not in self.splits:
            raise DataError(
                f"data set digits: split {split!r} is unknown; allowed: {', '.join(self.splits)}"
            )
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._indices = digits_split(digits.target, split)
        self._labels = digits.target[self._indices]
        grey = (digits.images[self._indices] * (255 / 16)).round().astype(np.uint8)
        self._images = [
            Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR).convert("RGB")
            for image in grey
        ]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._images[index].copy(), int(self._labels[index])

    def describe(self, index: int) -> str:
        """The image's number within scikit-learn's data set."""
        return f"digit {self.key(index)}"

    def key(self, index: int) -> int:
        """The same number."""
        return int(self._indices[index])


def digits_split(labels: np.ndarray, split: str) -> np.ndarray:
    """Indices (ascending) of one split of the digits, stratified by a fixed rule."""
    within = np.zeros(len(labels), dtype=np.int64)  # how many of its class came before
    for digit in np.unique(labels):
        members = labels == digit
        within[members] = np.arange(members.sum())
    held_out = within % 5 == 4
    if split == "validation":
        return np.flatnonzero(held_out)
    train = np.flatnonzero(~held_out)
    if split == "train":
        return train
    inner = digits_split(labels[train], "validation" if split == "tune_validation" else "train")
    return train[inner]


class TimmImages:
    """A data set of timm's factory whose images have indices; `place` tells splits apart."""

    def __init__(self, dataset: Any, place: str) -> None:
        self._dataset = dataset
        self._place = place
        self._reader = getattr(dataset, "reader", None)  # timm's; torchvision has none

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self._reader is None:
            image, label = self._dataset[index]
            return image.convert("RGB"), int(label)
        # timm's own __getitem__ replaces an unreadable image by the next one
        file, label, *_ = self._reader[index]
        with file, Image.open(file) as image:
            return image.convert("RGB"), int(label)

    def describe(self, index: int) -> str:
        """The image's file, where the data set has files."""
        # a Hugging Face data set may hold the images themselves, without a file's name
        file = self._reader.filename(index, absolute=True) if self._reader else None
        return f"image {index}" if file is None else str(file)

    def key(self, index: int) -> tuple[str, int]:
        """The split's place and the number there."""
        return self._place, index

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes in order, where the data set states them."""
        for owner in (self._reader, self._dataset):
            # timm's reader of a tar file has another name for it
            for attribute in ("class_to_idx", "class_name_to_idx"):
                if classes := getattr(owner, attribute, None):
                    names = {index: str(name) for name, index in classes.items()}
                    last = max(names)
                    return tuple(names.get(index, f"class {index}") for index in range(last + 1))
        return None


class UnreadableImage(DataError):
    """An image that cannot be read; says which, and why."""


def read_image(images: Images, index: int, num_classes: int) -> tuple[Image.Image, int]:
    """An image and its class.

    Raises:
        UnreadableImage: it cannot be read.
        DataError: there is no such class.
    """
    try:
        image, label = images[index]
    except Exception as error:  # whatever a reader or a decoder raises: name the image
        raise UnreadableImage(
            f"cannot read {images.describe(index)}: {type(error).__name__}: {error}"
        ) from error
    if not 0 <= label < num_classes:
        raise DataError(
            f"{images.describe(index)} has class {label}; allowed with {num_classes} classes: 0 to "
            f"{num_classes - 1}"
        )
    return image, label


class SomeImages:
    """Some images of a data set, by their indices there."""

    def __init__(self, whole: SplitImages, indices: Sequence[int]) -> None:
        self._whole = whole
        self.indices = indices
        self.class_names = whole.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._whole[self.indices[index]]

    def describe(self, index: int) -> str:
        """The image's name within the whole data set."""
        return self._whole.describe(self.indices[index])

    def key(self, index: int) -> Hashable:
        """The image's key within the whole data set."""
        return self._whole.key(self.indices[index])


def draw_per_class(images: SplitImages, per_class: int, num_classes: int, seed: int) -> SomeImages:
    """`per_class` images of each class, in the data set's own order.

    They are the first of each class in an order of all images that depends on the seed alone: a
    function of (seed, labels) for which most images need not be read.

    Raises:
        DataError: a class has fewer images, or one cannot be read.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "per class"))
    chosen: dict[int, list[int]] = {label: [] for label in range(num_classes)}
    missing = per_class * num_classes
    for index in torch.randperm(len(images), generator=generator).tolist():
        own = chosen[read_image(images, index, num_classes)[1]]
        if len(own) < per_class:
            own.append(index)
            missing -= 1
            if not missing:
                return SomeImages(images, sorted(itertools.chain(*chosen.values())))
    label, fewest = min(chosen.items(), key=lambda item: len(item[1]))
    raise DataError(
        f"data.per_class: got {per_class}; allowed: up to {len(fewest)}, as many images as class "
        f"{label} has among the {len(images)} of the training split"
    )


def open_images(config: DataConfig, split: str) -> SplitImages:
    """Open one split of the configured data set, or a part of it.

    `train[:10000]` is the first 10,000 images of `train` in the data set's own order,
    `train[50000:60000]` the 10,000 images from image 50,000 on. Every data set can be sliced.

    Raises:
        DataError: it is missing, unreadable or unknown; the message says where it is expected.
    """
    part = _PART.fullmatch(split)
    if part is None:
        if "[" in split:
            allowed = "parts by the numbers of images, such as train[:10000] and train[500:600]"
            raise _wrong_split(config, split, "not understood", allowed)
        return _open_split(config, split)
    whole = _open_split(config, part["split"])
    start, stop = int(part["start"] or 0), int(part["stop"] or len(whole))
    if not start < stop <= len(whole):
        raise DataError(
            f"data set {config.dataset or 'folder of images'}: split {split!r} asks for images "
            f"{start} to {stop}; allowed: at least one image, of the {len(whole)} of "
            f"{part['split']!r}"
        )
    return SomeImages(whole, range(start, stop))


def to_be_fetched(config: DataConfig, splits: Sequence[str]) -> bool:
    """Whether opening these splits may fetch the data set, or write a cache as `datasets` does.

    Raises:
        DataError: as `open_images`.
    """
    prefix = _prefix(config)
    if prefix != "torch" or not config.download or _name(config) in _BY_HAND:
        return prefix == "hfds"
    there = dataclasses.replace(config, download=False)
    missing = False
    for split in splits:
        try:
            open_images(there, split)
        except MissingData:
            missing = True
    return missing


def refuse_other_classes(
    config: DataConfig, splits: Sequence[str], opened: Sequence[Images]
) -> None:
    """Refuse splits in which a label means another class than in the first of them.

    Splits that do not name their classes cannot be compared.

    Raises:
        DataError: it names the classes that a split lacks.
    """
    first = opened[0].class_names
    for split, images in zip(splits[1:], opened[1:], strict=True):
        names = images.class_names
        if first is None or names is None or names == first:
            continue
        lacks = [
            f"{where!r} lacks {_some(missing)}"
            for where, missing in (
                (split, [name for name in first if name not in set(names)]),
                (splits[0], [name for name in names if name not in set(first)]),
            )
            if missing
        ]
        if not lacks:
            pairs = enumerate(zip(first, names, strict=True))
            number = next(number for number, (one, other) in pairs if one != other)
            lacks = [
                f"class {number} is {first[number]!r} in {splits[0]!r} and {names[number]!r} in "
                f"{split!r}"
            ]
        raise DataError(
            f"data set {config.dataset or 'folder of images'}: the classes of {splits[0]!r} and "
            f"{split!r} differ: {'; '.join(lacks)}; allowed: the same classes in the same order, "
            "since a label is a class's number among them"
        )


def refuse_shared_images(
    config: DataConfig, splits: Sequence[str], opened: Sequence[SplitImages]
) -> None:
    """Refuse splits that share images.

    Raises:
        DataError: it says which two, and how many images.
    """
    named = zip(splits, opened, strict=True)
    for (one, images), (other, others) in itertools.combinations(named, 2):
        keys = {others.key(index) for index in range(len(others))}
        shared = sum(images.key(index) in keys for index in range(len(images)))
        if shared:
            raise DataError(
                f"data set {config.dataset or f'in {config.root}'}: the splits {one!r} and "
                f"{other!r} share {shared} images; allowed: splits without common images, such as "
                "train[:9000] and train[9000:], since images of the training validate nothing"
            )


def _some(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _in_folders(config: DataConfig) -> bool:
    """Whether each split is a folder, or a tar file, of one folder of images per class."""
    return not _prefix(config) or _name(config) in _FOLDERS


def _prefix(config: DataConfig) -> str:
    """What tells timm's kinds of data sets apart, "" for folders and tar files."""
    return config.dataset.partition("/")[0].lower() if "/" in config.dataset else ""


def _open_split(config: DataConfig, split: str) -> SplitImages:
    name, prefix = _name(config), _prefix(config)
    if name == "digits":
        return DigitImages(split)
    if name in _TRAIN_AND_TEST and split not in (*_NAMES, "test"):
        raise _wrong_split(config, split, "unknown", ", ".join((*_NAMES, "test")))
    if prefix in STREAMED:
        raise DataError(
            f"data.dataset: got {config.dataset!r}, which is read as a stream; allowed: data sets "
            "whose images have an index (digits, torch/NAME, hfds/NAME, wds/NAME, folders, a tar "
            "file)"
        )
    root = Path(config.root)
    if _in_folders(config) and root.is_dir():
        root = _place_of_split(config, split)
    download = config.download and prefix == "torch"
    if not root.exists() and prefix not in ("hfds", "torch"):
        raise MissingData(_missing(config, split, "the folder does not exist"))
    if prefix == "wds":
        from experiments.data.shards import ShardImages

        images = ShardImages(root, split)
        if not len(images):
            raise MissingData(_missing(config, split, "the shards hold no images"))
        return images
    if root.suffix == ".tar" and root.is_file():
        return _tar_images(root)
    from timm.data import create_dataset

    # in the folder of a split, timm would take a class named "train" for another split
    create = partial(
        create_dataset, config.dataset, root=str(root), split=split, search_split=False
    )
    try:
        with _network_timeout():
            try:
                dataset = create()
            except RuntimeError:
                if not download:
                    raise
                dataset = create(download=True)
    except AssertionError as error:
        raise DataError(f"data.dataset: got {config.dataset!r}; {error}") from None
    except ImportError as error:
        raise DataError(f"data.dataset: {config.dataset!r} needs a package: {error}") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = f"not there, and the download failed: {error}" if download else str(error)
        raise MissingData(_missing(config, split, reason)) from None
    if len(dataset) == 0:
        raise MissingData(_missing(config, split, "it holds no images"))
    if _in_folders(config):
        return TimmImages(dataset, str(root))
    if name in _TRAIN_AND_TEST:
        return TimmImages(dataset, "train" if split in _SYNONYMS[0] else "test")
    return TimmImages(dataset, split)


def _place_of_split(config: DataConfig, split: str) -> Path:
    """The folder or tar file of a split, under its own name or a synonym.

    A folder without any split is itself the place of each.

    Raises:
        DataError: there are other splits, but not this one, or the splits lie deeper.
    """
    root = Path(config.root)
    names = [split, *(name for group in _SYNONYMS if split in group for name in group)]
    for path in (root / f"{name}{ending}" for name in names for ending in (".tar", "")):
        if path.exists():
            return path
    others = [path.name for path in sorted(root.iterdir()) if path.stem.lower() in _NAMES]
    if others:
        found = ", ".join(others)
        raise DataError(_missing(config, split, f"there is {found}, but not this split"))
    for folder, classes, _ in os.walk(root, followlinks=True):  # as timm, which would mix them
        path = Path(folder)
        if path != root and path.name.lower() in _NAMES and classes:
            raise DataError(
                f"data.root: got {config.root}, in which {path.relative_to(root)} is the folder of "
                f"a split; allowed: {path.parent}, the folder that holds the folders of the splits"
            )
    return root


def _tar_images(path: Path) -> TimmImages:
    """A tar file with one folder of images per class."""
    from timm.data import ImageDataset
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        # by default timm caches the index of a large archive as a pickle, which it would run
        reader = ReaderImageInTar(str(path), cache_tarinfo=False)
    except (OSError, AssertionError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot read the tar file of images: {error}") from None
    return TimmImages(ImageDataset(str(path), reader=reader), str(path))


def known_num_classes(config: RunConfig) -> int | None:
    """The number of classes, where the config alone tells it.

    Raises:
        ConfigError: the config contradicts the data set.
    """
    wanted, facts = config.model.num_classes, known_facts(config.data)
    if facts is not None and wanted not in (None, facts.num_classes):
        raise _wrong_classes(config, facts.num_classes)
    return facts.num_classes if facts is not None else None


def stated_num_classes(config: RunConfig, images: Images) -> int:
    """The number of classes of a data set that has been opened.

    Raises:
        ConfigError: the config contradicts the data set, or neither states it.
    """
    wanted, names = config.model.num_classes, images.class_names
    found = wanted if names is None else len(names)
    if found is None:
        raise ConfigError(
            f"data.dataset: {config.data.dataset!r} does not state its number of classes; "
            "set model.num_classes"
        )
    if wanted not in (None, found):
        raise _wrong_classes(config, found)
    return found


def readable_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, with words in place of ImageNet's WordNet numbers."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    words = [info.label_name_to_description(n) if n in known else n for n in names]
    return tuple(word.partition(",")[0] for word in words)


def _wrong_classes(config: RunConfig, found: int) -> ConfigError:
    return ConfigError(
        f"model.num_classes: got {config.model.num_classes}; allowed: {found}, as many classes "
        f"as the data set {config.data.dataset!r} has"
    )


def _wrong_split(config: DataConfig, split: str, reason: str, allowed: str) -> DataError:
    name = config.dataset or "folder of images"
    return DataError(f"data set {name}: split {split!r} is {reason}; allowed: {allowed}")


def _missing(config: DataConfig, split: str, reason: str) -> str:
    where = Path(config.root).resolve()
    reason = " ".join(reason.split()).rstrip(".")
    advice = "set data.root to the folder that holds it"
    if _in_folders(config):
        advice += ", with one folder of images per class in the folder of each split, or SPLIT.tar"
    elif _prefix(config) == "torch":
        advice += ", or let data.download fetch it on a machine with a network"
    elif _prefix(config) == "hfds":
        advice = "name a data set of the Hugging Face Hub, or a folder of one: hfds/PATH"
    name = config.dataset or "folder of images"
    return f"data set {name}, split {split}: expected in {where}: {reason}; {advice}"


@contextmanager
def _network_timeout() -> Iterator[None]:
    """End a stalled download, for which torchvision sets no time limit, with an error."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
