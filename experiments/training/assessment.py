"""Weights of any file in the model of a config, evaluated on its validation split."""

from collections.abc import Iterable

import torch

from experiments.checkpoint import Loaded, load_weights
from experiments.config import RunConfig
from experiments.data.datasets import known_num_classes, open_images, stated_num_classes
from experiments.data.loading import Batch, EvalBatches
from experiments.models.build import build_model
from experiments.training.distributed import World
from experiments.training.step import Evaluation, evaluate, place
from tokenmixup import TokenMixupModel


def assemble(
    config: RunConfig, checkpoint: str, num_classes: int, device: torch.device
) -> tuple[TokenMixupModel, Loaded]:
    """The model of a config with the weights of a file, on a device."""
    model = build_model(config, num_classes)
    loaded = load_weights(model, checkpoint)
    return place(model, device, config), loaded


class Assessment:
    """Weights from a file in the model of a config, ready to be evaluated.

    Raises:
        UserError: whatever of the config or of the file cannot work.
    """

    def __init__(self, config: RunConfig, checkpoint: str, world: World) -> None:
        self.config = config
        self.world = world
        num_classes = known_num_classes(config)
        parts = None
        if num_classes is not None:  # mistakes in the file need no data to be found
            parts = assemble(config, checkpoint, num_classes, world.device)
        with world.main_first():  # which may have to fetch it
            self.images = open_images(config.data, config.data.val_split)
        if num_classes is None:
            num_classes = stated_num_classes(config, self.images)
        self.model, self.loaded = parts or assemble(config, checkpoint, num_classes, world.device)
        pin_memory = world.device.type == "cuda"
        self.batches = EvalBatches(
            config, self.images, num_classes, pin_memory, world.rank, world.size
        )

    def evaluate(self, batches: Iterable[Batch] | None = None) -> Evaluation:
        """Top-1, top-5 and loss over the whole validation split; once.

        Args:
            batches: `self.batches` as someone watches them go by.
        """
        watched = self.batches if batches is None else batches
        try:
            return evaluate(self.model, watched, self.world, self.config)
        finally:
            self.batches.close()
