"""Tokens as squares of an image, and cells of a figure that show them.

Dimensions: B batch, T patch tokens, S side of the image in pixels, C classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import FigureBase

from experiments.documents.figures import EARLIER, GROUND, INK, MAP, OWN, PARTNER, REST, SOFT
from experiments.errors import ConfigError
from experiments.visualize.recording import HorizontalRecord
from experiments.visualize.scenes import Scene

_MOST_NAMED = 4  # classes of a mixed label with a bar of their own

# Functions of arrays


def token_grid(values: np.ndarray, size: int) -> np.ndarray:
    """Values of the tokens (..., T), a square grid, as squares of an image (..., S, S)."""
    tokens = values.shape[-1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(
            f"model: its {tokens} patch tokens form no square grid, so they cannot be shown as "
            "squares of the image; allowed: square patches"
        )
    along = np.arange(size) * side // size
    return values[..., along[:, None] * side + along]


def patchwork(images: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Images (B, S, S, 3) whose tokens are the patches of the samples in `origin` (B, T)."""
    rows, columns = np.indices(images.shape[1:3])
    return images[token_grid(origin, images.shape[1]), rows, columns]


def heat(image: np.ndarray, values: np.ndarray, high: float) -> np.ndarray:
    """Values of the tokens (T,), 0 to `high`, as colours over an image (S, S, 3) in grey."""
    scaled = token_grid(values, len(image)) / (high or 1.0)
    colours = matplotlib.colormaps[MAP](np.clip(scaled, 0, 1))[..., :3]
    return 0.7 * colours + (1 - 0.7) * _grey(image)


def spotlight(image: np.ndarray, chosen: np.ndarray, colour: str) -> np.ndarray:
    """An image (S, S, 3) with the chosen tokens (T,) tinted and all others faded."""
    where = token_grid(chosen, len(image))[..., None]
    faded = 0.45 * _grey(image) + 0.55 * 0.5
    return np.where(where, 0.55 * image + 0.45 * np.array(to_rgb(colour)), faded)


def outlines(chosen: np.ndarray, size: int) -> list[tuple[tuple[float, float], ...]]:
    """Line segments ((x, y), (x, y)) between chosen (T,) and other tokens, in pixels of an image.

    A pixel's centre has whole coordinates, as in matplotlib's images.
    """
    side = math.isqrt(len(chosen))
    edge = [math.ceil(k * size / side) - 0.5 for k in range(side + 1)]
    grid = np.pad(chosen.reshape(side, side), 1)
    segments: list[tuple[tuple[float, float], ...]] = []
    for row, column in np.argwhere(grid[:, 1:] != grid[:, :-1]):  # borders on the right
        segments.append(((edge[column], edge[row - 1]), (edge[column], edge[row])))
    for row, column in np.argwhere(grid[1:] != grid[:-1]):  # borders below
        segments.append(((edge[column - 1], edge[row]), (edge[column], edge[row])))
    return segments


def chosen_tokens(positions: np.ndarray, tokens: int) -> np.ndarray:
    """Positions (K,) as a mask over all tokens (T,)."""
    mask = np.zeros(tokens, dtype=bool)
    mask[positions] = True
    return mask


class Share(NamedTuple):
    """A bar of a mixed label: what some classes have of it."""

    name: str
    share: float
    colour: str


def label_shares(scene: Scene, layer: HorizontalRecord, index: int) -> list[Share]:
    """The bars of a sample's label after an HTM layer.

    The first is of its own class, the second of the partner's, further ones of the classes that
    came at earlier layers, in the order of what came, and the last of what label smoothing gave to
    all others.
    """
    target, labels = layer.targets[index], scene.labels
    givers = np.argsort(-layer.parts[index], kind="stable")[: np.count_nonzero(layer.parts[index])]
    colours = {int(labels[index]): OWN}
    if layer.mask[index].any():
        colours.setdefault(int(labels[layer.partner[index]]), PARTNER)
    for giver in givers:
        colours.setdefault(int(labels[giver]), EARLIER)
    named, many = list(colours)[:_MOST_NAMED], list(colours)[_MOST_NAMED:]
    shares = [Share(scene.class_text(one), float(target[one]), colours[one]) for one in named]
    if many:
        shares.append(Share(f"{len(many)} more, earlier", float(target[many].sum()), EARLIER))
    others = np.delete(target, list(colours))
    if others.sum() > 0.005:
        shares.append(Share(f"{len(others)} others (smoothing)", float(others.sum()), REST))
    return shares


def _grey(image: np.ndarray) -> np.ndarray:
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


def images_at(scene: Scene, layer: int) -> np.ndarray:
    """The images (B, S, S, 3) as HTM has mixed them up to a layer, its own included."""
    return patchwork(scene.images, scene.recording.origin(layer))


# Cells of a figure


def show(cell: Axes, image: np.ndarray, below: str = "") -> None:
    """An image (S, S, 3) in a thin frame, with lines of text below."""
    # no interpolation, so that an SVG keeps the pixels as they are
    cell.imshow(image, interpolation="none", vmin=0, vmax=1)
    cell.set(xticks=[], yticks=[])
    for spine in cell.spines.values():
        spine.set(visible=True, color=SOFT, linewidth=0.5)
    if below:
        cell.set_xlabel(below, fontsize=7, labelpad=2.5)


def show_chosen(cell: Axes, image: np.ndarray, chosen: np.ndarray, below: str = "") -> None:
    """An image (S, S, 3) with some of its tokens (T,) tinted and outlined, and the rest faded."""
    show(cell, spotlight(image, chosen, PARTNER), below)
    outline(cell, chosen, len(image))


def outline(cell: Axes, chosen: np.ndarray, size: int, colour: str = PARTNER) -> None:
    """A line around the chosen tokens (T,) of an image of S pixels."""
    for ink, width in ((GROUND, 2.2), (colour, 1.1)):  # readable on any image
        lines = LineCollection(outlines(chosen, size), colors=ink, linewidths=width)
        lines.set(capstyle="projecting", clip_on=False)
        cell.add_collection(lines)
    cell.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


def show_shares(cell: Axes, shares: Sequence[Share]) -> None:
    """Bars of a mixed label, per cent."""
    for row, (name, share, colour) in enumerate(shares):
        cell.barh(row, 100 * share, color=colour, height=0.4)
        cell.text(2, row - 0.22, name, fontsize=7, va="bottom", ha="left", color=INK)
        cell.text(100 * share + 2, row, f"{100 * share:.0f}%", fontsize=7, va="center", color=INK)
    low = max(2.4, len(shares) - 0.6)
    cell.set(xlim=(0, 122), ylim=(low, -0.75), xticks=[0, 50, 100], yticks=[])
    cell.spines["left"].set_color(SOFT)


def empty(cell: Axes, text: str) -> None:
    """A cell with a text in place of an image."""
    cell.axis("off")
    cell.text(0.5, 0.5, text, ha="center", va="center", fontsize=7.5, color=SOFT)
    cell.set_box_aspect(1)


def colour_scale(
    panel: FigureBase, below: list[Axes], high: float, text: str, shrink: float, pad: float
) -> None:
    """The scale of `heat` below some cells, from 0 to `high`."""
    bar = panel.colorbar(
        ScalarMappable(Normalize(0, high), MAP),
        ax=below,
        location="bottom",
        shrink=shrink,
        aspect=40,
        pad=pad,
    )
    bar.set_label(text, fontsize=7.5)
    bar.outline.set_visible(False)
