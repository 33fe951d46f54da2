"""Pictures of what TokenMixup did to images.

Dimensions: B batch, T patch tokens, C classes, K kappa.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from experiments.assessment import Assessment
from experiments.config_file import load_config
from experiments.data import eval_transform, normalisation
from experiments.datasets import open_images
from experiments.distributed import ONE_PROCESS
from experiments.errors import DataError
from experiments.files import atomic_file
from experiments.recording import HorizontalRecord, Recording, VerticalRecord, record
from experiments.run_folder import CONFIG_FILE, FINAL_WEIGHTS

matplotlib.use("Agg")  # files only: no window, no display

from matplotlib import pyplot as plt
from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, which stay apart for colour-blind readers
_OWN, _PARTNER, _OTHER = "#0072B2", "#E69F00", "#999999"
_SALIENCY_MAP = "cividis"
_CELL_INCHES = 1.6
_COLUMNS = 6


@dataclass(frozen=True)
class Scene:
    """A batch of images, and what a model's TokenMixup did to it in one training pass."""

    images: np.ndarray
    """(B, H, W, 3), 0 to 1."""
    labels: np.ndarray
    """(B,)."""
    recording: Recording
    num_classes: int
    run: str


def make_scene(assessment: Assessment, name: str, batch_size: int = 64) -> Scene:
    """Show a trained model the first validation images of its run, in training mode.

    Args:
        assessment: a model with its weights.
        name: of the run, for titles.
        batch_size: images that HTM may pair.
    """
    config = assessment.config
    images = open_images(config.data, config.data.val_split)
    transform = eval_transform(config.data, config.model.image_size)
    samples = [images[index] for index in range(min(batch_size, len(images)))]
    batch = torch.stack([transform(image) for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    num_classes = assessment.model.num_classes
    assert num_classes is not None, "models of a run have a classifier"
    targets = torch.nn.functional.one_hot(labels, num_classes).float()
    model = assessment.model
    recording = record(model, batch, targets)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(config.data))
    shown = (batch * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return Scene(shown, labels.numpy(), recording, num_classes, name)


def draw_runs(path: Path, folders: list[Path]) -> Path | None:
    """Draw the first run with HTM and the first with VTM; none where no run has either."""
    configs = {folder: load_config(folder / CONFIG_FILE) for folder in folders}
    wanted = [
        next((f for f, config in configs.items() if config.horizontal is not None), None),
        next((f for f, config in configs.items() if config.vertical is not None), None),
    ]
    scenes = [
        make_scene(
            Assessment(configs[folder], str(folder / FINAL_WEIGHTS), ONE_PROCESS),
            folder.resolve().name,
        )
        for folder in dict.fromkeys(wanted)
        if folder is not None
    ]
    if not scenes:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path, scenes)
    return path


def draw(path: Path, scenes: list[Scene], samples: int = 4) -> None:
    """Draw one PNG: HTM of the first scene that has it, VTM of the first that has it.

    Args:
        path: of the PNG; written whole or not at all.
        scenes: of the runs that are compared.
        samples: images that HTM is shown on.

    Raises:
        DataError: no scene has HTM or VTM.
    """
    horizontal = next((scene for scene in scenes if scene.recording.horizontal), None)
    vertical = next((scene for scene in scenes if scene.recording.vertical), None)
    parts = []
    if horizontal is not None:
        rows = min(samples, len(horizontal.images))
        parts.append((_draw_horizontal, horizontal, rows))
    if vertical is not None:
        rows = 1 + len(vertical.recording.vertical)
        parts.append((_draw_vertical, vertical, rows))
    if not parts:
        raise DataError("there is nothing to draw: none of the runs has HTM or VTM")
    heights = [_CELL_INCHES * rows + 0.7 for _, _, rows in parts]
    figure = plt.figure(figsize=(_CELL_INCHES * _COLUMNS, sum(heights)), layout="constrained")
    try:
        panels = figure.subfigures(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (part, scene, rows) in zip(panels, parts, strict=True):
            part(panel, scene, rows)
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    finally:
        plt.close(figure)


def mix_patches(images: np.ndarray, partner: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tokens shown as image patches: each masked one is the partner's at the same position.

    Args:
        images: (B, H, W, 3).
        partner: (B,).
        mask: (B, T) bool.
    """
    pixels = token_grid(mask, images.shape[1])[..., None]
    return np.where(pixels, images[partner], images)


def token_grid(values: np.ndarray, size: int) -> np.ndarray:
    """Values of the tokens (..., T) as squares of an image (..., size, size)."""
    side = math.isqrt(values.shape[-1])
    assert side * side == values.shape[-1], "the patch tokens form a square grid"
    squares = values.reshape(*values.shape[:-1], side, side)
    index = np.arange(size) * side // size
    return squares[..., index[:, None], index]


def _draw_horizontal(panel: SubFigure, scene: Scene, rows: int) -> None:
    layer = scene.recording.horizontal[0]
    chosen = _most_mixed(layer, scene.labels, rows)
    saliency, mask = _array(layer.saliency), _array(layer.mask)
    partner, targets = _array(layer.partner), _array(layer.targets)
    mixed = mix_patches(scene.images, partner, mask)
    share = 100 * float(layer.easy.float().mean())
    panel.suptitle(
        f"Horizontal TokenMixup at layer {layer.layer} ({scene.run}); "
        f"{share:.0f}% of this batch is easy",
        fontsize=10,
    )
    axes = panel.subplots(rows, _COLUMNS, squeeze=False)
    for row, index in enumerate(chosen):
        other, size = partner[index], scene.images.shape[1]
        cells = axes[row]
        _image(cells[0], scene.images[index], f"class {scene.labels[index]}")
        _image(cells[1], scene.images[index], "")
        heat = cells[1].imshow(
            token_grid(saliency[index], size), cmap=_SALIENCY_MAP, alpha=0.65, vmin=0
        )
        bar = panel.colorbar(heat, ax=cells[1], shrink=0.8)
        bar.ax.tick_params(labelsize=6)
        _image(cells[2], scene.images[other], f"class {scene.labels[other]}")
        _image(cells[3], scene.images[index], f"{int(mask[index].sum())} of {mask.shape[1]} tokens")
        _shade(cells[3], token_grid(mask[index], size), _PARTNER, 0.7)
        _image(cells[4], mixed[index], "")
        _shares(cells[5], targets[index], int(scene.labels[index]), int(scene.labels[other]))
    for cell, title in zip(
        axes[0],
        (
            "image",
            "saliency (share\nof attention)",
            "partner",
            "tokens taken\nfrom partner",
            "mixed",
            "mixed label",
        ),
        strict=True,
    ):
        cell.set_title(title, fontsize=9)


def _draw_vertical(panel: SubFigure, scene: Scene, rows: int) -> None:
    layers = scene.recording.vertical
    chosen = _spread_over_classes(scene.labels, _COLUMNS)
    kappa = layers[0].positions.shape[1]
    panel.suptitle(
        f"Vertical TokenMixup ({scene.run}): the {kappa} tokens (orange) of each lower layer "
        "that the VTM layer also attends to",
        fontsize=10,
    )
    axes = panel.subplots(rows, len(chosen), squeeze=False)
    axes[0, 0].set_ylabel("image", fontsize=9)
    for column, index in enumerate(chosen):
        _image(axes[0, column], scene.images[index], f"class {scene.labels[index]}")
        for row, layer in enumerate(layers, start=1):
            cell = axes[row, column]
            _image(cell, scene.images[index], "")
            tokens = np.zeros(layer.saliency.shape[1], dtype=bool)
            tokens[_array(layer.positions)[index]] = True
            _shade(cell, token_grid(tokens, scene.images.shape[1]), _PARTNER, 0.6)
            if column == 0:
                cell.set_ylabel(f"layer {layer.layer}", fontsize=9)


def _image(cell: Any, image: np.ndarray, label: str) -> None:
    cell.imshow(image, interpolation="nearest")
    cell.set_xticks([])
    cell.set_yticks([])
    cell.set_xlabel(label, fontsize=8)


def _shade(cell: Any, where: np.ndarray, colour: str, alpha: float) -> None:
    layer = np.zeros((*where.shape, 4))
    layer[where] = matplotlib.colors.to_rgba(colour, alpha)
    cell.imshow(layer, interpolation="nearest")


def _shares(cell: Any, target: np.ndarray, own: int, other: int) -> None:
    """Bars of the shares of the two classes, and of the rest where there is any."""
    bars = [(f"class {own}", float(target[own]), _OWN)]
    if other != own:
        bars.append((f"class {other}", float(target[other]), _PARTNER))
    rest = float(target.sum()) - sum(value for _, value, _ in bars)
    if rest > 0.005:
        bars.append(("others", rest, _OTHER))
    names, values, colours = zip(*bars, strict=True)
    drawn = cell.barh(range(len(bars)), values, color=colours)
    cell.bar_label(drawn, [f"{value:.2f}" for value in values], fontsize=8, padding=2)
    cell.set_yticks(range(len(bars)), names, fontsize=8)
    cell.set_xlim(0, 1.35)
    cell.set_xticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=7)
    cell.set_ylim(len(bars) - 0.4, -0.6)
    cell.set_xlabel("share", fontsize=8)
    for side in ("top", "right"):
        cell.spines[side].set_visible(False)


def _most_mixed(layer: HorizontalRecord, labels: np.ndarray, count: int) -> list[int]:
    """Samples that took most tokens from a partner, of different classes as far as there are."""
    order = torch.argsort(layer.mask.sum(1), descending=True, stable=True).tolist()
    first = [i for n, i in enumerate(order) if labels[i] not in labels[order[:n]]]
    return (first + [index for index in order if index not in first])[:count]


def _spread_over_classes(labels: np.ndarray, count: int) -> list[int]:
    """The first image of each class, then further images."""
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    rest = [index for index in range(len(labels)) if index not in first]
    return (first + rest)[:count]


def _array(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


__all__ = ["Figure", "Scene", "VerticalRecord", "draw", "make_scene", "mix_patches", "token_grid"]
