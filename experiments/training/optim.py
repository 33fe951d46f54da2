"""The optimiser and the learning rate, from timm's factories, in optimiser steps."""

import torch
from torch import nn

from experiments.config.schema import OptimizerConfig, ScheduleConfig
from experiments.errors import ConfigError, nearest

_FUSED_IN_TORCH = ("adam", "adamw", "momentum", "nesterov", "sgd")


def check_optimizer(config: OptimizerConfig) -> None:
    """Check what only timm knows: the optimiser's name, and which settings it has.

    Raises:
        ConfigError: an unknown optimiser, or a setting that it does not have.
    """
    from timm.optim import get_optimizer_info, list_optimizers

    names = [str(name) for name in list_optimizers()]
    if config.name not in names:
        near = nearest(config.name, names)
        raise ConfigError(f"optimizer.name: got {config.name!r}, which timm does not know; {near}")
    info = get_optimizer_info(config.name)
    for field in ("momentum", "betas", "eps"):
        if getattr(config, field) is not None and not getattr(info, f"has_{field}"):
            raise ConfigError(
                f"optimizer.{field}: got {getattr(config, field)!r}; allowed: null, since "
                f"{config.name} has none"
            )


def build_optimizer(
    config: OptimizerConfig, schedule: ScheduleConfig, model: nn.Module
) -> torch.optim.Optimizer:
    """timm's optimiser over its own parameter groups: no weight decay on biases and norms.

    On CUDA, torch's fused implementation where there is one.

    Raises:
        ConfigError: it cannot be built, for example since a package is missing.
    """
    from timm.optim import create_optimizer_v2

    arguments = {
        name: getattr(config, name)
        for name in ("momentum", "betas", "eps")
        if getattr(config, name) is not None
    }
    on_cuda = next(model.parameters()).device.type == "cuda"
    if on_cuda and config.name in _FUSED_IN_TORCH:
        arguments["fused"] = True
    try:
        return create_optimizer_v2(
            model, opt=config.name, lr=schedule.lr, weight_decay=config.weight_decay, **arguments
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer.name: {config.name!r} cannot be used: {error}") from None


class Schedule:
    """The learning rate of each optimiser step, by timm's scheduler factory.

    It has no state: the same step always gives the same rate, also in a resumed run.
    """

    def __init__(
        self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
    ) -> None:
        from timm.scheduler import create_scheduler_v2

        self._optimizer = optimizer
        self._steps_per_interval = steps_per_epoch if config.interval == "epoch" else 1
        self.total_epochs = config.total_epochs
        self._scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            cooldown_epochs=config.cooldown_epochs,
            min_lr=config.min_lr,
            warmup_lr=config.warmup_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
        assert epochs == config.total_epochs, "timm counts other epochs than the config"

    def set_step(self, step: int) -> float:
        """Put the learning rate of a step (from 0) into the optimiser, and return it."""
        start = step - step % self._steps_per_interval
        self._scheduler.step_update(start)
        return float(self._optimizer.param_groups[0]["lr"])
