"""Row 6: the input pipeline of the CIFAR recipe, in images per second and core; checkpoints.

The images are 32×32 pieces of the two photographs that come with scikit-learn, so that no download
is needed. Pieces of photographs of CIFAR's size take each operation as long as CIFAR's images.
"""

import contextlib
import io
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import row
from benchmarks.row import Row, Settings, Target
from benchmarks.timing import Timing, ratio, recorded
from experiments.checkpoint import save_checkpoint
from experiments.config.reading import load_config
from experiments.config.schema import RunConfig
from experiments.data.augment import train_transform
from experiments.data.loading import SeededImages, TrainBatches
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT
from experiments.seeding import derive_seed, generators_kept, seed_generators, seeded
from experiments.training.folder import RunFolder

CONFIG = ROOT / "configs" / "cct_7-3x1_cifar100_HTM.yaml"
CLASSES = 100
GPU_IMAGES_PER_SECOND = 20_000
"""The target of a GPU's training speed; a loader on 16 cores must not be slower."""
GPU_CORES = 16
OVERHEAD = 0.05
"""Largest share of a sample's time that our code may add to timm's transform."""
_SIDE, _STEP = 32, 8


class PhotographPieces:
    """`count` pieces of scikit-learn's two sample photographs, repeated as needed."""

    def __init__(self, count: int | None = None) -> None:
        from sklearn.datasets import load_sample_images

        self._pieces = [
            photograph[row : row + _SIDE, column : column + _SIDE]
            for photograph in load_sample_images().images
            for row in range(0, photograph.shape[0] - _SIDE, _STEP)
            for column in range(0, photograph.shape[1] - _SIDE, _STEP)
        ]
        self._count = count or len(self._pieces)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # torchvision's CIFAR makes its images from arrays too
        piece = self._pieces[index % len(self._pieces)]
        return Image.fromarray(np.ascontiguousarray(piece)), index % CLASSES

    class_names = None

    def describe(self, index: int) -> str:
        """The piece's number."""
        return f"piece {index} of the photographs"


class JpegPhotographs:
    """`count` times scikit-learn's two sample photographs, decoded from JPEG each time."""

    class_names = None

    def __init__(self, count: int) -> None:
        from sklearn.datasets import load_sample_images

        self._files = [Path(name).read_bytes() for name in load_sample_images().filenames]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file = io.BytesIO(self._files[index % len(self._files)])
        return Image.open(file).convert("RGB"), index % CLASSES

    def describe(self, index: int) -> str:
        """The photograph's number."""
        return f"photograph {index % len(self._files)}"


def make_config(workers: int, batch: int) -> RunConfig:
    """The CIFAR-100 recipe of this repository."""
    return load_config(CONFIG, {"data.workers": str(workers), "data.batch_size": str(batch)})


def measure(settings: Settings) -> dict[str, Any]:
    """The whole loader with several numbers of processes; a sample; timm's operations."""
    batch = 16 if settings.quick else 128
    images = PhotographPieces()
    cores = os.cpu_count() or 1
    workers = [0, 1] if settings.quick else [n for n in (0, 1, 2, 4, 8, 16) if n <= max(cores, 2)]
    count = 3 if settings.quick else 24
    loading = {}
    for number in workers:
        config = make_config(number, batch)
        with contextlib.closing(TrainBatches(config, images, CLASSES)) as batches:
            stream = (one for epoch in itertools.count() for one in batches.epoch(epoch))
            stretches = [_stretch(stream, count) for _ in range(settings.rounds(3))]
        timing = Timing(tuple(seconds for seconds, _ in stretches))
        loading[str(number)] = {
            **timing.record(),
            "images_per_second": batch / timing.median,
            "cores": min(max(1, number), cores),
            "seconds_of_this_process": statistics.median(own for _, own in stretches) / batch,
        }
    return {
        "images": "32×32 pieces of scikit-learn's sample photographs",
        "batch": batch,
        "loading": loading,
        **_parts(settings, images, batch),
        "saving": _saving(settings),
        "operations": _operations(images, 64 if settings.quick else 2_000),
    }


def _stretch(stream: Iterator[Any], batches: int) -> tuple[float, float]:
    """Seconds per batch, after a few batches that use up what was loaded ahead.

    The first is wall time, the second this process's own CPU time.
    """
    for _ in range(batches // 4):
        next(stream)
    start, own_start = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(stream)
    own_seconds = time.process_time() - own_start
    return (time.perf_counter() - start) / batches, own_seconds / batches


def _parts(settings: Settings, images: PhotographPieces, batch: int) -> dict[str, Any]:
    """Our samples against timm's transform alone, in turn, on the same images and random draws.

    The draws of a policy decide how long an image takes, so both must draw the same: seeding the
    generators for timm does not count towards its time.
    """
    config = make_config(0, batch)
    transform = train_transform(config.data, config.model.image_size)
    dataset = SeededImages(images, transform, config.seed, CLASSES)

    def ours(epoch: int) -> float:
        start = time.perf_counter()
        dataset.__getitems__([(epoch, index) for index in range(batch)])
        return time.perf_counter() - start

    def reference(epoch: int) -> tuple[float, float]:
        """Seconds of seeding, then of timm's transform."""
        seeding = transforming = 0.0
        start = time.perf_counter()
        with generators_kept():
            seeding += time.perf_counter() - start
            for index in range(batch):
                start = time.perf_counter()
                seed_generators(derive_seed(config.seed, "sample", epoch, index))
                seeded_at = time.perf_counter()
                image, _ = images[index]
                transform(image)
                seeding += seeded_at - start
                transforming += time.perf_counter() - seeded_at
        return seeding, transforming

    found: dict[str, list[float]] = {"ours": [], "timm": [], "seeding": []}
    for epoch in range(-1, settings.rounds(15)):  # the first one warms up
        if epoch % 2:
            whole, (seeding, timm) = ours(epoch), reference(epoch)
        else:
            (seeding, timm), whole = reference(epoch), ours(epoch)
        if epoch >= 0:
            for name, seconds in (("ours", whole), ("timm", timm), ("seeding", seeding)):
                found[name].append(seconds / batch)
    timings = {name: Timing(tuple(seconds)) for name, seconds in found.items()}
    return {"sample": recorded(timings), "ours_over_timm": ratio(timings["ours"], timings["timm"])}


def _saving(settings: Settings) -> dict[str, Any]:
    """How long a checkpoint of ViT-B/16 with its momentum holds the training, and its writing."""
    tensors, numbers = (150, 1_000) if settings.quick else (150, 577_000)
    content = {part: {str(n): torch.randn(numbers) for n in range(tensors)} for part in "mo"}
    held, written, direct = [], [], []
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        with folder.held():
            for step in range(settings.rounds(5) + 1):
                start = time.perf_counter()
                folder.save(step, content, keep=2)
                held.append(time.perf_counter() - start)
                folder.settle()
                written.append(time.perf_counter() - start)
                save_checkpoint(Path(place) / "direct.pt", content)
                direct.append(time.perf_counter() - start - written[-1])
    return {
        "bytes": sum(tensor.nbytes for part in content.values() for tensor in part.values()),
        "first_held": held[0],
        "held": Timing(tuple(held[1:])).record(),
        "written": Timing(tuple(written[1:])).record(),
        "direct": Timing(tuple(direct[1:])).record(),
    }


def _operations(images: PhotographPieces, count: int) -> dict[str, float]:
    """Seconds per image of each of timm's operations."""
    config = make_config(0, 2)
    transform: Any = train_transform(config.data, config.model.image_size)
    seconds = {"image from array": 0.0}
    with seeded(derive_seed(config.seed, "operations")):
        for number in range(count):
            start = time.perf_counter()
            value: Any = images[number % len(images)][0]
            seconds["image from array"] += time.perf_counter() - start
            for operation in transform.transforms:
                name = type(operation).__name__
                start = time.perf_counter()
                value = operation(value)
                elapsed = time.perf_counter() - start
                seconds[name] = seconds.get(name, 0.0) + elapsed
    return {name: total / count for name, total in seconds.items()}


def tables(values: dict[str, Any]) -> str:
    """The loader, then the parts of an image's time."""
    loading = [
        [
            number,
            f"{found['images_per_second']:,.0f}",
            f"{found['images_per_second'] / found['cores']:,.0f}",
            f"{1e6 * found['seconds_of_this_process']:.0f}",
        ]
        for number, found in values["loading"].items()
    ]
    head = ("loader processes", "images/s", "images/s per core", "training process, µs per image")
    sample, total = values["sample"], sum(values["operations"].values())
    parts = [
        ["a sample of ours", f"{1e6 * sample['ours']['seconds']:.0f}", ""],
        ["timm's transform alone", f"{1e6 * sample['timm']['seconds']:.0f}", ""],
        ["seeding (state saved once per batch)", f"{1e6 * sample['seeding']['seconds']:.0f}", ""],
        *(
            [f"– {name}", f"{1e6 * seconds:.0f}", f"{100 * seconds / total:.0f}%"]
            for name, seconds in values["operations"].items()
        ),
    ]
    return (
        aligned_table(head, loading, (0, 1, 2, 3))
        + f"\nImages: {values['images']}, batches of {values['batch']}.\n\n"
        + aligned_table(("one image", "µs", "share of timm's"), parts, (1, 2))
        + _saving_line(values.get("saving"))
    )


def _saving_line(found: dict[str, Any] | None) -> str:
    """About checkpoints, which records of before 2026-11-28 say nothing of."""
    if found is None:
        return ""
    held, written, direct = (found[key]["seconds"] for key in ("held", "written", "direct"))
    return (
        f"\nA checkpoint of ViT-B/16 with its momentum ({found['bytes'] / 1e6:.0f} MB) holds the "
        f"training for {held:.2f} s, the first one for {found['first_held']:.2f} s, and is on the "
        f"disk after {written:.2f} s; written by the training itself it would hold it for "
        f"{direct:.2f} s.\n"
    )


def targets(values: dict[str, Any]) -> list[Target]:
    """The prediction for 16 such cores, and what our code adds to timm's transform.

    It is scaled from the largest number of processes measured, since one process alone is faster
    than each of several. The training process only receives batches: its CPU time is the second
    bound.
    """
    _, most = max(values["loading"].items(), key=lambda item: int(item[0]))
    loaded = GPU_CORES * most["images_per_second"] / most["cores"]
    received = 1 / most["seconds_of_this_process"]
    over = values["ours_over_timm"]
    percent, low, high = (100 * (over[name] - 1) for name in ("ratio", "low", "high"))
    return [
        Target(
            f"6. loader on {GPU_CORES} cores",
            f"≥ {GPU_IMAGES_PER_SECOND:,} images/s, predicted",
            f"{loaded / GPU_CORES:,.0f} per core, so {loaded:,.0f} predicted on {GPU_CORES}; "
            f"{received:,.0f} could be received",
            min(loaded, received) >= GPU_IMAGES_PER_SECOND,
        ),
        Target(
            "6. our share of a sample's time",
            f"≤ {OVERHEAD:.0%} over timm's transform",
            f"{percent:.1f}% ({low:.1f}–{high:.1f}%)",
            over["ratio"] <= 1 + OVERHEAD,
        ),
    ]


# This process normalises what a GPU would: idle threads of it would take the loaders' cores.
ROW = Row("pipeline", measure, tables, targets, threads=1)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
