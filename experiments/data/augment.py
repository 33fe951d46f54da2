"""Augmentation: timm's transforms of single images, and Mixup and CutMix of batches.

Dimensions: B batch, C classes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from experiments.config import DataConfig, MixupConfig
from experiments.data.datasets import FACTS, IMAGENET_MEAN, IMAGENET_STD
from experiments.errors import DataError
from experiments.seeding import derive_seed, seeded


def normalisation(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel: the config's, or else the data set's."""
    facts = FACTS.get(config.dataset)
    mean = config.mean or (facts.mean if facts else IMAGENET_MEAN)
    std = config.std or (facts.std if facts else IMAGENET_STD)
    return mean, std


def train_transform(config: DataConfig, image_size: int) -> Callable[[Any], Tensor]:
    """timm's augmentation for training: PIL image -> tensor (3, H, W).

    Raises:
        DataError: a policy of `data.auto_augment` that timm does not know.
    """
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
