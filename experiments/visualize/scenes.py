"""A batch of images and what a model's TokenMixup did to it, ready to be drawn.

Dimensions: B batch, S side of the image in pixels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.config import RunConfig
from experiments.data.augment import BatchMixer, eval_transform, normalisation
from experiments.data.datasets import (
    class_names,
    known_num_classes,
    open_images,
    readable_names,
    stated_num_classes,
)
from experiments.errors import ConfigError, DataError
from experiments.training.distributed import World
from experiments.training.evaluation import Assessment, assemble
from experiments.visualize.own_images import OwnImages
from experiments.visualize.recording import Recording, record
from tokenmixup import TokenMixupModel

_SHOWN_PIXELS = 168  # side of a large image, as many as a cell of a PNG has
PREDICTED, FROM_FOLDER = "predicted", "folder"


@dataclass(frozen=True)
class Scene:
    """What the figures of one model and one batch are made of."""

    images: np.ndarray
    """(B, S, S, 3), 0 to 1, perhaps smaller than the model saw them."""
    labels: np.ndarray
    """(B,)."""
    label_notes: tuple[str, ...]
    """Where each label comes from, "" for the data set's own."""
    recording: Recording
    num_classes: int
    run: str
    """Name of the run, for titles."""
    about: str
    """What was run, for captions."""
    names: tuple[str, ...] | None = None
    """Of the classes."""
    tau: float | None = None
    """Greatest difficulty of an easy sample, None where every sample is mixed."""
    class_token: bool = False
    left_out: tuple[str, ...] = ()
    """Parameters that the file of weights had nothing for."""

    def class_text(self, label: int) -> str:
        """Name of a class, short enough for a cell."""
        name = self.names[label] if self.names else f"class {label}"
        return name if len(name) <= 16 else name[:15] + "…"

    def label_text(self, index: int) -> str:
        """Label of an image and, where it is not the data set's, where it comes from."""
        note = self.label_notes[index]
        return self.class_text(int(self.labels[index])) + (f" ({note})" if note else "")


def scene_of_split(assessment: Assessment, run: str, count: int) -> Scene:
    """Show a model images of its validation split, evenly spread over it.

    Args:
        assessment: a model with its weights.
        run: name of the run.
        count: images, which form one batch.
    """
    images = assessment.images
    chosen = spread(len(images), count)
    samples = [images[index] for index in chosen]
    split = assessment.config.data.val_split
    about = f"{_some(len(chosen), len(images))} of the split {split!r}, as in evaluation"
    model, labels = assessment.model, [label for _, label in samples]
    assert model.num_classes is not None, "models of a run have a classifier"
    names = class_names(images)
    pictures = [image for image, _ in samples]
    scene = make_scene(assessment.config, model, pictures, labels, run, about, names)
    return dataclasses.replace(scene, left_out=assessment.loaded.left_out)


def scene_of_weights(
    config: RunConfig, checkpoint: str, world: World, run: str, count: int
) -> Scene:
    """`scene_of_split` for a file of weights."""
    return scene_of_split(Assessment(config, checkpoint, world), run, count)


def scene_of_folder(
    config: RunConfig, checkpoint: str, world: World, folder: Path, run: str, count: int
) -> Scene:
    """Show a model a person's own images.

    The label of an image is that of its folder where the folder has the name or the number of a
    class, otherwise what the model itself predicts. The data set of the config may be missing: then
    classes have numbers alone.

    Raises:
        DataError: the folder is missing or empty, or an image cannot be read.
        ConfigError: neither the config nor the data set tells the number of classes.
    """
    images = OwnImages(folder)
    try:
        present = dataclasses.replace(config.data, download=False)
        known = open_images(present, config.data.val_split)
    except DataError:
        known = None
    classes = known_num_classes(config) or config.model.num_classes
    if classes is None and known is not None:
        classes = stated_num_classes(config, known)
    if classes is None:
        raise ConfigError(
            f"model.num_classes: got null, and the data set {config.data.dataset!r} is not there "
            "to be counted; set it to the number of classes that the weights were trained on"
        )
    model, loaded = assemble(config, checkpoint, classes, world.device)
    names = class_names(known) if known is not None else None
    chosen = spread(len(images), count)
    pictures = [images.read(index) for index in chosen]
    labels = [images.label(index, classes, names) for index in chosen]
    name = folder.resolve().name
    about = f"{_some(len(chosen), len(images))} of {name}/, resized as in evaluation"
    scene = make_scene(config, model, pictures, labels, run, about, names, FROM_FOLDER)
    return dataclasses.replace(scene, left_out=loaded.left_out)


def make_scene(
    config: RunConfig,
    model: TokenMixupModel,
    images: Sequence[Any],
    labels: Sequence[int | None],
    run: str,
    about: str,
    names: tuple[str, ...] | None,
    note: str = "",
) -> Scene:
    """Run one training pass over PIL images; those without a label get the model's prediction.

    Args:
        config: of the run.
        model: with its weights, on its device.
        images: one batch.
        labels: of each image, or None.
        run: name of the run.
        about: what the images are.
        names: of the classes, where they are known.
        note: what to say of a label that is given.
    """
    transform = eval_transform(config.data, config.model.image_size)
    batch = torch.stack([transform(image) for image in images])
    device = next(model.parameters()).device
    own = all(label is not None for label in labels)
    notes = tuple(PREDICTED if label is None else note for label in labels)
    known = torch.tensor([-1 if label is None else label for label in labels])
    if not own:
        known = torch.where(known < 0, _predict(model, batch.to(device)).cpu(), known)
    assert model.num_classes is not None
    # as in training, but for Mixup and CutMix, after which an image is hard to recognise
    mixup = dataclasses.replace(config.mixup, prob=0.0)
    _, targets = BatchMixer(mixup, model.num_classes, config.seed)(batch, known, 0, 0, 0)
    recording = record(model, batch.to(device), targets.to(device))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(config.data))
    shown = batch * std + mean
    if shown.shape[-1] > _SHOWN_PIXELS:
        size = (_SHOWN_PIXELS, _SHOWN_PIXELS)
        shown = torch.nn.functional.interpolate(shown, size, mode="bilinear", antialias=True)
    if config.mixup.label_smoothing:
        about += f"; labels smoothed by {config.mixup.label_smoothing:g}, as in training"
    htm = config.horizontal
    return Scene(
        images=shown.clamp(0, 1).permute(0, 2, 3, 1).numpy(),
        labels=known.numpy(),
        label_notes=notes,
        recording=recording,
        num_classes=model.num_classes,
        run=run,
        about=f"{about}; dropout off.",
        names=readable_names(names) if names else None,
        tau=htm.tau if htm is not None and htm.scorenet is not None else None,
        class_token=model.layout.class_token,
    )


def spread(available: int, wanted: int) -> list[int]:
    """Indices that are evenly spread, so that a set sorted by class shows several."""
    wanted = min(available, wanted)
    return [number * available // wanted for number in range(wanted)]


def _some(shown: int, available: int) -> str:
    return f"{shown} of the {available} images" if shown < available else f"All {shown} images"


def _predict(model: TokenMixupModel, batch: Tensor) -> Tensor:
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        predicted = model(batch).argmax(1)
    model.train(was_training)
    return predicted
