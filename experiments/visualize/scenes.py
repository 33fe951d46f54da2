"""A batch of images and what a model's TokenMixup did to it, ready to be drawn.

Dimensions: B batch, S side of the image in pixels.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from experiments.config.schema import RunConfig
from experiments.data.augment import BatchMixer, eval_transform, mean_and_std, normalise
from experiments.data.datasets import open_images
from experiments.data.facts import known_num_classes, readable_names, stated_num_classes
from experiments.errors import ConfigError, DataError
from experiments.training.distributed import World
from experiments.training.evaluation import Assessment, assemble
from experiments.visualize.recording import Recording, record
from tokenmixup import TokenMixupModel

_SHOWN_PIXELS = 168  # side of a large image, as many as a cell of a PNG has
_MOST_NAMES = 3  # of mixed images below one


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
    run: str
    """Name of the run, for titles."""
    about: str
    """What was run, for captions."""
    names: tuple[str, ...] | None = None
    """Of the classes."""
    tau: float | None = None
    """Greatest difficulty of an easy sample, None where every sample is mixed."""
    class_token: bool = False
    weight_notes: tuple[str, ...] = ()
    """What became of the names in the weights file, `Loaded.notes`."""

    def class_text(self, label: int) -> str:
        """Name of a class, short enough for a cell."""
        name = self.names[label] if self.names else f"class {label}"
        return name if len(name) <= 16 else name[:15] + "…"

    def label_text(self, index: int) -> str:
        """Label of an image and, where it is not the data set's, where it comes from."""
        note = self.label_notes[index]
        return self.class_text(int(self.labels[index])) + (f" ({note})" if note else "")

    def givers(self, index: int, layer: int) -> list[str]:
        """Classes of the images whose tokens an image has after HTM up to a layer, most first."""
        origin = self.recording.origin(layer)
        count = np.bincount(origin[index], minlength=len(self.labels))
        count[index] = 0
        givers = np.argsort(-count, kind="stable")[: np.count_nonzero(count)]
        names = list(dict.fromkeys(self.class_text(int(self.labels[giver])) for giver in givers))
        if len(names) > _MOST_NAMES:
            names = [*names[: _MOST_NAMES - 1], f"{len(names) - _MOST_NAMES + 1} more"]
        return names

    def mixed_text(self, index: int, layer: int) -> str:
        """The same below an image, with a line for each class that HTM mixed in up to a layer."""
        mixed = [f"+ {name}" for name in self.givers(index, layer)]
        note = [f"({self.label_notes[index]})"] if self.label_notes[index] else []
        return "\n".join([self.class_text(int(self.labels[index])), *note, *mixed])

    def lines_below(self, layer: int) -> int:
        """Lines that `mixed_text` may have beyond the first."""
        mixed = self.recording.mixed_at(layer)
        return any(self.label_notes) + min(_MOST_NAMES, 2 ** len(mixed) - 1)


def scene_of_split(config: RunConfig, checkpoint: str, world: World, run: str, count: int) -> Scene:
    """Show the model of a weights file `count` images of its validation split, evenly spread."""
    assessment = Assessment(config, checkpoint, world)
    images = assessment.images
    chosen = spread(len(images), count)
    samples = [images[index] for index in chosen]
    split = config.data.val_split
    about = f"{_some(len(chosen), len(images))} of the split {split!r}, as in evaluation"
    pictures, labels = [image for image, _ in samples], [label for _, label in samples]
    model, notes = assessment.model, assessment.loaded.notes
    return _scene(config, model, notes, pictures, labels, run, about, images.class_names)


def scene_of_folder(
    config: RunConfig, checkpoint: str, world: World, folder: Path, run: str, count: int
) -> Scene:
    """Show the model of a weights file up to `count` images of a person's own folder.

    The label of an image is the class whose name or number its folder has, otherwise the model's
    own prediction. The data set of the config may be missing: classes then have numbers only.
    """
    paths = _image_paths(folder)
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
    names = known.class_names if known is not None else None
    chosen = [paths[index] for index in spread(len(paths), count)]
    labels = [_folder_label(path.relative_to(folder), classes, names) for path in chosen]
    name = folder.resolve().name
    about = f"{_some(len(chosen), len(paths))} of {name}/, resized as in evaluation"
    pictures = [read_image(path) for path in chosen]
    return _scene(config, model, loaded.notes, pictures, labels, run, about, names, note="folder")


def spread(available: int, wanted: int) -> list[int]:
    """Indices that are evenly spread, so that a set sorted by class shows several."""
    wanted = min(available, wanted)
    return [number * available // wanted for number in range(wanted)]


def _some(shown: int, available: int) -> str:
    return f"{shown} of the {available} images" if shown < available else f"All {shown} images"


def _scene(
    config: RunConfig,
    model: TokenMixupModel,
    weight_notes: list[str],
    images: Sequence[Image.Image],
    labels: Sequence[int | None],
    run: str,
    about: str,
    names: tuple[str, ...] | None,
    note: str = "",
) -> Scene:
    """Run one training pass over a batch; images without a label get the model's prediction.

    `about` says what the images are, `names` are those of the classes, and `note` says where the
    given labels come from.
    """
    assert model.num_classes is not None, "models of a run have a classifier"
    transform = eval_transform(config.data, config.model.image_size)
    mean, std = mean_and_std(config.data)
    batch = normalise(torch.stack([transform(image) for image in images]), mean, std)
    device = next(model.parameters()).device
    known = torch.tensor([-1 if label is None else label for label in labels])
    if None in labels:
        with torch.inference_mode():
            predicted = model.eval()(batch.to(device)).argmax(1).cpu()
        known = torch.where(known < 0, predicted, known)
    # as in training, but without Mixup and CutMix, which make an image hard to recognise
    mixup = dataclasses.replace(config.mixup, prob=0.0)
    _, targets = BatchMixer(mixup, model.num_classes, config.seed)(batch, known, 0, 0, 0)
    recording = record(model, batch.to(device), targets.to(device))
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
        label_notes=tuple("predicted" if label is None else note for label in labels),
        recording=recording,
        run=run,
        about=f"{about}; dropout off.",
        names=readable_names(names) if names else None,
        tau=htm.tau if htm is not None and htm.scorenet is not None else None,
        class_token=model.layout.class_token,
        weight_notes=tuple(weight_notes),
    )


def _image_paths(folder: Path) -> list[Path]:
    """The images below a folder, in the order of their paths, without hidden ones."""
    if not folder.is_dir():
        raise DataError(f"--images: {folder} is no folder; give a folder of images")
    formats = Image.registered_extensions()
    endings = {ending for ending, name in formats.items() if name in Image.OPEN}
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in endings
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise DataError(
            f"--images: {folder} holds no images; expected files such as NAME.jpg or NAME.png"
        )
    return paths


def read_image(path: Path) -> Image.Image:
    """An image, upright, in RGB, on white where it is transparent."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            white = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    except Exception as error:  # whatever a decoder raises: name the file
        raise DataError(f"--images: cannot read {path}: {error!r}") from None


def _folder_label(path: Path, num_classes: int, names: tuple[str, ...] | None) -> int | None:
    """The class that a folder of a path names, the nearest folder first; None where none does.

    Case, spaces, hyphens and underscores are ignored.
    """
    known = [_plain(name) for name in names or ()]
    for folder in reversed(path.parent.parts):
        if _plain(folder) in known:
            return known.index(_plain(folder))
        if folder.isascii() and folder.isdigit() and int(folder) < num_classes:
            return int(folder)
    return None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")
