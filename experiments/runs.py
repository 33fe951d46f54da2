"""A run from its config to its final weights: run folder, resuming, epochs, records."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

import tokenmixup
from experiments.checkpoint import (
    BEST,
    CHECKPOINT_FOLDER,
    FINAL_WEIGHTS,
    LAST,
    load_checkpoint,
    load_weights,
    random_state,
    refuse_changed_config,
    restore_random_state,
    save_checkpoint,
    save_final_weights,
)
from experiments.config import RunConfig, as_plain
from experiments.data import BatchMixer, EvalBatches, TrainBatches
from experiments.datasets import known_num_classes, open_images, stated_num_classes
from experiments.distributed import World
from experiments.engine import Evaluation, Learner, Report, evaluate, place, train_epoch
from experiments.errors import ConfigError, TrainingStopped
from experiments.files import write_atomically
from experiments.metrics import METRICS_FILE, TENSORBOARD_FOLDER, Recorder, mean_of_rows
from experiments.models.build import build_model
from experiments.optim import Schedule, build_optimizer, check_optimizer

CONFIG_FILE = "config.yaml"


@dataclass
class Progress:
    """How far a run has come."""

    epochs_done: int = 0
    step: int = 0
    top1: float = -1.0
    best_top1: float = -1.0
    best_epoch: int = 0


class Assessment:
    """Weights from a file in the model of a config, ready to be evaluated.

    Raises:
        UserError: whatever of the config or of the file cannot work.
    """

    def __init__(self, config: RunConfig, checkpoint: str, world: World) -> None:
        self.config = config
        self.world = world
        num_classes = known_num_classes(config)
        if num_classes is not None:
            model = build_model(config, num_classes)
            self.loaded = load_weights(model, checkpoint)  # its mistakes need no data
        with world.main_first():  # which may have to fetch it
            images = open_images(config.data, config.data.val_split)
        if num_classes is None:
            num_classes = stated_num_classes(config, images)
            model = build_model(config, num_classes)
            self.loaded = load_weights(model, checkpoint)
        self.model = place(model, world.device, config)
        pin_memory = world.device.type == "cuda"
        self.batches = EvalBatches(config, images, num_classes, pin_memory, world.rank, world.size)

    def evaluate(self) -> Evaluation:
        """Top-1, top-5 and loss over the whole validation split."""
        return evaluate(self.model, self.batches, self.world, self.config)


class Run:
    """One training, in its run folder.

    Making one checks everything and reads the data; `fit` trains.

    Raises:
        UserError: whatever of the config cannot work.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        assert config.output is not None, "the reader of the config fills it in"
        self.config = config
        self.world = world
        self.folder = Path(config.output)
        check_optimizer(config.optimizer)
        num_classes = known_num_classes(config)
        if num_classes is not None:
            model = build_model(config, num_classes)  # its mistakes need no data to be found
        with world.main_first():  # which may have to fetch them
            images = open_images(config.data, config.data.train_split)
            val_images = open_images(config.data, config.data.val_split)
        if num_classes is None:
            num_classes = stated_num_classes(config, images)
            model = build_model(config, num_classes)
        share = (world.device.type == "cuda", world.rank, world.size)
        self.batches = TrainBatches(config, images, num_classes, *share)
        self.val_batches = EvalBatches(config, val_images, num_classes, *share)
        place(model, world.device, config)
        optimizer = build_optimizer(config.optimizer, config.schedule, model)
        self.learner = Learner(
            config,
            model,
            optimizer,
            Schedule(config.schedule, optimizer, self.batches.steps_per_epoch),
            BatchMixer(config.mixup, num_classes, config.seed),
            self.batches.division,
            world,
        )
        self.progress = Progress()
        self.total_epochs = config.schedule.total_epochs

    def fit(self) -> None:
        """Train until the last epoch, from where an earlier run of this folder stopped.

        Raises:
            ConfigError: the folder holds another experiment, or cannot be written.
            TrainingStopped: the loss was not finite.
        """
        self._prepare_folder()
        final = self.folder / FINAL_WEIGHTS
        if self.progress.epochs_done == self.total_epochs and final.exists():
            self._say(f"{self.folder}: all {self.total_epochs} epochs are done already")
            return
        self._say(self._headline())
        recorder = None
        if self.world.is_main:
            recorder = Recorder(self.folder, self.progress.step, self.config.logging.tensorboard)
        try:
            for epoch in range(self.progress.epochs_done, self.total_epochs):
                self._run_epoch(epoch, recorder)
        except TrainingStopped as error:
            raise TrainingStopped(f"{error}; {self._last_good()}") from None
        finally:
            if recorder is not None:
                recorder.close()
        if self.world.is_main:
            save_final_weights(final, self.learner.model)
        self._say(self._summary())

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _run_epoch(self, epoch: int, recorder: Recorder | None) -> None:
        last = epoch + 1 == self.total_epochs
        reports: list[Report] = []
        with tqdm(
            total=self.batches.steps_per_epoch,
            desc=f"epoch {epoch + 1}/{self.total_epochs}",
            disable=not (self.world.is_main and sys.stderr.isatty()),
            leave=False,
        ) as bar:
            for report in train_epoch(self.learner, self.batches, epoch, on_step=bar.update):
                if recorder is not None:
                    recorder.write("train", epoch + 1, report.step, report.values)
                reports.append(report)
        self.progress.epochs_done, self.progress.step = epoch + 1, reports[-1].step
        line = self._training_line(epoch, reports)
        if last or (epoch + 1) % self.config.logging.evaluate_every == 0:
            result = evaluate(self.learner.model, self.val_batches, self.world, self.config)
            values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
            if recorder is not None:
                recorder.write("validation", epoch + 1, self.progress.step, values)
            line += f"  top-1 {result.top1:.2f}%"
            self._keep_best(result)
        self._say(line)
        due = last or (epoch + 1) % self.config.checkpoint.every == 0
        if due and self.world.is_main:
            save_checkpoint(self.folder / CHECKPOINT_FOLDER / LAST, self._state())

    def _keep_best(self, result: Evaluation) -> None:
        progress = self.progress
        progress.top1 = result.top1
        if result.top1 <= progress.best_top1:
            return
        progress.best_top1, progress.best_epoch = result.top1, progress.epochs_done
        if not self.world.is_main:
            return
        content = {"model": self.learner.model.state_dict(), "progress": asdict(progress)}
        save_checkpoint(
            self.folder / CHECKPOINT_FOLDER / BEST, {**content, "config": as_plain(self.config)}
        )

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.learner.model.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "scaler": self.learner.scaler.state_dict(),
            "progress": asdict(self.progress),
            "random": random_state(),
            "config": as_plain(self.config),
            "versions": {"torch": str(torch.__version__), "tokenmixup": tokenmixup.__version__},
        }

    def _prepare_folder(self) -> None:
        last = self.folder / CHECKPOINT_FOLDER / LAST
        if last.exists():
            self._resume(last)
        elif self.config.model.weights is not None:
            self._start_from(self.config.model.weights)
        if not self.world.is_main:
            return
        try:
            last.parent.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(as_plain(self.config), sort_keys=False)
            write_atomically(self.folder / CONFIG_FILE, text.encode())
        except OSError as error:
            raise ConfigError(
                f"output: cannot write the run folder {self.folder}: {error.strerror}"
            ) from None

    def _start_from(self, path: str) -> None:
        loaded = load_weights(self.learner.model, path, self.config.model.new_head)
        line = f"{self.folder}: starts from {path} ({loaded.kind})"
        if loaded.left_out:
            line += f"; as initialised: {', '.join(loaded.left_out)}"
        if loaded.resized:
            line += "; position embedding resized"
        self._say(line)

    def _resume(self, path: Path) -> None:
        saved = load_checkpoint(path)
        refuse_changed_config(path, saved["config"], as_plain(self.config))
        learner = self.learner
        learner.model.load_state_dict(saved["model"])
        learner.optimizer.load_state_dict(saved["optimizer"])
        learner.scaler.load_state_dict(saved["scaler"])
        restore_random_state(saved["random"])
        self.progress = Progress(**saved["progress"])

    def _headline(self) -> str:
        model = self.learner.model
        device = self.world.device.type
        if self.world.size > 1:
            device = f"{self.world.size} × {device}"
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        done = self.progress.epochs_done
        start = f", going on after epoch {done}" if done else ""
        return (
            f"{self.folder}: {self.config.model.name}, {size:.2f} M parameters, "
            f"{self.batches.num_images} training and {self.val_batches.num_images} validation "
            f"images, {device}, {self.config.precision}{start}"
        )

    def _training_line(self, epoch: int, reports: list[Report]) -> str:
        means = mean_of_rows([report.values for report in reports])
        line = (
            f"epoch {epoch + 1:>3}/{self.total_epochs}  loss {means['loss']:.4f}"
            f"  lr {reports[-1].values['lr']:.2e}  {means['images_per_second']:.0f} images/s"
        )
        shares = [value for name, value in means.items() if name.endswith("/mixed_share")]
        if shares:
            line += f"  mixed {100 * sum(shares) / len(shares):.0f}%"
        return line

    def _summary(self) -> str:
        progress = self.progress
        return "\n".join(
            (
                f"top-1 {progress.top1:.2f}% after the last epoch, best {progress.best_top1:.2f}% "
                f"after epoch {progress.best_epoch}",
                f"weights: {self.folder / FINAL_WEIGHTS}",
                f"checkpoints: {self.folder / CHECKPOINT_FOLDER}",
                f"metrics: {self.folder / METRICS_FILE}",
                *(
                    [f"TensorBoard: tensorboard --logdir {self.folder / TENSORBOARD_FOLDER}"]
                    if self.config.logging.tensorboard
                    else []
                ),
            )
        )

    def _last_good(self) -> str:
        path = self.folder / CHECKPOINT_FOLDER / LAST
        if not path.exists():
            return "there is no checkpoint yet"
        return f"the last checkpoint is {path}"
