"""All of a run that a checkpoint keeps: taken from its parts, and put back into them."""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tokenmixup
from experiments.checkpoint import refuse_changed_config
from experiments.config import RunConfig, as_plain
from experiments.data.loading import TrainBatches
from experiments.errors import CheckpointError, ConfigError, UserError
from experiments.seeding import random_state, restore_random_state
from experiments.training.distributed import World
from experiments.training.run_folder import SavedRun
from experiments.training.step import Learner, Tally


@dataclass
class Progress:
    """How far a run has come."""

    epochs_done: int = 0
    """Epochs that are trained and, where it is due, evaluated."""
    step: int = 0
    """Optimiser steps done; beyond `epochs_done` they belong to the epoch that is under way."""
    skipped_steps: int = 0
    """Those of them that were left out, since something was not finite."""
    top1: float = -1.0
    best_top1: float = -1.0
    best_epoch: int = 0


class RunState:
    """The parts of a run that change while it trains.

    Attributes:
        progress: how far it has come.
        tally: what was measured since the last report.
        reports: those of the epoch under way.
        rows: rows of metrics before the checkpoint that the run goes on from.
    """

    def __init__(
        self, config: RunConfig, world: World, learner: Learner, batches: TrainBatches
    ) -> None:
        self.config = config
        self.world = world
        self.learner = learner
        self.batches = batches
        self.progress = Progress()
        self.tally = Tally(world.device)
        self.reports: list[dict[str, float]] = []
        self.rows = 0

    def capture(self) -> dict[str, Any] | None:
        """The state of all processes, in the main one; every process calls it."""
        own = {
            "random": random_state(),
            "tally": self.tally.state_dict(),
            "bad_images": list(self.batches.bad_images),
        }
        processes = self.world.gather(own)
        if not self.world.is_main:
            return None
        return {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "progress": asdict(self.progress),
            "data": self._data(),
            "reports": self.reports,
            "processes": processes,
            "config": as_plain(self.config),
            "versions": {"torch": str(torch.__version__), "tokenmixup": tokenmixup.__version__},
        }

    def _data(self) -> dict[str, int]:
        """What the order of the images depends on, besides the seed."""
        return {
            "images": self.batches.num_images,
            "steps an epoch": self.batches.steps_per_epoch,
        }

    def restore(
        self, saved: SavedRun, allow_changed: Collection[str], warn: Callable[[str], object]
    ) -> None:
        """Go on from a checkpoint.

        Args:
            saved: the checkpoint.
            allow_changed: keys of the config that may differ.
            warn: told what is not as it was.

        Raises:
            ConfigError: it is of another experiment.
            CheckpointError: it does not fit the model or the optimiser.
        """
        try:
            self._restore(saved.path, saved.content, allow_changed, warn)
        except UserError:
            raise
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            IndexError,
            RuntimeError,
            OverflowError,
        ) as error:
            # what a checkpoint that another program wrote lacks shows wherever it is used first
            reason = " ".join(f"{type(error).__name__} {error}".split())
            raise CheckpointError(
                f"{saved.path}: does not hold the state of a run: {reason[:200]}"
            ) from None

    def _restore(
        self,
        path: Path,
        content: dict[str, Any],
        allow_changed: Collection[str],
        warn: Callable[[str], object],
    ) -> None:
        now = as_plain(self.config)
        changed = refuse_changed_config(path, content["config"], now, allow_changed)
        for text in changed:
            warn(f"goes on with another config: {text}")
        if content["data"] != self._data():
            before, now = (_facts(facts) for facts in (content["data"], self._data()))
            raise ConfigError(
                f"{path}: that run had {before}, and now there are {now}: the order of the images "
                "would be another, so it cannot go on"
            )
        learner = self.learner
        groups = [dict(group) for group in learner.optimizer.param_groups]
        try:
            learner.model.load_state_dict(content["model"])
            _compute_as_here(content["optimizer"]["param_groups"], groups)
            learner.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise CheckpointError(
                f"{path}: does not fit the model or the optimiser: {' '.join(reason)[:300]}"
            ) from None
        _set_changed(learner.optimizer, groups, allow_changed)
        if content["scaler"]:  # empty without fp16: a run that changes to it begins a scale anew
            learner.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        learner.skipped = self.progress.skipped_steps
        self.reports, self.rows = list(content["reports"]), content["rows"]
        self._restore_process(content["processes"], warn)

    def _restore_process(
        self, processes: list[dict[str, Any]], warn: Callable[[str], object]
    ) -> None:
        """Take on what the checkpoint holds of each single process."""
        world = self.world
        if len(processes) == world.size:
            own = processes[world.rank]
            restore_random_state(own["random"])
            self.tally.load_state_dicts([own["tally"]])
            self.batches.bad_images = dict.fromkeys(own["bad_images"])
            return
        if self.config.data.micro_batch is None:
            kept = (
                "each computes its share of the batch at once (data.micro_batch: null), so Mixup, "
                "dropout and HTM partners are others from here; the order of the images and their "
                "augmentation stay the same"
            )
        else:
            kept = (
                "order, augmentation, Mixup, dropout and HTM partners stay the same; sums over the "
                "batch are taken in another order, so weights agree up to rounding"
            )
        warn(f"the run so far had {len(processes)} processes, now {world.size}: {kept}")
        # the random states belong to processes that are gone; every step seeds its own anyway
        tallies = [each["tally"] for each in processes]
        self.tally.load_state_dicts(tallies, mine=world.is_main)
        self.batches.bad_images = dict.fromkeys(
            problem for each in processes for problem in each["bad_images"]
        )


def _compute_as_here(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Give saved settings of the optimiser this device's implementation: fused on CUDA.

    Before they are loaded, since it decides where torch puts the state.
    """
    for group, here in zip(saved, groups, strict=False):
        group.update({name: here[name] for name in ("fused", "foreach") if name in here})


def _set_changed(
    optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]], changed: Collection[str]
) -> None:
    """Give the config's word to settings of the optimiser that a checkpoint brought along."""
    for key in changed:
        section, _, name = key.partition(".")
        if section != "optimizer":
            continue
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            if name in wanted:
                group[name] = wanted[name]


def _facts(facts: dict[str, int]) -> str:
    return " and ".join(f"{number} {name}" for name, number in facts.items())
