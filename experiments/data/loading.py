"""Batches of augmented images that are a function of (seed, epoch, index) alone.

They depend neither on the number of loader processes nor on where a run was interrupted.

Dimensions: B batch.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from experiments.config.schema import DataConfig, RunConfig
from experiments.data.augment import eval_transform, train_transform
from experiments.data.images import Images, UnreadableImage, read_image
from experiments.data.transfer import Loaded, Transfer
from experiments.errors import ConfigError, DataError
from experiments.seeding import derive_seed, generators_kept, seed_generators

Key = tuple[int, int]  # epoch, index
Sample = tuple[Tensor, int, str]  # image (3, H, W), label, why another image stands in its place
Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), normalised, and labels (B,), on the device

_CPU = torch.device("cpu")
_SUBSTITUTES = 10  # images that are tried in place of an unreadable one
_SAVING_SECONDS = 10  # how long a loader process outlives SIGTERM


@dataclass(frozen=True)
class Division:
    """How a batch is divided into micro-batches, and which of them this process computes."""

    micro_batch: int
    """Images per forward pass."""
    first: int
    """This process's first micro-batch within the batch."""
    count: int
    """How many of them it computes."""


def divide_batch(config: DataConfig, rank: int, size: int, even: bool = False) -> Division:
    """This process's share of every batch; `even` for Mixup and CutMix, which mix in pairs.

    Raises:
        ConfigError: the batch cannot be shared out equally.
    """
    if config.micro_batch is None:
        unit = 2 * size if even else size
        if config.batch_size % unit:
            pairs = " that mix in pairs (Mixup, CutMix)" if even else ""
            raise ConfigError(
                f"data.batch_size: got {config.batch_size}; allowed with {size} processes{pairs}: "
                f"a multiple of {unit}"
            )
        return Division(config.batch_size // size, rank, 1)
    parts = config.batch_size // config.micro_batch
    if parts % size:
        raise ConfigError(
            f"data.micro_batch: got {config.micro_batch}, which divides a batch of "
            f"{config.batch_size} into {parts} parts; allowed with {size} processes: a multiple of "
            f"{size} parts"
        )
    count = parts // size
    return Division(config.micro_batch, rank * count, count)


class SeededImages(Dataset[Sample]):
    """Transformed images whose randomness depends on (seed, epoch, index) alone.

    A key carries the epoch, since loader processes live through all epochs. Where unreadable images
    are allowed, another image stands in for such a one, and the sample says why.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Any], Tensor],
        seed: int,
        num_classes: int,
        bad_allowed: bool = False,
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.num_classes = num_classes
        self.bad_allowed = bad_allowed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """The samples of a batch, as torch's loader asks for them."""
        with generators_kept():
            return [self._sample(key) for key in keys]

    def _sample(self, key: Key) -> Sample:
        epoch, index = key
        try:
            return *self._read(epoch, index), ""
        except UnreadableImage as error:
            problem = str(error)
        for attempt in range(_SUBSTITUTES if self.bad_allowed else 0):
            parts = (self.seed, "in its place", epoch, index, attempt)
            try:
                return *self._read(epoch, derive_seed(*parts) % len(self)), problem
            except UnreadableImage:
                continue
        raise DataError(problem)

    def _read(self, epoch: int, index: int) -> tuple[Tensor, int]:
        image, label = read_image(self.images, index, self.num_classes)
        seed_generators(derive_seed(self.seed, "sample", epoch, index))
        return self.transform(image), label


class EpochBatches(Sampler[list[Key]]):
    """Keys of one process's share of the batches of one epoch.

    The order depends on (seed, epoch) alone. A last batch that is not full is left out. `epoch` and
    `first_step` say what the next iteration gives.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, division: Division) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.division = division
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator()
        generator.manual_seed(derive_seed(self.seed, "order", self.epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        share = self.division.count * self.division.micro_batch
        for step in range(self.first_step, self.num_images // self.batch_size):
            start = step * self.batch_size + self.division.first * self.division.micro_batch
            yield [(self.epoch, index) for index in order[start : start + share]]


class _Batches:
    """A loader's batches, brought to the device."""

    def __init__(
        self, config: RunConfig, dataset: SeededImages, batch_sampler: Any, device: torch.device
    ) -> None:
        # the loader draws a seed for its processes in every epoch: from a generator of its own
        generator = torch.Generator()
        generator.manual_seed(derive_seed(config.seed, "loader"))
        self._loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=config.data.workers,
            pin_memory=device.type == "cuda",
            persistent_workers=config.data.workers > 0,
            generator=generator,
            collate_fn=_collate,
            worker_init_fn=_outlive_main_process,
        )
        self._transfer = Transfer(config, device)
        self.num_images = len(dataset)

    def _arriving(self) -> Iterator[Loaded]:
        return self._transfer(_loaded(self._loader))

    def close(self) -> None:
        """End the loader's processes, which otherwise live until Python exits."""
        del self._loader


class TrainBatches(_Batches):
    """One process's share of the training batches, epoch by epoch, on its device."""

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        num_classes: int,
        device: torch.device = _CPU,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        data, seed = config.data, config.seed
        if len(images) < data.batch_size:
            raise DataError(
                f"data.batch_size: got {data.batch_size}; allowed: up to the {len(images)} images "
                f"of the split {data.train_split!r}"
            )
        transform = train_transform(data, config.model.image_size)
        dataset = SeededImages(images, transform, seed, num_classes, data.max_bad_images > 0)
        self.division = divide_batch(data, rank, size, config.mixup.active)
        self._keys = EpochBatches(len(images), data.batch_size, seed, self.division)
        super().__init__(config, dataset, self._keys, device)
        self.images = images
        self.steps_per_epoch = len(images) // data.batch_size
        self.max_bad_images = data.max_bad_images
        self.bad_images: dict[str, None] = {}
        """What was wrong with each image that could not be read so far, in order."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (counted from 0), starting at a step within it.

        Raises:
            DataError: more images than allowed cannot be read; the message names the last.
        """
        self._keys.epoch, self._keys.first_step = epoch, first_step
        for images, labels, problems in self._arriving():
            for problem in problems:
                self._count_bad(problem)
            yield images, labels
            del images, labels  # before the next batch is begun

    def _count_bad(self, problem: str) -> None:
        if not problem or problem in self.bad_images:
            return
        self.bad_images[problem] = None
        count = f"{len(self.bad_images)} of {self.max_bad_images} allowed (data.max_bad_images)"
        if len(self.bad_images) > self.max_bad_images:
            raise DataError(f"{problem}; unreadable images: {count}")
        print(f"warning: {problem}; unreadable images: {count}", file=sys.stderr, flush=True)


class EvalBatches(_Batches):
    """This process's share of the validation split, on its device; over all, every image once."""

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        num_classes: int,
        device: torch.device = _CPU,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        data = config.data
        transform = eval_transform(data, config.model.image_size)
        dataset = SeededImages(images, transform, config.seed, num_classes)
        length = data.eval_batch_size or data.batch_size
        keys = [(0, index) for index in range(rank, len(images), size)]
        batches = [keys[start : start + length] for start in range(0, len(keys), length)]
        super().__init__(config, dataset, batches, device)
        self.common_batches = -(-(len(images) // size) // length)
        """Batches that every process has at least."""

    def __iter__(self) -> Iterator[Batch]:
        for images, labels, _ in self._arriving():
            yield images, labels
            del images, labels  # as above

    def __len__(self) -> int:
        return len(self._loader)


def _collate(samples: list[Sample]) -> Loaded:
    images, labels = default_collate([sample[:2] for sample in samples])
    return images, labels, [sample[2] for sample in samples]


def _outlive_main_process(number: int) -> None:
    """Let the main process handle signals sent to the group; it needs this one until it has saved.

    The main process ends its loader processes by SIGTERM as well, so that is only delayed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SAVING_SECONDS))


def _loaded(loader: DataLoader[Any]) -> Iterator[Loaded]:
    """The loader's batches; errors that came from its processes in one line."""
    try:
        yield from loader
    except DataError as error:
        # a loader process puts its traceback in front
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except (ConnectionError, EOFError) as error:
        # tensors come through a socket, which may tell of a killed process before torch does
        raise RuntimeError(f"DataLoader worker ended: {error or type(error).__name__}") from error
