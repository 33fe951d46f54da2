"""The training loop and the evaluation, one of each for every model.

Dimensions: B batch, C classes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.config import RunConfig
from experiments.data.loading import BatchMixer, Division, TrainBatches
from experiments.errors import TrainingStopped
from experiments.seeding import derive_seed
from experiments.training.distributed import World
from experiments.training.evaluation import autocast, memory_format
from experiments.training.metrics import RunningStatistics, StepTimer
from experiments.training.optim import Schedule
from tokenmixup import TokenMixupModel, TokenMixupOutput
from tokenmixup.functional import soft_cross_entropy

CHECKED = ("training loss", "ScoreNet's loss", "norm of the gradient")
"""What must be finite at each step."""
_MOST_OVERFLOWS = 32
"""Steps in a row that fp16's scaler may leave out: from any scale that it starts with, so many
halvings come to one at which a finite gradient cannot overflow."""


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
        self.skipped = 0
        """Steps that were left out so far, since something was not finite."""
        self._overflows = torch.zeros((), device=self.device)
        """Steps in a row, up to the last one, that the scaler has left out."""
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def step(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> "StepResult":
        """One optimiser step; everything random in it depends on (seed, step, part) alone.

        Where `on_nonfinite` is skip, a step whose loss or gradient is not finite changes nothing.

        Args:
            images: (B, 3, H, W), this process's share of the batch, on the device.
            labels: (B,), on the device.
            epoch: counted from 0.
            step: optimiser steps before this one, over the whole run.
        """
        parts = self.division.count
        statistics: list[dict[str, Tensor]] = []
        losses: list[Tensor] = []
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
            losses.append(torch.stack((loss.detach(), output.scorenet_loss.detach().float())))
            values = {"loss": loss.detach(), **output.stats}
            if self.config.horizontal is not None:
                values["scorenet_loss"] = output.scorenet_loss.detach()
            statistics.append(values)
        norm = self._gradient_norm()
        gradient_finite = norm.isfinite()
        measured = {"gradient_norm": norm}
        if self.scaler.is_enabled():
            # an overflow of fp16 is no fault: the scaler leaves the step out and lowers its scale
            measured = {
                "gradient_norm": norm.where(gradient_finite, 0.0),
                "finite_share": gradient_finite.float(),
            }
            self._overflows = (self._overflows + 1).where(~gradient_finite, 0.0)
            gradient_finite = self._overflows < _MOST_OVERFLOWS
        for values in statistics:
            values |= measured
        finite = torch.cat((torch.stack(losses).isfinite().all(0), gradient_finite.view(1)))
        skipped = False
        if self.config.on_nonfinite == "skip":
            finite = self.world.minimum(finite.float()).bool()
            skipped = not finite.all().item()
        if not skipped:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(statistics, finite, skipped)

    def count_skipped(self, number: int, epoch: int, result: "StepResult") -> None:
        """Count a step that was left out; raise TrainingStopped where there are too many."""
        self.skipped += 1
        if self.skipped > self.config.skip_limit:
            raise TrainingStopped(
                f"step {number} (epoch {epoch + 1}): the {_not_finite(result.finite.tolist())} is "
                f"not finite, and {self.config.skip_limit} steps were left out for that already "
                "(skip_limit)"
            )

    def _gradients_stay_here(self, yes: bool) -> AbstractContextManager[Any]:
        """Where further parts follow, gradients of all processes are averaged with theirs."""
        if yes and isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return nullcontext()

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, which is clipped where the config says so."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.optimizer.clip_grad
        if limit is not None:
            return nn.utils.clip_grad_norm_(self._parameters, limit)
        return nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step gives back; its tensors stay on the device."""

    statistics: list[dict[str, Tensor]]
    """0-d tensors by name, for each part of the batch."""
    finite: Tensor
    """(3,) bool: whether each of `CHECKED` was finite."""
    skipped: bool = False
    """Whether the step was left out, since something was not finite."""


@dataclass(frozen=True)
class Report:
    """Statistics of the steps since the last report, up to `step` of the whole run."""

    step: int
    values: dict[str, float]


class Tally:
    """What was measured since the last report; a checkpoint within an interval keeps it."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        """Optimiser steps since the last report."""
        self._statistics = RunningStatistics()
        self._device = device
        self._restart()

    def _restart(self) -> None:
        self.steps = 0
        self._finite = torch.ones(len(CHECKED), dtype=torch.bool, device=self._device)
        self._good_steps = torch.zeros(len(CHECKED), device=self._device)  # before a bad one

    def add(self, result: StepResult) -> None:
        """Take in a step, without waiting for the device."""
        self.steps += 1
        if result.skipped:
            self._good_steps = self._good_steps + 1
            return
        self._finite = self._finite & result.finite
        self._good_steps = self._good_steps + self._finite
        for values in result.statistics:
            self._statistics.add(values)

    def refuse_not_finite(self, world: World, done: int, epoch: int) -> None:
        """Raise TrainingStopped where a value of these steps was not finite.

        Args:
            world: all processes, each of which calls this.
            done: optimiser steps of the whole run so far.
            epoch: counted from 0.
        """
        good = [round(value) for value in world.minimum(self._good_steps.clone()).tolist()]
        first = min(good)
        if first < self.steps:
            raise TrainingStopped(
                f"step {done - self.steps + first + 1} (epoch {epoch + 1}): the "
                f"{_not_finite([steps > first for steps in good])} is not finite"
            )

    def read(self, world: World) -> dict[str, float]:
        """The means since the last report, over all processes; then anew."""
        values = {**self._statistics.read(world), "steps": self.steps}
        self._restart()
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, once `refuse_not_finite` has found nothing."""
        return {"steps": self.steps, "statistics": self._statistics.state_dict()}

    def load_state_dicts(self, states: list[dict[str, Any]], mine: bool = True) -> None:
        """Go on from what `state_dict` gave in one or several processes.

        Args:
            states: of the processes, which have made the same steps.
            mine: whether this process takes them on; else another one of the run does.
        """
        self._restart()
        self.steps = states[0]["steps"]
        self._good_steps = self._good_steps + self.steps
        statistics = [state["statistics"] for state in states]
        self._statistics.load_state_dicts(statistics, self._device, mine)


def _not_finite(finite: list[bool]) -> str:
    return CHECKED[finite.index(False)]


def train_epoch(
    learner: Learner, batches: TrainBatches, epoch: int, tally: Tally, first_step: int = 0
) -> Iterator[Report | None]:
    """Train one epoch: after each step comes a report, or None between two reports.

    A report is due at every `logging.interval` steps and at the end. Between two of them nothing
    waits for the device.

    Args:
        learner: the model and what changes it.
        batches: the training images.
        epoch: counted from 0.
        tally: what was measured since the last report.
        first_step: steps of this epoch that were done before.

    Raises:
        TrainingStopped: the loss or the gradient was not finite, or too many steps were left out
            for that; the message names the step.
    """
    learner.model.train()
    config, device = learner.config, learner.device
    timer = StepTimer(device)
    start = epoch * batches.steps_per_epoch
    done = start + first_step
    for images, labels in batches.epoch(epoch, first_step):
        timer.got_data()
        rate = learner.schedule.set_step(done)
        images = images.to(device, non_blocking=True, memory_format=memory_format(config))
        labels = labels.to(device, non_blocking=True)
        result = learner.step(images, labels, epoch, done)
        tally.add(result)
        done += 1
        if result.skipped:
            learner.count_skipped(done, epoch, result)
        timer.step_done()
        in_epoch = done - start
        report = None
        if in_epoch == batches.steps_per_epoch or in_epoch % config.logging.interval == 0:
            tally.refuse_not_finite(learner.world, done, epoch)
            values = {**tally.read(learner.world), "lr": rate}
            if config.on_nonfinite == "skip":
                values["skipped_steps"] = learner.skipped
            report = Report(done, {**values, **timer.read(config.data.batch_size)})
        yield report
        timer.restart()
