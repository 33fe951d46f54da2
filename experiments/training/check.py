"""What `--check` does: all that comes before the first step, without a fetch or a written file."""

import os
import sys
from pathlib import Path

from experiments.checkpoint import load_weights
from experiments.config.schema import RunConfig
from experiments.data.datasets import to_be_fetched
from experiments.data.facts import known_num_classes
from experiments.data.loading import divide_batch
from experiments.models.build import build_model
from experiments.training.distributed import ONE_PROCESS, choose_device
from experiments.training.evaluation import Assessment, refuse_tf32_without_gpu
from experiments.training.folder import RunFolder
from experiments.training.optim import build_optimizer, check_optimizer
from experiments.training.run import Run, model_to_train
from experiments.training.step import refuse_graphs_without_gpu


def check_training(config: RunConfig, allow_changed: list[str]) -> None:
    """Build a training and read what it begins with, on the CPU.

    Raises:
        UserError: any setting or file that cannot work.
    """
    assert config.output is not None, "the reader of the config fills it in"
    choose_device(config.device)
    refuse_graphs_without_gpu(config)
    refuse_tf32_without_gpu(config)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    divide_batch(config.data, 0, size, config.mixup.active)
    folder = RunFolder(Path(config.output))
    folder.refuse_unwritable_place()
    if not to_be_fetched(config.data, (config.data.train_split, config.data.val_split)):
        Run(config, ONE_PROCESS).check(allow_changed)
        return
    check_optimizer(config.optimizer)
    num_classes = known_num_classes(config) or config.model.num_classes
    if num_classes is not None:
        model = model_to_train(config, num_classes)
        build_optimizer(config.optimizer, config.schedule, model)
        if config.model.weights is not None and not folder.saved():
            load_weights(model, config.model.weights, config.model.new_head)
    _say_unchecked(config, num_classes)


def check_evaluation(config: RunConfig, checkpoint: str, needs_data: bool = True) -> None:
    """Build an evaluation and load its weights, on the CPU; the data set is opened if it is needed.

    Raises:
        UserError: any setting or file that cannot work.
    """
    choose_device(config.device)
    refuse_tf32_without_gpu(config)
    if needs_data and not to_be_fetched(config.data, (config.data.val_split,)):
        Assessment(config, checkpoint, ONE_PROCESS)
        return
    num_classes = known_num_classes(config) or config.model.num_classes
    if num_classes is not None:
        load_weights(build_model(config, num_classes), checkpoint)
    _say_unchecked(config, num_classes)


def _say_unchecked(config: RunConfig, num_classes: int | None) -> None:
    model = " and the model, whose classes it counts" if num_classes is None else ""
    print(
        f"not checked: the data set {config.data.dataset}{model}; opening it may fetch it into "
        f"{config.data.root}",
        file=sys.stderr,
    )
