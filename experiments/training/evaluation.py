"""Evaluation on the whole validation split: of a model in training, or of weights from a file.

Also where models go, and in which precision they compute.

Dimensions: B batch, C classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.checkpoint import Loaded, load_weights
from experiments.config.schema import RunConfig
from experiments.data.datasets import open_images, refuse_other_classes, refuse_shared_images
from experiments.data.facts import known_num_classes, stated_num_classes
from experiments.data.images import SplitImages
from experiments.data.loading import Batch, EvalBatches
from experiments.data.transfer import memory_format
from experiments.errors import CheckpointError, ConfigError
from experiments.models.build import build_model
from experiments.training.distributed import World, choose_device
from tokenmixup import TokenMixupModel

_Model = TypeVar("_Model")


@dataclass(frozen=True)
class Evaluation:
    """A model's result on a whole validation split."""

    top1: float
    """Per cent of the images whose class has the largest logit."""
    top5: float
    """Per cent of the images whose class is among the five largest logits."""
    loss: float
    """Mean cross-entropy."""
    images: int
    """Number of images, each counted once."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """torch's mixed precision for a forward pass; nothing in fp32 and tf32."""
    if precision in ("fp32", "tf32"):
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """On a GPU, products in float32 round their factors to TF32 for "tf32", and never otherwise.

    By default torch lets cuDNN round those of convolutions.
    """
    matrices, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matrices.allow_tf32, convolutions.allow_tf32
    matrices.allow_tf32 = convolutions.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matrices.allow_tf32, convolutions.allow_tf32 = before


def refuse_tf32_without_gpu(config: RunConfig) -> None:
    """Refuse an evaluation in TF32 where nothing would be rounded to it.

    Raises:
        ConfigError: on a CPU, or on a GPU of before 2020.
    """
    if config.eval_precision != "tf32":
        return
    if choose_device(config.device).type != "cuda" or not torch.cuda.is_tf32_supported():
        raise ConfigError("eval_precision: got 'tf32'; allowed on this device: fp32, bf16, fp16")


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    config: RunConfig,
    on_batch: Callable[[], object] = lambda: None,
    on_logits: Callable[[Tensor, Tensor], object] = lambda logits, labels: None,
) -> Evaluation:
    """Evaluate on every image once, over all processes; restores the model's mode.

    `batches` are this process's share of the images, on its device; `on_batch` is called before
    each, and `on_logits` after it, with its logits (B, C) and labels (B,). The host waits for the
    device once, at the end.
    """
    was_training, device = model.training, world.device
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    seen = 0
    with torch.inference_mode(), float32_products(config.eval_precision):
        for images, labels in batches:
            on_batch()
            with autocast(device, config.eval_precision):
                logits = model(images)
            logits = logits.float()  # (B, C)
            on_logits(logits, labels)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals[:3] += torch.stack((best[:, 0].sum(), best.sum(), loss))
            seen += len(labels)
        totals[3].fill_(seen)
    model.train(was_training)
    top1, top5, loss_sum, count_sum = world.sum(totals).tolist()
    images_seen = round(count_sum)
    return Evaluation(
        100 * top1 / images_seen, 100 * top5 / images_seen, loss_sum / images_seen, images_seen
    )


def place(model: TokenMixupModel, device: torch.device, config: RunConfig) -> TokenMixupModel:
    """Put a model on its device, in the configured memory format."""
    untyped: Any = model  # torch's types do not know a module's memory format
    untyped.to(device=device, memory_format=memory_format(config))
    return model


def assemble(
    config: RunConfig, checkpoint: str, num_classes: int, device: torch.device
) -> tuple[TokenMixupModel, Loaded]:
    """The model of a config with the weights of a file, on a device."""
    model = build_model(config, num_classes)
    loaded = load_weights(model, checkpoint)
    return place(model, device, config), loaded


def model_and_images(
    config: RunConfig, world: World, splits: Sequence[str], make: Callable[[int], _Model]
) -> tuple[_Model, int, list[SplitImages]]:
    """Make a model for the number of classes, and open splits of the data set.

    Where the config alone tells the number of classes, the model comes first: its mistakes need no
    data to be found.

    Raises:
        UserError: any setting that cannot work, or data that is missing.
    """
    refuse_tf32_without_gpu(config)
    num_classes = known_num_classes(config)
    model = None if num_classes is None else make(num_classes)
    with world.main_first():  # downloads
        images = [open_images(config.data, split) for split in splits]
    refuse_other_classes(config.data, splits, images)
    refuse_shared_images(config.data, splits, images)
    if num_classes is None or model is None:
        num_classes = stated_num_classes(config, images[0])
        model = make(num_classes)
    return model, num_classes, images


class Assessment:
    """Weights from a file in the model of a config, ready to be evaluated.

    Raises:
        UserError: any setting or file that cannot work.
    """

    def __init__(self, config: RunConfig, checkpoint: str, world: World) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.world = world
        (self.model, self.loaded), num_classes, (self.images,) = model_and_images(
            config,
            world,
            (config.data.val_split,),
            lambda num_classes: assemble(config, checkpoint, num_classes, world.device),
        )
        share = (world.device, world.rank, world.size)
        self.batches = EvalBatches(config, self.images, num_classes, *share)

    def evaluate(self, batches: Iterable[Batch] | None = None) -> Evaluation:
        """Evaluate once on `self.batches`, which a caller may wrap in a progress bar.

        Raises:
            CheckpointError: the loss is not finite.
        """
        watched = self.batches if batches is None else batches
        try:
            result = evaluate(self.model, watched, self.world, self.config)
        finally:
            self.batches.close()
        if not math.isfinite(result.loss):
            raise CheckpointError(
                f"{self.checkpoint}: its loss on the {result.images} images of "
                f"{self.config.data.val_split!r} is {result.loss}, expected a finite one: weights "
                "or logits are not finite, so that their top-1 tells nothing; use other weights, "
                f"or another eval_precision (now {self.config.eval_precision})"
            )
        return result
