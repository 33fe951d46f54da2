"""What an optimiser step needs besides forward, loss and backward, which `run.train_step` shows.

Dimensions: B batch, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.config import RunConfig
from experiments.data.augment import BatchMixer
from experiments.data.loading import Division
from experiments.errors import TrainingStopped
from experiments.seeding import derive_seed
from experiments.training.distributed import World
from experiments.training.metrics import CHECKED, Progress
from experiments.training.optim import Schedule
from tokenmixup import TokenMixupModel, TokenMixupOutput

_MOST_OVERFLOWS = 32
"""Steps in a row that fp16's scaler may leave out: from any scale that it starts with, so many
halvings lead to one at which a finite gradient cannot overflow."""


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
        self.forward: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.world.size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.forward = DistributedDataParallel(
                self.forward, devices, gradient_as_bucket_view=True
            )
        self._overflows = torch.zeros((), device=self.device)
        """Steps in a row, up to the last one, that the scaler has left out."""
        self._parameters = list(self.model.parameters())

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
            torch.manual_seed(derive_seed(self.config.seed, "step", progress.step, part))
            last = index + 1 == count
            with nullcontext() if last or self.world.size == 1 else self.forward.no_sync():
                yield self.mixer(
                    some_images, some_labels, progress.epochs_done, progress.step, part
                )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part's loss to that of the batch."""
        self.scaler.scale(loss / self.division.count).backward()

    def measured(self, loss: Tensor, output: TokenMixupOutput) -> dict[str, Tensor]:
        """The statistics of one part, which stay on the device."""
        values = {"loss": loss.detach(), **output.stats}
        if self.config.horizontal is not None and self.model.enabled:
            values["scorenet_loss"] = output.scorenet_loss.detach()
        return values

    def clip_gradient(self) -> dict[str, Tensor]:
        """Clip the gradient where the config says so; gives the norm that it had.

        In fp16 a gradient may overflow: the scaler leaves such a step out and lowers its scale.
        Then the norm is 0, and so is `finite_share`.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optimizer.clip_grad
        if limit is not None:
            norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        else:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        if not self.scaler.is_enabled():
            return {"gradient_norm": norm}
        finite = norm.isfinite()
        self._overflows = (self._overflows + 1).where(~finite, 0.0)
        return {"gradient_norm": norm.where(finite, 0.0), "finite_share": finite.float()}

    def finite(self, parts: Sequence[dict[str, Tensor]], norm: Tensor) -> Tensor:
        """Whether each of `CHECKED` is finite, (3,) bool; for `skip`, in all processes.

        Args:
            parts: the statistics of each part.
            norm: of the gradient.
        """
        nothing = torch.zeros_like(norm)
        losses = [
            torch.stack([part.get(name, nothing).isfinite() for part in parts]).all()
            for name in ("loss", "scorenet_loss")
        ]
        gradient = norm.isfinite()
        if self.scaler.is_enabled():
            gradient = self._overflows < _MOST_OVERFLOWS
        finite = torch.stack((*losses, gradient))
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
        self.optimizer.zero_grad()
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
