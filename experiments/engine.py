"""The training loop and the evaluation, one of each for every model.

Dimensions: B batch, C classes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.config import RunConfig
from experiments.data import Batch, BatchMixer, Division, TrainBatches
from experiments.distributed import World
from experiments.errors import TrainingStopped
from experiments.metrics import RunningStatistics, StepTimer
from experiments.optim import Schedule
from experiments.seeding import derive_seed
from tokenmixup import TokenMixupModel, TokenMixupOutput
from tokenmixup.functional import soft_cross_entropy


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
    """torch's mixed precision for a forward pass; nothing in fp32."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], world: World, config: RunConfig
) -> Evaluation:
    """Evaluate on every image once, over all processes; the model's mode is left as it came."""
    was_training, device = model.training, world.device
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    with torch.inference_mode():
        for images, labels in batches:
            images = images.to(device, non_blocking=True, memory_format=memory_format(config))
            labels = labels.to(device, non_blocking=True)
            with autocast(device, config.eval_precision):
                logits = model(images)
            logits = logits.float()  # (B, C)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            count = loss.new_tensor(len(labels))
            totals += torch.stack((best[:, 0].sum(), best.sum(), loss, count)).double()
    model.train(was_training)
    top1, top5, loss_sum, count_sum = world.sum(totals).tolist()
    images_seen = round(count_sum)
    return Evaluation(
        100 * top1 / images_seen, 100 * top5 / images_seen, loss_sum / images_seen, images_seen
    )


def memory_format(config: RunConfig) -> torch.memory_format:
    """The layout of images and convolutions in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def place(model: TokenMixupModel, device: torch.device, config: RunConfig) -> TokenMixupModel:
    """Put a model on its device, in the configured memory format."""
    untyped: Any = model  # torch's types do not know a module's memory format
    untyped.to(device=device, memory_format=memory_format(config))
    return model


@dataclass
class Learner:
    """A model in training, and what changes it."""

    config: RunConfig
    model: TokenMixupModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    mixer: BatchMixer
    division: Division
    world: World

    def __post_init__(self) -> None:
        self.device = self.world.device
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.config.precision == "fp16"
        )
        # compiled, parallel or neither, the weights are those of `model`
        self._forward: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.world.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self._forward = DistributedDataParallel(
                self._forward, devices, gradient_as_bucket_view=True
            )
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def step(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> "StepResult":
        """One optimiser step; everything random in it depends on (seed, step, part) alone.

        Args:
            images: (B, 3, H, W), this process's share of the batch, on the device.
            labels: (B,), on the device.
            epoch: counted from 0.
            step: optimiser steps before this one, over the whole run.
        """
        parts = self.division.count
        statistics: list[dict[str, Tensor]] = []
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for index, (some_images, some_labels) in enumerate(
            zip(images.chunk(parts), labels.chunk(parts), strict=True)
        ):
            part = self.division.first + index  # within the batch of all processes
            torch.manual_seed(derive_seed(self.config.seed, "step", step, part))
            mixed, targets = self.mixer(some_images, some_labels, epoch, step, part)
            with self._gradients_stay_here(index + 1 < parts):
                with autocast(self.device, self.config.precision):
                    output: TokenMixupOutput = self._forward(mixed, targets)
                assert output.targets is not None, "a training pass is given targets"
                loss = soft_cross_entropy(output.logits, output.targets).mean()
                total = loss + output.scorenet_loss
                self.scaler.scale(total / parts).backward()
            finite = finite & total.detach().isfinite()
            values = {"loss": loss.detach(), **output.stats}
            if self.config.horizontal is not None:
                values["scorenet_loss"] = output.scorenet_loss.detach()
            statistics.append(values)
        norm = self._clip()
        if norm is not None:
            for values in statistics:
                values["gradient_norm"] = norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(statistics, finite)

    def _gradients_stay_here(self, yes: bool) -> AbstractContextManager[Any]:
        """Where further parts follow, gradients of all processes are averaged with theirs."""
        if yes and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return nullcontext()

    def _clip(self) -> Tensor | None:
        limit = self.config.optimizer.clip_grad
        if limit is None:
            return None
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self._parameters, limit)


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step gives back; all of it stays on the device."""

    statistics: list[dict[str, Tensor]]
    """0-d tensors by name, for each part of the batch."""
    finite: Tensor
    """0-d bool: whether the loss was finite."""


@dataclass(frozen=True)
class Report:
    """Statistics of the steps since the last report, up to `step` of the whole run."""

    step: int
    values: dict[str, float]


def train_epoch(
    learner: Learner,
    batches: TrainBatches,
    epoch: int,
    first_step: int = 0,
    on_step: Callable[[], object] = lambda: None,
) -> Iterator[Report]:
    """Train one epoch and give a report at every `logging.interval` steps and at the end.

    Between two reports nothing waits for the device.

    Args:
        learner: the model and what changes it.
        batches: the training images.
        epoch: counted from 0.
        first_step: steps of this epoch that were done before.
        on_step: called after each step, for a progress bar.

    Raises:
        TrainingStopped: the loss was not finite; the message names the first such step.
    """
    learner.model.train()
    config, device = learner.config, learner.device
    statistics, timer = RunningStatistics(), StepTimer(device)
    start = epoch * batches.steps_per_epoch
    done = reported = start + first_step
    all_finite = torch.ones((), dtype=torch.bool, device=device)
    good_steps = torch.zeros((), device=device)  # since the last report, before a bad one
    for images, labels in batches.epoch(epoch, first_step):
        timer.got_data()
        rate = learner.schedule.set_step(done)
        images = images.to(device, non_blocking=True, memory_format=memory_format(config))
        labels = labels.to(device, non_blocking=True)
        result = learner.step(images, labels, epoch, done)
        all_finite = all_finite & result.finite
        good_steps = good_steps + all_finite
        for values in result.statistics:
            statistics.add(values)
        done += 1
        on_step()
        timer.step_done()
        in_epoch = done - start
        if in_epoch < batches.steps_per_epoch and in_epoch % config.logging.interval:
            continue
        good = round(learner.world.minimum(good_steps).item())
        means = statistics.read(learner.world)
        if good < done - reported:
            raise TrainingStopped(
                f"step {reported + good + 1} (epoch {epoch + 1}): the training loss is not finite"
            )
        timing = timer.read(config.data.batch_size)
        yield Report(done, {**means, "lr": rate, "steps": done - reported, **timing})
        reported, good_steps = done, torch.zeros_like(good_steps)
        timer.restart()
