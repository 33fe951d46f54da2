"""What a study measures of final weights: calibration, robustness, overfitting, saliency.

Corrupted images are the same for all models: what is random in them is a function of the image's
place in the split, as long as `data.eval_batch_size` is the same.

Dimensions: I images, B batch, C classes, S height and width.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.config.schema import RunConfig
from experiments.data.augment import mean_and_std
from experiments.data.images import Images
from experiments.data.loading import Batch, EvalBatches
from experiments.data.transfer import memory_format
from experiments.study.sinks import layer_saliencies, sink_statistics
from experiments.training.distributed import World
from experiments.training.evaluation import Evaluation, evaluate
from tokenmixup import TokenMixupModel

CALIBRATION_BINS = 15
NOISE = 0.1
"""Standard deviation of the noise, of pixels from 0 to 1."""
BLUR = 1.0
"""Standard deviation of the blur, pixels."""
PATCH = 4
"""Side of an occluded patch, pixels; a quarter of all patches is occluded."""
GREY = 0.5
SALIENCY_IMAGES = 1000

Corruption = Callable[[Tensor, torch.Generator], Tensor]
"""Pixels (B, 3, S, S) from 0 to 1 -> the same shape."""


def calibration_error(logits: Tensor, labels: Tensor, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error, sum over the bins of their share times |accuracy - confidence|.

    Confidence is the largest probability; bin k holds those in (k / bins, (k + 1) / bins].

    Args:
        logits: (I, C).
        labels: (I,).
        bins: of equal width.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right - confidence)
    return gap.abs().sum().item() / len(labels)


def noisy(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise, the same in each channel."""
    noise = torch.randn(len(pixels), 1, *pixels.shape[2:], generator=generator)
    return (pixels + NOISE * noise).clamp(0, 1)


def blurred(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur; nothing is drawn."""
    radius = round(3 * BLUR)
    weights = torch.exp(-(torch.arange(-radius, radius + 1) ** 2) / (2 * BLUR**2))
    weights = (weights / weights.sum()).expand(pixels.shape[1], 1, 1, -1)
    padded = F.pad(pixels, (radius,) * 4, mode="reflect")
    across = F.conv2d(padded, weights, groups=pixels.shape[1])
    return F.conv2d(across, weights.transpose(2, 3), groups=pixels.shape[1])


def occluded(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random quarter of the patches of each image, in grey."""
    side = pixels.shape[-1] // PATCH
    order = torch.rand(len(pixels), side * side, generator=generator).argsort(1)
    hidden = (order < side * side // 4).float().unflatten(1, (1, side, side))
    hidden = hidden.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    rest = pixels.shape[-1] - side * PATCH
    hidden = F.pad(hidden, (0, rest, 0, rest))
    return torch.where(hidden > 0, GREY, pixels)


CORRUPTIONS: dict[str, Corruption] = {"noise": noisy, "blur": blurred, "occlusion": occluded}


def measure(
    model: TokenMixupModel,
    images: Images,
    train_images: Images,
    num_classes: int,
    world: World,
    config: RunConfig,
) -> tuple[Evaluation, dict[str, float]]:
    """Evaluate final weights on images that took no part in the training, and on those that did.

    Args:
        model: with its final weights, on the device.
        images: of the test split.
        train_images: those it was trained on, here without augmentation.
        num_classes: C.
        world: one process.
        config: of the training.

    Returns:
        The evaluation of `images`, and by name: `calibration_error` from 0 to 1, `top1_NAME` for
        each of `CORRUPTIONS`, `train_top1`, `train_loss`, and as `layer0/largest_share` what
        `sink_statistics` says of each layer's saliency, for the first of `images`.
    """
    clean = EvalBatches(config, images, num_classes, world.device)
    seen: list[tuple[Tensor, Tensor]] = []
    result = evaluate(
        model, clean, world, config, on_logits=lambda *batch: seen.append((batch[0], batch[1]))
    )
    logits, labels = (torch.cat(parts).cpu() for parts in zip(*seen, strict=True))
    found = {"calibration_error": calibration_error(logits, labels)}
    for name, corruption in CORRUPTIONS.items():
        corrupted = _corrupted(clean, corruption, config)
        found[f"top1_{name}"] = evaluate(model, corrupted, world, config).top1
    train = EvalBatches(config, train_images, num_classes, world.device)
    own = evaluate(model, train, world, config)
    found |= {"train_top1": own.top1, "train_loss": own.loss}
    for layer, saliency in enumerate(_saliencies(model, clean)):
        for name, value in sink_statistics(saliency).items():
            found[f"layer{layer}/{name}"] = value
    return result, found


def _saliencies(model: TokenMixupModel, batches: EvalBatches) -> list[Tensor]:
    """The saliency (I, T) at each layer, for the first images."""
    model.eval()
    parts, wanted = [], SALIENCY_IMAGES
    for images, _ in batches:
        parts.append([saliency.cpu() for saliency in layer_saliencies(model, images[:wanted])])
        wanted -= len(images)
        if wanted <= 0:
            break
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def _corrupted(batches: EvalBatches, corruption: Corruption, config: RunConfig) -> Iterator[Batch]:
    mean, std = mean_and_std(config.data)
    generator = torch.Generator().manual_seed(0)
    for images, labels in batches:
        pixels = images.cpu().contiguous() * std + mean
        corrupted = (corruption(pixels, generator) - mean) / std
        yield corrupted.to(images.device, memory_format=memory_format(config)), labels
