"""WebDataset shards (`wds/NAME`), read by index.

A shard is a tar archive in which files with the same name and different endings form one sample:
`0001.jpg` with its class in `0001.cls`. timm reads shards as a stream, which shuffles only within a
buffer and in an order that depends on the number of loader processes. Here the shards are indexed
once, so that every image has a number, as in any other data set.
"""

import io
import json
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.errors import DataError

_INFO_FILES = ("_info.json", "info.json")  # timm's names
_IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_CLASS_ENDING = "cls"


class ShardImages:
    """The images of one split of WebDataset shards.

    Args:
        root: folder of the shards.
        split: a split of `_info.json` (its `splits.NAME.filenames`), or the names of the shards,
            in which `{0000..0009}` stands for ten numbers.

    Raises:
        DataError: a shard is missing or damaged, or a sample lacks its image or class.
    """

    class_names = None

    def __init__(self, root: Path, split: str) -> None:
        self._shards = [root / name for name in _shard_names(root, split)]
        # compact arrays, which loader processes share: ImageNet has 1.3 million images
        self._shard, self._offset, self._size, self._label = (array("q") for _ in range(4))
        for number, path in enumerate(self._shards):
            for image, label in _samples(path):
                self._shard.append(number)
                self._offset.append(image.offset_data)
                self._size.append(image.size)
                self._label.append(label)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # opened each time: loader processes must not share a position in a file
        with self._shards[self._shard[index]].open("rb") as file:
            file.seek(self._offset[index])
            content = file.read(self._size[index])
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB"), self._label[index]

    def describe(self, index: int) -> str:
        """The image's shard and offset."""
        shard, offset = self.key(index)
        return f"{shard} (the image at byte {offset})"

    def key(self, index: int) -> tuple[Path, int]:
        """The same, as a pair."""
        return self._shards[self._shard[index]], self._offset[index]


def _shard_names(root: Path, split: str) -> list[str]:
    if split.endswith(".tar"):
        return list(_expand(split))
    for name in _INFO_FILES:
        path = root / name
        if path.exists():
            return _names_in_info(path, split)
    raise DataError(
        f"WebDataset shards in {root.resolve()}: split {split!r} needs a file {_INFO_FILES[0]} "
        'there, with {"splits": {"NAME": {"filenames": [...]}}}; or name the shards as the split, '
        "such as train-{0000..0009}.tar"
    )


def _names_in_info(path: Path, split: str) -> list[str]:
    try:
        splits: Any = json.loads(path.read_text(encoding="utf-8"))["splits"]
        known = ", ".join(splits)
        if split not in splits:
            raise DataError(f"{path}: split {split!r} is unknown; allowed: {known}")
        names = splits[split]["filenames"]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("filenames must be text")
        return list(names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: does not list shards as expected ({reason})") from None


def _expand(pattern: str) -> Iterator[str]:
    """Every name that a pattern with `{0000..0009}` stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        middle = f"{number:0{len(first)}}"
        yield from _expand(pattern[: found.start()] + middle + pattern[found.end() :])


def _samples(path: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The samples of a shard: the archive's entry of the image, and its class."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                if member.offset_data + member.size > size:
                    raise DataError(f"{path}: is cut off within {member.name}")
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                key, ending = f"{folder}/{stem}", ending.lower()
                if ending in _IMAGE_ENDINGS:
                    images[key] = member
                elif ending == _CLASS_ENDING:
                    labels[key] = _class_in(path, archive, member)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot read the shard: {reason}") from None
    for key, image in images.items():
        if key not in labels:
            raise DataError(f"{path}: {image.name} has no class: no .{_CLASS_ENDING} beside it")
        yield image, labels[key]
    if without := labels.keys() - images.keys():
        name = min(without).lstrip("/")
        raise DataError(f"{path}: {name}.{_CLASS_ENDING} has no image beside it")


def _class_in(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    file = archive.extractfile(member)
    assert file is not None, "a regular file of the archive"
    text = file.read(32)
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path}: {member.name}: got {text!r}; allowed: a class number") from None
