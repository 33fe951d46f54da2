"""Augmentation: timm's transforms of single images, and Mixup and CutMix of batches.

Dimensions: B batch, C classes.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.config.schema import DataConfig, MixupConfig, RunConfig, is_on
from experiments.data.facts import IMAGENET_MEAN, IMAGENET_STD, known_facts
from experiments.errors import ConfigError, DataError
from experiments.seeding import derive_seed
from tokenmixup import functional


def normalisation(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel: the config's, or else the data set's."""
    facts = known_facts(config)
    mean = config.mean or (facts.mean if facts else IMAGENET_MEAN)
    std = config.std or (facts.std if facts else IMAGENET_STD)
    return mean, std


def mean_and_std(config: DataConfig, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The same as tensors (3, 1, 1)."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(device) for v in normalisation(config))
    return mean, std


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (..., 3, H, W) from 0 to 255 as normalised floats.

    These are the operations of torchvision's ToTensor and Normalize, so that a CPU gives the same
    bits; a GPU multiplies by 1 / 255 instead.
    """
    return pixels.float().div_(255).sub_(mean).div_(std)


def train_transform(config: DataConfig, image_size: int) -> Callable[[Any], Tensor]:
    """timm's augmentation of single images for training: PIL image -> uint8 (3, H, W).

    What follows of the batch are `normalise`, `BatchMixer` and `RandomErasing`.

    Raises:
        DataError: a policy of `data.auto_augment` that timm does not know.
    """
    from timm.data import create_transform

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
            mean=normalisation(config)[0],  # with which policies fill what they uncover
            normalize=False,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"data.auto_augment: got {config.auto_augment!r}, which timm does not understand"
            f" ({type(error).__name__}: {error}); allowed: a policy such as rand-m9-mstd0.5-inc1"
        ) from None


def eval_transform(config: DataConfig, image_size: int) -> Callable[[Any], Tensor]:
    """timm's transform for evaluation, without anything random: PIL image -> uint8 (3, H, W)."""
    from timm.data import create_transform

    return create_transform(
        input_size=image_size,
        is_training=False,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        normalize=False,
    )


def least_difficulty(config: MixupConfig, num_classes: int) -> float:
    """The least difficulty that a sample can have: H(y) / 10 of a smoothed target y.

    A cross-entropy is at least the entropy of its target, and a mixed target has no less than the
    smoothed ones that it is mixed of.
    """
    from timm.data.mixup import mixup_target

    label = torch.zeros(1, dtype=torch.int64)
    target = mixup_target(label, num_classes, smoothing=config.label_smoothing)
    return functional.least_difficulty(target.double()).item()


def refuse_unreachable_tau(config: RunConfig, num_classes: int) -> None:
    """Refuse a tau below which no sample's difficulty can lie, so that nothing is ever mixed.

    Raises:
        ConfigError: it says how small tau may be.
    """
    horizontal = config.horizontal
    if horizontal is None or horizontal.scorenet is None or horizontal.tau is None:
        return
    tau, least = horizontal.tau, least_difficulty(config.mixup, num_classes)
    if tau < least:
        raise ConfigError(
            f"horizontal.tau: got {tau}; allowed: above {least:.4f}, the least difficulty that a "
            f"target can have with mixup.label_smoothing {config.mixup.label_smoothing} and "
            f"{num_classes} classes: below it no sample is easy, and HTM mixes nothing"
        )


class BatchMixer:
    """timm's Mixup and CutMix, and label smoothing; random by (seed, epoch, step, part) alone."""

    def __init__(self, config: MixupConfig, num_classes: int, seed: int) -> None:
        from timm.data.mixup import Mixup

        self._seed = seed
        self._num_classes = num_classes
        self._smoothing = config.label_smoothing
        self._off_epoch = config.off_epoch
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
        """Mix a part of a batch: images (B, 3, H, W), labels (B,) -> images, targets (B, C).

        Epochs count from 0.
        """
        from timm.data.mixup import mixup_target

        if self._mixup is None or not is_on(self._off_epoch, epoch):
            return images, mixup_target(labels, self._num_classes, smoothing=self._smoothing)
        # timm draws from NumPy alone; to save and restore its state would cost as much as to mix
        np.random.seed(derive_seed(self._seed, "mixup", epoch, step, part) & 0xFFFFFFFF)
        mixed, targets = self._mixup(images, labels)
        return mixed, targets


class RandomErasing:
    """Random erasing (Zhong et al., 2020) of a batch, of the same distribution as timm's.

    timm erases one image after the other, with several operations for each, for which a GPU would
    have to wait. These operations take the whole batch, and can be compiled with the step.
    """

    AREA = (0.02, 1 / 3)  # of the rectangles of an image, a share of its area
    ASPECT = 0.3  # the least; the largest is its inverse
    TRIES = 10  # at a rectangle that fits into the image

    def __init__(self, config: DataConfig) -> None:
        self.probability, self.mode = config.re_prob, config.re_mode
        self.most = config.re_count

    def __call__(self, images: Tensor) -> Tensor:
        """Replace rectangles of normalised images (B, 3, H, W); random by torch's generator."""
        if self.probability == 0:
            return images
        (size, _, height, width), device = images.shape, images.device
        per_image, per_rectangle = (size, 1), (size, self.most)
        count = torch.randint(1, self.most + 1, per_image, device=device)
        share = torch.empty(self.TRIES, *per_rectangle, device=device).uniform_(*self.AREA)
        bound = -math.log(self.ASPECT)
        aspect = torch.empty_like(share).uniform_(-bound, bound).exp()
        area = share * (height * width) / count
        tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (tall < height) & (wide < width)
        first = fits.byte().argmax(0, keepdim=True)
        tall, wide, fits = (values.gather(0, first)[0] for values in (tall, wide, fits))
        erased = fits & (torch.rand(per_image, device=device) < self.probability)
        erased &= torch.arange(self.most, device=device) < count
        inside = []
        for length, extent in ((height, tall), (width, wide)):
            start = (torch.rand(per_rectangle, device=device) * (length - extent + 1)).floor()
            position = torch.arange(length, device=device) - start.unsqueeze(-1)
            inside.append((position >= 0) & (position < extent.unsqueeze(-1)))
        rows, columns = inside[0] & erased.unsqueeze(-1), inside[1]
        for i in range(self.most):
            place = rows[:, i, None, :, None] & columns[:, i, None, None, :]
            images = images.where(~place, self._noise(images))
        return images

    def _noise(self, images: Tensor) -> Tensor:
        """What one rectangle of each image is replaced by, to be broadcast to (B, 3, H, W)."""
        if self.mode == "pixel":
            return torch.randn_like(images)
        colour = images.new_zeros(*images.shape[:2], 1, 1)
        return colour.normal_() if self.mode == "rand" else colour
