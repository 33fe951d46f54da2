"""A training on one page: data, model, optimiser, resume; then step by step, epoch by epoch.

`train_step` is one optimiser step, `Run` the training around it.

Dimensions: B batch, C classes.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from experiments.checkpoint import load_weights, save_final_weights
from experiments.config.schema import RunConfig, as_plain, is_on
from experiments.data.augment import BatchMixer, refuse_unreachable_tau
from experiments.data.images import draw_per_class
from experiments.data.loading import EvalBatches, TrainBatches
from experiments.errors import ConfigError, DataError, SavedAndStopped, TrainingStopped
from experiments.models.build import build_model
from experiments.training.distributed import Agreement, World
from experiments.training.evaluation import evaluate, model_and_images, place
from experiments.training.folder import CHECKPOINT_FOLDER, RunFolder, captured, restore
from experiments.training.metrics import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    MetricsWriter,
    Progress,
    RunningStatistics,
    StepTimer,
    mean_of_rows,
)
from experiments.training.optim import Schedule, build_optimizer, check_optimizer
from experiments.training.step import Learner, refuse_graphs_without_gpu
from experiments.training.stopping import StopRequests, explain_fault
from tokenmixup import TokenMixupModel
from tokenmixup.rules import Rules


def train_step(
    learner: Learner,
    images: Tensor,
    labels: Tensor,
    progress: Progress,
    statistics: RunningStatistics,
) -> None:
    """One optimiser step; everything random in it depends on (seed, step, part of the batch) alone.

    Args:
        learner: the model and what changes it, in training mode.
        images: (B, 3, H, W), this process's share of the batch, on the device.
        labels: (B,), on the device.
        progress: of the run; the step is counted there.
        statistics: take what the step measures, without waiting for the device.

    Raises:
        TrainingStopped: too many steps were skipped, since something was not finite.
    """
    parts = []
    for mixed_images, targets in learner.micro_batches(images, labels, progress):
        result = learner.forward(mixed_images, targets)
        learner.backward(result.loss)
        parts.append(result)
    gradient = learner.clip_gradient()
    finite = learner.finite(parts, gradient["gradient_norm"])
    if learner.update(finite, progress):
        names, values = (*result.names, *gradient), torch.stack(tuple(gradient.values()))
        statistics.add_step(names, [torch.cat((part.values, values)) for part in parts], finite)
    else:
        statistics.add_skipped_step()


def model_to_train(
    config: RunConfig, num_classes: int, rules: Rules | None = None
) -> TokenMixupModel:
    """The model of `build_model`, after a look at whether its HTM can ever mix anything."""
    refuse_unreachable_tau(config, num_classes)
    return build_model(config, num_classes, rules)


class Run:
    """One training, in its run folder.

    The constructor checks everything and reads the data; `fit` trains. A study passes the rules by
    which TokenMixup decides, by default the paper's, and the command that resumes with them.

    Raises:
        UserError: any setting that cannot work.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        rules: Rules | None = None,
        command: str | None = None,
    ) -> None:
        assert config.output is not None, "the reader of the config fills it in"
        self.config = config
        self.world = world
        self.folder = RunFolder(Path(config.output))
        self._command = command

        # Data and model.
        check_optimizer(config.optimizer)
        refuse_graphs_without_gpu(config)
        splits = (config.data.train_split, config.data.val_split)
        model, num_classes, (images, val_images) = model_and_images(
            config, world, splits, lambda num_classes: model_to_train(config, num_classes, rules)
        )
        per_class = config.data.per_class
        if per_class is not None:
            images = draw_per_class(images, per_class, num_classes, config.seed)
        self.num_classes = num_classes
        share = (world.device, world.rank, world.size)
        self.batches = TrainBatches(config, images, num_classes, *share)
        self.val_batches = EvalBatches(config, val_images, num_classes, *share)

        # Optimiser and schedule, of the parameters on the device.
        place(model, world.device, config)
        optimizer = build_optimizer(config.optimizer, config.schedule, model)
        schedule = Schedule(config.schedule, optimizer, self.batches.steps_per_epoch)
        mixer = BatchMixer(config.mixup, num_classes, config.seed)
        self.learner = Learner(
            config, model, optimizer, schedule, mixer, self.batches.division, world
        )

        self.progress = Progress()
        self.statistics = RunningStatistics(world.device)
        self.total_epochs = config.schedule.total_epochs
        self._metrics: MetricsWriter | None = None  # of the main process
        self._agreement = Agreement(world)

    def fit(
        self, requests: StopRequests | None = None, allow_changed: Collection[str] = ()
    ) -> None:
        """Train until the last epoch, from where an earlier run of this folder stopped.

        Args:
            requests: what may ask the run to save and stop.
            allow_changed: keys of the config that may differ from those of the run so far.

        Raises:
            ConfigError: the folder holds another experiment, is in use, or cannot be written.
            CheckpointError: all checkpoints of the folder are damaged.
            SavedAndStopped: the run was asked to stop.
            TrainingStopped: a loss or gradient was not finite, memory or the disk was full, or a
                loader process was killed.
            DataError: images cannot be read.
        """
        self._requests = requests or StopRequests()
        with ExitStack() as stack:
            if self.world.is_main:
                stack.enter_context(self.folder.held())
            stack.callback(self.batches.close)
            stack.callback(self.val_batches.close)
            rows = self._resume(allow_changed, set_aside=True)
            done = self.progress.epochs_done == self.total_epochs
            if done and self.folder.final_weights.exists():
                self._say(f"{self.folder.path}: all {self.total_epochs} epochs are done already")
                return
            if self.world.is_main:
                self.folder.begin(self.config, self._command)
                with self.folder.refuse_unwritable():
                    tensorboard = self.config.logging.tensorboard
                    self._metrics = MetricsWriter(self.folder.path, rows, tensorboard)
                stack.callback(self._metrics.close)
            self._say_headline()
            with self._faults_explained():
                while self.progress.epochs_done < self.total_epochs:
                    self._train_epoch()
                    self._end_epoch()
                self._agreement.finish()
                self.folder.settle()
                if self.world.is_main:
                    save_final_weights(self.folder.final_weights, self.learner.model)
            self._beat("finished", at_once=True)
            self._say_summary()

    def check(self, allow_changed: Collection[str] = ()) -> None:
        """Read what `fit` would begin with, and write nothing.

        Raises:
            UserError: as `fit` before its first step.
        """
        self._resume(allow_changed, set_aside=False)

    def _resume(self, allow_changed: Collection[str], set_aside: bool) -> int:
        """Restore the newest checkpoint or begin; gives the rows of metrics so far."""
        saved = self.folder.newest(self.world, self._warn, set_aside)
        if saved is not None:
            parts = (self.learner, self.batches, self.statistics)
            self.progress = restore(saved, *parts, allow_changed, self._warn)
            self._refuse_fewer_epochs()
            return int(saved[1]["rows"])
        self.folder.refuse_lost_checkpoints(self.config.checkpoint.every)
        if allow_changed:
            raise ConfigError(
                f"command line: --allow-changed: {self.folder.path} holds no run to resume"
            )
        if self.config.model.weights is not None:
            self._start_from(self.config.model.weights)
        return 0

    def _refuse_fewer_epochs(self) -> None:
        """Refuse an end that the run has passed: its weights would be of another schedule."""
        done = math.ceil(self.progress.step / self.batches.steps_per_epoch)
        if done > self.total_epochs:
            raise ConfigError(
                f"schedule.epochs: the config's {self.total_epochs} epochs end before the run of "
                f"{self.folder.path}, which has come to epoch {done}; allowed: {done} or more, or "
                "another --output"
            )

    def _train_epoch(self) -> None:
        """Train the rest of an epoch, step by step: batch, step, log, stop, save."""
        config, learner, progress = self.config, self.learner, self.progress
        epoch, steps = progress.epochs_done, self.batches.steps_per_epoch
        save_every = config.checkpoint.every_steps
        first = progress.step - epoch * steps
        if first == steps:
            return  # the run stopped within the evaluation
        learner.model.train()
        learner.model.enabled = is_on(config.tokenmixup_off_epoch, epoch)
        timer = StepTimer(learner.device)
        with self._progress_bar(steps, first) as advance:
            for images, labels in timer.batches(self.batches.epoch(epoch, first)):
                rate = learner.schedule.set_step(progress.step)
                train_step(learner, images, labels, progress, self.statistics)
                timer.step_done()
                advance()
                step = progress.step - epoch * steps  # within the epoch, this one included
                if step % config.logging.interval == 0 or step == steps:
                    self._log_step(rate, timer)
                self._beat("training")
                self._stop_if_asked()
                if save_every is not None and progress.step % save_every == 0:
                    self._save()

    def _log_step(self, rate: float, timer: StepTimer) -> None:
        """Write what was measured since the last row; here alone the training waits for it."""
        self.statistics.refuse_not_finite(self.world, self.progress)
        values = {**self.statistics.read(self.world), "lr": rate}
        if self.config.on_nonfinite == "skip":
            values["skipped_steps"] = self.progress.skipped_steps
        values |= {f"{name.lower()}_on": int(on) for name, on in self._switches().items()}
        self._write("train", values | timer.read(self.config.data.batch_size))

    def _switches(self) -> dict[str, bool]:
        """Of what is switched off within the run: whether it is on in the current epoch."""
        config, epoch = self.config, self.progress.epochs_done
        ends = {"TokenMixup": config.tokenmixup_off_epoch, "Mixup": config.mixup.off_epoch}
        return {name: is_on(end, epoch) for name, end in ends.items() if end is not None}

    def _end_epoch(self) -> None:
        """Evaluate and save, as often as the config says, and always after the last epoch."""
        number = self.progress.epochs_done + 1
        last = number == self.total_epochs
        evaluated = last or number % self.config.logging.evaluate_every == 0
        saved = last or number % self.config.checkpoint.every == 0
        line = self._epoch_line(number)
        if evaluated:
            if saved:
                self._save()  # a crash within the evaluation repeats the evaluation alone
            self._evaluate()
            line += f"  top-1 {self.progress.top1:.2f}%"
        self._say(line)
        self.progress.epochs_done = number
        if last or (saved and not evaluated):
            self._save()

    def _evaluate(self) -> None:
        """Evaluate on the whole validation split, and keep the best weights."""
        asks = iter(range(self.val_batches.common_batches))  # as often in each process

        def on_batch() -> None:
            self._beat("evaluating")
            if next(asks, None) is not None:
                self._stop_if_asked()

        progress, model = self.progress, self.learner.model
        result = evaluate(model, self.val_batches, self.world, self.config, on_batch)
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        self._write("validation", values)
        progress.top1 = result.top1
        if not math.isfinite(result.loss):
            problem = (
                f"validation of epoch {progress.epochs_done + 1}: the loss is not finite (weights "
                f"or eval_precision, now {self.config.eval_precision}), so that top-1 tells nothing"
            )
            if self.config.on_nonfinite == "stop":
                raise TrainingStopped(problem)
            self._warn(problem)
        elif result.top1 > progress.best_top1:
            progress.best_top1, progress.best_epoch = result.top1, progress.epochs_done + 1
            if self.world.is_main:
                content = {"model": model.state_dict(), "progress": asdict(progress)}
                self.folder.save_best({**content, "config": as_plain(self.config)})

    def _stop_if_asked(self) -> None:
        if not self._agreement.ask(self._requests.reason is not None):
            return
        self._agreement.finish()
        self._save()
        self.folder.settle()
        self._beat("stopped", at_once=True)
        reason = self._requests.reason or "another process was asked to stop"
        where = self.folder.saved()[0] if self.world.is_main else self.folder.path
        raise SavedAndStopped(
            f"{reason}: saved after step {self.progress.step} (epoch "
            f"{self.progress.epochs_done + 1}) in {where}; the same command resumes"
        )

    def _save(self) -> None:
        """Begin to write the state of all processes; no checkpoint holds what is not finite."""
        self.statistics.refuse_not_finite(self.world, self.progress)
        state = captured(self.learner, self.batches, self.progress, self.statistics)
        if state is None or self._metrics is None:
            return  # not the main process
        self._metrics.flush_to_disk()
        state["rows"] = self._metrics.rows
        self.folder.save(self.progress.step, state, self.config.checkpoint.keep)
        self._beat("training", at_once=True)

    # The main process alone writes and prints.

    def _write(self, split: str, values: dict[str, float]) -> None:
        if self._metrics is not None:
            self._metrics.write(split, self.progress, values)

    def _beat(self, state: str, at_once: bool = False) -> None:
        if self.world.is_main:
            self.folder.beat(state, self.progress, at_once)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _warn(self, text: str) -> None:
        if self.world.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def _faults_explained(self) -> Iterator[None]:
        """Name the last good checkpoint wherever a training ends before its time."""
        try:
            yield
        except (TrainingStopped, DataError) as error:
            raise type(error)(f"{error}; {self.folder.last_good()}") from None
        except (RuntimeError, OSError) as error:
            told = explain_fault(error, self.config, self.batches.division.micro_batch)
            if told is None:
                raise
            raise TrainingStopped(f"{told}; {self.folder.last_good()}") from error

    @contextmanager
    def _progress_bar(self, total: int, done: int) -> Iterator[Callable[[], object]]:
        """A bar with the time left, on a terminal alone; gives what advances it by a step."""
        if not (self.world.is_main and sys.stderr.isatty()):
            yield lambda: None
            return
        from rich.console import Console
        from rich.progress import Progress as Bar

        # not redirected: a forked loader process would get rich's lock in any state
        console = Console(stderr=True)
        bar = Bar(console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
        with bar:
            title = f"epoch {self.progress.epochs_done + 1}/{self.total_epochs}"
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)

    def _start_from(self, path: str) -> None:
        loaded = load_weights(self.learner.model, path, self.config.model.new_head)
        line = f"{self.folder.path}: starts from {path} ({loaded.kind})"
        self._say("; ".join([line, *loaded.notes]))

    def _say_headline(self) -> None:
        schedule, step = self.config.schedule, self.progress.step
        if schedule.warmup_epochs >= schedule.epochs:
            self._warn(
                f"schedule.warmup_epochs is {schedule.warmup_epochs} and schedule.epochs "
                f"{schedule.epochs}: the learning rate never reaches schedule.lr "
                f"({schedule.lr:g}); a shorter run needs a shorter warm-up"
            )
        processes = f"{self.world.size} × " if self.world.size > 1 else ""
        size = sum(parameter.numel() for parameter in self.learner.model.parameters()) / 1e6
        epoch = math.ceil(step / self.batches.steps_per_epoch)
        resumed = f", resuming after step {step} (epoch {epoch})" if step else ""
        self._say(
            f"{self.folder.path}: {self.config.model.name}, {size:.2f} M parameters, "
            f"{self.batches.num_images} training and {self.val_batches.num_images} validation "
            f"images, {processes}{self.world.device.type}, {self.config.precision}, evaluated in "
            f"{self.config.eval_precision}{resumed}"
        )

    def _epoch_line(self, number: int) -> str:
        rows = [] if self._metrics is None else self._metrics.training_rows(number)
        means = mean_of_rows(rows)
        line = (
            f"epoch {number:>3}/{self.total_epochs}  loss {means.get('loss', math.nan):.4f}"
            f"  lr {rows[-1]['lr'] if rows else math.nan:.2e}"
            f"  {means.get('images_per_second', math.nan):.0f} images/s"
        )
        shares = [value for name, value in means.items() if name.endswith("/mixed_share")]
        if shares:
            line += f"  mixed {100 * sum(shares) / len(shares):.0f}%"
        line += "".join(f"  {name} off" for name, on in self._switches().items() if not on)
        if self.progress.skipped_steps:
            line += f"  skipped steps {self.progress.skipped_steps}"
        return line

    def _say_summary(self) -> None:
        progress, folder = self.progress, self.folder.path
        lines = [
            f"top-1 {progress.top1:.2f}% after the last epoch, best {progress.best_top1:.2f}% "
            f"after epoch {progress.best_epoch}",
            f"weights: {self.folder.final_weights}",
            f"checkpoints: {folder / CHECKPOINT_FOLDER}",
            f"metrics: {folder / METRICS_FILE}",
        ]
        if self.config.logging.tensorboard:
            lines.append(f"TensorBoard: tensorboard --logdir {folder / TENSORBOARD_FOLDER}")
        self._say("\n".join(lines))
