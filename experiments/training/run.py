"""A run from its config to its final weights: epochs, records, resuming where it was cut."""

import math
import sys
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import yaml
from tqdm import tqdm

from experiments.checkpoint import load_weights, save_final_weights
from experiments.config import RunConfig, as_plain
from experiments.data.datasets import known_num_classes, open_images, stated_num_classes
from experiments.data.loading import BatchMixer, EvalBatches, TrainBatches
from experiments.errors import (
    ConfigError,
    DataError,
    SavedAndStopped,
    TrainingStopped,
)
from experiments.models.build import build_model
from experiments.training import faults
from experiments.training.distributed import Agreement, World
from experiments.training.evaluation import Evaluation, evaluate, place
from experiments.training.metrics import METRICS_FILE, TENSORBOARD_FOLDER, Recorder, mean_of_rows
from experiments.training.optim import Schedule, build_optimizer, check_optimizer
from experiments.training.run_folder import CHECKPOINT_FOLDER, RunFolder, SavedRun
from experiments.training.run_state import RunState
from experiments.training.step import Learner, train_epoch
from experiments.training.stopping import StopRequests
from tokenmixup.rules import Rules


class Run:
    """One training, in its run folder.

    Making one checks everything and reads the data; `fit` trains. A study passes the rules by
    which TokenMixup decides; by default they are the paper's.

    Raises:
        UserError: whatever of the config cannot work.
    """

    def __init__(self, config: RunConfig, world: World, rules: Rules | None = None) -> None:
        assert config.output is not None, "the reader of the config fills it in"
        self.config = config
        self.world = world
        self.folder = RunFolder(Path(config.output))
        check_optimizer(config.optimizer)
        num_classes = known_num_classes(config)
        if num_classes is not None:
            model = build_model(config, num_classes, rules)  # its mistakes need no data to be found
        with world.main_first():  # which may have to fetch them
            images = open_images(config.data, config.data.train_split)
            val_images = open_images(config.data, config.data.val_split)
        if num_classes is None:
            num_classes = stated_num_classes(config, images)
            model = build_model(config, num_classes, rules)
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
        self.state = RunState(config, world, self.learner, self.batches)
        self.total_epochs = config.schedule.total_epochs
        self._recorder: Recorder | None = None
        self._agreement = Agreement(world)
        self._evaluating = False

    def fit(
        self, requests: StopRequests | None = None, allow_changed: Collection[str] = ()
    ) -> None:
        """Train until the last epoch, from where an earlier run of this folder stopped.

        Args:
            requests: what may ask the run to save and stop.
            allow_changed: keys of the config that may differ from those of the run so far.

        Raises:
            ConfigError: the folder holds another experiment, is in use, or cannot be written.
            CheckpointError: no checkpoint of the folder is whole.
            SavedAndStopped: the run was asked to stop.
            TrainingStopped: a loss or gradient was not finite, memory or the disk was full, or a
                loader process was killed.
            DataError: images cannot be read.
        """
        self._requests = requests or StopRequests()
        with self._folder_held(), closing(self.batches), closing(self.val_batches):
            if self._prepare(allow_changed):
                return
            self._warn_of_a_long_warmup()
            self._say(self._headline())
            with self._faults_told(), self._recording():
                for epoch in range(self.state.progress.epochs_done, self.total_epochs):
                    self._run_epoch(epoch)
            self._agreement.finish()
            if self.world.is_main:
                with self._faults_told():
                    save_final_weights(self.folder.final_weights, self.learner.model)
                self._beat("finished")
            self._say(self._summary())

    @contextmanager
    def _folder_held(self) -> Iterator[None]:
        if not self.world.is_main:
            yield
            return
        with self.folder.held():
            yield

    @contextmanager
    def _recording(self) -> Iterator[None]:
        if not self.world.is_main:
            yield
            return
        tensorboard = self.config.logging.tensorboard
        with self.folder.refuse_unwritable():
            recorder = self._recorder = Recorder(self.folder.path, self.state.rows, tensorboard)
        if recorder.missing:
            self._warn(
                f"{recorder.path}: {recorder.missing} of the {self.state.rows} rows that the "
                "checkpoint counted are missing; later ones follow"
            )
        try:
            yield
        finally:
            recorder.close()

    @contextmanager
    def _faults_told(self) -> Iterator[None]:
        """Name the last good checkpoint wherever a training ends before its time."""
        try:
            yield
        except (TrainingStopped, DataError) as error:
            raise type(error)(f"{error}; {self._last_good()}") from None
        except (RuntimeError, OSError) as error:
            with faults.further_deaths_unheard():
                division, saved = self.batches.division, bool(self.folder.saved())
                told = faults.explain(error, self.config, division, self._evaluating, saved)
                if told is None:
                    raise
                raise TrainingStopped(f"{told}; {self._last_good()}") from error

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)

    def _warn(self, text: str) -> None:
        if self.world.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _warn_of_a_long_warmup(self) -> None:
        """A run shortened by its epochs alone may end within its warm-up, and learn nothing."""
        schedule = self.config.schedule
        if schedule.warmup_epochs >= schedule.epochs:
            self._warn(
                f"schedule.warmup_epochs is {schedule.warmup_epochs} and schedule.epochs "
                f"{schedule.epochs}: the learning rate does not come to schedule.lr "
                f"({schedule.lr:g}); a shorter run wants a shorter warm-up"
            )

    def _beat(self, state: str, at_once: bool = True) -> None:
        if self.world.is_main:
            epoch, step = self.state.progress.epochs_done, self.state.progress.step
            self.folder.beat(state, at_once, epochs_done=epoch, step=step)

    def _run_epoch(self, epoch: int) -> None:
        last = epoch + 1 == self.total_epochs
        evaluated = last or (epoch + 1) % self.config.logging.evaluate_every == 0
        saved = last or (epoch + 1) % self.config.checkpoint.every == 0
        self._train(epoch)
        line = self._training_line(epoch)
        if evaluated:
            if saved:
                self._save()  # a crash within the evaluation repeats that alone
            line += f"  top-1 {self._evaluate(epoch):.2f}%"
        self._say(line)
        self.state.progress.epochs_done, self.state.reports = epoch + 1, []
        if last or (saved and not evaluated):
            self._save()

    def _train(self, epoch: int) -> None:
        progress, steps = self.state.progress, self.batches.steps_per_epoch
        first = progress.step - epoch * steps
        if first == steps:
            return
        every = self.config.checkpoint.every_steps
        with tqdm(
            total=steps,
            initial=first,
            desc=f"epoch {epoch + 1}/{self.total_epochs}",
            disable=not (self.world.is_main and sys.stderr.isatty()),
            leave=False,
        ) as bar:
            for report in train_epoch(self.learner, self.batches, epoch, self.state.tally, first):
                bar.update()
                progress.step += 1
                progress.skipped_steps = self.learner.skipped
                if report is not None:
                    self._record("train", epoch, report.values)
                    self.state.reports.append(report.values)
                self._beat("training", at_once=False)
                if self._agreement.ask(self._requests.reason is not None):
                    self._save_and_stop(epoch)
                if every is not None and progress.step % every == 0:
                    self.state.tally.refuse_not_finite(self.world, progress.step, epoch)
                    self._save()

    def _evaluate(self, epoch: int) -> float:
        """Evaluate, record, keep the best; gives top-1."""
        questions = iter(range(self.val_batches.common_batches))

        def on_batch() -> None:
            self._beat("evaluating", at_once=False)
            asked = next(questions, None) is not None
            if asked and self._agreement.ask(self._requests.reason is not None):
                self._save_and_stop(epoch)

        self._evaluating = True
        result = evaluate(self.learner.model, self.val_batches, self.world, self.config, on_batch)
        self._evaluating = False
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
        self._record("validation", epoch, values)
        self._keep_best(epoch, result)
        return result.top1

    def _record(self, split: str, epoch: int, values: dict[str, float]) -> None:
        if self._recorder is not None:
            self._recorder.write(split, epoch + 1, self.state.progress.step, values)

    def _keep_best(self, epoch: int, result: Evaluation) -> None:
        progress = self.state.progress
        progress.top1 = result.top1
        if result.top1 <= progress.best_top1:
            return
        progress.best_top1, progress.best_epoch = result.top1, epoch + 1
        if self.world.is_main:
            content = {"model": self.learner.model.state_dict(), "progress": asdict(progress)}
            self.folder.save_best({**content, "config": as_plain(self.config)})

    def _save_and_stop(self, epoch: int) -> None:
        self._agreement.finish()
        self.state.tally.refuse_not_finite(self.world, self.state.progress.step, epoch)
        self._save()
        self._beat("stopped")
        reason = self._requests.reason or "another process was asked to stop"
        raise SavedAndStopped(
            f"{reason}: saved after step {self.state.progress.step} (epoch {epoch + 1}) in "
            f"{self.folder.saved()[0] if self.world.is_main else self.folder.path}; the same "
            "command goes on"
        )

    def _save(self) -> None:
        """Write the state of all processes, with the main one."""
        state = self.state.capture()
        if state is None:
            return
        assert self._recorder is not None, "the main process records"
        self._recorder.to_disk()
        state["rows"] = self._recorder.rows
        self.folder.save(self.state.progress.step, state, self.config.checkpoint.keep)
        self._beat("training")

    def _prepare(self, allow_changed: Collection[str]) -> bool:
        """Go on from the newest checkpoint or begin; gives whether there is nothing left to do."""
        saved = self._newest()
        if saved is not None:
            self.state.restore(saved, allow_changed, self._warn)
        elif allow_changed:
            raise ConfigError(
                f"command line: --allow-changed: {self.folder.path} holds no run to go on with"
            )
        elif self.config.model.weights is not None:
            self._start_from(self.config.model.weights)
        done = self.state.progress.epochs_done == self.total_epochs
        if done and self.folder.final_weights.exists():
            self._say(f"{self.folder.path}: all {self.total_epochs} epochs are done already")
            return True
        if self.world.is_main:
            self.folder.forget_final_weights()
            self.folder.save_config(yaml.safe_dump(as_plain(self.config), sort_keys=False))
        return False

    def _newest(self) -> SavedRun | None:
        """The same checkpoint in all processes: the main one chooses it."""
        found = self.folder.newest_valid(self._warn) if self.world.is_main else None
        step = self.world.from_main(-1 if found is None else found.step)
        if found is not None or step < 0:
            return found
        return self.folder.load(step)

    def _start_from(self, path: str) -> None:
        loaded = load_weights(self.learner.model, path, self.config.model.new_head)
        line = f"{self.folder.path}: starts from {path} ({loaded.kind})"
        if loaded.left_out:
            line += f"; as initialised: {', '.join(loaded.left_out)}"
        if loaded.resized:
            line += "; position embedding resized"
        self._say(line)

    def _headline(self) -> str:
        model = self.learner.model
        device = self.world.device.type
        if self.world.size > 1:
            device = f"{self.world.size} × {device}"
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        step = self.state.progress.step
        epoch = math.ceil(step / self.batches.steps_per_epoch)
        start = f", going on after step {step} (epoch {epoch})" if step else ""
        return (
            f"{self.folder.path}: {self.config.model.name}, {size:.2f} M parameters, "
            f"{self.batches.num_images} training and {self.val_batches.num_images} validation "
            f"images, {device}, {self.config.precision}{start}"
        )

    def _training_line(self, epoch: int) -> str:
        reports = self.state.reports
        means = mean_of_rows(reports)
        line = (
            f"epoch {epoch + 1:>3}/{self.total_epochs}  loss {means.get('loss', math.nan):.4f}"
            f"  lr {reports[-1]['lr']:.2e}  {means['images_per_second']:.0f} images/s"
        )
        shares = [value for name, value in means.items() if name.endswith("/mixed_share")]
        if shares:
            line += f"  mixed {100 * sum(shares) / len(shares):.0f}%"
        if self.state.progress.skipped_steps:
            line += f"  skipped steps {self.state.progress.skipped_steps}"
        return line

    def _summary(self) -> str:
        progress = self.state.progress
        return "\n".join(
            (
                f"top-1 {progress.top1:.2f}% after the last epoch, best {progress.best_top1:.2f}% "
                f"after epoch {progress.best_epoch}",
                f"weights: {self.folder.final_weights}",
                f"checkpoints: {self.folder.path / CHECKPOINT_FOLDER}",
                f"metrics: {self.folder.path / METRICS_FILE}",
                *(
                    [f"TensorBoard: tensorboard --logdir {self.folder.path / TENSORBOARD_FOLDER}"]
                    if self.config.logging.tensorboard
                    else []
                ),
            )
        )

    def _last_good(self) -> str:
        saved = self.folder.saved()
        return f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
