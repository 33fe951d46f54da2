"""Row 6: the input pipeline of the CIFAR recipe, in images a second and core.

The images are 32×32 pieces of the two photographs that come with scikit-learn: CIFAR-100 itself may
be fetched nowhere on a machine without a network, and an image of its size that compresses and
varies as photographs do takes each operation as long.
"""

import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.harness import Row, Settings, Target
from benchmarks.timing import Timing, ratio
from experiments.config import RunConfig, load_config
from experiments.data.augment import train_transform
from experiments.data.loading import SeededImages, TrainBatches
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT
from experiments.seeding import derive_seed, generators_kept, seed_generators, seeded

CONFIG = ROOT / "configs" / "cct_7-3x1_cifar100_HTM.yaml"
CLASSES = 100
GPU_IMAGES_PER_SECOND = 20_000
"""What a GPU is to train; a loader on 16 cores must not be slower."""
GPU_CORES = 16
OVERHEAD = 0.05
"""Share of a sample's time that may go into what we add to timm's transform."""
_SIDE, _STEP = 32, 8


class PhotographPieces:
    """32×32 pieces of scikit-learn's two sample photographs, 8 pixels apart."""

    def __init__(self) -> None:
        from sklearn.datasets import load_sample_images

        self._pieces = [
            photograph[row : row + _SIDE, column : column + _SIDE]
            for photograph in load_sample_images().images
            for row in range(0, photograph.shape[0] - _SIDE, _STEP)
            for column in range(0, photograph.shape[1] - _SIDE, _STEP)
        ]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # from an array, as torchvision's CIFAR does
        return Image.fromarray(np.ascontiguousarray(self._pieces[index])), index % CLASSES

    def describe(self, index: int) -> str:
        """The piece's number."""
        return f"piece {index} of the photographs"


def make_config(workers: int, batch: int) -> RunConfig:
    """The CIFAR-100 recipe of this repository."""
    return load_config(CONFIG, {"data.workers": str(workers), "data.batch_size": str(batch)})


def measure(settings: Settings) -> dict[str, Any]:
    """The whole loader with 0, 1 and 2 processes; the parts of a sample; timm's operations."""
    batch = 16 if settings.quick else 128
    images = PhotographPieces()
    cores = os.cpu_count() or 1
    workers = [0, 1] if settings.quick else [n for n in (0, 1, 2, 4, 8, 16) if n <= max(cores, 2)]
    with loaders(images, workers, batch) as endless:
        actions: dict[str, Callable[[], object]] = {
            str(number): functools.partial(next, stream) for number, stream in endless.items()
        }
        # a process that has loaded ahead would be timed by what it has ready: all in one stretch
        batches = 3 if settings.quick else 24
        stretches = {
            name: [_stretch(action, batches) for _ in range(settings.rounds(3))]
            for name, action in actions.items()
        }
    parts = _parts(settings, images, batch)
    return {
        "images": "32×32 pieces of scikit-learn's sample photographs",
        "batch": batch,
        "loading": {
            name: {
                **timing.record(),
                "images_per_second": batch / timing.median,
                "cores": min(max(1, int(name)), cores),
                "seconds_of_this_process": statistics.median(own for _, own in found) / batch,
            }
            for name, found in stretches.items()
            for timing in (Timing(tuple(seconds for seconds, _ in found)),)
        },
        **parts,
        "operations": _operations(images, 64 if settings.quick else 2_000),
    }


@contextmanager
def loaders(
    images: PhotographPieces, workers: list[int], batch: int
) -> Iterator[dict[int, Iterator[Any]]]:
    """An endless stream of batches for each number of processes."""
    made = {n: TrainBatches(make_config(n, batch), images, CLASSES) for n in workers}
    try:
        yield {n: _endless(batches) for n, batches in made.items()}
    finally:
        for batches in made.values():
            batches.close()


def _endless(batches: TrainBatches) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


def _stretch(action: Callable[[], object], calls: int) -> tuple[float, float]:
    """Seconds of one of many calls, after a few that use up what was made ready.

    First by the clock, then of this process's own CPU time.
    """
    for _ in range(calls // 4):
        action()
    start, own_start = time.perf_counter(), time.process_time()
    for _ in range(calls):
        action()
    own_seconds = time.process_time() - own_start
    return (time.perf_counter() - start) / calls, own_seconds / calls


def _parts(settings: Settings, images: PhotographPieces, batch: int) -> dict[str, Any]:
    """Our samples against timm's transform alone, in turn, on the same images and draws.

    What a policy draws decides how long an image takes, so both must draw the same: timm's clock
    stands still while its generators are seeded.
    """
    config = make_config(0, batch)
    transform = train_transform(config.data, config.model.image_size)
    dataset = SeededImages(images, transform, config.seed, CLASSES)

    def ours(epoch: int) -> float:
        start = time.perf_counter()
        dataset.__getitems__([(epoch, index) for index in range(batch)])
        return time.perf_counter() - start

    def timm_alone(epoch: int) -> float:
        seconds = 0.0
        with generators_kept():
            for index in range(batch):
                seed_generators(derive_seed(config.seed, "sample", epoch, index))
                start = time.perf_counter()
                image, _ = images[index]
                transform(image)
                seconds += time.perf_counter() - start
        return seconds

    def seeding(epoch: int) -> float:
        start = time.perf_counter()
        with generators_kept():
            for index in range(batch):
                seed_generators(derive_seed(config.seed, "sample", epoch, index))
        return time.perf_counter() - start

    actions = {"ours": ours, "timm": timm_alone, "seeding": seeding}
    found: dict[str, list[float]] = {name: [] for name in actions}
    for epoch in range(-1, settings.rounds(15)):  # the first is to warm up
        names = list(actions) if epoch % 2 else list(reversed(actions))
        for name in names:
            seconds = actions[name](epoch) / batch
            if epoch >= 0:
                found[name].append(seconds)
    timings = {name: Timing(tuple(seconds)) for name, seconds in found.items()}
    return {
        "sample": {name: timing.record() for name, timing in timings.items()},
        "ours_over_timm": ratio(timings["ours"], timings["timm"]),
    }


def _operations(images: PhotographPieces, count: int) -> dict[str, float]:
    """Seconds an image of each of timm's operations, one after the other."""
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
    """The loader, then where the time of an image goes."""
    loading = [
        [
            number,
            f"{found['images_per_second']:,.0f}",
            f"{found['images_per_second'] / found['cores']:,.0f}",
            f"{1e6 * found['seconds_of_this_process']:.0f}",
        ]
        for number, found in values["loading"].items()
    ]
    head = ("loader processes", "images/s", "images/s and core", "training process, µs an image")
    sample, total = values["sample"], sum(values["operations"].values())
    parts = [
        ["a sample of ours", f"{1e6 * sample['ours']['seconds']:.0f}", ""],
        ["timm's transform alone", f"{1e6 * sample['timm']['seconds']:.0f}", ""],
        ["seeding (state kept once a batch)", f"{1e6 * sample['seeding']['seconds']:.0f}", ""],
        *(
            [f"– {name}", f"{1e6 * seconds:.0f}", f"{100 * seconds / total:.0f}%"]
            for name, seconds in values["operations"].items()
        ),
    ]
    return (
        aligned_table(head, loading, (0, 1, 2, 3))
        + f"\nImages: {values['images']}, batches of {values['batch']}.\n\n"
        + aligned_table(("one image", "µs", "share of timm's"), parts, (1, 2))
    )


def images_on(cores: int, values: dict[str, Any]) -> tuple[float, float]:
    """Images a second of so many loader processes, and what the training process can receive.

    From the most processes that were measured: what one gives alone is not what each of several
    gives. The training process only takes what they hand over: its own time is a second bound.
    """
    _, found = max(values["loading"].items(), key=lambda item: int(item[0]))
    return (
        cores * found["images_per_second"] / found["cores"],
        1 / found["seconds_of_this_process"],
    )


def targets(values: dict[str, Any]) -> list[Target]:
    """What 16 such cores would give, and what we add to timm's transform."""
    loaded, received = images_on(GPU_CORES, values)
    over = values["ours_over_timm"]
    return [
        Target(
            f"6. loader on {GPU_CORES} cores",
            f"≥ {GPU_IMAGES_PER_SECOND:,} images/s, predicted",
            f"{loaded / GPU_CORES:,.0f} a core, so {loaded:,.0f} predicted on {GPU_CORES}; "
            f"{received:,.0f} could be received",
            min(loaded, received) >= GPU_IMAGES_PER_SECOND,
        ),
        Target(
            "6. our share of a sample's time",
            f"≤ {OVERHEAD:.0%} over timm's transform",
            f"{100 * (over['ratio'] - 1):.1f}% "
            f"({100 * (over['low'] - 1):.1f}–{100 * (over['high'] - 1):.1f}%)",
            over["ratio"] <= 1 + OVERHEAD,
        ),
    ]


ROW = Row("pipeline", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(harness.main(ROW))
