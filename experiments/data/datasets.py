"""Opening the splits of the configured data set, and comparing them."""

import dataclasses
import itertools
import os
import re
import socket
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from experiments.config.schema import DataConfig
from experiments.data.facts import dataset_name
from experiments.data.images import DigitImages, Images, SomeImages, SplitImages, TimmImages
from experiments.errors import DataError, MissingData

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
    if prefix != "torch" or not config.download or dataset_name(config) in _BY_HAND:
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
    return not _prefix(config) or dataset_name(config) in _FOLDERS


def _prefix(config: DataConfig) -> str:
    """What tells timm's kinds of data sets apart, "" for folders and tar files."""
    return config.dataset.partition("/")[0].lower() if "/" in config.dataset else ""


def _open_split(config: DataConfig, split: str) -> SplitImages:
    name, prefix = dataset_name(config), _prefix(config)
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
