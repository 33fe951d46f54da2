"""Batches of augmented images that are a function of (seed, epoch, index) alone.

Neither the number of loader processes nor where a run was cut changes them.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from experiments.config import DataConfig, MixupConfig, RunConfig
from experiments.data.datasets import FACTS, IMAGENET_MEAN, IMAGENET_STD, Images
from experiments.errors import ConfigError, DataError, LoaderProcessLost
from experiments.seeding import derive_seed, generators_kept, seed_generators, seeded
from experiments.training.stopping import outlive_the_main_process

Key = tuple[int, int]  # epoch, index
Sample = tuple[Tensor, int, str]  # image (3, H, W), label, what was wrong with the one in its place
Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W), labels (B,)

_SUBSTITUTES = 10  # images that are tried in the place of an unreadable one


@dataclass(frozen=True)
class Division:
    """How a batch is divided into micro-batches, and which of them this process computes.

    Attributes:
        micro_batch: images of one forward pass.
        first: this process's first micro-batch within the batch.
        count: how many of them it computes.
    """

    micro_batch: int
    first: int
    count: int


def divide_batch(config: DataConfig, rank: int, size: int) -> Division:
    """This process's share of every batch.

    Raises:
        ConfigError: the batch cannot be shared out equally.
    """
    if config.micro_batch is None:
        if config.batch_size % size:
            raise ConfigError(
                f"data.batch_size: got {config.batch_size}; allowed with {size} processes: a "
                f"multiple of {size}"
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


def normalisation(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel: the config's, or else the data set's."""
    facts = FACTS.get(config.dataset)
    mean = config.mean or (facts.mean if facts else IMAGENET_MEAN)
    std = config.std or (facts.std if facts else IMAGENET_STD)
    return mean, std


def train_transform(config: DataConfig, image_size: int) -> Callable[[Any], Tensor]:
    """timm's augmentation for training: PIL image -> tensor (3, H, W)."""
    from timm.data import create_transform

    mean, std = normalisation(config)
    # timm's types leave out the None that switches the jitter off
    jitter: Any = config.color_jitter or None
    try:
        return create_transform(
            input_size=image_size,
            is_training=True,
            scale=config.scale,
            ratio=config.ratio,
            hflip=config.hflip,
            vflip=config.vflip,
            color_jitter=jitter,
            auto_augment=config.auto_augment,
            interpolation=config.train_interpolation,
            mean=mean,
            std=std,
            re_prob=config.re_prob,
            re_mode=config.re_mode,
            re_count=config.re_count,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"data.auto_augment: got {config.auto_augment!r}, which timm does not understand"
            f" ({type(error).__name__}: {error}); allowed: a policy such as rand-m9-mstd0.5-inc1"
        ) from None


def eval_transform(config: DataConfig, image_size: int) -> Callable[[Any], Tensor]:
    """timm's transform for evaluation, without anything random: PIL image -> (3, H, W)."""
    from timm.data import create_transform

    mean, std = normalisation(config)
    return create_transform(
        input_size=image_size,
        is_training=False,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        mean=mean,
        std=std,
    )


class _UnreadableImage(Exception):
    """An image that cannot be read; says which, and why."""


class SeededImages(Dataset[Sample]):
    """Transformed images whose randomness depends on (seed, epoch, index) alone.

    A key carries the epoch, so that loader processes that live through all epochs know it. Where
    unreadable images are allowed, another one takes the place of such an image, and the sample says
    why.
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
        except _UnreadableImage as error:
            problem = str(error)
        for attempt in range(_SUBSTITUTES if self.bad_allowed else 0):
            parts = (self.seed, "in its place", epoch, index, attempt)
            try:
                return *self._read(epoch, derive_seed(*parts) % len(self)), problem
            except _UnreadableImage:
                continue
        raise DataError(problem)

    def _read(self, epoch: int, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.images[index]
        except Exception as error:  # whatever a reader or a decoder raises: name the image
            raise _UnreadableImage(
                f"cannot read {self.images.describe(index)}: {type(error).__name__}: {error}"
            ) from error
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"{self.images.describe(index)} has class {label}; allowed with "
                f"{self.num_classes} classes: 0 to {self.num_classes - 1}"
            )
        seed_generators(derive_seed(self.seed, "sample", epoch, index))
        return self.transform(image), label


class EpochBatches(Sampler[list[Key]]):
    """Keys of one process's share of the batches of one epoch.

    The order depends on (seed, epoch) alone. The last batch is left out where it is not full.
    `epoch` and `first_step` say what the next iteration gives.
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


class TrainBatches:
    """One process's share of the training batches, epoch by epoch."""

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        num_classes: int,
        pin_memory: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        data = config.data
        if len(images) < data.batch_size:
            raise DataError(
                f"data.batch_size: got {data.batch_size}; allowed: up to the {len(images)} images "
                f"of the split {data.train_split!r}"
            )
        dataset = SeededImages(
            images,
            train_transform(data, config.model.image_size),
            config.seed,
            num_classes,
            bad_allowed=data.max_bad_images > 0,
        )
        self.division = divide_batch(data, rank, size)
        self._batches = EpochBatches(len(images), data.batch_size, config.seed, self.division)
        self._loader = _loader(
            dataset, data.workers, pin_memory, config.seed, batch_sampler=self._batches
        )
        self.num_images = len(images)
        self.steps_per_epoch = len(images) // data.batch_size
        self.max_bad_images = data.max_bad_images
        self.bad_images: dict[str, None] = {}
        """What was wrong with each image that could not be read so far, in order."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (counted from 0), from a step within it on.

        Raises:
            DataError: more images than allowed cannot be read; the message names the last.
        """
        self._batches.epoch, self._batches.first_step = epoch, first_step
        for images, labels, problems in _readable_errors(self._loader):
            for problem in problems:
                self._count_bad(problem)
            yield images, labels

    def close(self) -> None:
        """End the loader's processes, which otherwise live until Python's own end."""
        del self._loader

    def _count_bad(self, problem: str) -> None:
        if not problem or problem in self.bad_images:
            return
        self.bad_images[problem] = None
        count = f"{len(self.bad_images)} of {self.max_bad_images} allowed (data.max_bad_images)"
        if len(self.bad_images) > self.max_bad_images:
            raise DataError(f"{problem}; unreadable images: {count}")
        print(f"warning: {problem}; unreadable images: {count}", file=sys.stderr, flush=True)


class EvalBatches:
    """Every image of the validation split once, over all processes."""

    def __init__(
        self,
        config: RunConfig,
        images: Images,
        num_classes: int,
        pin_memory: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        data = config.data
        dataset = SeededImages(
            images, eval_transform(data, config.model.image_size), config.seed, num_classes
        )
        length = data.eval_batch_size or data.batch_size
        keys = [(0, index) for index in range(rank, len(images), size)]
        batches = [keys[start : start + length] for start in range(0, len(keys), length)]
        self._loader = _loader(dataset, data.workers, pin_memory, config.seed, batches)
        self.num_images = len(images)
        self.common_batches = -(-(len(images) // size) // length)
        """Batches that every process has at least."""

    def __iter__(self) -> Iterator[Batch]:
        for images, labels, _ in _readable_errors(self._loader):
            yield images, labels

    def close(self) -> None:
        """End the loader's processes, which otherwise live until Python's own end."""
        del self._loader

    def __len__(self) -> int:
        return len(self._loader)


class BatchMixer:
    """timm's Mixup and CutMix, and label smoothing; random by (seed, epoch, step, part) alone."""

    def __init__(self, config: MixupConfig, num_classes: int, seed: int) -> None:
        from timm.data.mixup import Mixup

        self._seed = seed
        self._num_classes = num_classes
        self._smoothing = config.label_smoothing
        self._mixup = None
        if config.active:
            self._mixup = Mixup(
                mixup_alpha=config.mixup_alpha,
                cutmix_alpha=config.cutmix_alpha,
                prob=config.prob,
                switch_prob=config.switch_prob,
                mode=config.mode,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int, step: int, part: int
    ) -> tuple[Tensor, Tensor]:
        """Mix a part of a batch: images (B, 3, H, W), labels (B,) -> images, targets (B, C)."""
        from timm.data.mixup import mixup_target

        if self._mixup is None:
            return images, mixup_target(labels, self._num_classes, smoothing=self._smoothing)
        with seeded(derive_seed(self._seed, "mixup", epoch, step, part)):
            mixed, targets = self._mixup(images, labels)
        return mixed, targets


def _loader(
    dataset: SeededImages, workers: int, pin_memory: bool, seed: int, batch_sampler: Any
) -> DataLoader[Sample]:
    # the loader draws a number for its processes at every epoch: from a generator of its own
    generator = torch.Generator()
    generator.manual_seed(derive_seed(seed, "loader"))
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        generator=generator,
        collate_fn=_collate,
        worker_init_fn=_begin_worker,
    )


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    images, labels = default_collate([sample[:2] for sample in samples])
    return images, labels, [sample[2] for sample in samples]


def _begin_worker(number: int) -> None:
    outlive_the_main_process()


def _readable_errors(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    try:
        yield from loader
    except DataError as error:
        # from a loader process it comes with that process's traceback in front
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except (ConnectionError, EOFError) as error:
        # its tensors come through a socket, whose end may be noticed before the process's
        raise LoaderProcessLost(str(error) or type(error).__name__) from error
