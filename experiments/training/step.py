"""The parts of an optimiser step, which `run.train_step` shows.

Dimensions: B batch, C classes, V values that a pass measures.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.config.schema import RunConfig
from experiments.data.augment import BatchMixer, RandomErasing
from experiments.data.loading import Division
from experiments.errors import ConfigError, TrainingStopped
from experiments.seeding import derive_seed, seed_step
from experiments.training.distributed import World, choose_device
from experiments.training.evaluation import autocast
from experiments.training.metrics import CHECKED, Progress
from experiments.training.optim import Schedule
from tokenmixup import TokenMixupModel, TokenMixupOutput
from tokenmixup.functional import soft_cross_entropy

_MOST_OVERFLOWS = 32
"""Steps in a row that fp16's scaler may leave out: from any scale that it starts with, so many
halvings lead to one at which a finite gradient cannot overflow."""


def refuse_graphs_without_gpu(config: RunConfig) -> None:
    """Refuse `compile: graphs` on a CPU, where torch would leave the graphs out.

    Raises:
        ConfigError: it says what to choose.
    """
    if config.compile == "graphs" and choose_device(config.device).type != "cuda":
        raise ConfigError(
            "compile: got 'graphs', but the device is cpu, and the graphs are CUDA's; allowed "
            "here: off, on, auto"
        )


class StepResult(NamedTuple):
    """What the forward pass of one part of a batch gives.

    Attributes:
        loss: 0-d, to go backward from: the part's share of the batch's loss.
        names: of the values.
        values: (V,) float32, without gradient.
        finite: (2,) bool, whether the training loss and ScoreNet's are finite.
    """

    loss: Tensor
    names: tuple[str, ...]
    values: Tensor
    finite: Tensor


class TrainingPass(nn.Module):
    """Erasing, forward pass, loss and statistics of one part of a batch, as one graph to compile.

    Places are erased after Mixup and CutMix, as in timm's own loaders: they then hold noise as
    strong as the pixels, and no noise is part of what is mixed.

    Args:
        model: to train.
        config: of the run.
        parts: of a batch in this process.
    """

    def __init__(self, model: TokenMixupModel, config: RunConfig, parts: int) -> None:
        super().__init__()
        self.model, self.precision, self.parts = model, config.precision, parts
        self.erase = RandomErasing(config.data)

    def forward(self, images: Tensor, targets: Tensor) -> StepResult:
        """Images (B, 3, H, W), targets (B, C) -> what to go backward from, and what to keep."""
        images = self.erase(images)
        with autocast(images.device, self.precision):
            output: TokenMixupOutput = self.model(images, targets)
        assert output.targets is not None, "a training pass is given targets"
        loss = soft_cross_entropy(output.logits, output.targets).mean()
        values = {"loss": loss, **output.stats}
        if self.model.horizontal is not None and self.model.enabled:
            values["scorenet_loss"] = output.scorenet_loss
        return StepResult(
            (loss + output.scorenet_loss) / self.parts,
            tuple(values),
            torch.stack([value.detach().float() for value in values.values()]),
            torch.stack((loss.detach(), output.scorenet_loss.detach())).isfinite(),
        )


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
        mode = self.config.compile
        if mode == "auto":
            mode = "on" if self.device.type == "cuda" else "off"
        self._graphs = mode == "graphs"
        # compiled, parallel or neither, the weights are those of `model`
        run: Any = TrainingPass(self.model, self.config, self.division.count)
        if mode != "off":
            how = "reduce-overhead" if self._graphs else None
            run = torch.compile(run, fullgraph=True, mode=how)
        if self.world.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            run = DistributedDataParallel(run, devices, gradient_as_bucket_view=True)
        self.training_pass = run
        self._overflows = torch.zeros((), device=self.device)
        """Steps in a row, up to the last one, that the scaler has left out."""
        self._parameters = list(self.model.parameters())
        self._adds_up = self._graphs and self.division.count > 1
        if self._adds_up:  # a gradient that a graph gave would not outlast its next replay
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)

    def micro_batches(
        self, images: Tensor, labels: Tensor, progress: Progress
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's parts of a batch after Mixup and CutMix: images, targets (B, C).

        Everything random in a part depends on (seed, step, part) alone. The processes average
        their gradients in the backward pass of the last part.

        Args:
            images: (B, 3, H, W), this process's share of the batch.
            labels: (B,).
            progress: of the run, before this step.
        """
        count = self.division.count
        parts = zip(images.chunk(count), labels.chunk(count), strict=True)
        for index, (some_images, some_labels) in enumerate(parts):
            part = self.division.first + index  # within the batch of all processes
            seed_step(derive_seed(self.config.seed, "step", progress.step, part), self.device)
            last = index + 1 == count
            with nullcontext() if last or self.world.size == 1 else self.training_pass.no_sync():
                yield self.mixer(
                    some_images, some_labels, progress.epochs_done, progress.step, part
                )

    def forward(self, images: Tensor, targets: Tensor) -> StepResult:
        """The forward pass of one part, what it measures staying on the device.

        The loss is there until the next pass, everything else for good.
        """
        if not self._graphs:
            return self.training_pass(images, targets)
        torch.compiler.cudagraph_mark_step_begin()
        result: StepResult = self.training_pass(images, targets)
        # the next replay writes where this one did
        return result._replace(values=result.values.clone(), finite=result.finite.clone())

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part's loss to that of the batch."""
        self.scaler.scale(loss).backward()

    def clip_gradient(self) -> dict[str, Tensor]:
        """Clip the gradient where the config says so; gives the norm that it had.

        In fp16 a gradient may overflow: the scaler leaves such a step out and lowers its scale.
        Then the norm is 0, and so is `finite_share`.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # the arithmetic of torch's get_total_norm, in half of the host's time: there is one device
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        limit = self.config.optimizer.clip_grad
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        if not self.scaler.is_enabled():
            return {"gradient_norm": norm}
        finite = norm.isfinite()
        self._overflows = (self._overflows + 1).where(~finite, 0.0)
        return {"gradient_norm": norm.where(finite, 0.0), "finite_share": finite.float()}

    def finite(self, parts: Sequence[StepResult], norm: Tensor) -> Tensor:
        """Whether each of `CHECKED` is finite, (3,) bool; for `skip`, in all processes.

        Args:
            parts: what the passes of this step gave.
            norm: of the gradient.
        """
        losses = functools.reduce(torch.logical_and, [part.finite for part in parts])
        gradient = norm < math.inf  # one operation, where isfinite has four
        if self.scaler.is_enabled():
            gradient = self._overflows < _MOST_OVERFLOWS
        finite = torch.cat((losses, gradient.reshape(1)))
        if self.config.on_nonfinite == "skip":
            finite = self.world.minimum(finite.float()).bool()
        return finite

    def update(self, finite: Tensor, progress: Progress) -> bool:
        """Change the weights and count the step; False where it is skipped (`on_nonfinite: skip`).

        Raises:
            TrainingStopped: more steps than `skip_limit` were skipped.
        """
        applied = self.config.on_nonfinite != "skip" or bool(finite.all().item())
        if applied:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=not self._adds_up)
        progress.step += 1
        if applied:
            return True
        progress.skipped_steps += 1
        limit = self.config.skip_limit
        if progress.skipped_steps > limit:
            name = CHECKED[finite.tolist().index(False)]
            raise TrainingStopped(
                f"step {progress.step} (epoch {progress.epochs_done + 1}): the {name} is not "
                f"finite, and {limit} steps were skipped for that already (skip_limit)"
            )
        return False
