"""Pieces that several figures are made of: an image in a cell, outlines, bars of a label.

Dimensions: T patch tokens, S side of the image in pixels, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from experiments.documents.figures import GROUND, INK, OWN, PARTNER, REST, SOFT
from experiments.visualize.scenes import Scene
from experiments.visualize.tokens import outlines, spotlight


def show(cell: Axes, image: np.ndarray, below: str = "") -> None:
    """An image (S, S, 3) in a thin frame, with a line of text below."""
    # its own pixels, which an SVG keeps as they are
    cell.imshow(image, interpolation="none", vmin=0, vmax=1)
    frame(cell, below)


def frame(cell: Axes, below: str = "") -> None:
    """Nothing but a thin frame, and a line of text below."""
    cell.set_xticks([])
    cell.set_yticks([])
    for spine in cell.spines.values():
        spine.set(visible=True, color=SOFT, linewidth=0.5)
    if below:
        cell.set_xlabel(below, fontsize=7.5, labelpad=2.5)


def empty(cell: Axes, text: str) -> None:
    """A cell that has nothing to show, and says why."""
    cell.axis("off")
    cell.text(0.5, 0.5, text, ha="center", va="center", fontsize=7.5, color=SOFT)
    cell.set_box_aspect(1)


def show_chosen(
    cell: Axes, image: np.ndarray, chosen: np.ndarray, colour: str, below: str = ""
) -> None:
    """An image (S, S, 3) with some of its tokens (T,) in a colour, outlined, and the rest faded."""
    show(cell, spotlight(image, chosen, colour), below)
    outline(cell, chosen, len(image), colour)


def outline(cell: Axes, chosen: np.ndarray, size: int, colour: str) -> None:
    """A line around the chosen tokens (T,) of an image of S pixels."""
    for ink, width in ((GROUND, 2.2), (colour, 1.1)):  # readable on any image
        lines = LineCollection(outlines(chosen, size), colors=ink, linewidths=width)
        lines.set(capstyle="projecting", clip_on=False)
        cell.add_collection(lines)
    cell.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))


def label_shares(target: np.ndarray, own: int, other: int) -> list[tuple[int | None, float]]:
    """Share of the own class, of the partner's where it is another, and of all others (None)."""
    shares: list[tuple[int | None, float]] = [(own, float(target[own]))]
    if other != own:
        shares.append((other, float(target[other])))
    rest = float(target.sum()) - sum(value for _, value in shares)
    if rest > 0.005:
        shares.append((None, rest))
    return shares


def show_shares(cell: Axes, scene: Scene, target: np.ndarray, own: int, other: int) -> Any:
    """Bars of a mixed label (C,) in per cent; gives the bars."""
    shares = label_shares(target, own, other)
    colours = {own: OWN, other: OWN if other == own else PARTNER, None: REST}
    names = [_name(scene, label, len(shares)) for label, _ in shares]
    values = [100 * value for _, value in shares]
    bars = cell.barh(
        range(len(shares)), values, color=[colours[label] for label, _ in shares], height=0.4
    )
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        cell.text(2, row - 0.22, name, fontsize=7, va="bottom", ha="left", color=INK)
        cell.text(value + 2, row, f"{value:.0f}%", fontsize=7, va="center", color=INK)
    cell.set(xlim=(0, 122), ylim=(2.4, -0.75), yticks=[])
    cell.set_xticks([0, 50, 100])
    cell.spines["left"].set_color(SOFT)
    return bars


def _name(scene: Scene, label: int | None, shown: int) -> str:
    if label is not None:
        return scene.class_text(label)
    others = scene.num_classes - shown + 1
    return f"{others} others (smoothing)"


def head(cells: Sequence[Axes], titles: Sequence[str]) -> None:
    """Titles above a row of cells."""
    for cell, text in zip(cells, titles, strict=True):
        # a fixed height, so that one line and two stand on the same base
        cell.set_title(text, fontsize=8, fontweight="bold", linespacing=1.25, pad=5, y=1.0)
