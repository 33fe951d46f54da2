"""Data sets as maps from an index to (PIL image, class), without any transform."""

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from experiments.errors import DataError
from experiments.seeding import derive_seed


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
